"""Tasks of lm-evaluation-harness, if it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from fasp_lightning.cli.jobs import EvaluateJob
from fasp_lightning.errors import FaspError, as_refusal, one_line

SHOWN = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity", "f1", "bleu")


class TaskResult(NamedTuple):
    """One figure of one task.

    Attributes:
        task: Its name.
        metric: Name of the figure.
        value: The figure.
        error: Its standard error; NaN where the harness gives none.
        examples: Number of examples.
    """

    task: str
    metric: str
    value: float
    error: float
    examples: int


class Tasks(NamedTuple):
    """Tasks that were found.

    Attributes:
        names: Their names.
        manager: The harness' table of tasks.
    """

    names: list[str]
    manager: Any


def find_tasks(wanted: str, folder: str | None) -> Tasks:
    """Look tasks up, before a model is loaded.

    Args:
        wanted: Their names, separated by commas.
        folder: Folder with task definitions of the user's own.

    Raises:
        FaspError: If the harness is not installed, with the line that installs it, or if a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FaspError(
            "tasks need lm-evaluation-harness, which is not installed; run pip install 'fasp-lightning[eval]'"
        )
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in wanted.split(",") if name.strip()]
    with as_refusal(lambda error: FaspError(f"task_folder {folder!r} cannot be read: {one_line(error)}")):
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        got = ", ".join(unknown) or "none"
        raise FaspError(f"tasks must be names of the harness or of --task_folder, got {got}")
    return Tasks(names, manager)


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks, job: EvaluateJob) -> list[TaskResult]:
    """Run tasks on a loaded model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=job.task_batch_size)
    found = simple_evaluate(
        wrapped, tasks=tasks.names, limit=job.task_limit, task_manager=tasks.manager, bootstrap_iters=0
    )
    return [result for task in found["results"] for result in _figures(task, found)]


def _figures(task: str, found: dict[str, Any]) -> list[TaskResult]:
    """The figures of one task; the harness names them ``metric,filter``."""
    figures = found["results"][task]
    examples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    return [
        TaskResult(task, name.split(",")[0], float(value), _error(figures, name), examples)
        for name, value in figures.items()
        if isinstance(value, (int, float)) and "_stderr" not in name and name.split(",")[0] in SHOWN
    ]


def _error(figures: dict[str, Any], name: str) -> float:
    metric, _, rule = name.partition(",")
    value = figures.get(f"{metric}_stderr,{rule}")
    return float(value) if isinstance(value, (int, float)) else float("nan")
