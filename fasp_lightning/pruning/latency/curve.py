"""Seconds at a few sparsities → the least sparsity that is fast enough: pure arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fasp_lightning.errors import FaspError


@dataclass(frozen=True)
class Curve:
    """How long each phase takes at a few sparsities.

    Attributes:
        sparsities: Ascending; the first one is 0, the dense model.
        seconds: Phase → seconds at each of them.
    """

    sparsities: tuple[float, ...]
    seconds: dict[str, tuple[float, ...]]

    def at(self, phase: str, sparsity: float) -> float:
        """Seconds of a phase at a sparsity, on the line between those that were timed next to it.

        The time of matrix products grows with the parameters in them, hence linearly with sparsity.
        """
        times, places = self.seconds[phase], self.sparsities
        right = min(max(bisect_right(places, sparsity), 1), len(places) - 1)
        weight = (sparsity - places[right - 1]) / (places[right] - places[right - 1])
        return (1 - weight) * times[right - 1] + weight * times[right]

    def speedup(self, phase: str, sparsity: float) -> float:
        """How many times faster than the dense model a phase is."""
        return self.seconds[phase][0] / self.at(phase, sparsity)

    def slowest(self, phases: Iterable[str], sparsity: float) -> float:
        """The smallest speed-up of several phases."""
        return min(self.speedup(phase, sparsity) for phase in phases)


def least_sparsity(curve: Curve, sparsities: Sequence[float], factor: float, phases: Sequence[str]) -> int:
    """The first of ascending sparsities at which every phase is ``factor`` times faster than the dense model.

    Args:
        curve: What was timed.
        sparsities: Those that widths can make, ascending.
        factor: The speed-up that is asked for.
        phases: What is to be faster.

    Returns:
        Its index.

    Raises:
        FaspError: If there is none; the message names the highest speed-up, and where it is reached.
    """
    reached = [curve.slowest(phases, sparsity) for sparsity in sparsities]
    found = next((index for index, speedup in enumerate(reached) if speedup >= factor), None)
    if found is None:
        best = max(range(len(reached)), key=reached.__getitem__)
        raise FaspError(
            f"speedup must be at most {int(100 * reached[best]) / 100:.2f}, which {' and '.join(phases)} reach here at "
            f"a sparsity of {sparsities[best]:.4f}, got {factor}: attention over the context, norms, head and "
            "embeddings stay; lower it, ask for one phase alone (serving.phase), or let pruning.attention cut more"
        )
    return found
