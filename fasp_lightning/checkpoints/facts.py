"""What is known of a pruned model: its plan and its report read as one, for the model card and the page alike."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.checkpoints.publishing.record import entries_in
from fasp_lightning.checkpoints.tasks.entries import TaskFacts, facts_in_entry
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import read_json
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.pruning_plan import PruningPlan

log = logging.getLogger(__name__)

ERRORS = ("error_before", "error_after", "output_error_before", "output_error_after")

DAMAGED = (AttributeError, KeyError, TypeError, ValueError)
"""What reading a damaged report raises."""

Place = tuple[int, str]
"""A block's index, and the rest of a layer's path."""


@dataclass(frozen=True)
class PairFacts:
    """One kind of pair in all blocks.

    Attributes:
        consumer: Path of the consumer in its block.
        kind: ``"ffn"``, ``"value"`` or ``"groups"``.
        original: Units of the original pair.
        blocks: Indices of the blocks that have such a pair.
        widths: Units that each of them has left.
        unrestored: Relative error of each block without restoration, in the last round that cut it; ``None`` where
            that is not known.
        restored: Likewise with restoration.
        output_unrestored: Root mean square of the same ratio of each output, without restoration.
        output_restored: That, with restoration.
    """

    consumer: str
    kind: str
    original: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    unrestored: tuple[float | None, ...]
    restored: tuple[float | None, ...]
    output_unrestored: tuple[float | None, ...] = ()
    output_restored: tuple[float | None, ...] = ()

    @property
    def left(self) -> dict[int, int]:
        """Units left, by block."""
        return dict(zip(self.blocks, self.widths, strict=True))

    @property
    def uneven(self) -> bool:
        """Whether blocks differ."""
        return len(set(self.widths)) > 1


@dataclass(frozen=True)
class TextFacts:
    """Perplexities on one text.

    Attributes:
        name: The text.
        domain: ``"calibrated"`` if it comes from a source of the calibration text, else ``"other"``.
        seq_len: Tokens of a sequence.
        tokens: Predicted tokens.
        bos: Token that every sequence began with, ``None`` where it began with the text.
        before: Before this pruning.
        after: After it.
        unrestored: With the same columns and the weights as they were; ``None`` if not measured.
    """

    name: str
    domain: str
    seq_len: int
    tokens: int
    bos: str | None
    before: float
    after: float
    unrestored: float | None


@dataclass(frozen=True)
class Facts:
    """What is known of a pruned model; empty or ``None`` is what is not.

    Attributes:
        model_type: The family.
        form: In which it is saved.
        pairs: The kinds of pairs that are cut in some block.
        report: The report that :func:`~fasp_lightning.save_pruned` wrote.
        fits: Whether the report's last widths are the plan's: if not it is that of another pruning.
        texts: Perplexities right after the pruning.
        measured: Whether the weights are those that were measured; if not, they were trained since, or rounded.
        events: What each event of a training run did.
        settings: Of the pruning.
        tasks: Accuracies of these weights.
    """

    model_type: str
    form: str
    pairs: tuple[PairFacts, ...]
    report: dict[str, Any]
    fits: bool
    texts: tuple[TextFacts, ...] = ()
    measured: bool = False
    events: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[TaskFacts, ...] = ()

    @property
    def asked(self) -> float | None:
        """The sparsity that was asked for."""
        return self.settings.get("sparsity")

    @property
    def saved(self) -> dict[str, Any]:
        """What :func:`~fasp_lightning.checkpoints.publishing.record.record_of` saw of the model when it was saved.

        ``sparsity`` and ``sparsity_total`` that were reached, ``parameters`` and ``original_parameters``, ``dtype`` of
        the weights, and ``versions`` of the packages.
        """
        saved: dict[str, Any] = self.report.get("saved", {})
        return saved

    @property
    def base(self) -> dict[str, Any]:
        """The model that was pruned: its ``name``, its ``id`` on the hub, its ``license``; each where it is known."""
        base: dict[str, Any] = self.report.get("base", {})
        return base

    def known(self, name: str) -> Any:
        """An entry of the report, ``None`` if it is not there or the report is that of another pruning."""
        return (self.report.get(name) or None) if self.fits else None


def facts_of(report: dict[str, Any], plan: PruningPlan, form: str) -> Facts:
    """Read a report and a plan as one.

    Args:
        report: The report, of any origin: of ``fasp prune``, of :class:`~fasp_lightning.FASPPruner`, of a training
            run, or empty. One that cannot be read counts as that of another pruning.
        plan: The model's plan.
        form: The form it is saved in.
    """
    try:
        entries = {_place(entry): entry for entry in report.get("pairs", ())}  # the last round's
        pairs = _pairs(plan, entries)
        now = {(index, pair.consumer): width for pair in pairs for index, width in pair.left.items()}
        fits = all(now.get(at, entry["width_before"]) == entry["width_after"] for at, entry in entries.items())
        texts = tuple(map(_text, report.get("evaluation", ())))
    except DAMAGED as error:
        log.warning("the report of the pruning is not told in full: it is damaged at %r", error)
        fits = False
    events, tasks = _events(report), _tasks(report)
    if not fits:
        return Facts(plan.model_type, form, _pairs(plan, {}), report, False, events=events, tasks=tasks)
    measured, settings = bool(report.get("saved", {}).get("measured")), report.get("config", {})
    return Facts(plan.model_type, form, pairs, report, True, texts, measured, events, settings, tasks)


def facts_in(folder: Path) -> Facts:
    """What is known of a saved model.

    Args:
        folder: The folder that :func:`~fasp_lightning.save_pruned` wrote.

    Raises:
        FaspError: If it holds no pruned model, or a damaged one.
    """
    files = [folder / "config.json", folder / REPORT_FILE]
    if not files[0].is_file():
        raise FaspError(f"{folder} must be a folder that save_pruned wrote, got one without config.json")
    config = read_json(files[0])
    data = config.get("fasp")
    if not isinstance(data, dict):
        raise FaspError(f"config.json of {folder} must carry a plan, got none; name the folder of a pruned model")
    report = read_json(files[1]) if files[1].is_file() else {}
    return facts_of(report, PruningPlan.from_dict(data), data.get("form", "stock"))


def finite(value: Any) -> bool:
    """Whether a figure is one that can be told."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _place(entry: dict[str, Any]) -> Place:
    """Where a pair of a report is: ``"model.layers.3.mlp.down_proj"`` → (3, ``"mlp.down_proj"``)."""
    parts = entry["layer"].split(".")
    index = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return (-1, entry["layer"]) if index is None else (int(parts[index]), ".".join(parts[index + 1 :]))


