"""Models of a config's shapes with random weights, each of one width: as many of its blocks as a timing needs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.pruning.budget.budget import PairWidth
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import record_plan, resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

BEYOND_CACHES = 2**30
"""Bytes of a sample's blocks, if the model has so many: of fewer, caches keep a part that depends on the width."""

PATTERN = 2**20
"""Random values that weights repeat: to draw each of billions would take minutes."""

ALIGNMENT = 64
"""Values; at least 64 bytes, a line of a cache."""

Widths = tuple[PairWidth, ...]
"""The widths of the pairs of one block."""


@dataclass(frozen=True)
class Sample:
    """The model, and what its blocks are.

    Attributes:
        model: The causal LM, in evaluation mode.
        blocks: Its blocks.
        kinds: The kind of layer of each, all different ones first.
        layers: How many layers of each kind the whole model has.
    """

    model: Any
    blocks: list[Any]
    kinds: list[str | None]
    layers: dict[str | None, int]

    def shorten(self) -> None:
        """Leave one block of each kind, which is enough where a weight is read once for many tokens."""
        for blocks in (find_blocks(self.model, spec_for(self.model)), self.blocks, self.kinds):
            del blocks[len(self.layers) :]

    def whole(self, parts: Sequence[float]) -> float:
        """Seconds of the whole model from those of the sample's blocks and of the rest."""
        *blocks, rest = parts
        for kind, count in self.layers.items():
            rest += count * mean(seconds for seconds, found in zip(blocks, self.kinds, strict=True) if found == kind)
        return rest


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
    with as_refusal(lambda error: _no_blocks(config, error)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(own, **options)


def require_alike(config: Any, whole: Collection[str], **options: Any) -> None:
    """Refuse a model whose blocks have other pairs than their neighbours: each is timed with the widths of the first.

    Args:
        config: The model's.
        whole: Kinds of pairs of which whole heads or experts are removed.
        options: Further ones of ``AutoModelForCausalLM.from_config``.

    Raises:
        FaspError: Naming the first block that differs.
    """
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    first, *others = resolve_pruned(shapes_of(config, kinds, **options), whole=whole)
    for index, block in enumerate(others, start=1):
        if [pair.layout for pair in block] != [pair.layout for pair in first]:
            raise FaspError(
                f"speedup needs blocks that are alike, got a {config.model_type} model whose block {index} has "
                f"{_pairs_of(block)}, and the first one {_pairs_of(first)}; give a sparsity instead"
            )


def _pairs_of(block: Sequence[ResolvedPair]) -> str:
    """For a message."""
    return " and ".join(f"{pair.layout.kind} of {pair.layout.width}" for pair in block) or "no pairs"


def _no_blocks(config: Any, error: Exception) -> FaspError:
    return FaspError(
        f"speedup times single blocks, of which a {config.model_type} config makes no model: {one_line(error)}; give a "
        "sparsity instead"
    )


def make_samples(
    config: Any, widths: Sequence[Widths], device: torch.device, dtype: torch.dtype, **options: Any
) -> list[Sample]:
    """Build a sample of each width, the blocks of all in the memory that the most take: one is timed after the other.

    A token reads all weights once. How many of them a cache still holds from the token before depends on their
    size, so each sample has all blocks of the model, or more bytes than any cache.

    Args:
        config: The model's.
        widths: Widths of the pairs of a block, some of them.
        device: Where to time.
        dtype: In which.
        options: Further ones of ``AutoModelForCausalLM.from_config``.
    """
    layers = layer_kinds(config)
    block = shapes_of(config, list(layers)[:1], **options)
    whole = sum(parameter.numel() for parameter in find_blocks(block, spec_for(block)).parameters())
    others = (Counter(layers) - Counter(list(layers))).elements()
    kinds, samples = [*layers, *others], list[Sample]()
    for pairs in widths:
        size = dtype.itemsize * (whole - sum(pair.removed for pair in pairs))
        some = kinds[: max(len(layers), -(-BEYOND_CACHES // size))]
        model = cut_shapes(config, some, [pairs] * len(some), dtype, options)
        samples.append(Sample(model, list(find_blocks(model, spec_for(model))), some, layers))
    lay([sample.model for sample in samples], device, dtype)
    return samples


def random_values(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(count,) random values, which repeat: an accelerator is slower on them than on zeros."""
    generator = torch.Generator(device).manual_seed(0)
    pattern = torch.empty(PATTERN, device=device, dtype=dtype).uniform_(-0.03, 0.03, generator=generator)
    values = torch.empty(count, device=device, dtype=dtype)
    whole = count - count % PATTERN
    values[:whole].view(-1, PATTERN).copy_(pattern)
    values[whole:].copy_(pattern[: count - whole])
    return values


def cut_shapes(
    config: Any, kinds: Sequence[str | None], widths: Sequence[Widths], dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """A model on the ``meta`` device, in evaluation mode.

    Args:
        config: The dense model's.
        kinds: The kind of each layer.
        widths: The widths of the pairs of each block.
        dtype: Of its parameters.
        options: Further ones of ``AutoModelForCausalLM.from_config``.
    """
    model = shapes_of(config, kinds, dtype=dtype, **options)
    pairs = resolve_pruned(model, whole={width.kind for width in widths[0]})
    for block, block_widths in zip(pairs, widths, strict=True):
        for pair, width in zip(block, block_widths, strict=True):
            pair.cut(_first_units(pair, width.after))
    record_plan(model, pairs)
    return model.eval()


def lay(models: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Give models of one config memory: blocks lie one behind the other, those of all models in the same place.

    Embeddings are one and the same, in memory of their own as in a model that is loaded: torch copies the head of some
    models on each pass, which takes half as long again at one address than at another.
    """
    heads = [random_values(shape.numel(), device, dtype) for shape in _embeddings(models[0])]
    lengths = [sum(_aligned(shape.numel()) for shape in _others(model)) for model in models]
    memory = random_values(max(lengths), device, dtype)
    for model in models:
        places = dict(zip(_embeddings(model), heads, strict=True))
        offset = 0
        for shape in _others(model):
            places[shape] = memory[offset : offset + shape.numel()]
            offset += _aligned(shape.numel())
        _put(model, places, device)


def _embeddings(model: Any) -> list[nn.Parameter]:
    """The parameters of input and output embeddings, one if they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _others(model: Any) -> list[nn.Parameter]:
    """All other parameters."""
    embeddings = set(_embeddings(model))
    return [parameter for parameter in model.parameters() if parameter not in embeddings]


def _aligned(count: int) -> int:
    """Up to where the next parameter begins: allocators align each, as kernels like it."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _put(model: Any, places: dict[nn.Parameter, torch.Tensor], device: torch.device) -> None:
    """Let each parameter be the values at its place; ones in tables and masks."""
    laid = {
        shape: nn.Parameter(values.view(shape.shape).to(shape.dtype), requires_grad=False)
        for shape, values in places.items()
    }
    for module in model.modules():
        for name, shape in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, laid[shape])
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = 0 if buffer.dtype in (torch.int32, torch.int64) else 1
            setattr(module, name, torch.full_like(buffer, value, device=device))


def _first_units(pair: ResolvedPair, units: int) -> torch.Tensor:
    """So many units, as many of each head as of the others where that is possible; which ones takes no time."""
    heads = pair.layout.groups if units % pair.layout.groups == 0 else 1
    return torch.arange(pair.layout.width).reshape(heads, -1)[:, : units // heads].reshape(-1)
