"""A forward pass on a few tokens, which shows whether the model runs its blocks as pruning block by block takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.basis import turned
from fasp_lightning.pruning.blocks.standins import first
from fasp_lightning.pruning.finite import bad_parameter, require_finite
from fasp_lightning.structure.adapters import base_of
from fasp_lightning.structure.causal_lm import input_device
from fasp_lightning.structure.experts.resolved import ResolvedExperts
from fasp_lightning.structure.modes import Hook, evaluating, hooked
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16
"""Enough to attend to something; what it costs is to read the weights once."""


def rehearse(model: PreTrainedModel, pairs: Sequence[Sequence[ResolvedPair]], inputs: dict[str, Tensor]) -> None:
    """Refuse a model whose blocks are not a chain, or are not finite, before anything is spent on it.

    Args:
        model: The causal LM, where it is.
        pairs: The pairs of its blocks.
        inputs: What it is called with: one sequence, of which a few tokens from its first real one on are taken, and
            some padding before them, if there is any.

    Raises:
        FaspError: If a block is not called once and in its place, is given other hidden states than the one before it
            returned, or does not call each layer of its pairs once; if a consumer computes something else than its
            weight says; or if an activation is not finite.
    """
    device = input_device(model)
    given = {name: value.to(device) for name, value in _excerpt(inputs).items()}
    watch = _Watch(model, pairs, given.get("attention_mask"))
    with evaluating(model), watch.attached():
        model(**given, use_cache=False)
    watch.check()


def require_turnable(
    model: PreTrainedModel, pairs: Sequence[Sequence[ResolvedPair]], inputs: dict[str, Tensor]
) -> None:
    """Refuse value dims that something else than a mix of tokens takes from V to O, which no other basis would bear.

    A second forward pass on the same few tokens reflects V's outputs, in each head by 1 − 2/d · 11ᵀ, and O's inputs
    back: those must be the inputs that they were.

    Args:
        model: The causal LM, where it is.
        pairs: The pairs of its blocks.
        inputs: As for :func:`rehearse`.

    Raises:
        FaspError: If they are others, as behind a gate or a norm of the values.
    """
    device = input_device(model)
    given = {name: value.to(device) for name, value in _excerpt(inputs).items()}
    values = [pair for block in pairs for pair in block if pair.spec.kind == "value"]
    seen: dict[str, Tensor] = {}
    notes = [(pair.consumer, _noter(pair, seen)) for pair in values]
    checks = [(pair.consumer, _unturner(pair, seen)) for pair in values]
    turns = [(producer, _turner(pair, index)) for pair in values for index, producer in enumerate(pair.producers)]
    with evaluating(model):
        for before, after in ((notes, []), (checks, turns)):
            with hooked(before=before, after=after):
                model(**given, use_cache=False)


def _reflections(pair: ResolvedPair) -> list[Tensor]:
    """One a KV head; each is its own inverse."""
    return [torch.eye(dims) - 2 / max(dims, 1) for dims in pair.layout.dims(pair.kept)]


def _noter(pair: ResolvedPair, seen: dict[str, Tensor]) -> Hook:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[pair.layer] = args[0]

    return note


def _turner(pair: ResolvedPair, index: int) -> Hook:
    rows, blocks = pair.layout.unit_rows(index, pair.kept), _reflections(pair)

    def turn(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        place = rows.to(output.device)
        return output.index_copy(-1, place, turned(output.index_select(-1, place), blocks, -1))

    return turn


def _unturner(pair: ResolvedPair, seen: dict[str, Tensor]) -> Hook:
    blocks = pair.column_blocks(_reflections(pair))

    def back(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        found, expected = turned(args[0], blocks, -1), seen[pair.layer]
        allowed = (1e-3 if found.dtype.itemsize > 2 else 0.05) * expected.abs().max()
        if (found - expected).abs().max() > allowed:
            raise FaspError(
                f"value_basis must be 'given' for {pair.layer}, got 'principal', though its inputs are more than a mix "
                "of values over tokens: a gate or norm stands between, which another basis would change"
            )
        return (expected, *args[1:]), kwargs  # so that rounding does not add up over blocks

    return back


def _excerpt(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A few tokens of one sequence, where all inputs are (1, seq)."""
    if any(value.ndim != 2 for value in inputs.values()):
        return inputs
    mask = inputs.get("attention_mask", inputs["input_ids"].new_ones(1, 1))
    first_real = int(mask[0].int().argmax())
    start = max(0, first_real - TOKENS // 2)
    return {name: value[:, start : first_real + TOKENS] for name, value in inputs.items()}


def require_chain(names: Sequence[str], calls: Sequence[int]) -> None:
    """Refuse calls of the blocks that are not one each, in their order.

    Args:
        names: Paths of the blocks.
        calls: Which of them the model's forward has called, in that order.

    Raises:
        FaspError: If they are others.
    """
    if list(calls) == list(range(len(names))):
        return
    place = next((place for place, call in enumerate(calls) if call != place), len(calls))
    wrong = names[place] if place < len(names) else names[calls[place]]
    found = ", ".join(map(str, calls[:12])) + (", ..." if len(calls) > 12 else "")
    raise FaspError(
        f"{wrong} must be called once by the model's forward, in its place, got calls of the blocks {found or 'none'}; "
        "a model that repeats, skips or reorders its blocks cannot be pruned block by block"
    )


def require_one_call(layer: str, calls: int) -> None:
    """Refuse a layer that is not called once: what it is measured by would not be what it is called with.

    Args:
        layer: Its path.
        calls: How often its block's forward has called it.

    Raises:
        FaspError: If that is not once.
    """
    if calls != 1:
        raise FaspError(
            f"{layer} must be called once by its block's forward, got {calls} calls; correct the row of this model_type"
        )


class _Watch:
    """What one forward pass of the model does with the blocks and the layers of their pairs."""

    def __init__(self, model: PreTrainedModel, pairs: Sequence[Sequence[ResolvedPair]], mask: Tensor | None) -> None:
        self.model = model
        self.pairs = pairs
        self.mask = mask
        spec = spec_for(model)
        self.blocks = list(find_blocks(model, spec))
        self.names = [f"{spec.layers}.{index}" for index in range(len(pairs))]
        self.calls: list[int] = []
        self.layers: Counter[str] = Counter()
        self.changed: list[str] = []
        self.returned: Tensor | None = None

    def attached(self) -> AbstractContextManager[None]:
        """Watch while inside."""
        pairs = [pair for block in self.pairs for pair in block]
        layers = [(linear, self._counter(path)) for pair in pairs for path, linear in pair.linears]
        layers += [(pair.consumer, self._checker(pair)) for pair in pairs]
        called = [(block, self._called(index)) for index, block in enumerate(self.blocks)]
        return hooked(before=[*called, *layers], after=[(block, self._returned) for block in self.blocks])

    def check(self) -> None:
        """Refuse what was seen."""
        require_chain(self.names, self.calls)
        for pair in (pair for block in self.pairs for pair in block):
            for path, _ in pair.linears:
                require_one_call(path, self.layers[path])
        if self.changed:
            raise FaspError(
                f"{self.changed[0]} must be called with what the block before it returned, got other hidden states; a "
                "model that changes them between its blocks cannot be pruned block by block"
            )
        if self.returned is not None:
            self._require_finite(self.returned, f"what follows {self.names[-1]}")

    def _called(self, index: int) -> Hook:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append(index)
            hidden, before = args[0] if args else kwargs["hidden_states"], self.returned
            if before is not None and not before.to(hidden).nan_to_num().equal(hidden.nan_to_num()):
                self.changed.append(self.names[index])

        return called

    def _returned(self, _: nn.Module, args: Any, output: Any) -> None:
        self.returned = first(output)

    def _counter(self, path: str) -> Hook:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.layers[path] += 1

        return called

    def _checker(self, pair: ResolvedPair) -> Hook:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = (*args, *kwargs.values())
            self._require_finite(inputs[0], pair.layer)
            if isinstance(pair, ResolvedExperts):
                _require_experts(pair, *inputs)
            else:
                _require_linear(pair, inputs[0])

        return called

    def _require_finite(self, hidden: Tensor, layer: str) -> None:
        """Padding may be what it likes."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        real = rows if self.mask is None else rows[self.mask.reshape(-1).bool().to(rows.device)]
        if not real.isfinite().all():
            require_finite("activations", False, layer, bad_parameter(self.model))


def _require_experts(pair: ResolvedExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Refuse experts that compute something else than the row says: their consumers would read another thing."""
    found, expected = pair.module.forward(hidden, chosen, weights), torch.zeros_like(hidden)
    for index in range(pair.count):
        token, place = torch.where(chosen == index)
        output = pair.output(index, pair.hidden(index, hidden[token])) * weights[token, place, None]
        expected.index_add_(0, token, output.to(expected.dtype))
    _require_close(pair, found, expected, pair.module)


def _require_linear(pair: ResolvedPair, inputs: Tensor) -> None:
    """Refuse a consumer that computes something else than W x + b, such as one that rounds W first: W is fitted."""
    layer: Any = base_of(pair.consumer)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    found = layer.forward(inputs)
    expected = functional.linear(inputs.to(weight.device), weight.T if pair.transposed else weight, bias)
    _require_close(pair, found, expected, layer)


def _require_close(pair: ResolvedPair, found: Tensor, expected: Tensor, layer: nn.Module) -> None:
    allowed = (1e-3 if expected.dtype.itemsize > 2 else 0.05) * expected.nan_to_num().abs().max()
    if (found.to(expected) - expected).nan_to_num().abs().max() > allowed:
        raise FaspError(
            f"{pair.layer} must compute its weight times its input, plus its bias, to be pruned, got another output of "
            f"{type(layer).__name__}; prune before it is quantised or changed otherwise"
        )
