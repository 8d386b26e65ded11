"""What a causal LM is called with on a batch: all that changes what it computes, or a refusal."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.ops.likelihood import IGNORED
from fasp_lightning.structure.causal_lm import input_device
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.registry import known_architectures, spec_for
from fasp_lightning.text.batches import CALIBRATION, TokenBatch, check_vocabulary, read_batch

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")
"""What collators say packed sequences by for some attention kernels; ``position_ids`` say the same to all of them."""

log = logging.getLogger(__name__)


class ModelInputs:
    """Calls a model alike in calibration, sensitivity, own text, perplexity and training.

    A mask that has padding before tokens, without positions, gets them as ``generate`` of transformers makes them
    (``_prepare_position_ids_for_generation``: counted over real tokens), so that padding on either side changes
    nothing; but for models that count so themselves (OPT), or take no positions (Bloom, which reads the mask).

    Args:
        model: The causal LM, wrapped or not.

    Attributes:
        vocabulary: Number of its embeddings.
        device: Where they are.
        name: Class of the model, for messages.
        table: Its learned position embeddings; ``None`` where positions are computed (rotary, ALiBi), so that
            sequences may be longer than ``max_position_embeddings``, if not as good: the log warns of it.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = _causal_lm(model)
        config: Any = text_config(getattr(inner, "config", None))
        embeddings: Any = inner.get_input_embeddings()
        self.vocabulary: int = embeddings.num_embeddings
        self.device = input_device(inner)
        self.name = type(inner).__name__
        self._longest: int | None = getattr(config, "max_position_embeddings", None)
        self.table = _position_table(inner, embeddings, self._longest)
        self._takes = _arguments(inner)
        known = getattr(config, "model_type", None) in known_architectures()
        self._packs = not known or spec_for(config).packing  # of other families it is not known
        # whether positions would be those in the row: a table that is handed the mask leaves padding out by itself
        self._counts_padding = self.table is None or "attention_mask" not in _arguments(self.table)

    def __call__(self, batch: TokenBatch) -> dict[str, Tensor]:
        """The named inputs, (batch, seq) each, where they are."""
        inputs, positions = batch.inputs, self._positions(batch)
        return inputs if positions is None else inputs | {"position_ids": positions}

    def check(self, batch: TokenBatch, what: str = "a batch") -> None:
        """Refuse what the model would crash on, or what would be left out although it changes what is computed.

        Args:
            batch: The batch.
            what: What it is, for messages.

        Raises:
            FaspError: If an id has no embedding, a position no row in the model's table, or the batch has an input
                that the model takes and that is not passed on.
        """
        self._check_other(batch, what)
        text = what if batch.source == CALIBRATION else batch.source
        check_vocabulary(batch.input_ids, self.vocabulary, text)
        if batch.given_labels is not None:
            labels = batch.given_labels
            check_vocabulary(labels[labels != IGNORED], self.vocabulary, text, "labels")
        positions = self._positions(batch)
        if positions is None:
            self.check_length(batch.input_ids.shape[1] if self._counts_padding else batch.longest, what)
        else:
            self._check_positions(int(positions.min()), int(positions.max()))

    def checked(self, batch: TokenBatch, what: str = "a batch") -> dict[str, Tensor]:
        """The inputs of a batch that is not refused, on the device of the embeddings."""
        self.check(batch, what)
        return {name: value.to(self.device) for name, value in self(batch).items()}

    def check_length(self, length: int, what: str = "a batch") -> None:
        """Refuse sequences that are longer than a table of learned positions; warn of computed ones never trained on.

        Args:
            length: Tokens of a sequence.
            what: What has them, for messages.

        Raises:
            FaspError: If they are.
        """
        if self.table is None:
            self._warn_beyond(length)
        elif length > self._rows:
            raise FaspError(
                f"sequences of {what} must have at most {self._rows} tokens, the positions that {self.name} has "
                f"learned, got {length}; lower seq_len, or cut them"
            )

    @property
    def _rows(self) -> int:
        """Positions from 0 that the table has."""
        return 0 if self.table is None else self.table.num_embeddings - _offset(self.table)

    def _positions(self, batch: TokenBatch) -> Tensor | None:
        """(batch, seq) positions: those given, or derived where a model that takes them would count padding along."""
        mask = batch.attention_mask
        if batch.position_ids is not None or mask is None or not self._counts_padding:
            return batch.position_ids
        if "position_ids" not in self._takes:
            return None
        real = mask.bool().long()
        if not bool((real[:, 1:] > real[:, :-1]).any()):  # no padding before a token
            return None
        return (real.cumsum(-1) - 1).clamp_min(0)

    def _check_positions(self, lowest: int, highest: int) -> None:
        if self.table is None:
            self._warn_beyond(highest + 1)
            return
        least = -_offset(self.table)  # OPT's own positions of padding are −1
        if lowest < least or highest >= self._rows:
            wrong = lowest if lowest < least else highest
            raise FaspError(
                f"position_ids must be in [0, {self._rows}), the positions that {self.name} has learned, got {wrong}; "
                "cut the sequences, or count the positions of each from 0"
            )

    def _warn_beyond(self, length: int) -> None:
        if isinstance(self._longest, int) and length > self._longest:
            _warn_once(self.name, self._longest)

    def _check_other(self, batch: TokenBatch, what: str) -> None:
        if batch.position_ids is not None and "position_ids" not in self._takes:
            raise FaspError(
                f"{what} must not have position_ids for {self.name}, which takes none and would attend across packed "
                "sequences; give each sequence a row of its own"
            )
        if not self._packs and _is_packed(batch):
            raise FaspError(
                f"{what} must not have packed sequences (position_ids that start again) for {self.name}, which would "
                "attend across them; give each sequence a row of its own, padded, with attention_mask"
            )
        for name in batch.other:
            packed = name in PACKING and batch.position_ids is None
            if name in self._takes or packed:
                raise FaspError(
                    f"{what} must not have {name}, which changes what {self.name} computes and is not passed on; "
                    + ("give position_ids, which say the same" if packed else "leave it out, or set it to None")
                )


