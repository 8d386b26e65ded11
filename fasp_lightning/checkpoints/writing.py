"""The weights of a model, written as they are, in another dtype, or wider with zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fasp_lightning.checkpoints.devices import choose_stored
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.pruning_plan import PruningPlan, targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Write = Callable[[Any, Path, torch.dtype], torch.dtype]
"""Writes a model, its weights in a dtype, into a folder; returns the dtype that they were written in."""


class Held(Protocol):
    """The weights of a model, wherever they are, as they are saved."""

    def size(self, dtype: torch.dtype) -> int:
        """Bytes that they will take."""

    def write(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> torch.dtype:
        """See :data:`Write`."""

    def verify(self, folder: Path, form: str, dtype: torch.dtype) -> float:
        """See :func:`~fasp_lightning.checkpoints.verifying.verify_saved`."""


def stored_in(model: PreTrainedModel, requested: str | torch.dtype) -> torch.dtype:
    """The dtype that a model's weights are stored in.

    Args:
        model: The model.
        requested: ``"auto"`` or a dtype.

    Raises:
        FaspError: If ``requested`` is no known dtype.
    """
    return choose_stored(requested, getattr(model, "fasp_stored_dtype", None), model.dtype)


def write_whole(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, replaced: dict[str, Tensor] | None = None
) -> torch.dtype:
    """Write a model that is in memory.

    Args:
        model: The model, as :func:`~fasp_lightning.checkpoints.dry_save.savable` has it.
        folder: Where to.
        dtype: Dtype of the weights that are in the model's; others, such as a router kept in fp32, keep theirs.
        replaced: Entries of its state to write instead of its own.

    Returns:
        The dtype that they were written in: the model's own if ``dtype`` does not reach as far as they do.
    """
    state = model.state_dict() | (replaced or {})
    if dtype != model.dtype:
        state, dtype = converted(state, model.dtype, dtype)
    model.save_pretrained(folder, state_dict=state)
    return dtype


def bytes_of(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes that tensors take in a dtype."""
    return sum(tensor.numel() * dtype.itemsize for tensor in tensors)


def converted(
    state: dict[str, Tensor], computed: torch.dtype, dtype: torch.dtype
) -> tuple[dict[str, Tensor], torch.dtype]:
    """Weights in another dtype, those that share memory sharing it, or as they are if one of them would overflow."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.dtype == computed and key not in done:
            done[key] = tensor.to("cpu", dtype)  # an accelerator may have no room for another copy
            if tensor.numel() and done[key].isinf().any() and not tensor.isinf().any():
                log.warning("saved in %s: %s has values that are too large for %s", computed, name, dtype)
                return state, computed
    return {name: done.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}, dtype


def wider(model: PreTrainedModel, plan: PruningPlan) -> Iterator[tuple[ResolvedPair, Tensor]]:
    """The pairs that have fewer units than in a plan, and those that the plan gives them.

    Args:
        model: The model.
        plan: Keeps at least what the model's plan keeps.
    """
    for pair, units in targets(model, resolve_pruned(model), plan):
        if units.numel() > pair.kept.numel():
            yield pair, units


def zero_filled(model: PreTrainedModel, plan: PruningPlan) -> dict[str, Tensor]:
    """State entries in a plan's shapes, for the pairs that have fewer units; zeros where units are gone.

    Args:
        model: The model.
        plan: As for :func:`wider`.
    """
    return {
        f"{pair.name}.{key}": tensor
        for pair, units in wider(model, plan)
        for key, tensor in pair.zero_filled(units).items()
    }
