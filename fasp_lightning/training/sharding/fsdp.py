"""``fully_shard``, taken off modules and put on again with other shapes.

Nothing public takes it off, and a sharded parameter keeps the shape that it had: an ``FSDPParam`` notes it in its
``__init__``. So what ``fully_shard`` has put on a module is removed here from the module itself: its class, its state,
and the hooks; parameters, their values and meshes come and go by public interfaces. Checked against torch 2.13;
comments name the upstream code, relative to ``torch/distributed``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fasp_lightning.structure.ownership import is_spread
from fasp_lightning.training.sharding.shard import reshard

SETTINGS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "reduce_scatter_unused_params",
    "unshard_in_backward",
    "unshard_async_op",
)
"""What methods of an ``FSDPModule`` set on its groups after ``fully_shard``."""


class Home(NamedTuple):
    """Where a sharded parameter was.

    Attributes:
        owner: The module.
        name: Its name there.
        sharded: The parameter.
    """

    owner: nn.Module
    name: str
    sharded: nn.Parameter


@dataclass(frozen=True)
class _Unit:
    """Modules that were sharded together.

    Attributes:
        modules: Mostly one.
        options: Of ``fully_shard``.
        settings: What was set afterwards.
    """

    modules: tuple[nn.Module, ...]
    options: dict[str, Any]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """Modules whose parameters are plain ones, each whole in every process, until :meth:`close`.

    Attributes:
        units: What was sharded, outer ones before those inside them.
        homes: Where the sharded parameters were.
        plain: Those that were never sharded.
    """

    units: list[_Unit]
    homes: list[Home]
    plain: set[nn.Parameter]

    def close(self) -> dict[Tensor, nn.Parameter]:
        """Shard all again, in the shapes they have now; no other process is needed.

        Returns:
            Old sharded parameter → new one.
        """
        from torch.distributed.fsdp import fully_shard

        for unit in reversed(self.units):  # FSDP groups the parameters that no inner module has
            modules: Any = list(unit.modules) if len(unit.modules) > 1 else unit.modules[0]
            fully_shard(modules, ignored_params=self.plain, **unit.options)
            for group in _groups(unit.modules[0]):
                vars(group).update(unit.settings)
        return {home.sharded: home.owner.get_parameter(home.name) for home in self.homes}


def opened(root: nn.Module, beside: Collection[nn.Module] = (), *, values: bool = True) -> Opened:
    """Make all sharded parameters below a module plain and whole. All processes call this, in the same order.

    Args:
        root: The module.
        beside: Modules in it that stay sharded.
        values: Gather the values; otherwise the parameters are on ``meta``.
    """
    modules = list(_modules(root, beside))
    units = [unit for unit in dict.fromkeys(map(_state, modules)) if unit is not None]
    reshard(root)
    mesh = next((cast(Any, one).device_mesh for one in _parameters(modules) if is_spread(one)), None)
    found = [_unit(state, mesh) for state in units]
    plain = {one for one in _parameters(modules) if not is_spread(one)}
    homes = [
        Home(module, name, parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if is_spread(parameter)
    ]
    for state in units:
        _take_off(state)
    whole: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for home in homes:
        if home.sharded not in whole:
            value = (
                cast(Any, home.sharded.detach()).full_tensor()
                if values
                else torch.empty(home.sharded.shape, device="meta")
            )
            whole[home.sharded] = nn.Parameter(value.to(home.sharded.dtype), home.sharded.requires_grad)
        setattr(home.owner, home.name, whole[home.sharded])
    return Opened(found, homes, plain)


def _modules(root: nn.Module, beside: Collection[nn.Module]) -> Iterator[nn.Module]:
    """A module and all below it, outer ones first, but for some and what is below those."""
    left = {inner for one in beside for inner in one.modules()}
    return (module for module in root.modules() if module not in left)


def _parameters(modules: Collection[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for module in modules for parameter in module.parameters(recurse=False))


def _state(module: nn.Module) -> Any:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    return fully_shard.state(module) if isinstance(module, FSDPModule) else None  # type: ignore[attr-defined]


def _groups(module: nn.Module) -> list[Any]:
    state = _state(module)
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # before torch 2.11


def _unit(state: Any, mesh: Any) -> _Unit:
    """How a module was sharded."""
    # What fully_shard (fsdp/_fully_shard/_fully_shard.py) was given is noted in FSDPState and FSDPParamGroup alone.
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": state._mp_policy}
    groups = _groups(state._modules[0])
    if not state._auto_reshard_after_forward and groups:
        after, full = groups[0].post_forward_mesh_info, groups[0].mesh_info
        options["reshard_after_forward"] = after is not None and (after is full or after.shard_mesh_size)
    present = {name: getattr(group, name) for group in groups for name in SETTINGS if hasattr(group, name)}
    return _Unit(tuple(state._modules), options, present)


def _take_off(state: Any) -> None:
    """Undo what ``fully_shard`` did to modules; their parameters stay sharded."""
    from torch.distributed import _composable_state
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import fully_shard

    # FSDPState.init and FSDPParamGroup._register_state_dict_hooks (fsdp/_fully_shard) register these.
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in _groups(state._modules[0]):
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
        handles += [one._post_load_hook_handle for one in group.fsdp_params]
    for handle in handles:
        handle.remove()
    for module in state._modules:
        # _apply_to_module (fsdp/_fully_shard/_fsdp_init.py) puts a subclass in the place of the module's class: [that
        # of FSDP, FSDPModule, the module's own, …]. contract (_composable/contract.py) refuses a second application.
        module.__class__ = type(module).__mro__[2]
        vars(module)[STATE_KEY].pop(fully_shard.__wrapped__, None)  # type: ignore[attr-defined]
        vars(module)[REGISTRY_KEY].pop(fully_shard.__name__, None)
        _composable_state._module_state_mapping.pop(module, None)
