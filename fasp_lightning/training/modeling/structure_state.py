"""A LightningModule's state dict carries the model's structure, and gives the model that structure before it is loaded.

The structure is the pruning plan and the settings of adapters. It travels in the state dict itself, not beside it,
since that is what every way of loading has in common: ``fit(ckpt_path)``, ``validate(ckpt_path)``,
``load_from_checkpoint``, weights-only checkpoints, averaged models, and the state that ``ddp_spawn`` sends back to the
main process.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.structure.adapters import has_adapters, is_adapter_parameter
from fasp_lightning.structure.plan import adopt_plan, conform, plan_of
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.training.modeling.locate import find_causal_lm
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora

KEY = "fasp_structure"
"""Entry of the state dict: a uint8 tensor of JSON. A model that was never pruned, without adapters, has none."""

_MARK = "fasp_attribute"


def carry_structure(module: nn.Module, attribute: str | None = None) -> None:
    """Let a module's state dict carry the structure of the causal LM in it.

    Args:
        module: The LightningModule. Deep copies of it do the same.
        attribute: See :func:`~fasp_lightning.training.modeling.locate.find_causal_lm`.

    Raises:
        FaspError: If the module holds no causal LM, or several.

    Example::

        import lightning as L
        from fasp_lightning import carry_structure

        class MyModule(L.LightningModule):
            def __init__(self, lm):
                super().__init__()
                self.lm = lm
                carry_structure(self)  # last: checkpoints of a pruned model load into a dense one, and the reverse

        assert "fasp_structure" not in MyModule(model).state_dict()  # nothing is cut yet
    """
    adopt_plan(find_causal_lm(module, attribute))
    if carries_structure(module):
        return
    setattr(module, _MARK, attribute)
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_read)


def carries_structure(module: nn.Module) -> bool:
    """Whether :func:`carry_structure` was called on a module."""
    return hasattr(module, _MARK)


def plan_in_state(state: dict[str, Any]) -> PruningPlan | None:
    """The plan that a state dict carries, that of a LightningModule or of a checkpoint's.

    Raises:
        FaspError: If it is damaged.
    """
    found = next((value for name, value in state.items() if name.rpartition(".")[2] == KEY), None)
    plan = None if found is None else _decode(found)["plan"]
    return plan and PruningPlan.from_dict(plan)


def _write(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    model = find_causal_lm(module, getattr(module, _MARK))
    plan, lora = plan_of(model), getattr(model, "fasp_lora", None)
    pruned = plan is not None and any(plan.blocks)
    if pruned or lora:
        state[prefix + KEY] = _encode({"plan": plan.to_dict() if plan and pruned else None, "lora": lora})


def _read(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    model = find_causal_lm(module, getattr(module, _MARK))
    if prefix + KEY not in state and not _holds(state, module, model, prefix):
        return
    structure = _decode(state.pop(prefix + KEY)) if prefix + KEY in state else {"plan": None, "lora": None}
    conform(model, structure["plan"] and PruningPlan.from_dict(structure["plan"]))
    if structure["lora"] and not has_adapters(model):
        with torch.random.fork_rng(devices=[]):  # the loaded values overwrite those drawn here
            attach_lora(model, LoRAConfig(**structure["lora"]))
    elif has_adapters(model) and not any(is_adapter_parameter(key) for key in state):
        _add_adapters(module, state, prefix)


def _holds(state: dict[str, Any], module: nn.Module, model: nn.Module, prefix: str) -> bool:
    """Whether a state dict has an entry of the model. One of other parts alone must not change the model's shapes."""
    (path,) = (name for name, one in module.named_modules(prefix=prefix.rstrip(".")) if one is model)
    return any(key.startswith(f"{path}." if path else "") for key in state)


def _add_adapters(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Let a state dict without adapters load into a module with adapters, which keep their values."""
    for key, value in module.state_dict(prefix=prefix).items():
        plain = key.replace(".base_layer.", ".")
        if plain != key and plain in state:
            state[key] = state.pop(plain)
        elif is_adapter_parameter(key):
            state[key] = value


def _encode(structure: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(structure, separators=(",", ":")).encode()), dtype=torch.uint8)


def _decode(encoded: Tensor) -> dict[str, Any]:
    structure: dict[str, Any] = json.loads(bytes(encoded.cpu().tolist()).decode())
    return structure
