"""What changes Lightning's internals, but for what ``resuming.py`` does.

Checked against lightning 2.6.6. Comments name the upstream code that is relied upon or repaired, relative to
``lightning/pytorch``, and where something is changed its state before → after.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.slicing import Dim
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import conform, plan_of, resolve_pruned
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.training.modeling.locate import find_causal_lm
from fasp_lightning.training.sharding.shard import reshard
from fasp_lightning.training.trainer.optimizer_state import restart_states, slice_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STALE = torch.finfo(torch.float32).max
"""Stands for a monitored metric of the model before it changed: the worst finite value."""


def part(trainer: Trainer) -> None:
    """Let this process end, and write a checkpoint, without waiting for the others."""
    # ModelCheckpoint.on_exception (callbacks/model_checkpoint.py) runs where the error is, perhaps in one process
    # alone, and Trainer.save_checkpoint waits at Strategy.barrier for the others, which wait in a backward.
    trainer.strategy.barrier = lambda *_, **__: None  # type: ignore[method-assign]


def rejoin(trainer: Trainer) -> None:
    """Undo :func:`part`, in a further run of the same Trainer."""
    vars(trainer.strategy).pop("barrier", None)


def averages(trainer: Trainer) -> list[nn.Module]:
    """The averaged copies of the LightningModule that ``WeightAveraging`` callbacks hold."""
    return [average.module for average in _average_models(trainer)]


def _average_models(trainer: Trainer) -> list[AveragedModel]:
    # None before WeightAveraging.setup (callbacks/weight_averaging.py) has made the copy.
    found = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
    return [callback._average_model for callback in found if callback._average_model is not None]


@contextmanager
def unwrapped(trainer: Trainer) -> Iterator[None]:
    """Take DDP off while parameters change, and put it on anew. Not inside a forward or backward.

    DDP's reducer knows from its construction which parameters there are, their shapes, and which of them train. What
    FSDP2 has left whole after a forward is sharded again, so that the module's parameters are those of the optimizers.
    """
    reshard(trainer.lightning_module)
    # DDPStrategy.configure_ddp (strategies/ddp.py) wraps self.model. strategy.model: DistributedDataParallel → the
    # module → a new DistributedDataParallel, whose constructor compares the new shapes over the processes.
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        # This was the last reference to the old wrapper. Its reducer holds gradient accumulators of the old shapes,
        # which would refuse the new gradients ("returned an invalid gradient").
        strategy.model = trainer.lightning_module
    yield
    if wrapped:
        # With static_graph and manual optimization DDPStrategy.post_backward launches the all-reduce of a wrapper's
        # first backward, once: True → False, since the new wrapper has its first one still to come.
        strategy._pl_static_graph_delay_done = False
        strategy.configure_ddp()


def prune_attached(
    trainer: Trainer,
    model: PreTrainedModel,
    prune: Callable[[], PruningReport],
    attribute: str | None,
    whole: Collection[str],
) -> PruningReport:
    """Let ``prune`` change the model in place, and all that hangs on its shapes follow: optimizers, averages.

    Args:
        trainer: Between two optimizer steps, in :func:`unwrapped`.
        model: The causal LM in its LightningModule.
        prune: Prunes it.
        attribute: Where the model is, for the averaged copies.
        whole: Kinds of pairs of which ``prune`` cuts whole KV groups or experts.

    Returns:
        What ``prune`` returns.
    """
    old = plan_of(model)
    with eagerly():
        report = prune()
        blocks = resolve_pruned(model, whole=whole)
        restart_states(trainer.optimizers, _turned(blocks, report))
        slice_states(trainer.optimizers, _slices(blocks, old))
        for average in _average_models(trainer):
            _restart_average(average, trainer.lightning_module, model, attribute)
    if _compiles():
        # Beyond 8 shapes (torch._dynamo.config.recompile_limit) dynamo would stop compiling, with a log line only.
        torch.compiler.reset()
    return report


def _turned(blocks: list[list[ResolvedPair]], report: PruningReport) -> Iterator[Tensor]:
    """The parameters of pairs whose value dims are in another basis than before."""
    layers = {pair.layer for pair in report.pairs if pair.basis != "given"}
    for pair in chain.from_iterable(blocks):
        if pair.layer in layers:
            yield from (piece.parameter for piece in pair.pieces())


def _slices(blocks: list[list[ResolvedPair]], old: PruningPlan | None) -> Iterator[tuple[Tensor, Dim, Tensor]]:
    """How each parameter of a pair changed from the units of its old plan: (parameter, dim, positions kept)."""
    planned = old.blocks if old else repeat({}, len(blocks))
    for pairs, cut in zip(blocks, planned, strict=True):
        for pair in pairs:
            before = cut[pair.spec.consumer].kept if pair.spec.consumer in cut else range(pair.layout.width)
            yield from pair.slices(torch.tensor(before), pair.kept)


def _restart_average(average: Any, module: LightningModule, model: PreTrainedModel, attribute: str | None) -> None:
    """Let an average start again from the pruned weights: one of two structures means nothing."""
    # WeightAveraging._swap_models (callbacks/weight_averaging.py) zips the parameters of both and copies: old shapes
    # would fail there, or be broadcast. AveragedModel.n_averaged n → 0, so that update_parameters copies at its next
    # call instead of averaging.
    conform(find_causal_lm(average.module, attribute), plan_of(model))
    current = chain(module.parameters(), module.buffers())
    with torch.no_grad():
        for copy, value in zip(chain(average.module.parameters(), average.module.buffers()), current, strict=True):
            copy.copy_(value)
    average.n_averaged.zero_()


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled modules eagerly: stand-ins, new shapes and odd batches would each cost a recompilation."""
    with torch.compiler.set_stance("force_eager") if _compiles() else nullcontext():
        yield