def check_at_hand(inputs: ModelInputs, batches: Iterable[Any], what: str = "a batch") -> None:
    """Refuse batches before anything is computed on the first of them, if they are at hand and not made one by one."""
    for batch in batches if isinstance(batches, (list, tuple)) else ():
        inputs.check(read_batch(batch), what)


def _causal_lm(model: nn.Module) -> Any:
    """The model of transformers inside a wrapper, whose own ``forward`` may say nothing about its arguments."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


@functools.cache
def _warn_once(name: str, longest: int) -> None:
    log.warning(
        "sequences are longer than the %d positions that %s was trained on (max_position_embeddings): expect worse "
        "figures; lower seq_len, or extend its positions in the config",
        longest,
        name,
    )


def _is_packed(batch: TokenBatch) -> bool:
    """Whether rows hold several sequences: positions start again, and no mask says that they are one nevertheless."""
    positions = batch.position_ids
    if positions is None or batch.attention_mask is not None:
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())


def _position_table(model: nn.Module, embeddings: nn.Module, longest: int | None) -> nn.Embedding | None:
    """The embedding with a row for each of ``max_position_embeddings`` (OPT's has some more, by its ``offset``)."""
    tables = (one for one in model.modules() if isinstance(one, nn.Embedding) and one is not embeddings)
    return next((table for table in tables if table.num_embeddings - _offset(table) == longest), None)


def _arguments(module: nn.Module) -> frozenset[str]:
    """Names that a module's ``forward`` takes."""
    return frozenset(inspect.signature(module.forward).parameters)


def _offset(table: nn.Module) -> int:
    offset = getattr(table, "offset", 0)
    return offset if isinstance(offset, int) else 0
