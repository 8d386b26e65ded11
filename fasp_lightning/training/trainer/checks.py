"""What a run refuses at its start: settings of the Trainer that pruning in its middle could not go with.

Checked against lightning 2.6.6. Comments name the upstream code, relative to ``lightning/pytorch``.
"""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from fasp_lightning.errors import FaspError
from fasp_lightning.training.schedule import PruningSchedule
from fasp_lightning.training.trainer.optimizer_state import check_optimizer
from fasp_lightning.training.trainer.surgery import no_source, steps_per_epoch


def check_trainer(trainer: Trainer) -> None:
    """Refuse what cannot follow a change of shapes in the middle of a run.

    Raises:
        FaspError: For FSDP1 and DeepSpeed, PowerSGD, ``ModelPruning``, and ``StochasticWeightAveraging``.
    """
    strategy = trainer.strategy
    # DeepSpeedStrategy (strategies/deepspeed.py) derives from DDPStrategy, but holds its own copies of the weights.
    sharded = isinstance(strategy, DeepSpeedStrategy)
    if sharded or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        raise FaspError(
            "strategy must be a single device, ddp or ModelParallelStrategy to prune during fit, got "
            f"{type(strategy).__name__}; prune first (fasp prune, FASPPruner) and train the saved folder, or shard by "
            "ModelParallelStrategy (FSDP2)"
        )
    # DDPStrategy._register_ddp_hooks (strategies/ddp.py) hands the same state object to each new DDP wrapper; PowerSGD
    # keeps in it errors of the shapes of the old gradient buckets.
    if type(getattr(strategy, "_ddp_comm_state", None)).__name__ == "PowerSGDState":
        raise FaspError(
            "strategy must have no PowerSGDState as ddp_comm_state beside FASPPruning, its errors would keep the old "
            "shapes; use a hook without such state, as bf16_compress_hook"
        )
    # ModelPruning.setup (callbacks/pruning.py) puts masked copies, weight_orig, in the place of the weights.
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise FaspError(
            "callbacks must not hold ModelPruning beside FASPPruning, its masks would keep the old shapes; take it "
            "out, or run it before and make its masks permanent (torch.nn.utils.prune.remove)"
        )
    # Its setup (callbacks/stochastic_weight_avg.py) deep-copies the module, and update_parameters zips the two.
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise FaspError(
            "callbacks must not hold StochasticWeightAveraging beside FASPPruning, its copy would keep the old shapes; "
            "use EMAWeightAveraging or WeightAveraging, which follow"
        )


def starts_by_spawn(trainer: Trainer) -> bool:
    """Whether workers are spawned or forked, and the main process loads their state."""
    # _MultiProcessingLauncher._recover_results_in_main_process (strategies/launchers/multiprocessing.py) loads a
    # worker's pruned state dict into the main process's module, which was never pruned.
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def check_spawn(trainer: Trainer, module: LightningModule, carried: bool) -> None:
    """Refuse spawned processes whose pruned state the main process could not load.

    Args:
        trainer: The Trainer.
        module: Its LightningModule.
        carried: Whether :func:`~fasp_lightning.carry_structure` was called on it before the processes were started.

    Raises:
        FaspError: If it was not.
    """
    if starts_by_spawn(trainer) and not carried:
        raise FaspError(
            f"strategy must be 'ddp' for {type(module).__name__}, got one that spawns its processes, whose "
            "pruned state the main process could not load; or call carry_structure(self) at the end of its __init__"
        )


def check_optimizers(trainer: Trainer, schedule: PruningSchedule) -> None:
    """Refuse optimizers that could not follow; say how steps are counted where there are several.

    Args:
        trainer: With its optimizers.
        schedule: All events.

    Raises:
        FaspError: If the state of an optimizer has another shape than its parameter.
    """
    for optimizer in trainer.optimizers:
        check_optimizer(optimizer)
    # _TrainingEpochLoop.global_step (loops/training_epoch_loop.py) counts the steps of all optimizers together.
    if len(trainer.optimizers) > 1 and any(event.step is not None for event in schedule):
        rank_zero_warn(
            f"the steps of the schedule are those of all {len(trainer.optimizers)} optimizers together, as "
            "trainer.global_step and max_steps count them; schedule by epoch to be independent of that"
        )


def check_length(trainer: Trainer, schedule: PruningSchedule, done: int) -> None:
    """Refuse a schedule that the run will not reach the end of.

    Args:
        trainer: In ``on_train_start``.
        schedule: All events.
        done: How many of them have happened.

    Raises:
        FaspError: Naming the first event that is too late.
    """
    late = schedule.beyond(trainer.max_steps, trainer.max_epochs, steps_per_epoch(trainer), done)
    if late is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # one batch of any config
        index, event = late
        raise FaspError(
            f"schedule entry {index}, {event.to_dict()!r}, must happen within the run, which ends before; "
            "raise max_steps or max_epochs, or take the entry out"
        )


def check_training_source(trainer: Trainer) -> None:
    """Refuse, before any loader is made, training data that calibration cannot be taken from.

    Raises:
        FaspError: If ``fit`` was given something else than one DataLoader; loaders from hooks are seen later.
    """
    # _DataConnector.attach_dataloaders (trainer/connectors/data_connector.py) keeps here what fit was given: loaders,
    # or the module or datamodule whose train_dataloader() will be called.
    source = trainer.fit_loop._data_source.instance
    if not isinstance(source, (DataLoader, LightningModule, LightningDataModule)):
        raise FaspError(no_source(type(source).__name__))
