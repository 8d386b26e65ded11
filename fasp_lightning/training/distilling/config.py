"""Settings of distillation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fasp_lightning.checkpoints.devices import require_dtype
from fasp_lightning.errors import FaspError


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of recovery by distillation: the pruned model learns what the model before its pruning predicts.

    The loss of a token is (1 − label_weight) · temperature² · KL(teacher ‖ student) + label_weight · NLL, from the
    first pruning on; before it, the NLL alone.

    Attributes:
        temperature: Both models' logits are divided by it; greater than 0. Above 1 unlikely tokens count more.
        label_weight: Share of the loss that is the text's own next tokens; in [0, 1).
        teacher: Hub id, folder, ``.gguf`` file or ``package:NAME`` of another model with the same vocabulary; by
            default the model as it was before the first event, read again from where it came. If it was trained since,
            or built from a config, it is written beside the run's checkpoints first.
        teacher_dtype: Data type of the teacher's weights; ``"auto"`` is the checkpoint's, on a CPU only where that is
            faster than fp32, as for ``fasp prune``. Name one if the run may be resumed on other hardware.
        teacher_device: Where the teacher computes, such as ``"cuda:1"``; by default where the student does.
        top_k: Ask the teacher once about all training sequences, and those of validation that events measure, before
            the first event: its likeliest tokens, so many of each prediction, are kept on disk beside the tokenised
            text, and all others are one more outcome. It is not needed afterwards, and unless one is named never stands
            beside the student. 128 tokens take 512 bytes a token of text (768 of a vocabulary beyond 65,536). By
            default the teacher is asked live, and says all.

    Example::

        from fasp_lightning import CausalLMModule, DistillationConfig, FASPPruning, LoRAConfig

        module = CausalLMModule(name, lora=LoRAConfig(rank=4), distillation=DistillationConfig(label_weight=0.1))
        pruning = FASPPruning([{"step": 1, "sparsity": 0.2}], recovery="lora")
    """

    temperature: float = 1.0
    label_weight: float = 0.0
    teacher: str | None = None
    teacher_dtype: str = "auto"
    teacher_device: str | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise FaspError(f"temperature must be a finite number > 0, got {self.temperature}")
        if not 0 <= self.label_weight < 1:
            raise FaspError(
                f"label_weight must be in [0, 1), got {self.label_weight}; leave distillation out to train on labels"
            )
        if self.top_k is not None and self.top_k < 1:
            raise FaspError(f"top_k must be at least 1, or None for the whole vocabulary, got {self.top_k}")
        for name in ("teacher", "teacher_device"):  # a path and a torch.device are no plain data
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else str(value))
        object.__setattr__(self, "teacher_dtype", str(self.teacher_dtype).removeprefix("torch."))
        require_dtype(self.teacher_dtype, "teacher_dtype")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data that YAML and weights-only checkpoints take."""
        return dataclasses.asdict(self)
