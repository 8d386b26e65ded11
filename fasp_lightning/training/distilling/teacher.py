"""What a teacher is, and the one that is asked live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fasp_lightning.checkpoints.devices import choose_device
from fasp_lightning.ops.distillation import TopK, top_k
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.own_text.cache import weights_digest
from fasp_lightning.text.batches import TokenBatch
from fasp_lightning.training.distilling.config import DistillationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Identity(NamedTuple):
    """Which teacher it is, as checkpoints note it.

    Attributes:
        source: Where it can be read again; ``None`` if nowhere.
        fingerprint: Hash of its weights and of what else decides on its predictions.
    """

    source: str | None
    fingerprint: str


class Teacher(Protocol):
    """Answers what is predicted on a batch of token ids. It is no ``nn.Module``, so that no module tree holds it.

    Another way to answer, such as a store of what a model once said, has the same three parts.

    Attributes:
        identity: Which model speaks; resuming a run with another one is refused.
    """

    identity: Identity

    def knows(self, batch: TokenBatch) -> bool:
        """Whether it has an answer for a batch."""

    def __call__(self, batch: TokenBatch) -> Tensor | TopK:
        """Its predictions on a batch, on the device of the batch, without gradients.

        Args:
            batch: (batch, seq) token ids, their mask and positions.

        Returns:
            (batch, seq, vocabulary) logits, any floating dtype; or, at the temperature of the settings, the likeliest
            tokens of each prediction.

        Raises:
            FaspError: If it has no answer for these tokens.
        """


class LiveTeacher:
    """A model that is asked with every batch; a :class:`Teacher`.

    Args:
        model: The model, which nobody else holds: it is frozen.
        source: Where it can be read again.
        config: Where it computes, and how much of its predictions it says.
    """

    def __init__(self, model: PreTrainedModel, source: str | None, config: DistillationConfig) -> None:
        self.model = model.eval().requires_grad_(False)
        self.identity = Identity(source, weights_digest(model))
        self._config = config
        self._inputs = ModelInputs(model)
        self._device = None if config.teacher_device is None else choose_device(config.teacher_device)

    def knows(self, batch: TokenBatch) -> bool:
        """For any tokens."""
        return True

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Tensor | TopK:
        """See :meth:`Teacher.__call__`."""
        home = batch.input_ids.device
        place = self._device or home
        if self.model.device != place:
            self.model.to(place)
        inputs = {name: value.to(place) for name, value in self._inputs(batch).items()}
        logits: Any = self.model(**inputs, use_cache=False).logits
        if self._config.top_k is None:
            return logits.to(home)
        return TopK(*(part.to(home) for part in top_k(logits, self._config.top_k, self._config.temperature)))
