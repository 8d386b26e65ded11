"""What a batch of token ids may look like, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError, FaspTypeError
from fasp_lightning.ops.likelihood import IGNORED

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Entries of a batch that the model gets."""


def as_inputs(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Take the token ids and the attention mask out of a batch, whichever form it has.

    Args:
        batch: (batch, seq) int64 token ids, or a mapping that has them as `input_ids` and may have an
            `attention_mask`; its other keys are passed over.

    Returns:
        (batch, seq) int64 token ids, and the (batch, seq) mask, non-zero at tokens, or None.

    Raises:
        FaspTypeError: If the batch, its ids or its mask are something else than that.
        FaspError: If their dtype or shape is wrong, or the batch is empty.
    """
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise FaspError(f"a mapping must have 'input_ids' to be a batch, got keys {list(batch)}")
        input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    else:
        input_ids, mask = batch, None
    _check_ids(input_ids)
    if mask is not None:
        _check_mask(mask, input_ids)
    return input_ids, mask


def weight_of(batch: Any) -> float:
    """How much each token of a calibration batch counts: its `weight` if it is a mapping that has one, else 1.

    Args:
        batch: As in :func:`as_inputs`.

    Raises:
        FaspTypeError: If the weight is not one number.
        FaspError: If it is not positive, or not finite.
    """
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
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


def weighted(batches: list[Tensor], weight: float) -> list[Any]:
    """Batches of token ids of which each token counts ``weight`` times; as they are for a weight of 1."""
    return list(batches) if weight == 1 else [{"input_ids": ids, "weight": weight} for ids in batches]


def check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse token ids that have no embedding: looking them up would crash without naming them.

    Args:
        input_ids: Token ids of any shape.
        vocab_size: Number of embeddings of the model.

    Raises:
        FaspError: If an id is negative, or `vocab_size` or more.
    """
    outside = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if outside.numel():
        raise FaspError(
            f"input_ids must be in [0, {vocab_size}), the model's vocabulary, got {int(outside[0])}; "
            "use the tokenizer that belongs to the model"
        )


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise FaspTypeError(
            "a batch must be a tensor of token ids or a mapping with 'input_ids' that is one, "
            f"got {type(input_ids).__name__}"
        )
    if input_ids.dtype != torch.int64:
        raise FaspError(f"input_ids must be int64, got {input_ids.dtype}; convert them with .long()")
    if input_ids.ndim != 2:
        raise FaspError(f"input_ids must be (batch, seq), got shape {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise FaspError(f"input_ids must hold at least one token, got shape {tuple(input_ids.shape)}")


def _check_mask(mask: Any, input_ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise FaspTypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != input_ids.shape:
        raise FaspError(f"attention_mask must have input_ids' shape, {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    if mask.is_floating_point():  # 0.0 and -inf of an additive mask would be read the wrong way round
        raise FaspError(f"attention_mask must be 0 and 1 in an integer or boolean dtype, got {mask.dtype}")


def read_tokens(batch: Any, what: str, remedy: str) -> tuple[dict[str, Tensor], Tensor]:
    """What :func:`~fasp_lightning.text.batches.read_batch` makes of a user's batch, or of its first entry.

    Args:
        batch: Token ids, a mapping with ``input_ids``, or a sequence whose first entry is one of both.
        what: Name of the data, for the message.
        remedy: What to do if it is none of these, likewise.

    Raises:
        FaspError: If it is none of these.
    """
    try:
        return read_batch(batch[0] if isinstance(batch, Sequence) and batch else batch)
    except FaspError as error:
        raise FaspError(f"{what}: {error}; {remedy}") from error


def read_batch(batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A batch as what the model gets, and labels.

    Args:
        batch: (batch, seq) token ids, or a mapping with ``input_ids`` and optionally ``attention_mask``,
            ``position_ids`` and ``labels`` (-100 where ignored). Without labels every token but padding is predicted.

    Raises:
        FaspError: If it is neither.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise FaspError(
            "a batch must be a tensor of token ids or a mapping with input_ids, "
            f"got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
    labels = batch.get("labels")
    if labels is None:
        labels, mask = inputs["input_ids"], inputs.get("attention_mask")
        labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    return inputs, labels
