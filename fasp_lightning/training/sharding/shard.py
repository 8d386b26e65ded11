"""Sharding a model over processes (FSDP2, ``fully_shard``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORT_LATER = (
    "let ModelParallelStrategy(save_distributed_checkpoint=False) save a checkpoint, and export the module that "
    "load_from_checkpoint makes of it in one process"
)
"""How a sharded run's model becomes a folder."""


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard each decoder block, and what is left of the model, over the data-parallel processes, in place.

    Sharding it again changes nothing.

    Args:
        model: A causal LM with its weights in memory, the same on each process; pruned before or not.
        mesh: A mesh with the dimensions ``data_parallel`` and ``tensor_parallel``, as Lightning's
            ``ModelParallelStrategy`` makes it.

    Raises:
        FaspError: If tensor parallelism is asked for.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise FaspError(
            "tensor_parallel_size must be 1, the model is sharded over data_parallel_size processes, "
            f"got {mesh['tensor_parallel'].size()}"
        )
    if is_sharded(model):
        return
    for block in find_blocks(model, spec_for(model)):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has spread the model over processes."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(root: nn.Module) -> None:
    """Free what a forward without a backward has left whole: the module's parameters are the sharded ones."""
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
