"""The entry ``tasks`` of a pruned model's report: answers that these weights gave, beside another model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fasp_lightning.checkpoints.publishing.record import add_to_report, mark_of, without_paths
from fasp_lightning.checkpoints.tasks.answers import (
    Answers,
    Figure,
    Measured,
    accuracies,
    differences,
    from_dict,
    to_dict,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entry = dict[str, Any]


class TaskRow(NamedTuple):
    """What is known of one task, or of a mean over tasks.

    Attributes:
        name: The task, or which mean.
        metric: What says that an answer is right; empty for a mean.
        questions: How many; ``None`` for a mean.
        accuracy: Of the model.
        theirs: Of the other model; ``None`` without one.
        apart: The model's − the other one's, on the same questions.
    """

    name: str
    metric: str
    questions: int | None
    accuracy: Figure
    theirs: Figure | None
    apart: Figure | None


class TaskFacts(NamedTuple):
    """Accuracies that were measured together.

    Attributes:
        questions: Task → what stands for its questions.
        dtype: What the model computed in.
        against: Name of the other model; ``None`` without one.
        rows: The tasks, and last the means over them.
    """

    questions: dict[str, str]
    dtype: str
    against: str | None
    rows: tuple[TaskRow, ...]


def entry_of(model: PreTrainedModel, answers: dict[str, Answers], against: Measured | None) -> Entry:
    """What a report keeps of a model that has just been measured; no path of this machine.

    Args:
        model: The model.
        answers: What it answered.
        against: Another model's answers to the same questions.
    """
    entry: Entry = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": mark_of(model),
        "answers": to_dict(answers),
    }
    if against is None:
        return entry
    return entry | {"against": without_paths(against._asdict() | {"answers": to_dict(against.answers)})}


def record_tasks(folder: str | Path, entry: Entry) -> bool:
    """Add answers to the report in a pruned folder, whose model gave them.

    They replace earlier ones to the same questions; where they come without another model's, that of the earlier stays.

    Args:
        folder: The folder.
        entry: See :func:`entry_of`.

    Returns:
        Whether it was written, see :func:`~fasp_lightning.checkpoints.publishing.record.add_to_report`.

    Raises:
        FaspError: If the report is damaged.
    """
    asked = questions_of(entry)

    def added(entries: list[Entry]) -> list[Entry]:
        same = [old for old in entries if questions_of(old) == asked]
        compared = [old["against"] for old in same if "against" in old]
        new = ({"against": compared[-1]} if compared else {}) | entry
        gone = [old for old in same if _other(old) in (None, _other(new))]
        return [*(old for old in entries if old not in gone), new]

    return add_to_report(folder, "tasks", added)


def questions_of(entry: Entry) -> dict[str, Any]:
    """Task → what stands for its questions; none in an entry that is damaged."""
    answers = entry.get("answers")
    found = answers.items() if isinstance(answers, dict) else ()
    return {task: given.get("questions") for task, given in found if isinstance(given, dict)}


def facts_in_entry(entry: Entry) -> TaskFacts:
    """An entry as figures.

    Raises:
        AttributeError: If it is damaged.
        FaspError: Likewise.
        KeyError: Likewise.
        TypeError: Likewise.
        ValueError: Likewise.
    """
    answers, other = from_dict(entry["answers"]), entry.get("against")
    theirs = {} if other is None else from_dict(other["answers"])
    apart = {} if other is None else differences(answers, theirs)
    their_figures = accuracies({task: theirs[task] for task in answers if task in theirs})
    rows = (
        TaskRow(
            name,
            answers[name].metric if name in answers else "",
            len(answers[name].correct) if name in answers else None,
            figure,
            their_figures.get(name),
            apart.get(name),
        )
        for name, figure in accuracies(answers).items()
    )
    against = None if other is None else str(other["model"])
    return TaskFacts(questions_of(entry), str(entry["dtype"]), against, tuple(rows))


def _other(entry: Entry) -> str | None:
    """Name of the model that it is compared with."""
    against = entry.get("against")
    return against.get("model") if isinstance(against, dict) else None
