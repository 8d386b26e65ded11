"""What a folder holds: a pruned model, a training run with the model that it exported, or a sweep of models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.facts import facts_of
from fasp_lightning.cli.page.models import Model, is_model, read_model
from fasp_lightning.cli.page.runs import Run, read_run, run_folder
from fasp_lightning.errors import FaspError, FaspFileNotFoundError

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Found:
    """What a page tells of.

    Attributes:
        name: Of the folder.
        models: The pruned models: one, those of a sweep, or of a run the exported one if it is there.
        run: The training run.
        sweep: Whether the models are those of a sweep.
    """

    name: str
    models: tuple[Model, ...] = ()
    run: Run | None = None
    sweep: bool = False


def gather(folder: Path) -> Found:
    """Read a folder.

    Raises:
        FaspError: If it is not there, holds nothing that a page could tell of, or something damaged.
    """
    if not folder.is_dir():
        raise FaspFileNotFoundError(f"folder must be that of a pruned model, a run or a sweep, got {str(folder)!r}")
    name = folder.resolve().name
    if (folder / SWEEP_FILE).is_file():
        models = tuple(read_model(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_model(path))
        return Found(name, models, sweep=True)
    if is_model(folder):
        model = read_model(folder)
        events = [event for event in model.facts.events if isinstance(event, dict)]
        return Found(name, (model,), Run(name, {}, events, "the report of the exported model") if events else None)
    if (run := run_folder(folder)) is not None:
        return _of_run(name, read_run(run, name if run == folder else f"{name}/{run.relative_to(folder).as_posix()}"))
    raise FaspError(
        f"folder {str(folder)!r} must hold a pruned model (config.json with a plan), a training run (what a logger "
        "wrote, or checkpoints) or a sweep (sweep.json), got none of them; name one that fasp prune, fit or sweep wrote"
    )


def _of_run(name: str, run: Run) -> Found:
    models = [read_model(path) for path in run.models]
    exported = [model for model in models if _same(model.facts.events, run.events)]
    return Found(name, tuple(exported[:1] or _of_checkpoint(run)), run)


def _same(exported: Any, events: list[dict[str, Any]]) -> bool:
    """Whether a model's events are those of a run; a folder may hold the model of another one."""
    keys = [[(event.get("step"), event.get("parameters")) for event in one] for one in (exported, events)]
    return bool(keys[0]) and keys[0] == keys[1]


def _of_checkpoint(run: Run) -> list[Model]:
    """What the plan in a checkpoint and the logged errors tell of the model, which was not exported."""
    if run.plan is None:
        return []
    widths = {f"{index}.{path}": left for (path, _), units in run.plan.widths.items() for index, left in units.items()}
    pairs = [
        {
            "layer": layer,
            "width_before": width,
            "width_after": width,
            "error_before": _last(run, f"fasp_error_unrestored/{layer}"),
            "error_after": _last(run, f"fasp_error/{layer}"),
        }
        for layer, width in _layers(run, widths).items()
    ]
    last = run.events[-1] if run.events else {}
    sizes = {name: last[name] for name in ("sparsity", "sparsity_total", "parameters") if name in last}
    facts = facts_of({"pairs": pairs, "saved": sizes}, run.plan, "checkpoint")
    return [Model(run.name, facts, 0, 0, None)]


def _layers(run: Run, widths: dict[str, int]) -> dict[str, int]:
    """Path of each pair as it was logged, or its end, → its width."""
    logged = [name.partition("/")[2] for name in run.scalars if name.startswith("fasp_error/")]
    return {next((name for name in logged if name.endswith(f".{end}")), end): width for end, width in widths.items()}


def _last(run: Run, name: str) -> float | None:
    values = run.scalars.get(name)
    return values[-1][1] if values else None
