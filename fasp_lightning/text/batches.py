"""What a user's batch may look like: read and checked in one place, for pruning, perplexity and training alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError, FaspTypeError
from fasp_lightning.ops.likelihood import IGNORED

CALIBRATION = "calibration"
"""Source of a batch that names none."""

ROWS = ("input_ids", "attention_mask", "position_ids", "given_labels")
"""Fields of a batch that have a row for each sequence."""

READ = ("input_ids", "attention_mask", "position_ids", "labels", "weight", "source")
"""Keys of a batch that are read."""


@dataclass(frozen=True)
class TokenBatch:
    """A batch of token ids, checked, however it was given.

    Attributes:
        input_ids: (batch, seq) int64 token ids.
        attention_mask: (batch, seq), non-zero at tokens and zero at padding; ``None`` means no padding.
        position_ids: (batch, seq) positions that the model is to use; ``None`` leaves them to the model.
        given_labels: (batch, seq) int64 labels, −100 where nothing is predicted; ``None`` if the batch has none.
        weight: How much each of its tokens counts in the calibration.
        source: Name of the text it comes from.
        other: Names of what else it has; the model they are for decides whether they may be passed over.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    given_labels: Tensor | None = None
    weight: float = 1.0
    source: str = CALIBRATION
    other: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        given = {"attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids} | {name: value for name, value in given.items() if value is not None}

    @property
    def labels(self) -> Tensor:
        """(batch, seq) int64 labels; where the batch has none, every token but padding is predicted."""
        if self.given_labels is not None:
            return self.given_labels
        if self.attention_mask is None:
            return self.input_ids
        return self.input_ids.masked_fill(self.attention_mask == 0, IGNORED)

    @property
    def targets(self) -> Tensor:
        """(batch, seq) int64 labels that are predicted: −100 also where either end of a prediction is padding.

        So the first token after padding on the left counts no more than the first of a sequence without.
        """
        if self.attention_mask is None:
            return self.labels
        real = self.attention_mask.bool()
        real = torch.cat([real[:, :1], real[:, 1:] & real[:, :-1]], dim=1)
        return self.labels.masked_fill(~real, IGNORED)

    @property
    def tokens(self) -> int:
        """Number of tokens, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.bool().sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, padding left out."""
        mask = self.attention_mask
        return self.input_ids.shape[1] if mask is None else int(mask.bool().sum(1).max())

    def unmasked(self) -> TokenBatch:
        """The batch without a mask that masks nothing, so that a model is called as without padding.

        Beside ``position_ids`` it stays: transformers takes positions that start again for packed sequences where there
        is no mask, and there alone (``masking_utils._preprocess_mask_arguments``).
        """
        mask = self.attention_mask
        if mask is None or self.position_ids is not None or not bool(mask.bool().all()):
            return self
        return replace(self, attention_mask=None)

    def pieces(self, size: int | None) -> Iterator[TokenBatch]:
        """The batch in pieces of so many sequences; ``None`` leaves it whole."""
        step = size or len(self.input_ids)
        for start in range(0, len(self.input_ids), step):
            yield replace(self, **{name: value[start : start + step] for name, value in self._rows().items()})

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._rows().items()})

    def _rows(self) -> dict[str, Any]:
        rows = {name: getattr(self, name) for name in ROWS}
        return {name: value for name, value in rows.items() if value is not None}


def each_batch(batches: Any) -> Iterable[Any]:
    """Go through what is given as batches, of which a single one is all there are: its keys or rows are none.

    Args:
        batches: An iterable of batches, such as a tensor of three dimensions; or one batch, a mapping or a tensor.

    Raises:
        FaspTypeError: If it is neither.
    """
    if isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.ndim <= 2):
        return [batches]
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        raise FaspTypeError(
            f"batches must be an iterable of batches, or one batch, got {type(batches).__name__}; token_batches makes "
            "them of a text, a tokenizer with return_tensors='pt' makes one"
        )
    return batches


def read_batch(batch: Any, what: str = "a batch", remedy: str = "") -> TokenBatch:
    """Read a user's batch, and refuse what is none.

    Args:
        batch: (batch, seq) int64 token ids; or a mapping that has them as ``input_ids``, and may have
            ``attention_mask``, ``position_ids``, ``labels`` (−100 where nothing is predicted), ``weight`` (how much
            each token counts in the calibration) and ``source`` (the name of the text), other keys being noted;
            or a list or tuple whose first entry is one of both, as a ``TensorDataset`` gives it.
        what: What the batch is, for messages.
        remedy: What to do where it is none, for messages.

    Raises:
        FaspTypeError: If the batch, or an entry of it, is of another type.
        FaspError: If a dtype or shape is wrong, the batch is empty, or its weight is not positive and finite.
    """
    try:
        return _read(batch, what)
    except FaspError as error:
        if remedy:
            raise type(error)(f"{error}; {remedy}") from None
        raise


