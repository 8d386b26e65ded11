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


def require_in_place(block: nn.Module, name: str, path: str) -> None:
    """Refuse a layer of which, or around which, a copy is trained: the model has two of it then, and cuts one.

    Args:
        block: The decoder block.
        name: Its path, for messages.
        path: Path of the layer in it.

    Raises:
        FaspError: If there is such a copy.
    """
    parts = path.split(".")
    for place in (".".join(parts[: count + 1]) for count in range(len(parts))):
        if _is_set_aside(block.get_submodule(place)):
            raise FaspError(
                f"{name}.{place} must be the one module at its place to be pruned, got a copy that is trained beside "
                "it (modules_to_save of peft); call merge_and_unload() first, or leave it out of modules_to_save"
            )


def _is_set_aside(module: nn.Module) -> bool:
    return hasattr(module, "original_module")


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
    if not _is_plain_lora(adapted):
        kinds = [type(one) for one in getattr(adapted, "lora_variant", {}).values()] or [type(adapted)]
        got = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
        raise FaspError(
            f"{name}: an adapter must be plain LoRA to be pruned along, got {got}; call merge_and_unload() first"
        )
    on = set() if getattr(adapted, "disable_adapters", False) else set(adapted.active_adapters)
    on -= set(getattr(adapted, "merged_adapters", ()))
    return [
        Adapter(first, adapted.lora_B[key], adapted.scaling[key] if key in on else 0.0)
        for key, first in adapted.lora_A.items()
    ]


def _is_plain_lora(adapted: Any) -> bool:
    """Whether all that an adapter does is to add a product of two matrices to the layer's own."""
    if getattr(adapted, "lora_variant", None) or hasattr(adapted, "parameter_name"):  # DoRA and others; of a parameter
        return False
    if not hasattr(adapted, "lora_A"):
        return False
    return all(isinstance(one, nn.Linear) for one in (*adapted.lora_A.values(), *adapted.lora_B.values()))


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
    """Whether any layer of a model is adapted, or trained as a copy beside adapters."""
    return any(is_adapted(module) or _is_set_aside(module) for module in model.modules())
