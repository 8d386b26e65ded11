"""Perplexity as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.likelihood import IGNORED, has_float64, next_token_nll


class Perplexity(Metric):
    """Perplexity of a causal language model: exp(Σ NLL / predicted tokens), over all that was given.

    It differs from ``torchmetrics.text.Perplexity`` where that one goes wrong: the shift by one happens inside,
    the log-softmax is taken in fp32 and in chunks (no second copy of the logits; 16-bit logits and large logit
    gaps are right), and both sums are float64 and stay so, also where Lightning casts the whole module to
    bfloat16 (``precision="bf16-true"``). On the same tokens it equals :func:`fasp_lightning.perplexity`.

    Args:
        ignore_index: Label of the tokens that don't count; −100 never counts.
        kwargs: Options of ``torchmetrics.Metric``.

    Example::

        from fasp_lightning import Perplexity

        metric = Perplexity()
        for batch in loader:
            metric.update(model(input_ids=batch["input_ids"]).logits, batch["labels"])  # labels are not shifted
        print(float(metric.compute()))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 1.0

    nll_sum: Tensor
    tokens: Tensor

    def __init__(self, ignore_index: int = IGNORED, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        for state in ("nll_sum", "tokens"):
            self.add_state(state, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> None:
        """Add a batch.

        A prediction counts iff its label isn't ignored, as in the loss of transformers, and, with a mask, iff
        the mask is non-zero both there and at the token before, which the prediction is made at.

        Args:
            logits: (batch, seq, vocabulary), as the model gives them; position t − 1 predicts token t.
            labels: (batch, seq) int64: the token ids themselves, not shifted, ``ignore_index`` where a token
                doesn't count.
            attention_mask: (batch, seq), non-zero at tokens; None means no padding.

        Raises:
            FaspError: If the shapes don't match.
        """
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise FaspError(
                "logits must be (batch, seq, vocabulary) and labels (batch, seq), "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        labels = labels.masked_fill(labels == self.ignore_index, IGNORED)
        nll, tokens = next_token_nll(logits.detach(), labels, attention_mask)
        # not in place: a reset inside ``trainer.validate`` leaves inference tensors, which ``fit`` may not change
        self.nll_sum = self.nll_sum + nll.to(self.nll_sum.device)
        self.tokens = self.tokens + tokens.to(self.tokens.device)

    def compute(self) -> Tensor:
        """The perplexity as a float64 scalar; NaN if no token counted."""
        return torch.exp(self.nll_sum / self.tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Perplexity:
        """Move the states to another device with the module, but never to another dtype.

        torchmetrics keeps its states out of ``.half()`` and the like, but not out of ``.to(torch.bfloat16)``, by
        which Lightning casts a module: a bfloat16 count of tokens ends at 256. On a device without float64 (MPS) the
        module goes alone, and its states stay on the CPU.
        """
        self._computed = self._forward_cache = None  # float64 too, and cast or moved along
        super()._apply(fn, tuple(self._defaults))
        place = self.device if has_float64(self.device) else torch.device("cpu")
        for state, default in self._defaults.items():
            setattr(self, state, getattr(self, state).to(place))
            self._defaults[state] = default.to(place)  # type: ignore[union-attr]  # no state is a list
        return self