def as_mapping(batch: Any) -> Any:
    """A batch as the mapping that :func:`read_batch` reads; what is none comes back as it is."""
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        batch = batch[0]
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def labelled(batches: list[Tensor], source: str, weight: float = 1.0) -> list[dict[str, Any]]:
    """Batches of one text that say which text it is, and how much each of its tokens counts.

    Args:
        batches: (batch, seq) token ids.
        source: Name of the text.
        weight: Weight of each token.
    """
    return [{"input_ids": ids, "source": source, "weight": weight} for ids in batches]


def check_vocabulary(input_ids: Tensor, vocab_size: int, text: str = CALIBRATION, name: str = "input_ids") -> None:
    """Refuse token ids that have no embedding: looking them up would crash without naming them.

    Only ids that occur count: a tokenizer may have more tokens than the model has embeddings.

    Args:
        input_ids: Token ids of any shape.
        vocab_size: Number of embeddings of the model.
        text: The text that they are from, for the message.
        name: What they are, for the message.

    Raises:
        FaspError: If an id is negative, or ``vocab_size`` or more.
    """
    outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if outside.numel():
        raise FaspError(
            f"{name} must be in [0, {vocab_size}), the model's vocabulary, got {int(outside[0])}; "
            f"the text is {text!r}, the model has {vocab_size} embeddings: use the tokenizer that belongs to the "
            "model, or give it more embeddings by resize_token_embeddings"
        )


def _read(batch: Any, what: str) -> TokenBatch:
    if isinstance(batch, TokenBatch):
        return batch
    fields = as_mapping(batch)
    if not isinstance(fields, Mapping) or "input_ids" not in fields:
        wrong = FaspError if isinstance(fields, Mapping) else FaspTypeError
        got = f"keys {list(fields)}" if isinstance(fields, Mapping) else type(batch).__name__
        raise wrong(f"{what} must be a tensor of token ids or a mapping with 'input_ids', got {got}")
    input_ids, mask = fields["input_ids"], fields.get("attention_mask")
    _check_ids(input_ids)
    if mask is not None:
        _check_mask(mask, input_ids)
    for name in ("position_ids", "labels"):
        _check_like_ids(name, fields.get(name), input_ids)
    return TokenBatch(
        input_ids,
        mask,
        fields.get("position_ids"),
        fields.get("labels"),
        _weight(fields.get("weight")),
        str(fields.get("source") or CALIBRATION),
        tuple(str(name) for name, value in fields.items() if name not in READ and value is not None),
    )


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise FaspTypeError(f"input_ids must be a tensor of token ids, got {_without_tensor(input_ids)}")
    if input_ids.dtype != torch.int64:
        raise FaspError(f"input_ids must be int64, got {input_ids.dtype}; convert them with .long()")
    if input_ids.ndim != 2:
        one = "; make a batch of it with [None], or of several by a DataLoader" if input_ids.ndim == 1 else ""
        raise FaspError(f"input_ids must be (batch, seq), got shape {tuple(input_ids.shape)}{one}")
    if input_ids.numel() == 0:
        raise FaspError(f"input_ids must hold at least one token, got shape {tuple(input_ids.shape)}")


def _without_tensor(ids: Any) -> str:
    """What ids are that are no tensor, and how they become one."""
    name = type(ids).__name__
    if not isinstance(ids, list):
        return f"{name}; make one with torch.as_tensor"
    if any(isinstance(one, Tensor) for one in ids):  # torch.utils.data.default_collate turns rows of lists into columns
        return f"{name} of tensors; give the DataLoader the data set's with_format('torch'), or a collate_fn that pads"
    return (
        f"{name}; call the tokenizer with return_tensors='pt', or put a data set's with_format('torch') in a DataLoader"
    )


def _check_mask(mask: Any, input_ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise FaspTypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != input_ids.shape:
        raise FaspError(f"attention_mask must have input_ids' shape, {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    if mask.is_floating_point():  # 0.0 and -inf of an additive mask would be read the wrong way round
        raise FaspError(f"attention_mask must be 0 and 1 in an integer or boolean dtype, got {mask.dtype}")


def _check_like_ids(name: str, value: Any, input_ids: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise FaspTypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise FaspError(f"{name} must be int64, got {value.dtype}; convert them with .long()")
    if value.shape != input_ids.shape:
        raise FaspError(f"{name} must have input_ids' shape, {tuple(input_ids.shape)}, got {tuple(value.shape)}")


def _weight(weight: Any) -> float:
    if weight is None:
        return 1.0
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise FaspTypeError(
            f"weight of a batch must be one number, got {type(weight).__name__}; "
            "put sequences of different weights into batches of their own"
        )
    if not 0 < weight < math.inf:
        raise FaspError(
            f"weight of a batch must be positive and finite, got {weight}; leave a batch out that should not count"
        )
    return float(weight)
