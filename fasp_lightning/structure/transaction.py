"""A change of one pair that happens wholly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fasp_lightning.structure.modes import undone
from fasp_lightning.structure.pair import ResolvedPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def all_or_nothing(pair: ResolvedPair, model: PreTrainedModel | None = None) -> Iterator[None]:
    """Whatever is raised inside, a Ctrl-C included, leaves the pair's block as it was, and the model and its config.

    No tensor is copied: what is changed inside must be given new ones, not be written into.

    Args:
        pair: The pair that is changed.
        model: The causal LM, if more of it is changed than the pair's block; but no parameters there.
    """
    put_back = _remembered(pair, model)
    whole = False
    with undone(lambda: None if whole else put_back()):
        yield
        whole = True


def _remembered(pair: ResolvedPair, model: PreTrainedModel | None) -> Callable[[], None]:
    """What puts everything back as it is now; it may be called again if it was stopped."""
    owners = [vars(module) for module in (model or pair.block).modules()]
    if model is not None:
        owners.append(vars(model.config))
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
