"""Spec + model → modules, with every shape checked up front."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.adapters import adapters_of, is_adapter_parameter, require_in_place
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.experts.resolving import experts_of, resolve_experts
from fasp_lightning.structure.layout import PairLayout
from fasp_lightning.structure.ownership import require_plain, require_unshared
from fasp_lightning.structure.pair import ResolvedPair, shape_of
from fasp_lightning.structure.spec import WHOLE, ArchitectureSpec, CoupledPair

Kept = Mapping[str, tuple[PairLayout, Tensor]]
"""Consumer path → (original layout, units left), for the pairs of one block that were cut before."""


def find_blocks(model: nn.Module, spec: ArchitectureSpec) -> nn.ModuleList:
    """The decoder blocks.

    Raises:
        FaspError: If ``spec.layers`` is not the path of a ``ModuleList`` in this model, or that is empty.
    """
    try:
        blocks = model.get_submodule(spec.layers)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise FaspError(f"layers must be the path of a ModuleList in {type(model).__name__}, got {spec.layers!r}")
    if len(blocks) == 0:
        raise FaspError(f"{spec.layers} must hold a decoder block to prune, got none; check the model's config")
    return blocks


def resolve(
    model: nn.Module, spec: ArchitectureSpec, kept: Sequence[Kept] | None = None, whole: Collection[str] = ()
) -> list[list[ResolvedPair]]:
    """Find the pairs of every block, and check their shapes against the model's config.

    Args:
        model: A causal LM, on any device, ``meta`` included.
        spec: Its row.
        kept: What is left of the pairs that were cut before, one mapping a block.
        whole: Kinds of pairs to be had: with "groups" whole KV groups are the units of the attention, instead of value
            dims, and with "whole_experts" whole experts, instead of their hidden units. Other kinds say nothing.

    Returns:
        For each block those of the row's pairs that it has, in the order of the forward pass.

    Raises:
        FaspError: If a path or shape does not fit, or a parameter cannot be cut; the message names the layer.
    """
    blocks = find_blocks(model, spec)
    pairs = [pair.whole() if WHOLE.get(pair.kind) in whole else pair for pair in spec.pairs]
    if kept is not None and len(kept) != len(blocks):
        raise FaspError(f"plan must have {len(blocks)} blocks as the model has, got {len(kept)}")
    config = text_config(model.config)
    nowhere = _missing([pair for pair in pairs if not any(has_pair(block, pair) for block in blocks)], pairs)
    resolved = []
    for index, block in enumerate(blocks):
        name = f"{spec.layers}.{index}"
        before = kept[index] if kept else {}
        there = [pair for pair in pairs if has_pair(block, pair) or pair in nowhere]
        resolved.append([_resolve_pair(block, name, pair, spec.transposed, config, before) for pair in there])
    require_unshared(model, [layer for block in resolved for pair in block for layer in pair.linears])
    return resolved


def _missing(nowhere: list[CoupledPair], pairs: list[CoupledPair]) -> list[CoupledPair]:
    """Those of the pairs found in no block that are refused: of several FFNs, experts among them, one is enough."""
    ffns = [pair for pair in pairs if not pair.inside_attention]
    return nowhere if set(map(id, ffns)) <= set(map(id, nowhere)) else [p for p in nowhere if p.inside_attention]


def has_pair(block: nn.Module, pair: CoupledPair) -> bool:
    """Whether a block has the layers of a pair; others may have a mixer, experts or nothing in their place."""
    return all(_at(block, path) is not None for path in (pair.consumer, *pair.producers))


def has_module(block: nn.Module, path: str | None) -> bool:
    """Whether a block has a module at a path."""
    return path is not None and isinstance(_at(block, path), nn.Module)


def _at(block: nn.Module, path: str) -> Any:
    """The module, or experts' parameter, at a path; ``None`` if there is none."""
    owner: Any = block
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def device_of(pairs: Sequence[Sequence[ResolvedPair]]) -> torch.device:
    """Where the first block is that has a pair."""
    first = next(pair for block in pairs for pair in block)
    return next(first.block.parameters()).device


def columns_at(block: nn.Module, name: str, pair: CoupledPair, transposed: bool) -> int:
    """Columns that a pair's consumer has now, those of all experts together."""
    if pair.experts is not None:
        return experts_of(block, name, pair).columns
    return shape_of(linear_at(block, name, pair.consumer), transposed)[1]


