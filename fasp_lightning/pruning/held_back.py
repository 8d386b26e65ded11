"""Calibration samples that the gram does not see, to choose the damping by."""

from __future__ import annotations

from collections import defaultdict

from fasp_lightning.pruning.capture import Sample

EVERY = 4
"""One sample in so many is held back: few enough to estimate an error, many enough to choose by it."""


def hold_back(samples: list[Sample]) -> None:
    """Mark one sample in ``EVERY`` of each kind, evenly spread; a kind, as own text, is what has the same weight.

    Args:
        samples: The calibration set. A kind with fewer samples than that goes into the gram as a whole.
    """
    seen: dict[float, int] = defaultdict(int)
    for sample in samples:
        seen[sample.weight] += 1
        sample.held_back = seen[sample.weight] % EVERY == 0
