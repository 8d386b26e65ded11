"""Restoration on grams that no factorisation likes, against 60 digits where they are small."""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor

from fasp_lightning.ops import least_squares
from fasp_lightning.ops.least_squares import LeastSquares, Restoration
from fasp_lightning.ops.moments import Moments

SWEPT, SAMPLED = 1000, 60
DAMPINGS = (0.0, 1e-8, 1e-4, 0.01, 1.0)
SMALL = 8


class Case(NamedTuple):
    """One system: spectrum over 0 to 16 decades, of any rank, in places with duplicates and zero columns."""

    weight: Tensor
    inputs: Tensor
    gram: Tensor
    kept: Tensor
    damping: float
    single: bool


def case(seed: int) -> Case:
    torch.manual_seed(seed)
    choose = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=choose))

    width = pick(3, SMALL) if seed % 4 == 0 else pick(SMALL + 1, 64)
    rank = pick(1, width)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for size in (2 * width, width))
    inputs = (left * torch.logspace(0, -pick(0, 16) / 2, rank, dtype=torch.float64)) @ right.T
    if pick(0, 1):
        inputs *= 10.0 ** (torch.rand(width, dtype=torch.float64) * pick(0, 6) - 3)  # massive and faint columns
    if pick(0, 1):
        inputs[:, torch.randint(width, (pick(1, width),))] = inputs[:, [pick(0, width - 1)]]
    if pick(0, 1):
        inputs[:, torch.randint(width, (pick(1, width // 2),))] = 0
    inputs *= 10.0 ** pick(-6, 6)
    kept = torch.randperm(width)[: pick(1, width - 1)].sort().values
    gram = (inputs.T @ inputs).to((torch.float32, torch.float64)[seed % 2])
    return Case(torch.randn(pick(1, 6), width), inputs, gram, kept, DAMPINGS[pick(0, 4)], seed % 3 != 0)


def restored(given: Case, monkeypatch: pytest.MonkeyPatch, ridge: str = "original") -> Restoration:
    """By the float32 factor first, or by that of float64 alone."""
    monkeypatch.setattr(least_squares, "SINGLE_FROM", 1 if given.single else 10**9)
    return LeastSquares(given.weight, Moments(given.gram), given.kept).restored(given.damping, ridge)
