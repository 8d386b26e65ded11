"""A model of a config's shapes with random weights, in which a few blocks of every width stand side by side."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fasp_lightning.pruning.budget.budget import PairWidth
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

BEYOND_CACHES = 2**28
"""Bytes of weights in the sample's blocks, if the model has so many: fewer might stay in a cache between two tokens."""

PATTERN = 2**20
"""Random values that weights repeat: to draw each of billions would take minutes."""

Widths = tuple[PairWidth, ...]
"""The widths of the pairs of one block."""


@dataclass(frozen=True)
class Sample:
    """The model, and what its blocks are.

    Attributes:
        model: The causal LM, in evaluation mode.
        blocks: Its blocks.
        kinds: Of each block: its kind of layer, and the index of its widths.
        layers: How many layers of each kind the whole model has.
    """

    model: Any
    blocks: list[Any]
    kinds: list[tuple[str | None, int]]
    layers: dict[str | None, int]

    def shorten(self) -> None:
        """Leave one block of each kind and width, which is enough where a weight is read once for many tokens."""
        once = len(set(self.kinds))
        for blocks in (find_blocks(self.model, spec_for(self.model)), self.blocks, self.kinds):
            del blocks[once:]

    def whole(self, parts: Sequence[float], width: int) -> float:
        """Seconds of the whole model, all blocks in one width, from those of the sample's blocks and of the rest."""
        *blocks, rest = parts
        total = rest
        for kind, count in self.layers.items():
            mine = [seconds for seconds, found in zip(blocks, self.kinds, strict=True) if found == (kind, width)]
            total += count * sum(mine) / len(mine)
        return total


def layer_kinds(config: Any) -> dict[str | None, int]:
    """Kinds of layers, which attend to all or to a window, and how many of each there are."""
    kinds = getattr(config, "layer_types", None)
    return dict(Counter(kinds)) if kinds else {None: config.num_hidden_layers}


def shapes_of(config: Any, kinds: Sequence[str | None], **options: Any) -> Any:
    """A model of a config with these layers, on the ``meta`` device."""
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)
    own.num_hidden_layers = len(kinds)
    if getattr(own, "layer_types", None):
        own.layer_types = list(kinds)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own, **options)


def make_sample(
    config: Any, widths: Sequence[Widths], device: torch.device, dtype: torch.dtype, **options: Any
) -> Sample:
    """Build the sample: nothing larger than it is ever in memory.

    Blocks of all widths alternate, so that whatever else the machine does meets them alike.

    Args:
        config: The model's.
        widths: Widths of the pairs of a block, some of them.
        device: Where to time.
        dtype: In which.
        options: Further ones of ``AutoModelForCausalLM.from_config``.
    """
    layers = layer_kinds(config)
    once = [(kind, index) for kind in layers for index in range(len(widths))]
    kinds = once * _repeats(config, widths, dtype.itemsize)
    each = [widths[index] for _, index in kinds]
    model = random_model(config, [kind for kind, _ in kinds], each, device, dtype, **options)
    return Sample(model, list(find_blocks(model, spec_for(model))), kinds, layers)


def random_model(
    config: Any,
    kinds: Sequence[str | None],
    widths: Sequence[Widths],
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """A model of random weights with these layers, in evaluation mode.

    Args:
        config: The dense model's.
        kinds: The kind of each layer.
        widths: The widths of the pairs of each block.
        device: Where it is to be.
        dtype: In which.
        options: Further ones of ``AutoModelForCausalLM.from_config``.
    """
    model = shapes_of(config, kinds, dtype=dtype, **options)
    pairs = resolve_pruned(model, kv_groups=any(width.kind == "groups" for width in widths[0]))
    for block, block_widths in zip(pairs, widths, strict=True):
        for pair, width in zip(block, block_widths, strict=True):
            pair.cut(_first_units(pair, width.after))
    record_plan(model, pairs)
    model.to_empty(device=device)
    model.tie_weights()
    _fill(model)
    return model.eval()


def _repeats(config: Any, widths: Sequence[Widths], size: int) -> int:
    """How often each width stands there, so that the blocks are larger than caches or than those of the model."""
    block = shapes_of(config, list(layer_kinds(config))[:1])
    whole = sum(parameter.numel() for parameter in find_blocks(block, spec_for(block)).parameters())
    cut = sum(pair.removed for pairs in widths for pair in pairs)
    kinds = layer_kinds(config)
    once = len(kinds) * (whole * len(widths) - cut) * size
    return math.ceil(min(BEYOND_CACHES, whole * sum(kinds.values()) * size) / once)


def _first_units(pair: ResolvedPair, units: int) -> torch.Tensor:
    """So many units, as many of each head as of the others where that is possible; which ones takes no time."""
    heads = pair.layout.groups if units % pair.layout.groups == 0 else 1
    return torch.arange(pair.layout.width).reshape(heads, -1)[:, : units // heads].reshape(-1)


@torch.no_grad()
def _fill(model: Any) -> None:
    """Random weights, as an accelerator is slower on them than on zeros; ones in tables and masks."""
    patterns: dict[torch.device, torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.device not in patterns:
            patterns[parameter.device] = _pattern(parameter)
        pattern, flat = patterns[parameter.device], parameter.view(-1)
        whole = flat.numel() - flat.numel() % PATTERN
        flat[:whole].view(-1, PATTERN).copy_(pattern)
        flat[whole:].copy_(pattern[: flat.numel() - whole])
    for buffer in model.buffers():
        buffer.fill_(0 if buffer.dtype in (torch.int32, torch.int64) else 1)


def _pattern(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return like.new_empty(PATTERN).uniform_(-0.03, 0.03, generator=generator)
