"""A checkpoint of another structure, loaded into a model that is sharded already.

``ModelParallelStrategy.load_checkpoint`` (lightning/pytorch/strategies/model_parallel.py) reads each process's part of
each tensor into the model as it is, so that the shapes must be there before it: no hook of a module or callback comes
in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.plan import conform, plan_of
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import find_blocks
from fasp_lightning.training.modeling.locate import find_causal_lm
from fasp_lightning.training.modeling.structure_state import KEY, plan_in_state
from fasp_lightning.training.sharding.fsdp import opened
from fasp_lightning.training.sharding.shard import is_sharded, reshard
from fasp_lightning.training.sharding.weights import replace_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    strategy: ModelParallelStrategy,
    module: LightningModule,
    attribute: str | None,
    checkpoint_path: Any,
    **options: Any,
) -> dict[str, Any]:
    model = find_causal_lm(module, attribute)
    if not is_sharded(model):
        return type(strategy).load_checkpoint(strategy, checkpoint_path, **options)
    reshard(module)
    contents = _contents(Path(strategy.broadcast(checkpoint_path)), module)
    plan = plan_in_state(contents.structure)
    if plan != plan_of(model):
        _restructure(strategy, module, model, plan)
    with _frozen_but(contents.stated, module, strategy.optimizers):
        return type(strategy).load_checkpoint(strategy, checkpoint_path, **options)


def _restructure(
    strategy: ModelParallelStrategy, module: LightningModule, model: PreTrainedModel, plan: PruningPlan | None
) -> None:
    """Give a sharded model the shapes of a plan; its weights are whatever, until they are loaded."""
    if not module.strict_loading:
        raise FaspError(
            "strict_loading must be true where a checkpoint has other shapes than the sharded model, weights that "
            "it lacks would be zero; name the pruned folder as the module's model"
        )
    blocks = [opened(block, values=False) for block in find_blocks(model, spec_for(model))]
    conform(model, plan)
    for block in blocks:
        for home in block.homes:
            _fill(home.owner, home.name, strategy.root_device)
        replace_parameters(strategy.optimizers, block.close())


def _fill(owner: nn.Module, name: str, device: torch.device) -> None:
    """Memory for a parameter on ``meta``, until its block is sharded again."""
    old = owner.get_parameter(name)
    if old.is_meta:
        setattr(owner, name, nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad))


@contextmanager
def _frozen_but(stated: set[str], module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Parameters of which a checkpoint has no optimizer state require no gradients, while inside.

    ``_init_optim_state`` (torch/distributed/checkpoint/state_dict.py) makes state of all others, and then misses it in
    the checkpoint; recovery has dropped that of parameters that it does not train.
    """
    held = {one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    trained = [one for name, one in module.named_parameters() if one in held and name not in stated]
    trained = [one for one in trained if one.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Contents(NamedTuple):
    """What a checkpoint has.

    Attributes:
        structure: The entry of its state dict that says which structure it has, if it was ever pruned.
        stated: Names of the parameters that have optimizer state.
    """

    structure: dict[str, Tensor]
    stated: set[str]


def _contents(path: Path, module: nn.Module) -> _Contents:
    """Read a file, or a folder of one file a process, but for its weights."""
    if not path.is_dir():
        whole = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        names, state = [name for name, _ in module.named_parameters()], whole["state_dict"]
        # FSDP.rekey_optim_state_dict, which Lightning calls, numbers the parameters of the module
        keys = [key for optimizer in whole.get("optimizer_states", []) for key in optimizer["state"]]
        stated = {names[key] if isinstance(key, int) else key for key in keys}
        return _Contents({KEY: state[KEY]} if KEY in state else {}, stated)
    from torch.distributed import checkpoint

    found = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    stated = {name.partition(".state.")[2].rpartition(".")[0] for name in found if name.startswith("optimizer_")}
    entry: Any = found.get(f"state_dict.{KEY}")
    if entry is None:
        return _Contents({}, stated)
    read = {"state_dict": {KEY: torch.empty(entry.size, dtype=torch.uint8)}}
    checkpoint.load(read, checkpoint_id=path, no_dist=True)
    return _Contents(read["state_dict"], stated)
