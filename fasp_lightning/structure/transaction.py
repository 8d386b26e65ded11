"""A change of one pair that happens wholly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fasp_lightning.structure.modes import undone
from fasp_lightning.structure.pair import ResolvedPair


@contextmanager
def all_or_nothing(pair: ResolvedPair) -> Iterator[None]:
    """Whatever is raised inside, a Ctrl-C included, leaves the pair and its block as they were.

    No tensor is copied: what is changed inside must be given new ones, not be written into. Nothing is looked at
    outside the block: what a model has of them would be paid for each pair of each.

    Args:
        pair: The pair that is changed.
    """
    put_back = _remembered(pair)
    whole = False
    with undone(lambda: None if whole else put_back()):
        yield
        whole = True


def _remembered(pair: ResolvedPair) -> Callable[[], None]:
    """What puts everything back as it is now; it may be called again if it was stopped."""
    owners = [vars(module) for module in pair.block.modules()]
    inner = [value for owner in owners for value in owner.values() if isinstance(value, (dict, set))]
    contents: list[tuple[Any, Any]] = [(one, one.copy()) for one in (*owners, *inner)]
    owned = (*pair.block.parameters(), *pair.block.buffers())
    tensors = [(parameter, parameter.data, parameter.grad) for parameter in owned]
    kept = pair.kept

    def put_back() -> None:
        for live, before in contents:
            live.clear()  # in its place: handles of hooks know the very mapping
            live.update(before)
        for parameter, data, gradient in tensors:
            parameter.grad = None  # of another shape it would be refused
            parameter.data = data
            parameter.grad = gradient
        pair.kept = kept

    return put_back
