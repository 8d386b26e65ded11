"""What is cut of a model: all that decides on the forms that can hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cuts:
    """Which kinds of pairs are cut, and whether blocks agree.

    Attributes:
        kinds: Kinds of the pairs that are cut in some block: ``"ffn"``, ``"value"``, ``"groups"``.
        uneven: Blocks have different FFN widths, or different numbers of KV groups, which is what a pruning that
            failed half-way leaves.
    """

    kinds: frozenset[str] = frozenset()
    uneven: bool = False

    def __or__(self, other: Cuts) -> Cuts:
        return Cuts(self.kinds | other.kinds, self.uneven or other.uneven)
