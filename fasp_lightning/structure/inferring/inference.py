"""Rows that write themselves: the pairs of an unknown decoder, found by tracing its twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fasp_lightning.errors import FaspError, of_library
from fasp_lightning.structure.configs.text_part import text_config, text_family
from fasp_lightning.structure.inferring.ffns import ffn_pair
from fasp_lightning.structure.inferring.tracing import Trace, is_transposed, linears_of, trace_block
from fasp_lightning.structure.inferring.twin import block_list, built_with, random_tokens, run, twin
from fasp_lightning.structure.inferring.values import value_pair
from fasp_lightning.structure.resolve import resolve
from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair


def infer_spec(model_or_config: Any) -> ArchitectureSpec:
    """Find the row of a family that has none, from a tiny random model of its class: by trying, not by names.

    A layer's outputs are changed one by one, and it is seen which inputs of which later layer change. Where each
    output reaches one input at the same token, the two layers are an FFN's; where it reaches those of some heads at
    later tokens too, they are values and their consumer. What is found is not proved by it: see
    :func:`~fasp_lightning.prove`.

    Args:
        model_or_config: A causal LM on any device, ``meta`` included, or its config.

    Returns:
        The row, as :func:`~fasp_lightning.register_architecture` takes it.

    Raises:
        FaspError: If there is no list of blocks, they hold experts, or no layer's outputs reach another's inputs one
            by one; the message says what was found.

    Example::

        from fasp_lightning import infer_spec

        print(infer_spec(model).pairs[-1].consumer)
    """
    small = twin(model_or_config).double()  # so that what changes is told from what is rounded otherwise
    path, blocks = block_list(small)
    require_no_experts(small)
    traces = _traces(small, blocks)
    ffn, value = ffn_pair(traces), value_pair(small, path, traces)
    if ffn is None and value is None:
        raise FaspError(_nothing(small, path, traces))
    pairs = [pair for pair in (value, ffn) if pair is not None]
    transposed = {
        is_transposed(blocks[index].get_submodule(pair.consumer)) for pair in pairs for index in _having(blocks, pair)
    }
    if len(transposed) > 1:
        raise FaspError(f"a row must have its weights all (out, in) or all (in, out), got both in {path}")
    spec = ArchitectureSpec(path, tuple(pairs), transposed=transposed.pop(), packing=packs(small))
    return replace(spec, width_field=width_field(small, spec))


def require_no_experts(model: Any) -> None:
    """Refuse blocks whose FFN is experts, which a row does not say.

    Raises:
        FaspError: If there are some; the message names one.
    """
    path, blocks = block_list(model)
    for name, module in blocks.named_modules(prefix=path):
        many = isinstance(module, nn.ModuleList) and len(module) > 1 and len({*map(type, module)}) == 1 and name != path
        stacked = any(p.ndim == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))
        if (many or stacked) and not isinstance(module, nn.Conv1d):
            raise FaspError(
                f"{text_family(model.config)} has experts, or several FFNs side by side ({name}), which is more "
                "than a row of dense pairs says"
            )


def _traces(model: Any, blocks: nn.ModuleList) -> list[dict[str, Trace]]:
    """The traces of the blocks, one of each kind."""
    kinds: dict[Any, nn.Module] = {}
    types = getattr(text_config(model.config), "layer_types", None) or [None] * len(blocks)
    for block, kind in zip(blocks, types, strict=False):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.setdefault((shapes, kind), block)
    return [trace_block(model, block) for block in kinds.values()]


def width_field(model: Any, spec: ArchitectureSpec) -> str | None:
    """The config field from which stock code takes the FFN width, found by setting each one and building.

    Args:
        model: The twin.
        spec: Its row.
    """
    ffns = [block[-1] for block in resolve(model, spec) if block and block[-1].spec.kind == "ffn"]
    widths = {pair.layout.width for pair in ffns}
    if len(widths) != 1:
        return None
    width = widths.pop()
    shapes = _parameter_shapes(model)
    wanted = dict(shapes)
    for pair in ffns:
        layers = {f"{pair.name}.{key}": shape for key, shape in ((piece.key, piece) for piece in pair.pieces())}
        for name, piece in layers.items():
            wanted[name] = tuple(
                size // width * (width - 16) if dim == piece.dim else size for dim, size in enumerate(shapes[name])
            )
    for name, value in vars(text_config(model.config)).items():
        named = any(part in name for part in ("ffn", "inner", "intermediate"))
        if value == width or (value is None and named):
            built = built_with(model, {name: width - 16})
            if built is not None and _parameter_shapes(built) == wanted:
                return name
    return None


def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def packs(model: Any) -> bool:
    """Whether positions that start again keep two sequences of one row apart.

    Args:
        model: A twin.
    """
    tokens = random_tokens(model, 2, 6)
    together, positions = tokens.reshape(1, -1), torch.arange(6).repeat(2).unsqueeze(0)
    try:
        with torch.no_grad():
            packed = model(input_ids=together, position_ids=positions, use_cache=False).logits
    except Exception as error:  # it takes none
        if not of_library(error):
            raise
        return False
    return torch.allclose(packed.reshape(2, 6, -1), run(model, tokens), atol=1e-4)


def _having(blocks: nn.ModuleList, pair: CoupledPair) -> list[int]:
    return [index for index, block in enumerate(blocks) if {pair.consumer, *pair.producers} <= set(linears_of(block))]


def _nothing(model: Any, path: str, traces: Sequence[dict[str, Trace]]) -> str:
    """What was found where no pair was."""
    layers = ", ".join(dict.fromkeys(layer for traced in traces for layer in traced)) or "none that reads its tokens"
    return (
        f"no row could be inferred for {text_family(model.config)!r}: of the linear layers of {path} ({layers}) none "
        "has outputs that reach another's inputs one by one; a norm, a mixer or another width "
        "lies between them; register_architecture takes a row of your own"
    )
