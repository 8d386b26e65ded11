"""Parameters that can be cut: each a plain one, of its own module, in one place of the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.adapters import base_of

COMPUTED = (
    ("{}_mask", "a mask of torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, {!r})"),
    ("{}_g", "torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm(layer, {!r})"),
    ("{}_u", "torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm(layer, {!r})"),
)
"""What a module holds beside a tensor that is computed anew before each forward, by what, and how to end that."""


def require_plain(path: str, linear: nn.Module) -> None:
    """Refuse a linear layer whose weight or bias is no plain parameter of its own: to cut it would change nothing.

    Args:
        path: Its path in the model, for messages.
        linear: The layer, adapted or not.

    Raises:
        FaspError: If one of them is computed from others, a tensor of a kind of its own, or not trainable for ever.
    """
    for name in ("weight", "bias"):
        require_plain_parameter(path, base_of(linear), name)


def require_plain_parameter(path: str, module: nn.Module, name: str) -> None:
    """Refuse one attribute of a module that is no plain parameter of its own; that it has none is fine.

    Args:
        path: The module's path in the model, for messages.
        module: The module.
        name: What it calls the attribute.

    Raises:
        FaspError: As :func:`require_plain`.
    """
    value: Any = getattr(module, name, None)
    if value is None:
        return
    registered: Any = module._parameters.get(name)
    if registered is not value:
        raise FaspError(_computed(path, module, name, "pruned"))
    if wrong := _kind_that_cannot_be_cut(value):
        raise FaspError(f"{path}.{name} must be a plain dense tensor to be pruned, got {wrong}")


def require_stored(model: nn.Module) -> None:
    """Refuse a model of which a tensor is stored as what it is computed from: nothing that reads it would know how.

    Args:
        model: The model; its layers are looked at wherever they are.

    Raises:
        FaspError: If there is one.
    """
    for path, module in model.named_modules():
        computed = [name for name in vars(module) if any(hasattr(module, mark.format(name)) for mark, *_ in COMPUTED)]
        if parametrize.is_parametrized(module):
            computed += module.parametrizations
        for name in computed:
            raise FaspError(_computed(path, module, name, "saved"))


def _computed(path: str, module: nn.Module, name: str, purpose: str) -> str:
    by, remedy = _computed_by(module, name)
    return (
        f"{path}.{name} must be a parameter of its own to be {purpose}, got one that is computed by {by}; make it "
        f"permanent first, with layer = model.get_submodule({path!r}): {remedy}"
    )


def _kind_that_cannot_be_cut(value: Any) -> str | None:
    """What is wrong with a parameter, and what to do about it; ``None`` if nothing is, or once it is gathered."""
    if is_spread(value):
        return None
    if type(value) is not nn.Parameter or type(value.data) is not Tensor:
        return f"{type(value.data).__name__} in {type(value).__name__}; prune before sharding or quantising"
    if value.layout != torch.strided:
        return f"the layout {value.layout}; convert it with to_dense()"
    if torch.finfo(value.dtype).bits < 16:
        return f"{value.dtype}; load the model in float32 or bfloat16"
    if value.is_inference():
        return "one that was made in torch.inference_mode(); load the model outside of it"
    return None


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def require_unspread(layer: str, parameters: Iterable[Tensor]) -> None:
    """Refuse to cut a layer of which each process has a part.

    Args:
        layer: Its path, for the message.
        parameters: What would be cut.

    Raises:
        FaspError: If one of them is spread over processes.
    """
    if any(map(is_spread, parameters)):
        raise FaspError(
            f"{layer} must be whole to be pruned, got one that is sharded over processes; prune before sharding, or "
            "during fit with FASPPruning under ModelParallelStrategy"
        )


def _computed_by(module: nn.Module, name: str) -> tuple[str, str]:
    """What computes a tensor of a module, and what makes it a parameter again."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(each).__name__.strip("_") for each in module.parametrizations[name])  # type: ignore[index]
        return (
            f"the parametrization {kinds}",
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})",
        )
    for mark, by, remedy in COMPUTED:
        if hasattr(module, mark.format(name)):
            return by, remedy.format(name)
    return type(module).__name__, f"layer.{name} = torch.nn.Parameter(layer.{name}.detach().clone())"


def require_unshared(model: nn.Module, linears: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse layers that stand in two places: what is measured in one of them would decide for both.

    Args:
        model: The model.
        linears: Path and module of every layer of a pair.

    Raises:
        FaspError: If two places share a module or a parameter; the message names both.
    """
    places: dict[nn.Module, str] = {}
    for path, linear in linears:
        if (first := places.setdefault(linear, path)) != path:
            first, path = _outermost(model, first, path)
            raise FaspError(_shared("module", first, path, f"copy.deepcopy(model.get_submodule({first!r}))"))
    owners: dict[Any, tuple[nn.Module, str]] = {}
    for path, linear in linears:
        base = base_of(linear)
        owned = {_identity(value): (base, f"{path}.{name}") for name, value in base.named_parameters(recurse=False)}
        owners = {**owned, **owners}
    places_of_all = {base_of(linear): path for linear, path in places.items()}
    for path, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            owner, place = owners.get(_identity(value), (module, ""))
            if owner is not module:
                here = f"{places_of_all.get(module, path)}.{name}"
                raise FaspError(_shared("parameter", place, here, "torch.nn.Parameter(layer.weight.detach().clone())"))


def _identity(parameter: Tensor) -> Any:
    """Equal for two parameters whose values are in the same memory."""
    if parameter.is_meta or type(parameter.data) is not Tensor or parameter.layout != torch.strided:
        return id(parameter)
    return (parameter.device, parameter.data_ptr()) if parameter.numel() else id(parameter)


def _outermost(model: nn.Module, first: str, second: str) -> tuple[str, str]:
    """Two places of one module; those of the largest module around it that stands in both."""
    above = first.rpartition(".")[0], second.rpartition(".")[0]
    while above[0] != above[1] and model.get_submodule(above[0]) is model.get_submodule(above[1]):
        first, second = above
        above = first.rpartition(".")[0], second.rpartition(".")[0]
    return first, second


def _shared(kind: str, first: str, second: str, copy: str) -> str:
    return (
        f"{second} must be a {kind} of its own to be pruned, got that of {first}: what is measured in one place would "
        f"decide for both; put a copy there first, such as {copy}"
    )
