"""A LightningModule's state dict carries the pruning plan, and gives the model its shapes before it is loaded.

The plan travels in the state dict itself, not beside it, since that is what every way of loading has in common:
``fit(ckpt_path)``, ``validate(ckpt_path)``, ``load_from_checkpoint``, weights-only checkpoints, averaged models, and
the state that ``ddp_spawn`` sends back to the main process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.pruning.plan import PruningPlan, conform, plan_of
from fasp_lightning.training.locate import find_causal_lm

KEY = "fasp_structure"
"""Entry of the state dict: a uint8 tensor, the plan as JSON. A model that was never pruned has none."""

_MARK = "fasp_attribute"


def carry_structure(module: nn.Module, attribute: str | None = None) -> None:
    """Let a module's state dict carry the pruning plan of the causal LM in it.

    Args:
        module: The LightningModule. Deep copies of it do the same.
        attribute: See :func:`~fasp_lightning.training.locate.find_causal_lm`.

    Raises:
        ValueError: If the module holds no causal LM, or several.
    """
    find_causal_lm(module, attribute)
    if carries_structure(module):
        return
    setattr(module, _MARK, attribute)
    module.register_state_dict_post_hook(_write)
    module.register_load_state_dict_pre_hook(_read)


def carries_structure(module: nn.Module) -> bool:
    """Whether :func:`carry_structure` was called on a module."""
    return hasattr(module, _MARK)


def _write(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    plan = plan_of(find_causal_lm(module, getattr(module, _MARK)))
    if plan is not None and any(plan.blocks):
        state[prefix + KEY] = _encode(plan)


def _read(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    encoded = state.pop(prefix + KEY, None)
    conform(find_causal_lm(module, getattr(module, _MARK)), None if encoded is None else _decode(encoded))


def _encode(plan: PruningPlan) -> Tensor:
    return torch.frombuffer(bytearray(plan.to_json().encode()), dtype=torch.uint8)


def _decode(encoded: Tensor) -> PruningPlan:
    return PruningPlan.from_json(bytes(encoded.cpu().tolist()).decode())