def _pairs(plan: PruningPlan, entries: dict[Place, dict[str, Any]]) -> tuple[PairFacts, ...]:
    return tuple(_pair(*key, units, entries) for key, units in plan.widths.items())


def _pair(path: str, layout: PairLayout, units: dict[int, int], entries: dict[Place, dict[str, Any]]) -> PairFacts:
    found = [entries.get((index, path), {}) for index in units]
    errors = (tuple(entry.get(name) for entry in found) for name in ERRORS)
    return PairFacts(path, layout.kind, layout.width, tuple(units), tuple(units.values()), *errors)


def _events(report: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(report.get("events", ()))


def _tasks(report: dict[str, Any]) -> tuple[TaskFacts, ...]:
    """Those that can be read."""
    found = []
    for entry in entries_in(report, "tasks"):
        try:
            found.append(facts_in_entry(entry))
        except (*DAMAGED, FaspError) as error:
            log.warning("answers to tasks are not told: they are damaged at %r", error)
    return tuple(found)


def _text(entry: dict[str, Any]) -> TextFacts:
    before, after, plain = entry["before"], entry["after"], entry.get("unrestored")
    return TextFacts(
        entry["name"],
        entry.get("domain", ""),
        after["seq_len"],
        after["tokens"],
        entry.get("bos"),
        before["perplexity"],
        after["perplexity"],
        None if plain is None else plain["perplexity"],
    )
