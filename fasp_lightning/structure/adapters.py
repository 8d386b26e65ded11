"""Low-rank adapters on a linear layer, read by their shape: whichever library put them there is not needed here.

An adapted linear layer holds the original as ``base_layer`` and, by name, factors A (``lora_A``, r × in) and B
(``lora_B``, out × r) with a ``scaling``. What it computes is (W + Σ scaling · B A) x, W of the base.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fasp_lightning.errors import FaspError


class Adapter(NamedTuple):
    """One pair of low-rank factors.

    Attributes:
        first: Linear layer of A, (r, in).
        second: Linear layer of B, (out, r).
        scaling: Factor of B A; 0 where the adapter is switched off or in the base weight already.
    """

    first: nn.Linear
    second: nn.Linear
    scaling: float


def base_of(linear: nn.Module) -> nn.Module:
    """The linear layer itself, whether or not it is adapted."""
    return getattr(linear, "base_layer", linear)


def is_adapted(linear: nn.Module) -> bool:
    """Whether a linear layer has adapters."""
    return hasattr(linear, "base_layer")


def adapters_of(name: str, linear: nn.Module) -> list[Adapter]:
    """The adapters of a linear layer, none for a plain one.

    Args:
        name: Its path, for messages.
        linear: The layer.

    Raises:
        FaspError: If what the adapter computes is not linear in its two factors.
    """
    if not is_adapted(linear):
        return []
    adapted: Any = linear
    if not hasattr(linear, "lora_A") or getattr(linear, "lora_variant", None):
        kind = type(linear).__name__
        raise FaspError(f"{name}: an adapter must be plain LoRA to be pruned along, got {kind}; merge it first")
    on = set() if getattr(adapted, "disable_adapters", False) else set(adapted.active_adapters)
    on -= set(getattr(adapted, "merged_adapters", ()))
    return [
        Adapter(first, adapted.lora_B[key], adapted.scaling[key] if key in on else 0.0)
        for key, first in adapted.lora_A.items()
    ]


def effective_weight(base: Tensor, factors: list[Tensor], adapters: list[Adapter]) -> Tensor:
    """W + Σ scaling · B A.

    Args:
        base: (out, n) weight of the base.
        factors: (r, n) one A an adapter, with the columns of ``base``.
        adapters: What they belong to; B is read from them.
    """
    for factor, adapter in zip(factors, adapters, strict=True):
        if adapter.scaling:
            base = base + adapter.scaling * (adapter.second.weight.detach().to(factor) @ factor)
    return base


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter, and not to the model."""
    return any(part.startswith("lora_") for part in name.split("."))


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of a model is adapted."""
    return any(is_adapted(module) for module in model.modules())
