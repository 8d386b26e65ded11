"""What is read of a pruned model's folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fasp_lightning.checkpoints.facts import Facts, facts_in
from fasp_lightning.checkpoints.forms import LoaderSupport, loaders_for
from fasp_lightning.checkpoints.publishing.record import without_paths
from fasp_lightning.checkpoints.source import weight_files
from fasp_lightning.staging import read_json
from fasp_lightning.structure.configs.stock_fields import cuts_in
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.structure.registry import known_architectures, spec_for

CONFIG_FILE = "config.json"
MAPPINGS = ("saved", "base", "config", "seconds", "peak_memory", "calibration", "computed")
"""Entries of a report that are left out where they are damaged."""


@dataclass(frozen=True)
class Model:
    """A pruned model.

    Attributes:
        name: Of its folder.
        facts: What plan and report say, no path of this machine in them.
        weight_bytes: Of the files of weights; 0 if there are none.
        folder_bytes: Of all files.
        loaders: Who loads it; ``None`` where the family is not known here.
    """

    name: str
    facts: Facts
    weight_bytes: int
    folder_bytes: int
    loaders: list[LoaderSupport] | None


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model with a plan."""
    config = folder / CONFIG_FILE
    return config.is_file() and "fasp" in read_json(config)


def read_model(folder: Path) -> Model:
    """Read a folder that :func:`~fasp_lightning.save_pruned` wrote.

    Raises:
        FaspError: If it holds no pruned model, or a damaged one.
    """
    facts = facts_in(folder)
    report = {name: value for name, value in facts.report.items() if name not in MAPPINGS or isinstance(value, dict)}
    told = replace(
        facts,
        report=without_paths(report),
        settings=without_paths(facts.settings),
        texts=tuple(replace(text, name=without_paths(text.name)) for text in facts.texts),
    )
    plan = PruningPlan.from_dict(read_json(folder / CONFIG_FILE)["fasp"])
    known = facts.model_type in known_architectures()
    loaders = loaders_for(facts.form, plan, cuts_in(spec_for(plan), plan)) if known else None
    return Model(folder.resolve().name, told, _size(weight_files(folder)), _size(folder.rglob("*")), loaders)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
