"""A change of one pair that happens wholly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fasp_lightning.structure.modes import insist
from fasp_lightning.structure.pair import ResolvedPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def all_or_nothing(model: PreTrainedModel, pair: ResolvedPair) -> Iterator[None]:
    """Whatever is raised inside, a Ctrl-C included, leaves model, config and pair as they were.

    No tensor is copied: what is changed inside must be given new ones, not be written into.

    Args:
        model: The causal LM; of its parameters only those of the pair's block may be changed.
        pair: The pair that is changed.
    """
    put_back = _remembered(model, pair)
    try:
        yield
    except BaseException:
        insist(put_back)
        raise


def _remembered(model: PreTrainedModel, pair: ResolvedPair) -> Callable[[], None]:
    """What puts everything back as it is now; it may be called again if it was stopped."""
    owners = [vars(model.config), *(vars(module) for module in model.modules())]
    inner = [value for owner in owners for value in owner.values() if isinstance(value, (dict, set))]
    contents: list[tuple[Any, Any]] = [(one, one.copy()) for one in (*owners, *inner)]
    tensors = [(parameter, parameter.data, parameter.grad) for parameter in pair.block.parameters()]
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
