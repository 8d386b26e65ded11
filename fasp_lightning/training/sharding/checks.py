"""What cannot be done yet to a model that FSDP2 shards, refused before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from fasp_lightning.errors import FaspError, one_line
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.training.sharding.fsdp import opened
from fasp_lightning.training.sharding.shard import EXPORT_LATER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ELSE = "strategy='ddp', which holds the whole model in each process"


def check_sharded_run(
    trainer: Trainer,
    module: LightningModule,
    model: PreTrainedModel,
    pruning: PruningConfig,
    recovery: str,
    exports: bool,
) -> None:
    """Refuse settings that need the whole model in one process, where the strategy shards it.

    Args:
        trainer: In ``setup``.
        module: Its LightningModule.
        model: The causal LM.
        pruning: How the callback prunes.
        recovery: What trains after the first event.
        exports: Whether the callback writes the model at the end.

    Raises:
        FaspError: Naming all of them, and the ways out.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    parallel = trainer.strategy.device_mesh["tensor_parallel"].size()
    averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    refused = {
        f"tensor_parallel_size must be 1, got {parallel}; give all processes to data_parallel_size": parallel > 1,
        "pruning.own_text must be null, sampling would gather the model for each token": pruning.own_text is not None,
        f"pruning.score must be 'wanda' or 'magnitude', got {pruning.score!r}": pruning.scores_by_sensitivity,
        f"pruning.allocation must be 'uniform', got {pruning.allocation!r}": pruning.allocation != "uniform",
        "recovery must be 'none', 'full' or 'blocks', got adapters": recovery == "lora" or has_adapters(model),
        "distillation must be null, got settings of a teacher": getattr(module, "distillation", None) is not None,
        "callbacks must not hold WeightAveraging, whose copy would not be sharded": averaged,
        f"export_to must be null, got a folder; {EXPORT_LATER}": exports,
    }
    if reasons := [reason for reason, found in refused.items() if found]:
        raise FaspError(f"where ModelParallelStrategy shards the model, {'; '.join(reasons)}; or train with {ELSE}")


def check_sharded_model(trainer: Trainer, model: PreTrainedModel) -> None:
    """Refuse a model that ``configure_model`` has sharded in a way that an event cannot restore.

    Args:
        trainer: In ``on_fit_start``.
        model: The causal LM.

    Raises:
        FaspError: If a block is not sharded by itself, or along another dimension than the first, or is offloaded, or
            this version of torch does not let sharding be taken off.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        spec = spec_for(model)
        for index, block in enumerate(find_blocks(model, spec)):
            _check_block(f"{spec.layers}.{index}", block, trainer.strategy)
        _check_torch(trainer.strategy)


def _check_block(name: str, block: nn.Module, strategy: ModelParallelStrategy) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    sharded = [one for one in block.parameters() if isinstance(one, DTensor)]
    if not sharded or not any(isinstance(module, FSDPModule) for module in block.modules()):
        raise FaspError(
            f"{name} must be sharded by itself to be pruned during fit, got a block that is not; let configure_model "
            'call fully_shard(block, mesh=self.device_mesh["data_parallel"]) on each decoder block, then on the model'
        )
    placements: set[Any] = {place for one in sharded for place in one.placements if place.is_shard()}
    if placements != {Shard(0)}:
        raise FaspError(
            f"{name} must be sharded along dimension 0 to be pruned during fit, got {placements}; leave out "
            "shard_placement_fn"
        )
    if any(one.to_local().device != strategy.root_device for one in sharded):
        raise FaspError(
            f"{name} must be on {strategy.root_device} to be pruned during fit, got a block that is offloaded; leave "
            "out offload_policy"
        )


def _check_torch(strategy: ModelParallelStrategy) -> None:
    """Try on a small layer what an event does to blocks: ``fsdp.py`` reads what no version of torch promises."""
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(2, 2, device=strategy.root_device)
    fully_shard(layer, mesh=strategy.device_mesh["data_parallel"])
    try:
        opened(layer).close()
    except (AttributeError, LookupError, TypeError) as error:
        raise FaspError(
            "torch must be a version whose fully_shard can be taken off to prune during fit, such as 2.13, got "
            f"{torch.__version__} ({one_line(error)}); install that, or train with {ELSE}"
        ) from error
