"""``fasp evaluate``: perplexity of any model, and tasks of the evaluation harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.checkpoints.devices import choose_device
from fasp_lightning.checkpoints.loading import model_shapes
from fasp_lightning.checkpoints.source import ModelSource, resolve_source
from fasp_lightning.checkpoints.tasks.answers import (
    Measured,
    accuracies,
    differences,
    read_measured,
    require_same,
    to_dict,
)
from fasp_lightning.checkpoints.tasks.entries import entry_of, record_tasks
from fasp_lightning.cli.checks import check_output_file, tokenizer_of
from fasp_lightning.cli.console import dtype_name, note, shown_warnings, table, tracked
from fasp_lightning.cli.jobs import EvaluateJob
from fasp_lightning.cli.model_setup import config_of, load
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.cli.tasks.harness import TaskFigures, find_tasks, run_tasks
from fasp_lightning.cli.tasks.tables import task_table
from fasp_lightning.cli.texts import Text, begins_with, load_text
from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity
from fasp_lightning.staging import write_beside
from fasp_lightning.text.config import for_role

JOB = EvaluateJob


class _Outcome(NamedTuple):
    """What was measured of a model.

    Attributes:
        name: The model's name.
        model: The model.
        texts: The texts.
        perplexities: Name of a text → its perplexity.
        tasks: What the model reaches in tasks.
        against: Another model's answers to their questions.
    """

    name: str
    model: Any
    texts: list[Text]
    perplexities: dict[str, PerplexityResult]
    tasks: TaskFigures
    against: Measured | None

    @property
    def dtype(self) -> str:
        """What the model computed in."""
        return dtype_name(self.model.dtype)


def run(job: EvaluateJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    check_output_file(job.output_file)
    against = None if job.against is None else read_measured(job.against)
    wanted = find_tasks(job)
    if wanted is not None and against is not None:
        require_same(wanted.questions, against.answers)
    device, config, source = choose_device(job.device), config_of(job.model), resolve_source(job.model.name_or_path)
    shapes = model_shapes(source, config, job.model.trust_remote_code)
    tokenizer = tokenizer_of(job.model)
    texts = [load_text(for_role(text, "test"), tokenizer, shapes, "evaluation") for text in job.evaluation]
    if begin := begins_with(texts):
        note(begin)
    note(f"loading {job.model.name_or_path}")
    with shown_warnings():
        model = load(job.model, config, job.dtype, device)
        perplexities = {
            text.name: measure_perplexity(model, tracked(text.batches, f"perplexity: {text.name}")) for text in texts
        }
        tasks = run_tasks(model, tokenizer, wanted)
    outcome = _Outcome(job.model.name_or_path, model, texts, perplexities, tasks, against)
    _print(outcome)
    if job.output_file is not None:
        _write(outcome, Path(job.output_file))
    _record(outcome, source)
    return 0


def _print(outcome: _Outcome) -> None:
    name, against = f"{outcome.name}, {outcome.dtype} on {outcome.model.device}", outcome.against
    if outcome.perplexities:
        table(f"perplexity of {name}", *_perplexities(outcome))
    if outcome.tasks.results:
        table(f"tasks, {name}", *task_table(outcome.tasks, against))
    if against is not None and against.dtype != outcome.dtype:
        note(f"{against.model} was measured in {against.dtype}, which alone changes some answers")


def _perplexities(outcome: _Outcome) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows; what sequences begin with is among them where that is not the text."""
    rows = [
        (text, f"{r.perplexity:.3f}", f"{r.tokens:,}", str(r.seq_len), f"{r.tokens_per_second:,.0f}")
        for text, r in outcome.perplexities.items()
    ]
    columns = ("text", "perplexity", "predicted tokens", "seq_len", "tokens/s")
    begins = {text.name: text.bos for text in outcome.texts if text.bos is not None}
    if not begins:
        return columns, list(rows)
    return (*columns, "begins with"), [(*row, begins.get(row[0], "the text")) for row in rows]


def _write(outcome: _Outcome, path: Path) -> None:
    answers, against = outcome.tasks.answers, outcome.against
    figures = {
        "model": outcome.name,
        "dtype": outcome.dtype,
        "device": str(outcome.model.device),
        "perplexity": {
            text.name: {**outcome.perplexities[text.name].to_dict(), **({} if text.bos is None else {"bos": text.bos})}
            for text in outcome.texts
        },
        "tasks": [result._asdict() for result in outcome.tasks.results],
        "accuracy": {name: figure._asdict() for name, figure in accuracies(answers).items()},
        "answers": to_dict(answers),
    }
    if against is not None:
        apart = differences(answers, against.answers)
        figures["against"] = {
            "model": against.model,
            "dtype": against.dtype,
            "difference": {name: figure._asdict() for name, figure in apart.items()},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, (json.dumps(figures, indent=1) + "\n").encode())
    note(f"wrote {path}")


def _record(outcome: _Outcome, source: ModelSource) -> None:
    """Keep answers in the report of the folder whose weights gave them; a .gguf file has none."""
    if not (outcome.tasks.answers and source.local and source.gguf_file is None):
        return
    entry = entry_of(outcome.model, outcome.tasks.answers, outcome.against)
    if record_tasks(source.location, entry):
        note(f"recorded in {source.location}")
