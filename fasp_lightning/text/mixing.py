"""How the sequences of an epoch are divided among several texts."""

from __future__ import annotations

from collections.abc import Sequence

from fasp_lightning.errors import FaspError


def shares_of(lengths: Sequence[int], weights: Sequence[float] | None, total: int) -> list[int]:
    """Divide the sequences of an epoch among texts, in the proportion of their weights.

    Args:
        lengths: Sequences of each text.
        weights: Weight of each text; None takes their lengths.
        total: Sequences of an epoch.

    Returns:
        Sequences of each text in an epoch, `total` together: the exact shares rounded down, what is left
        given to the largest remainders.

    Raises:
        FaspError: If a text gets none.
    """
    weights = [float(length) for length in lengths] if weights is None else weights
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda text: counts[text] - exact[text])
    for text in by_remainder[: total - sum(counts)]:
        counts[text] += 1
    if not all(counts):
        raise FaspError(
            f"weights {weights} must give each text a sequence of an epoch of {total}, got {counts}; raise the "
            "smallest weight or sequences_per_epoch"
        )
    return counts
