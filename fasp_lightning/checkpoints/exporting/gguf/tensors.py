"""The tensors of a model as llama.cpp names and shapes them, each made when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fasp_lightning.checkpoints.exporting.gguf.fields import PERMUTED, Family, query_scale
from fasp_lightning.checkpoints.exporting.gguf.quantising import encoded, type_of
from fasp_lightning.checkpoints.exporting.gguf.rope import rope_tensors
from fasp_lightning.checkpoints.exporting.gguf.shapes import Shapes
from fasp_lightning.checkpoints.exporting.gguf.writing import Entry
from fasp_lightning.errors import FaspError
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.pruning_plan import targets
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m")


class Source(NamedTuple):
    """A tensor on its way into the file.

    Attributes:
        read: The tensor in the model, or in the shapes that the file holds.
        shape: Its shape.
        changes: What is done to it, in turn; each works on the meta device, too.
    """

    read: Callable[[], Tensor]
    shape: torch.Size
    changes: tuple[Change, ...] = ()

    def changed(self, change: Change) -> Source:
        """With one change more."""
        return self._replace(changes=(*self.changes, change))

    def on(self, tensor: Tensor) -> Tensor:
        """Its changes on a tensor."""
        for change in self.changes:
            tensor = change(tensor)
        return tensor

    def final_shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(self.on(torch.empty(self.shape, device="meta")).shape)

    def values(self) -> Tensor:
        """fp32, on the CPU."""
        return self.on(self.read().detach().to("cpu", torch.float32))


def entries_of(model: PreTrainedModel, family: Family, shapes: Shapes, outtype: str) -> list[Entry]:
    """All tensors of the file.

    Args:
        model: The model.
        family: Its row.
        shapes: What the file holds.
        outtype: Type of the weights.

    Raises:
        FaspError: If llama.cpp has no tensor for one of the model's.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == shapes.architecture)
    names = gguf.get_tensor_name_map(architecture, len(shapes.ffn))
    sources = dict(_changed(model, family, shapes))
    if shapes.architecture == "openelm":
        sources = dict(_fused(sources))
    found = {name: Source(partial(_same, tensor), tensor.shape) for name, tensor in _extra(model, family).items()}
    for name, source in sources.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise FaspError(f"architecture {shapes.architecture!r} of llama.cpp has no tensor for the model's {name}")
        found[known] = source
    tied = "output.weight" not in found
    return [_entry(name, source, outtype.upper(), len(shapes.ffn), tied) for name, source in found.items()]


def _extra(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    return rope_tensors(model.config, family)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _changed(model: PreTrainedModel, family: Family, shapes: Shapes) -> Iterator[tuple[str, Source]]:
    """Every tensor of the model, with all that is done to it on the way."""
    held: Any = model
    config: Any = model.config
    head = f"{next(name for name, module in model.named_modules() if module is held.get_output_embeddings())}.weight"
    embeddings, own = held.get_input_embeddings().weight, held.get_output_embeddings().weight
    tied = own is embeddings or own.data_ptr() == embeddings.data_ptr()
    filled, pairs = _zero_filled(model, shapes), _ffn_changes(model, shapes)
    linears = {id(linear.weight) for block in resolve_pruned(model) for pair in block for _, linear in pair.linears}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == head and tied:
            continue
        source = filled.get(name) or Source(partial(_same, tensor), tensor.shape)
        if spec_for(model).transposed and (id(tensor) in linears):
            source = source.changed(Tensor.t)
        for change in (*pairs.get(name, ()), *_own_changes(name, config, family, shapes)):
            source = source.changed(change)
        yield name, source


def _own_changes(name: str, config: Any, family: Family, shapes: Shapes) -> Iterator[Change]:
    """What llama.cpp wants otherwise, whether the model is pruned or not."""
    if family.norm and name.endswith("norm.weight"):
        yield partial(torch.add, other=family.norm)
    scale = query_scale(config, family, shapes.heads)
    if scale != 1.0 and name.endswith("q_norm.weight" if "gemma3" in shapes.architecture else "q_proj.weight"):
        yield partial(torch.mul, other=scale)
    if shapes.architecture in PERMUTED:
        heads = {"q_proj": shapes.heads, "k_proj": shapes.kv_heads}.get(name.split(".")[-2])
        if heads is not None:
            yield partial(_neighbours, heads=heads)


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the two that turn together are neighbours, instead of half a head apart."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _zero_filled(model: PreTrainedModel, shapes: Shapes) -> dict[str, Source]:
    """The attention's tensors that the file holds wider than the model."""
    found: dict[str, Source] = {}
    for pair, units in targets(model, resolve_pruned(model), shapes.attention):
        if pair.spec.kind != "ffn" and units.numel() > pair.kept.numel():
            for key, tensor in pair.zero_filled(units).items():
                found[f"{pair.name}.{key}"] = Source(partial(_filled, pair, units, key), tensor.shape)
    return found


def _filled(pair: ResolvedPair, units: Tensor, key: str) -> Tensor:
    return pair.zero_filled(units)[key]


def _ffn_changes(model: PreTrainedModel, shapes: Shapes) -> dict[str, list[Change]]:
    """How the tensors of the FFNs come by the width that the file holds: zeros behind the units."""
    found: dict[str, list[Change]] = {}
    for block, width in zip(resolve_pruned(model), shapes.ffn, strict=True):
        for pair in block:
            if pair.spec.kind != "ffn" or pair.kept.numel() == width:
                continue
            units = pair.kept.numel()
            found[f"{pair.layer}.weight"] = [partial(_wider, dim=1, units=units, width=width)]
            for path in pair.spec.producers:
                for part in ("weight", "bias"):
                    found[f"{pair.name}.{path}.{part}"] = [partial(_wider, dim=0, units=units, width=width)]
    return found


def _wider(tensor: Tensor, dim: int, units: int, width: int) -> Tensor:
    """Each part of so many units filled up with zeros; a fused producer has two, one behind the other."""
    parts = tensor.split(units, dim)
    zeros = [tensor.new_zeros((width - units, *tensor.shape[1:]) if dim == 0 else (tensor.shape[0], width - units))]
    return torch.cat([piece for part in parts for piece in (part, *zeros)], dim)


def _fused(sources: dict[str, Source]) -> Iterator[tuple[str, Source]]:
    """Queries, keys and values as one tensor."""
    for name, source in sources.items():
        if ".q_proj." in name:
            parts = [sources[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            rows = sum(part.final_shape()[0] for part in parts)
            shape = torch.Size((rows, *source.final_shape()[1:]))
            yield name.replace(".q_proj.", ".qkv_proj."), Source(partial(_stacked, parts), shape)
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield name, source


def _stacked(parts: list[Source]) -> Tensor:
    return torch.cat([part.values() for part in parts])


def _entry(name: str, source: Source, kind: str, blocks: int, tied: bool) -> Entry:
    shape = source.final_shape()
    own = type_of(name, shape[::-1], kind, blocks, tied)
    return Entry(name, shape, own, partial(_bytes, name, source, own))


def _bytes(name: str, source: Source, kind: str) -> np.ndarray[Any, Any]:
    """A tensor's values in its type.

    Raises:
        FaspError: If one is too large for it.
    """
    import numpy as np

    values = source.values().contiguous().numpy()
    if kind == "F16" and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise FaspError(f"{name} has values that are too large for outtype 'f16'; use 'bf16' or 'f32'")
    return encoded(values, kind)
