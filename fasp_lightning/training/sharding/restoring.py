"""A checkpoint of another structure, loaded into a model that is sharded already.

``ModelParallelStrategy.load_checkpoint`` (lightning/pytorch/strategies/model_parallel.py) reads each process's part of
each tensor into the model as it is, so that the shapes must be there before it: no hook of a module or callback comes
in time.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.plan import conform, plan_of
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.training.modeling.locate import find_causal_lm
from fasp_lightning.training.modeling.structure_state import KEY, plan_in_state
from fasp_lightning.training.sharding.fsdp import opened
from fasp_lightning.training.sharding.shard import is_sharded, reshard
from fasp_lightning.training.sharding.weights import replace_parameters


def restore_structure(trainer: Trainer, module: LightningModule, attribute: str | None = None) -> None:
    """Let a sharded model take the structure of each checkpoint that is loaded, before its weights.

    Args:
        trainer: Nothing happens unless its strategy shards.
        module: Its LightningModule.
        attribute: See :func:`~fasp_lightning.training.modeling.locate.find_causal_lm`.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        strategy.load_checkpoint = partial(_load, strategy, module, attribute)  # type: ignore[method-assign]


def _load(
    strategy: ModelParallelStrategy, module: LightningModule, attribute: str | None, checkpoint_path: Any, **options: Any
) -> dict[str, Any]:
    model = find_causal_lm(module, attribute)
    path = Path(strategy.broadcast(checkpoint_path))
    plan = plan_in_state(_structure(path))
    if is_sharded(model) and plan != plan_of(model):
        if not module.strict_loading:
            raise FaspError(
                "strict_loading must be true where a checkpoint has other shapes than the sharded model: weights that it "
                "lacks would be zero; name the pruned folder as the module's model"
            )
        reshard(module)
        blocks = [opened(block, values=False) for block in find_blocks(model, spec_for(model))]
        conform(model, plan)
        for block in blocks:
            for home in block.homes:
                _fill(home.owner, home.name, strategy.root_device)
            replace_parameters(strategy.optimizers, block.close())
    return type(strategy).load_checkpoint(strategy, checkpoint_path, **options)


def _fill(owner: nn.Module, name: str, device: torch.device) -> None:
    """Memory for a parameter on ``meta``, until its block is sharded again."""
    old = owner.get_parameter(name)
    if old.is_meta:
        setattr(owner, name, nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad))


def _structure(path: Path) -> dict[str, Tensor]:
    """The entry of a checkpoint's state dict that says which structure it has; a folder has one file a process."""
    if not path.is_dir():
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        return {KEY: state[KEY]} if KEY in state else {}
    from torch.distributed import checkpoint

    found: Any = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata.get(f"state_dict.{KEY}")
    if found is None:
        return {}
    read = {"state_dict": {KEY: torch.empty(found.size, dtype=torch.uint8)}}
    checkpoint.load(read, checkpoint_id=path, no_dist=True)
    return read["state_dict"]
