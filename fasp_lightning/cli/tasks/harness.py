"""Tasks of lm-evaluation-harness, if it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from fasp_lightning.checkpoints.tasks.answers import Answers
from fasp_lightning.cli.console import tracked
from fasp_lightning.cli.jobs import TaskOptions
from fasp_lightning.cli.tasks.likelihoods import Answer, batches_of, score
from fasp_lightning.cli.tasks.questions import configs_in, metric_of
from fasp_lightning.errors import FaspError, as_refusal, one_line

SHOWN = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity", "f1", "bleu")
ANSWERED = ("acc", "exact_match")
"""Metrics that are 0 or 1 a question."""

RESAMPLED = 100
"""Draws for the standard error of what is no mean over questions, such as F1."""


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
        asked: The harness' tasks and groups of them.
        questions: Task → what stands for its questions.
        options: How they were asked for.
        manager: The harness' table of tasks.
    """

    asked: list[Any]
    questions: dict[str, str]
    options: TaskOptions
    manager: Any


class TaskFigures(NamedTuple):
    """What a model reaches.

    Attributes:
        results: Every figure.
        answers: Task → answers, for tasks whose answers are right or wrong.
    """

    results: list[TaskResult]
    answers: dict[str, Answers]


def find_tasks(options: TaskOptions) -> Tasks | None:
    """Look tasks up and read their questions, before a model is loaded; ``None`` if none are asked for.

    Args:
        options: Which tasks.

    Raises:
        FaspError: If the harness is not installed, with the line that installs it, or if a task is unknown or cannot be
            read.
    """
    if not options.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise FaspError(
            "tasks need lm-evaluation-harness, which is not installed; run pip install 'fasp-lightning[eval]'"
        )
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    specs = [spec for name in names for spec in (configs_in(Path(name)) if Path(name).is_dir() else [name])]
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder, limit = options.task_folder, options.task_limit
    named = [spec for spec in specs if isinstance(spec, str)]
    with as_refusal(lambda error: FaspError(f"task_folder {folder!r} cannot be read: {one_line(error)}")):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(named) <= set(manager.all_subtasks):  # the harness' own are thousands of files, read for seconds
            manager = TaskManager(include_path=folder)
    unknown = [spec for spec in named if spec not in manager.all_tasks]
    if unknown or not names:
        got = ", ".join(unknown) or "none"
        raise FaspError(f"tasks must be names of the harness or of --task_folder, or folders with *.jsonl, got {got}")
    asked = [task for spec in specs for task in _load(manager, spec)]
    leaves = [leaf for task in asked for leaf in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])]
    questions = {leaf.task_name: _digest([doc for _, doc in leaf.doc_iterator(limit=limit)]) for leaf in leaves}
    if len(questions) < len(leaves):
        raise FaspError(f"tasks must have different names, got {', '.join(sorted(leaf.task_name for leaf in leaves))}")
    return Tasks(asked, questions, options, manager)


def _load(manager: Any, spec: str | dict[str, Any]) -> list[Any]:
    """The group of a name, or its tasks."""
    name = spec if isinstance(spec, str) else spec["task"]
    with as_refusal(lambda error: FaspError(f"task {name!r} cannot be loaded: {one_line(error)}")):
        found = manager.load([spec])
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _digest(docs: list[Any]) -> str:
    """What stands for questions."""
    return hashlib.sha256(json.dumps(docs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_tasks(model: Any, tokenizer: Any, tasks: Tasks | None) -> TaskFigures:
    """Run tasks on a loaded model, if there are any."""
    if tasks is None:
        return TaskFigures([], {})
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        _wrapped(model, tokenizer, tasks.options.task_batch_size),
        tasks=tasks.asked,
        limit=tasks.options.task_limit,
        task_manager=tasks.manager,
        bootstrap_iters=RESAMPLED,
    )
    answers = {task: _answers(task, found, questions) for task, questions in tasks.questions.items()}
    return TaskFigures(
        [result for task in found["results"] for result in _figures(task, found)],
        {task: given for task, given in answers.items() if given is not None},
    )


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The model as the harness takes it, with choices that share what is computed of their context."""
    from lm_eval.models.huggingface import HFLM

    class SharedContexts(HFLM):
        # lm_eval/api/model.py TemplateLM: what tokenised requests come to, ((texts, context, continuation), …)
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[Answer]:
            batches = batches_of([request[1:] for request in requests], batch_size, self.max_length)
            found = dict(pair for batch in tracked(batches, "tasks") for pair in score(model, batch))
            return [found[index] for index in range(len(requests))]

    return SharedContexts(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _answers(task: str, found: dict[str, Any], questions: str) -> Answers | None:
    """The answers in one task by the metric that the field reports; if they are read in several ways, by the first."""
    samples = found["samples"][task]
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    for metric in (metric_of(task), *ANSWERED):
        if metric in first[0]["metrics"]:
            return Answers(metric, questions, [int(sample[metric]) for sample in first])
    return None


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
