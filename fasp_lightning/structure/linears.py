"""Counting the linear parameters of the decoder blocks."""

from __future__ import annotations

from torch import Tensor, nn

from fasp_lightning.structure.adapters import is_adapter_parameter
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.structure.spec import ArchitectureSpec


def linear_parameters(model: nn.Module, spec: ArchitectureSpec) -> int:
    """P_all of a model as it is: weights and biases of the linear layers in its decoder blocks.

    A linear layer is a leaf module with a two-dimensional weight that is not an embedding, so that ``Conv1D`` and
    a family's own linear classes count. Low-rank adapters do not: they end in the weights they belong to.
    """
    return sum(
        sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in find_blocks(model, spec).named_modules()
        if is_linear(module) and not is_adapter_parameter(name)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in the sense of :func:`linear_parameters`."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def parameter_count(model: nn.Module) -> int:
    """All parameters of a model; tied ones count once, low-rank adapters not at all."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not is_adapter_parameter(name))
