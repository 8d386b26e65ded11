"""A causal LM as a LightningModule."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.ops.loss import sequence_nll
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.text.batches import read_batch
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.distiller import (
    checked_distiller,
    distiller_of,
    load_teacher,
    save_teacher,
)
from fasp_lightning.training.distilling.loss import distillation_loss, divergence_in
from fasp_lightning.training.metrics import Perplexity
from fasp_lightning.training.modeling.building import new_model, read_model, recompute_activations, seeded
from fasp_lightning.training.modeling.export import export_model
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora, merge_lora
from fasp_lightning.training.modeling.structure_state import carry_structure
from fasp_lightning.training.sharding.restoring import restore_structure
from fasp_lightning.training.sharding.shard import shard

_DEFAULT_OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-4)


class CausalLMModule(L.LightningModule):
    """Trains a causal LM to predict the next token; its checkpoints carry the pruning plan and load on any shapes.

    Batches are (batch, seq) token ids, or mappings with ``input_ids`` and optionally ``attention_mask``,
    ``position_ids`` (of packed sequences) and ``labels`` (-100 where nothing is predicted); without labels every token
    but padding is predicted, and none at padding: on which side it is changes nothing. Logged are
    ``train_loss`` each step, and ``val_loss``, ``val_perplexity``, ``test_loss`` and ``test_perplexity`` over all
    predicted tokens. The model is ``self.model``, in training mode; call ``eval()`` to use it outside a Trainer.

    Checkpoints name the model they started from; ``load_from_checkpoint(path, name_or_path=...)`` if it has moved.
    Under ``ModelParallelStrategy`` each decoder block is sharded by itself (FSDP2), pruned before or not; checkpoints
    of either load there, too.

    Args:
        name_or_path: Model on the hub, folder (pruned ones too), ``.gguf`` file, or ``package:NAME``.
        config: Train this model from scratch instead: ``model_type``, and the fields that differ from that family's
            defaults.
        lora: Settings of low-rank adapters for the decoder blocks, or a mapping of them; then the adapters train, and
            nothing else does.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a learning rate scheduler, stepped once per optimizer step (one that watches a metric:
            once per epoch).
        gradient_checkpointing: Compute activations a second time in the backward pass, instead of keeping them.
        dtype: Data type of the weights, such as ``"float32"`` or ``"bfloat16"``; ``"auto"`` is that of the checkpoint.
            Training in 16-bit weights loses small updates: prefer ``"float32"`` with the Trainer's
            ``precision="bf16-mixed"``.
        attn_implementation: ``"eager"``, ``"sdpa"``, …; by default that of transformers.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let the repository's own code run.
        seed: Seed of the weights of a model from scratch, and of the adapters.
        distillation: Settings of recovery by distillation, or a mapping of them: from the first pruning on, or from the
            start for a model that is pruned already, the loss is the divergence from the model before it. Logged is
            ``train_kl`` too.

    Example::

        import lightning as L
        from fasp_lightning import CausalLMModule, LoRAConfig

        module = CausalLMModule(name, lora=LoRAConfig(rank=4))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(max_steps=2, accelerator="cpu", **quiet).fit(module, loader)
        module.export(folder, tokenizer)  # adapters merged; loads with AutoModelForCausalLM
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        config: dict[str, Any] | None = None,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        distillation: DistillationConfig | None = None,
    ) -> None:
        super().__init__()
        if (name_or_path is None) == (config is None):
            given = "neither" if config is None else "both"
            raise FaspError(f"exactly one of name_or_path and config must be given, got {given}")
        adapters = LoRAConfig(**lora) if isinstance(lora, dict) else lora
        # hyperparameters are plain data, so that checkpoints load with weights_only=True
        name_or_path = None if name_or_path is None else str(name_or_path)
        dtype = str(dtype).removeprefix("torch.")
        lora = adapters and adapters.to_dict()  # type: ignore[assignment]
        self.distillation = DistillationConfig(**distillation) if isinstance(distillation, dict) else distillation
        distillation = self.distillation and self.distillation.to_dict()  # type: ignore[assignment]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        # the command line reads the lambda's source, but processes can't send each other a lambda
        self.optimizer = _DEFAULT_OPTIMIZER if optimizer in _defaults() else optimizer
        self.lr_scheduler = lr_scheduler
        if name_or_path is not None:
            hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            self.model = read_model(name_or_path, dtype, attn_implementation=attn_implementation, **hub)
        else:
            self.model = new_model(config or {}, dtype, attn_implementation=attn_implementation, seed=seed)
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()
        if adapters is not None:
            self.attach_lora(adapters)
        if gradient_checkpointing:
            recompute_activations(self.model)
        self.model.train()  # Lightning leaves the mode to the module
        carry_structure(self)

    def attach_lora(self, config: LoRAConfig) -> None:
        """Give the model adapters, and note their settings in ``hparams``.

        Args:
            config: See :func:`~fasp_lightning.training.modeling.lora.attach_lora`.
        """
        with seeded(self.hparams.get("seed", 0)):
            attach_lora(self.model, config)
        self.hparams["lora"] = config.to_dict()

    def merge_lora(self) -> None:
        """Merge the model's adapters into its weights, and note in ``hparams`` that there are none."""
        merge_lora(self.model)
        self.hparams["lora"] = None

    def setup(self, stage: str) -> None:
        """Refuse a teacher that could not be used."""
        if stage == "fit":
            checked_distiller(self, self.model)

    def on_train_start(self) -> None:
        """Read the teacher of a model that is pruned already."""
        if distiller := distiller_of(self):
            distiller.start(self.trainer, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the teacher, whose weights are in no checkpoint."""
        save_teacher(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Expect the same one again."""
        load_teacher(self, checkpoint)

    def configure_model(self) -> None:
        """Shard the model if the strategy asks for it."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            restore_structure(self.trainer, self)
            shard(self.model, strategy.device_mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of every parameter that requires a gradient at this time, and the scheduler.

        Raises:
            FaspError: If there is none, they refuse their settings, or the scheduler ends before the run.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise FaspError("a parameter must require a gradient to be trained, got a model that is frozen as a whole")
        with as_refusal(lambda error: FaspError(f"optimizer cannot be made: {one_line(error)}")):
            optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return optimizer
        with as_refusal(lambda error: FaspError(f"lr_scheduler cannot be made: {one_line(error)}")):
            scheduler = self.lr_scheduler(optimizer)
        total, steps = getattr(scheduler, "total_steps", None), -1 if self._trainer is None else self.trainer.max_steps
        if total is not None and steps > total:  # OneCycleLR.get_lr raises in the step that follows
            raise FaspError(
                f"total_steps of lr_scheduler must be at least the run's max_steps, {steps}, got {total}; "
                "set both alike"
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor, "interval": "epoch"},
            }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """(batch, seq) token ids → (batch, seq, vocabulary) logits."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean NLL of the batch's predicted tokens; with a teacher, mostly their divergence from what that predicts."""
        inputs, targets = self._read(batch)
        logits, distiller = self(**inputs), distiller_of(self)
        teacher = distiller.teacher if distiller else None
        loss = distillation_loss(logits, teacher, batch, self.distillation)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(targets))
        if teacher and self.distillation:
            divergence = divergence_in(loss, logits, targets, self.distillation)
            self.log("train_kl", divergence, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``val_loss`` and ``val_perplexity``."""
        self._evaluate(batch, self.val_perplexity)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``test_loss`` and ``test_perplexity``."""
        self._evaluate(batch, self.test_perplexity)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Likelihood of each sequence: ``nll`` in nats, summed over its predicted ``tokens``; both (batch,)."""
        inputs, targets = self._read(batch)
        nll, tokens = sequence_nll(self(**inputs), targets)
        return {"nll": nll, "tokens": tokens}

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over the validation batches."""
        self._log("val", self.val_perplexity)

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity over the test batches."""
        self._log("test", self.test_perplexity)

    def _evaluate(self, batch: Any, metric: Perplexity) -> None:
        inputs, targets = self._read(batch)
        metric.update(self(**inputs), targets)

    @torch.compiler.disable  # signatures are read, and values of a mask decide
    def _read(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with on a batch, and the (batch, seq) labels that are predicted."""
        given, inputs = read_batch(batch), ModelInputs(self.model)
        inputs.check(
            given, "the data"
        )  # waits for an accelerator once a step; an assertion on it would end the process
        return inputs(given), given.targets

    def _log(self, stage: str, metric: Perplexity) -> None:
        """Log perplexity and loss, which is its logarithm: both over all tokens of all processes, no mean of means."""
        perplexity = metric.compute()
        values = {f"{stage}_loss": perplexity.log(), f"{stage}_perplexity": perplexity}
        self.log_dict(values, prog_bar=True, sync_dist=True)  # equal on all processes already; Lightning can't know
        metric.reset()

    @rank_zero_only
    def export(
        self, path: str | Path, tokenizer: Any = None, form: str = "auto", overwrite: bool = False, dtype: str = "auto"
    ) -> Path | None:
        """Write the model, LoRA merged, as safetensors and config; it can go on training afterwards.

        Args:
            path: Folder to write.
            tokenizer: Saved along if given.
            form: See :func:`~fasp_lightning.save_pruned`.
            overwrite: Replace a folder that holds a pruned model.
            dtype: See :func:`~fasp_lightning.save_pruned`.

        Returns:
            The folder; ``None`` on all processes but the first, which write nothing.

        Raises:
            FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or is no pruned model.
            FaspError: If ``form`` cannot hold the model, or the model is sharded.
        """
        return export_model(self.model, path, tokenizer, form, overwrite, dtype)


def _defaults() -> tuple[Any, ...]:
    return CausalLMModule.__init__.__defaults__ or ()
