"""The bases in which the value dims of a pair may be cut."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fasp_lightning.ops.basis import Basis, principal_basis
from fasp_lightning.ops.statistics import GramStatistics
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.pair import ResolvedPair

DAMPING = 0.01
"""Ridge of the gram that makes a basis, as a multiple of its mean diagonal: A has a condition of at most 113 at 128."""


class View(NamedTuple):
    """What is known of a consumer's inputs, in one basis of the value dims.

    Attributes:
        bases: Of the dims left of each KV head; empty for the given one.
        fitted: Statistics of the inputs.
        held: Of those that are held back.
    """

    bases: list[Basis]
    fitted: GramStatistics
    held: GramStatistics | None


def views_of(
    pair: ResolvedPair, fitted: GramStatistics, held: GramStatistics | None, config: PruningConfig
) -> list[View]:
    """The given basis, and the principal one of a value pair where the settings ask for it.

    Args:
        pair: The pair, not cut yet.
        fitted: Statistics of its consumer's inputs.
        held: Of those that are held back.
        config: ``value_basis`` and ``refit_bias`` are read.
    """
    views = [View([], fitted, held)]
    if config.value_basis == "principal" and pair.spec.kind == "value":
        bases = _principal(pair, fitted, config.refit_bias)
        blocks = pair.column_blocks([basis.forward for basis in bases])
        views.append(View(bases, fitted.turned(blocks), None if held is None else held.turned(blocks)))
    return views


def _principal(pair: ResolvedPair, statistics: GramStatistics, refit_bias: bool) -> list[Basis]:
    """The principal basis of each KV head's dims, of the gram that its least squares are made of."""
    weight = pair.weight.double()
    # the bias carries the mean
    moments = statistics.moments(centred=refit_bias and getattr(pair.consumer, "bias", None) is not None)
    bases, start = [], 0
    for dims in pair.layout.dims(pair.kept):
        grams, energies = torch.zeros(dims, dims).to(moments.gram), torch.zeros(dims, dims).to(weight)
        for _ in range(pair.layout.repeats):
            of_head = torch.arange(start, start := start + dims, device=weight.device)
            grams += moments.block(of_head, of_head)
            energies += weight[:, of_head].T @ weight[:, of_head]
        bases.append(principal_basis(grams, energies, DAMPING))
    return bases
