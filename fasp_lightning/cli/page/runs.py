"""What is read of the folder of a training run: what its logger wrote, its config, its checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.publishing.record import without_paths
from fasp_lightning.cli.page.models import is_model
from fasp_lightning.errors import FaspError, FaspOSError, as_refusal, one_line
from fasp_lightning.structure.pruning_plan import PruningPlan

EVENT_FILES, CSV_FILE, CHECKPOINTS = "events.out.tfevents.*", "metrics.csv", "*.ckpt"
CONFIG_FILE = "config.yaml"
PLACES = ("", "*/", "*/*/", "*/*/*/")
"""Where a run may be below a folder: by Lightning's own names in ``lightning_logs/version_0``, checkpoints deeper."""

Scalars = dict[str, list[tuple[int, float]]]
"""Name of a metric → its values with their steps, in the order in which they were written."""

LOGGED = {
    "sparsity": "fasp/sparsity",
    "sparsity_total": "fasp/sparsity_total",
    "parameters": "fasp/parameters",
    "seconds": "fasp/seconds",
    "perplexity_before": "fasp/perplexity_before",
    "perplexity_pruned": "fasp/perplexity_pruned",
    "kl_pruned": "fasp/kl_pruned",
}
"""What an event says → the metric that holds it."""

LOGGED_LATER = {"perplexity_recovered": "fasp/perplexity_recovered", "kl_recovered": "fasp/kl_recovered"}
"""The same of what is logged at the next event, or at the end of the run."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: What to call it.
        scalars: What its loggers wrote.
        events: What each event did, as :class:`~fasp_lightning.training.reporting.EventRecord` names it.
        source: Where the events were found.
        settings: Its config, no path of this machine in it; empty where that was not saved.
        schedule: Step → sparsity asked for, as far as its events go by steps; empty where it is not in the config.
        checkpoints: Name → bytes.
        plan: Of the newest checkpoint.
        models: Folders of pruned models that the run may have exported.
    """

    name: str
    scalars: Scalars
    events: list[dict[str, Any]]
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: dict[int, float] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    plan: PruningPlan | None = None
    models: tuple[Path, ...] = ()


def run_folder(folder: Path) -> Path | None:
    """The folder of the one run that is in a folder or below it, ``None`` if there is none.

    Raises:
        FaspError: If there are several.
    """
    found = {file.parent for file in _found(folder, EVENT_FILES, CSV_FILE)}
    found |= {_of_checkpoint(file) for file in _found(folder, CHECKPOINTS)}
    if len(found) > 1:
        names = sorted(path.relative_to(folder).as_posix() for path in found)
        raise FaspError(f"folder {str(folder)!r} must hold one run, got {len(found)}; name one of {', '.join(names)}")
    return next(iter(found), None)


def read_run(folder: Path, name: str) -> Run:
    """Read a run.

    Args:
        folder: What :func:`run_folder` gave.
        name: What to call it.

    Raises:
        FaspError: If its config or its newest checkpoint cannot be read.
    """
    scalars, settings = _scalars(folder), _config(folder)
    checkpoints = [file for file in _found(folder, CHECKPOINTS) if file.is_file() and not file.is_symlink()]
    newest = max(checkpoints, key=lambda file: file.stat().st_mtime, default=None)
    state, plan = ({}, None) if newest is None else _checkpoint(newest)
    events, source = _logged_events(scalars), "what the run's logger wrote"
    if not events:
        events, source = list(state.get("records", ())), f"the checkpoint {newest and newest.name}"
    callback = _callback(settings)
    return Run(
        name,
        scalars,
        events,
        source,
        without_paths(settings),
        _schedule(callback.get("schedule") or state.get("schedule")),
        {file.name: file.stat().st_size for file in sorted(checkpoints)},
        plan,
        tuple(_models(folder, callback.get("export_to"))),
    )


def _found(folder: Path, *patterns: str) -> list[Path]:
    return [file for pattern in patterns for place in PLACES for file in folder.glob(place + pattern)]


def _of_checkpoint(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def _models(folder: Path, export_to: str | None) -> Iterable[Path]:
    """Pruned models in the run's folder, beside it, and where its config says that one goes."""
    places = [folder, *folder.glob("*/"), *folder.parent.glob("*/"), *([Path(export_to)] if export_to else [])]
    return dict.fromkeys(place for place in places if is_model(place))


def _scalars(folder: Path) -> Scalars:
    """Of TensorBoard's files, or of a CSV file."""
    if next(folder.glob(EVENT_FILES), None) is None:
        return _csv(folder / CSV_FILE)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1})
    reader.Reload()
    return {name: [(one.step, one.value) for one in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def _csv(file: Path) -> Scalars:
    scalars: Scalars = {}
    if file.is_file():
        with (
            file.open(encoding="utf-8", newline="") as rows,
            as_refusal(lambda error: FaspOSError(f"{file} must be the table of a CSVLogger: {one_line(error)}")),
        ):
            for row in csv.DictReader(rows):
                for name, value in row.items():
                    if value and name != "step":
                        scalars.setdefault(name, []).append((int(row["step"]), float(value)))
    return scalars


def _logged_events(scalars: Scalars) -> list[dict[str, Any]]:
    """The events, each at a step at which its seconds were logged; what was not logged is absent."""
    later = {name: [value for _, value in scalars.get(metric, ())] for name, metric in LOGGED_LATER.items()}
    events = []
    for index, (step, _) in enumerate(scalars.get("fasp/seconds", ())):
        values = {name: _at(scalars.get(metric, []), step) for name, metric in LOGGED.items()}
        event = {"step": step} | {name: value for name, value in values.items() if value is not None}
        if "parameters" in event:
            event["parameters"] = round(event["parameters"])
        events.append(event | {name: values[index] for name, values in later.items() if index < len(values)})
    return events


def _at(values: list[tuple[int, float]], step: int) -> float | None:
    """The last value at a step: of what is logged before an event and after it, the latter."""
    return next((value for at, value in reversed(values) if at == step), None)


def _config(folder: Path) -> dict[str, Any]:
    """What LightningCLI was given."""
    import yaml  # type: ignore[import-untyped]

    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise FaspError(f"{file} must be YAML: {one_line(error)}") from None
    return config if isinstance(config, dict) else {}


def _callback(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the callback that prunes."""
    trainer = settings.get("trainer")
    callbacks = (trainer.get("callbacks") if isinstance(trainer, dict) else None) or []
    named = [one for one in callbacks if isinstance(one, dict)] if isinstance(callbacks, list) else []
    found = next((one for one in named if str(one.get("class_path")).endswith("FASPPruning")), {})
    arguments: dict[str, Any] = found.get("init_args") or {}
    return arguments


def _schedule(data: Any) -> dict[int, float]:
    from fasp_lightning.training.schedule import PruningSchedule

    if data is None or isinstance(data, str):  # a file, which may be another one by now
        return {}
    return {event.step: event.sparsity for event in PruningSchedule.parse(data) if event.step is not None}


def _checkpoint(file: Path) -> tuple[dict[str, Any], PruningPlan | None]:
    """The state of the callback that prunes, and the plan; weights stay on the disk."""
    import torch

    from fasp_lightning.training.modeling.structure_state import plan_in_state

    with as_refusal(lambda error: FaspOSError(f"{file} must be a checkpoint: {one_line(error, first=True)}")):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    states = checkpoint.get("callbacks", {}).items()
    state: dict[str, Any] = next((state for name, state in states if name.startswith("FASPPruning")), {})
    return state, plan_in_state(checkpoint.get("state_dict", {}))
