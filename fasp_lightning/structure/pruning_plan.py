"""The one outcome that checkpoint, resume and export share: which units are left, as plain data."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.configs.text_part import text_family
from fasp_lightning.structure.layout import Cuts, PairLayout, Widths
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.resolve import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1


@dataclass(frozen=True)
class PairPlan:
    """One pair of one block.

    Attributes:
        layout: Numbering of the original pair.
        kept: Units that are left, ascending, in that numbering.
    """

    layout: PairLayout
    kept: tuple[int, ...]

    def padded(self, units: int) -> PairPlan:
        """So many units: those kept, and the first others, which a zero-filled checkpoint holds as zeros.

        Args:
            units: Their number; of experts each has as many.
        """
        groups = self.layout.groups if self.layout.kind == "experts" else 1
        size, missing = self.layout.width // groups, (units - len(self.kept)) // groups
        kept = set(self.kept)
        for start in range(0, self.layout.width, size):
            kept.update([unit for unit in range(start, start + size) if unit not in kept][:missing])
        return PairPlan(self.layout, tuple(sorted(kept)))


@dataclass(frozen=True)
class PruningPlan:
    """Kept units of a whole model. Plain data: JSON in both directions, no tensors.

    Attributes:
        model_type: The family, ``config.model_type``, of the decoder.
        blocks: One mapping a decoder block: consumer path → :class:`PairPlan`. A consumer that is cut in some block
            is named in each that has it; one that is cut in none is absent.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, PruningPlan
        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        assert PruningPlan.from_json(model.fasp_plan.to_json()) == model.fasp_plan
    """

    model_type: str
    blocks: tuple[dict[str, PairPlan], ...]

    def of(self, consumers: Collection[str]) -> PruningPlan:
        """The part of the plan that is about some consumers."""
        parts = ({path: pair for path, pair in block.items() if path in consumers} for block in self.blocks)
        return PruningPlan(self.model_type, tuple(parts))

    @property
    def widths(self) -> Widths:
        """Units left of each pair that is cut in some block."""
        found: Widths = {}
        for index, block in enumerate(self.blocks):
            for path, pair in block.items():
                found.setdefault((path, pair.layout), {})[index] = len(pair.kept)
        return found

    @property
    def cuts(self) -> Cuts:
        """What is cut."""
        units: dict[str, set[int]] = {}
        for (path, layout), left in self.widths.items():
            if layout.kind != "value":
                units.setdefault(path, set()).update(left.values())
        cut = {
            pair.layout.kind for block in self.blocks for pair in block.values() if len(pair.kept) < pair.layout.width
        }
        return Cuts(frozenset(cut), any(len(left) > 1 for left in units.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a config: the number of units of each pair legibly, which ones in one string.

        Returns:
            ``pairs``: a consumer, its layout, and the units that each block keeps of it, ``None`` where it is not cut.
            ``kept``: a bit a unit, the blocks of the first pair first, each filled up to a byte; deflated, in base64.
            That is 0.3 MB of the 80 blocks of a 70B model, whose units it would list in 14 MB.

        Raises:
            FaspError: If a pair keeps what is no unit of it.
        """
        keys = {(path, pair.layout): None for block in self.blocks for path, pair in block.items()}
        pairs, bits = [], []
        for path, layout in keys:
            cut = [_cut(block.get(path), layout) for block in self.blocks]
            bits += [_bits(pair) for pair in cut if pair]
            units = [len(pair.kept) if pair else None for pair in cut]
            rows = list(layout.producer_rows)
            pairs.append({"consumer": path, "units": units, **asdict(layout), "producer_rows": rows})
        kept = base64.b64encode(zlib.compress(b"".join(bits), 9)).decode()
        return {
            "version": VERSION,
            "model_type": self.model_type,
            "blocks": len(self.blocks),
            "pairs": pairs,
            "kept": kept,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_dict`; other entries are left alone.

        Raises:
            FaspError: If ``data`` is not a plan, or one of another version.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise FaspError(f"a plan must be a mapping with version {VERSION}, got {str(data)[:60]!r}")
        try:
            blocks: list[dict[str, PairPlan]] = [{} for _ in range(data["blocks"])]
            bits = zlib.decompress(base64.b64decode(data["kept"], validate=True))
            for pair in data["pairs"]:
                consumer, layout, units = _layout(pair)
                for block, count in zip(blocks, units, strict=True):
                    if count is not None:
                        block[consumer], bits = _taken(layout, count, bits)
        except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
            reason = "a plan must hold model_type, blocks, the layout and units of each pair, and which are kept"
            raise FaspError(f"{reason}; damaged or missing: {error}") from None
        if bits or not isinstance(data.get("model_type"), str):
            raise FaspError(f"a plan must hold model_type and no bits beyond its pairs, got {len(bits)} bytes more")
        return cls(data["model_type"], tuple(blocks))

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            FaspError: If the text is not the JSON of a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FaspError(f"a plan must be JSON, got {text[:60]!r}: {error}") from None
        return cls.from_dict(data)

    def kept(self) -> list[Kept]:
        """The plan as :func:`~fasp_lightning.structure.resolve.resolve` takes it."""
        return [
            {path: (pair.layout, torch.tensor(pair.kept, dtype=torch.long)) for path, pair in block.items()}
            for block in self.blocks
        ]


def targets(
    model: PreTrainedModel, pairs: list[list[ResolvedPair]], plan: PruningPlan
) -> list[tuple[ResolvedPair, torch.Tensor]]:
    """Each pair with the units that the plan keeps of it.

    Raises:
        FaspError: If the plan belongs to another family or to other shapes.
    """
    if plan.model_type != text_family(model.config):
        raise FaspError(f"plan must be one of a {text_family(model.config)} model, got one of {plan.model_type!r}")
    if len(plan.blocks) != len(pairs):
        raise FaspError(f"plan must have {len(pairs)} blocks as the model has, got {len(plan.blocks)}")
    return [
        (pair, _target(pair, block.get(pair.spec.consumer)))
        for resolved, block in zip(pairs, plan.blocks, strict=True)
        for pair in _require_consumers(resolved, block)
    ]


def _require_consumers(pairs: list[ResolvedPair], block: dict[str, PairPlan]) -> list[ResolvedPair]:
    """The pairs of a block, if the plan names no other."""
    unknown = set(block) - {pair.spec.consumer for pair in pairs}
    if unknown:
        name = pairs[0].name if pairs else "a block without pairs"
        raise FaspError(f"plan of {name} must name its consumers, got {', '.join(sorted(unknown))}")
    return pairs


def _target(pair: ResolvedPair, planned: PairPlan | None) -> torch.Tensor:
    """Units to keep; all of them if the plan has nothing on this pair."""
    if planned is not None and planned.layout != pair.layout:
        raise FaspError(f"plan of {pair.layer} must be for {pair.layout}, got {planned.layout}")
    kept = planned.kept if planned else range(pair.layout.width)
    if not ascending(kept, pair.layout.width):
        raise FaspError(bad_units(pair, pair.layout.width))
    return torch.tensor(kept, dtype=torch.long)


def bad_units(pair: ResolvedPair, width: int) -> str:
    """What is said of units that are not so many ascending ones."""
    return f"plan of {pair.layer} must keep ascending units out of the {width} that are left"


def ascending(kept: Sequence[int], width: int) -> bool:
    """Whether these are units of a pair, at least one, each once and in order."""
    return _ascending(torch.tensor(kept, dtype=torch.long, device="cpu"), width)


def _ascending(units: torch.Tensor, width: int) -> bool:
    return bool(units.numel() and units[0] >= 0 and units[-1] < width and (units[1:] > units[:-1]).all())


def _cut(pair: PairPlan | None, layout: PairLayout) -> PairPlan | None:
    """What a block keeps of a pair; blocks may have the same consumer in another layout."""
    return pair if pair is not None and pair.layout == layout else None


def _bits(pair: PairPlan) -> bytes:
    """A bit a unit, the first one the lowest, set where it is kept."""
    width, units = pair.layout.width, torch.tensor(pair.kept, dtype=torch.long, device="cpu")
    if not _ascending(units, width):
        raise FaspError(f"a plan must keep ascending units out of the {width} that a pair has, got {pair.kept!s:.60}")
    mask = torch.zeros(width, dtype=torch.bool, device="cpu")
    mask[units] = True
    return np.packbits(mask.numpy(), bitorder="little").tobytes()


def _taken(layout: PairLayout, count: int, bits: bytes) -> tuple[PairPlan, bytes]:
    """A pair from the first of the bits, and the bits after it.

    Raises:
        FaspError: If they keep another number of units.
    """
    size = -(-layout.width // 8)
    mask = np.unpackbits(np.frombuffer(bits[:size], dtype=np.uint8), bitorder="little")
    pair = PairPlan(layout, tuple(mask.nonzero()[0].tolist()))
    if len(pair.kept) != count or not ascending(pair.kept, layout.width):
        raise FaspError(f"{count!r} units out of {layout.width}, of which kept marks {len(pair.kept)}")
    return pair, bits[size:]


def _layout(data: dict[str, Any]) -> tuple[str, PairLayout, list[int | None]]:
    layout = {**data, "producer_rows": tuple(data["producer_rows"])}
    consumer, units = layout.pop("consumer"), layout.pop("units")
    return consumer, PairLayout(**layout), units
