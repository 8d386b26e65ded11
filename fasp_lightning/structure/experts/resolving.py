"""Row + block → the experts of the block, with every shape checked up front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.adapters import is_adapted, require_in_place
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.ownership import require_plain_parameter
from fasp_lightning.structure.spec import CoupledPair, Experts


def resolve_experts(
    block: nn.Module, name: str, pair: CoupledPair, config: Any, before: tuple[PairLayout, Tensor] | None
) -> ResolvedExperts:
    """The experts of a block.

    Args:
        block: The block.
        name: Its path, for messages.
        pair: Their row.
        config: The model's config; the number of groups that the router chooses from is read.
        before: Their original layout, and the units left, if they were cut before.

    Raises:
        FaspError: If a path or a shape does not fit, or a parameter cannot be cut.
    """
    found = experts_of(block, name, pair)
    if before is None:
        found.layout = _fresh_layout(found, config)
        found.kept = torch.arange(found.layout.width, device="cpu")
    else:
        found.layout, found.kept = before
        if (found.layout.kind, found.layout.fused) != (pair.kind, pair.fused):
            raise FaspError(f"plan of {found.layer} must be for a pair of kind {pair.kind!r}, got {found.layout}")
    for piece in found.pieces():
        wanted = found.positions(piece, found.kept).shape
        dims = (piece.dim,) if isinstance(piece.dim, int) else piece.dim
        shape = torch.Size(piece.parameter.shape[dim] for dim in dims)
        if shape != wanted:
            reason = "as the plan in config.fasp has it" if before else f"to match {pair.consumer}"
            raise FaspError(f"{name}.{piece.key} must have {tuple(wanted)} entries {reason}, got {tuple(shape)}")
    return found


def experts_of(block: nn.Module, name: str, pair: CoupledPair) -> ResolvedExperts:
    """The experts of a block as they are, whatever is left of them.

    Raises:
        FaspError: If they are not where the row says, or cannot be cut.
    """
    around = pair.experts or Experts("")
    found = ResolvedExperts(block, name, pair, _NOTHING, torch.arange(0), around.transposed)
    for path in (found.path, around.router):
        try:
            block.get_submodule(path)
        except AttributeError:
            raise FaspError(f"{name} must have a module {path!r}; correct the row of this model_type") from None
        require_in_place(block, name, path)
        if any(map(is_adapted, block.get_submodule(path).modules())):
            raise FaspError(f"{name}.{path} must have no adapters to be pruned; call merge_and_unload() first")
    for path in (pair.consumer, *pair.producers):
        owner, _, own = path.rpartition(".")
        weight = getattr(block.get_submodule(owner), own, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
            kind = getattr(weight, "dtype", type(weight).__name__)
            raise FaspError(f"{name}.{path} must be a floating-point parameter (experts, …, …), got {kind}")
        for each in (own, f"{own}_bias"):
            require_plain_parameter(f"{name}.{owner}", found.module, each)
    return found


def _fresh_layout(found: ResolvedExperts, config: Any) -> PairLayout:
    """Layout of experts that were never cut."""
    count, size = found.count, found.expert_columns
    parts = 2 if found.spec.fused else 1
    rows = tuple(count * parts * size for _ in found.spec.producers)
    if found.spec.kind == "experts":
        return PairLayout("experts", count * size, count, 1, found.spec.fused, rows)
    groups = getattr(config, found.around.group_field, None) if found.around.group_field else 1
    return PairLayout("whole_experts", count, groups or 1, 1, found.spec.fused, rows)


_NOTHING = PairLayout("experts", 0, 1, 1, None, ())