def _resolve_pair(
    block: nn.Module, name: str, pair: CoupledPair, transposed: bool, config: Any, before: Kept
) -> ResolvedPair:
    if pair.experts is not None:
        return resolve_experts(block, name, pair, config, before.get(pair.consumer))
    heads = getattr(config, "num_attention_heads", None)
    columns = shape_of(linear_at(block, name, pair.consumer), transposed)[1]
    rows = tuple(shape_of(linear_at(block, name, path), transposed)[0] for path in pair.producers)
    if pair.consumer in before:
        layout, kept = before[pair.consumer]
        if (layout.kind, layout.fused, len(layout.producer_rows)) != (pair.kind, pair.fused, len(rows)):
            raise FaspError(f"plan of {name}.{pair.consumer} must be for a pair of kind {pair.kind!r}, got {layout}")
    else:
        layout = _fresh_layout(f"{name}.{pair.consumer}", pair, columns, rows, heads)
        kept = torch.arange(layout.width, device="cpu")
    resolved = ResolvedPair(block, name, pair, layout, kept, transposed)
    expected = (layout.columns(kept).numel(), *(layout.rows(i, kept).numel() for i in range(len(rows))))
    for path, found, wanted in zip((pair.consumer, *pair.producers), (columns, *rows), expected, strict=True):
        if found != wanted:
            reason = "as the plan in config.fasp has it" if pair.consumer in before else f"to match {pair.consumer}"
            raise FaspError(f"{name}.{path} must have a width of {wanted} {reason}, got {found}")
    return resolved


def _fresh_layout(name: str, pair: CoupledPair, columns: int, rows: tuple[int, ...], heads: int | None) -> PairLayout:
    """Layout of a pair that was never cut; head counts follow from the shapes and the number of query heads."""
    if pair.kind == "ffn":
        parts = 2 if pair.fused else 1
        for path, found in zip(pair.producers, rows, strict=True):
            if found != parts * columns:
                raise FaspError(f"{path} must have {parts * columns} rows to feed {name}, got {found}")
        return PairLayout("ffn", columns, 1, 1, pair.fused, rows)
    if not isinstance(heads, int) or columns % heads:
        raise FaspError(f"{name}: num_attention_heads must divide its {columns} columns, got {heads}")
    size = columns // heads
    groups = rows[-1] // size if pair.fused is None else (rows[0] // size - heads) // 2
    made = [groups] if pair.kind == "value" else [heads, groups, groups]  # heads that each producer makes
    if pair.fused is not None:
        made = [heads + 2 * groups]
    if groups < 1 or heads % groups or list(rows) != [size * count for count in made]:
        raise FaspError(
            f"{name}: {heads} query heads of size {size} must divide evenly among its KV heads, "
            f"got {groups} of them in {', '.join(map(str, rows))} producer rows"
        )
    if pair.kind == "groups":
        return PairLayout("groups", groups, 1, heads // groups, pair.fused, rows)
    return PairLayout("value", groups * size, groups, heads // groups, pair.fused, rows)


def linear_at(block: nn.Module, name: str, path: str) -> nn.Linear:
    """A linear layer of a block, by its path there.

    Raises:
        FaspError: If there is none, or one that cannot be cut; the message has ``name``, the block's path.
    """
    try:
        linear = cast(nn.Linear, block.get_submodule(path))
    except AttributeError:
        raise FaspError(f"{name} must have a module {path!r}; correct the row of this model_type") from None
    require_in_place(block, name, path)
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        kind = f"{type(linear).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise FaspError(f"{name}.{path} must be a linear layer with a floating-point weight, got {kind}")
    require_plain(f"{name}.{path}", linear)
    adapters_of(f"{name}.{path}", linear)  # refuses those that cannot be cut along
    return linear


def linear_parameters(model: nn.Module, spec: ArchitectureSpec) -> int:
    """P_all of a model as it is: weights and biases of the linear layers in its decoder blocks.

    A linear layer is a leaf module with a two-dimensional weight that is not an embedding, so that ``Conv1D`` and
    a family's own linear classes count, and so do the layers of experts, each a slice of a three-dimensional one.
    Low-rank adapters do not: they end in the weights they belong to.
    """
    experts = tuple(f".{pair.consumer.rpartition('.')[0]}" for pair in spec.pairs if pair.experts is not None)
    return sum(
        sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in find_blocks(model, spec).named_modules()
        if (is_linear(module) and not is_adapter_parameter(name)) or name.endswith(experts)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in the sense of :func:`linear_parameters`."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def parameter_count(model: nn.Module) -> int:
    """All parameters of a model; tied ones count once, low-rank adapters not at all."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not is_adapter_parameter(name))
