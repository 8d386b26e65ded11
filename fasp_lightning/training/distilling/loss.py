"""The loss of recovery, and the divergence from a teacher as a figure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasp_lightning.ops import distillation
from fasp_lightning.ops.likelihood import IGNORED, next_targets
from fasp_lightning.ops.loss import next_token_loss
from fasp_lightning.text.batches import TokenBatch, read_batch
from fasp_lightning.training.distilling.config import DistillationConfig
from fasp_lightning.training.distilling.teacher import Teacher


def distillation_loss(
    student_logits: Tensor, teacher: Teacher | None, batch: Any, config: DistillationConfig | None = None
) -> Tensor:
    """Loss of a batch in the ``training_step`` of a LightningModule of your own.

    Without a teacher, as before the first pruning, it is the mean NLL of the batch's predicted tokens.

    Args:
        student_logits: (batch, seq, vocabulary) of the model that trains, any floating dtype.
        teacher: ``FASPPruning.teacher``, which is ``None`` before the first event.
        batch: What the model was called with: (batch, seq) token ids, or a mapping that has them as ``input_ids``.
        config: Settings; temperature and label weight are read.

    Returns:
        Scalar, fp32.

    Raises:
        FaspError: If shapes or vocabularies do not fit, or the teacher has no answer for the batch.

    Example::

        import lightning as L
        import torch
        from fasp_lightning import DistillationConfig, FASPPruning, distillation_loss

        pruning = FASPPruning([{"step": 1, "sparsity": 0.2}])

        class MyModule(L.LightningModule):
            distillation = DistillationConfig()  # lets the callback keep a teacher

            def __init__(self, lm):
                super().__init__()
                self.lm = lm

            def training_step(self, batch, batch_idx):
                logits = self.lm(input_ids=batch["input_ids"]).logits
                return distillation_loss(logits, pruning.teacher, batch, self.distillation)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-4)

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        L.Trainer(callbacks=[pruning], max_steps=2, accelerator="cpu", **quiet).fit(MyModule(model), loader)
    """
    read, settings = read_batch(batch), config or DistillationConfig()
    if teacher is None:
        return next_token_loss(student_logits, read.targets)
    told = teacher(read)
    weights = settings.temperature, settings.label_weight
    return distillation.distillation_loss(student_logits, told, read.targets, *weights)


def divergence_in(loss: Tensor, logits: Tensor, targets: Tensor, config: DistillationConfig) -> Tensor:
    """The mean KL that is in a loss of distillation, at the temperature of the settings.

    Args:
        loss: What :func:`distillation_loss` gave with a teacher.
        logits: The student's logits it was given.
        targets: (batch, seq) labels that are predicted.
        config: The settings.
    """
    share, divergence = config.label_weight, loss.detach()
    if share:
        divergence = (divergence - share * next_token_loss(logits.detach(), targets)) / (1 - share)
    return divergence / config.temperature**2


@torch.no_grad()
def summed_divergence(logits: Tensor, teacher: Teacher, batch: TokenBatch, config: DistillationConfig) -> float:
    """Σ KL(teacher ‖ student) over a batch's predicted tokens, in nats.

    Args:
        logits: (batch, seq, vocabulary) of the student.
        teacher: The teacher.
        batch: The batch, where the logits are.
        config: Settings; both are at their temperature.
    """
    tokens = (next_targets(batch.targets) != IGNORED).sum()
    mean = distillation.distillation_loss(logits, teacher(batch), batch.targets, config.temperature)
    return float(mean * tokens) / config.temperature**2
