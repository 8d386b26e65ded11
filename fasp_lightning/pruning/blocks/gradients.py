"""What a backward pass says at the consumers' inputs, summed up on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.scores import fisher_score
from fasp_lightning.pruning.finite import require_finite
from fasp_lightning.structure.modes import Hook, hooked
from fasp_lightning.structure.pair import ResolvedPair


class ConsumerScores:
    """Loss sensitivity of the columns of many consumers, summed up while forward and backward passes run.

    The sums are float64, on the device of the inputs.
    """

    def __init__(self) -> None:
        self._scores: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}  # plain sums: not finite iff an input was not

    @contextmanager
    def recording(self, pairs: Iterable[ResolvedPair], weight: float) -> Iterator[None]:
        """One forward and one backward pass; an input is freed as soon as the backward pass has come to it.

        Args:
            pairs: Whose consumers take part.
            weight: How much each token counts. Padding counts nothing in any case: its gradient is zero.
        """

        def take(layer: str, inputs: Tensor, gradients: Tensor) -> None:
            width = inputs.shape[-1]
            _add(self._scores, layer, weight * fisher_score(inputs.reshape(-1, width), gradients.reshape(-1, width)))
            _add(self._inputs, layer, inputs.sum(dtype=torch.float32).double())

        with hooked(before=[(pair.consumer, _watcher(pair.layer, take)) for pair in pairs]):
            yield

    def add(self, other: ConsumerScores) -> None:
        """Take over the sums of another one."""
        for mine, more in ((self._scores, other._scores), (self._inputs, other._inputs)):
            for layer, value in more.items():
                _add(mine, layer, value)

    def columns(self, pairs: Iterable[ResolvedPair]) -> list[Tensor]:
        """The (columns left,) float64 sums of some pairs, on the CPU.

        Args:
            pairs: In the order of the forward pass.

        Raises:
            FaspError: If no gradient came, or an input or a gradient was not finite; the message names the layer.
        """
        layers = [pair.layer for pair in pairs]
        for layer in layers:
            if layer not in self._scores:
                raise FaspError(
                    f"the loss must depend on the input of {layer}, got no gradient there; score with 'wanda' instead"
                )
        # trouble spreads forwards from an activation, and backwards from a gradient: the first one is named
        for layer in layers:
            require_finite("activations", bool(self._inputs[layer].isfinite()), layer)
        for layer in reversed(layers):
            require_finite("gradients", bool(self._scores[layer].isfinite().all()), layer)
        return [self._scores[layer].cpu() for layer in layers]


def _watcher(layer: str, take: Callable[[str, Tensor, Tensor], None]) -> Hook:
    """A hook before a consumer's forward: it keeps the input until its gradient comes, and hands both on."""

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # detached: a tensor of the graph would hold itself, through the hook, for ever
        kept = [args[0].detach()]
        args[0].register_hook(lambda gradient: take(layer, kept.pop(), gradient))

    return watch


def _add(sums: dict[str, Tensor], layer: str, value: Tensor) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value