def _compiles() -> bool:
    return "torch._dynamo" in sys.modules


def forget_best(trainer: Trainer) -> None:
    """Let what watches a metric start to compare anew: the model before the change is no rival.

    Files on disk stay. A monitored metric of the old model counts as the worst until it is logged again, so that a
    checkpoint saved in between does not carry it.
    """
    # _TrainingEpochLoop._update_learning_rates (loops/training_epoch_loop.py) steps a ReduceLROnPlateau with the loss
    # of the pruned model: worse than the dense one's, it would lower the learning rate in recovery. After _reset: best
    # inf (mode "min"), num_bad_epochs 0.
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            _outdate(trainer, config.monitor, config.scheduler.mode)
            config.scheduler._reset()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, (ModelCheckpoint, EarlyStopping)):
            continue
        worst = _outdate(trainer, callback.monitor, callback.mode)
        # EarlyStopping._evaluate_stopping_criteria (callbacks/early_stopping.py) would count recovery as no
        # improvement: wait_count n → 0, best_score → inf (mode "min"). ModelCheckpoint.check_monitor_top_k
        # (callbacks/model_checkpoint.py) would save nothing as long as the dense model is better: best_k_models {file:
        # score} → {}. Both are then as their __init__ makes them.
        if isinstance(callback, EarlyStopping):
            callback.wait_count, callback.best_score = 0, worst.sign() * torch.inf
        else:
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.kth_value = worst.sign() * torch.inf
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None


def _outdate(trainer: Trainer, monitor: str | None, mode: str) -> Tensor:
    """Let the worst value stand for a metric, if it was logged; returns that value."""
    worst = torch.tensor(STALE if mode == "min" else -STALE)
    if monitor in trainer.callback_metrics:
        trainer.callback_metrics[monitor] = worst
    return worst


def publish(trainer: Trainer, metrics: dict[str, float], step: int | None = None) -> None:
    """Give metrics to every logger at ``trainer.global_step``, and to ``trainer.callback_metrics``.

    Args:
        trainer: The Trainer.
        metrics: Name → value.
        step: Another step for the loggers.
    """
    # LightningModule.log would keep them until _LoggerConnector.should_update_logs
    # (trainer/connectors/logger_connector/logger_connector.py) allows it, every log_every_n_steps. Its
    # callback_metrics is one dict, which training and validation only add to.
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def training_loader(trainer: Trainer) -> DataLoader:
    """The one training DataLoader.

    Raises:
        FaspError: If there are several, or it is another kind of loader.
    """
    loaders = training_loaders(trainer)
    if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
        raise FaspError(no_source(", ".join(type(loader).__name__ for loader in loaders) or "none"))
    return loaders[0]


def training_loaders(trainer: Trainer) -> list[Any]:
    """Whatever the training batches come from."""
    # _FitLoop.setup_data (loops/fit_loop.py) makes it before on_train_start; trainer.train_dataloader would be a list
    # or mapping where the user gave one.
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def no_source(got: str) -> str:
    """The refusal of training data that calibration cannot be taken from."""
    return (
        "calibration needs a calibration_dataloader() of the datamodule or module, or training data from one "
        f"DataLoader, got {got}"
    )


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders, requested if the run has not come to them yet."""
    # As _FitLoop.on_run_start (loops/fit_loop.py) does it: without a sanity check they are made only now. The stage is
    # set because _EvaluationLoop.setup_data (loops/evaluation_loop.py) processes them for the trainer's stage.
    if not trainer.enable_validation:
        return []
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    return [] if loop._combined_loader is None else list(loop._combined_loader.flattened)


def on_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether no gradient is pending before this batch."""
    # _TrainingEpochLoop._accumulated_batches_reached counts windows from the epoch's first batch.
    return batch_idx % trainer.accumulate_grad_batches == 0


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimizer steps of an epoch; infinite where it cannot be known.

    That is so where the loader has no length, and where the module steps its optimizers by itself.
    """
    # ceil: _TrainingEpochLoop._should_accumulate steps on the epoch's last batch, whatever is left of its window.
    known = trainer.lightning_module.automatic_optimization and trainer.num_training_batches < math.inf
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if known else math.inf
