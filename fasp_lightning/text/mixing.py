"""How several texts are mixed by weight: the sequences of a cached epoch, and which text of a stream comes next."""

from __future__ import annotations

from collections.abc import Sequence

from fasp_lightning.errors import FaspError


def shares_of(lengths: Sequence[int], weights: Sequence[float] | None, total: int) -> list[int]:
    """Divide the sequences of an epoch among texts, in the proportion of their weights.

    Args:
        lengths: Sequences of each text.
        weights: Weight of each text; ``None`` takes their lengths.
        total: Sequences of an epoch.

    Returns:
        Sequences of each text in an epoch, ``total`` together: the exact shares rounded down, what is left
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
            f"epoch_weight of each text, {weights}, must give it a sequence of an epoch of {total}, got {counts}; "
            "raise the smallest weight or sequences_per_epoch"
        )
    return counts


def next_text(weights: Sequence[float], counts: Sequence[int]) -> int:
    """Choose the text that is furthest behind its share, which mixes a window of any length in proportion.

    Args:
        weights: Weight of each text.
        counts: How often each was chosen.

    Returns:
        Index of the text, the first one of several that are equally far behind.
    """
    total, chosen = sum(weights), sum(counts) + 1
    behind = [chosen * weight / total - count for weight, count in zip(weights, counts, strict=True)]
    return behind.index(max(behind))
