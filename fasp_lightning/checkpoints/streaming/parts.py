"""The parts of a model that are in memory one at a time: its blocks, and each module around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        path: Its path in the model.
        module: Its module.
        block: Whether it is a block, with all that is below it; else it is the weights of the module alone.
    """

    path: str
    module: nn.Module
    block: bool

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose own weights these are."""
        return list(self.module.modules()) if self.block else [self.module]

    def state(self) -> dict[str, Tensor]:
        """Parameters, and those buffers that are stored, by their names in the model."""
        if self.block:
            return {f"{self.path}.{name}": value for name, value in self.module.state_dict(keep_vars=True).items()}
        hidden = self.module._non_persistent_buffers_set
        own = {name: value for name, value in self.module._buffers.items() if name not in hidden}
        own |= self.module._parameters
        return {f"{self.path}.{name}": value for name, value in own.items() if value is not None}

    @property
    def numel(self) -> int:
        """Number of its weights."""
        return sum(value.numel() for value in self.state().values())


def parts_of(model: Any) -> dict[str, Part]:
    """The parts of a model by their paths, the blocks in their order, then the others.

    Args:
        model: A causal LM of a registered family.
    """
    spec = spec_for(model)
    blocks = find_blocks(model, spec)
    parts = {path: Part(path, block, True) for path, block in ((f"{spec.layers}.{i}", b) for i, b in enumerate(blocks))}
    inside = tuple(f"{path}." for path in parts)
    for path, module in model.named_modules():
        if (module._parameters or module._buffers) and path not in parts and not path.startswith(inside):
            parts[path] = Part(path, module, False)
    return parts


@torch.no_grad()
def fill_buffers(model: Any) -> None:
    """Compute buffers that are not stored, such as the frequencies of rotary embeddings.

    As ``_initialize_missing_keys`` (transformers, modeling_utils.py) does; they are small, and stay in memory.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            model._init_weights(module)
