"""Calibration text sampled from the model itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.own_text.cache import FORMAT, read_ids, weights_digest, write_ids
from fasp_lightning.pruning.own_text.generation import first_tokens, sample
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.staging import fingerprint
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.text.batches import check_vocabulary, labelled, read_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN_TEXT = "own text"
"""Name of this text among the sources of a calibration set."""

BATCH_TOKENS = 1024
"""Tokens of a returned batch: enough to keep matrix products busy, little enough for any memory."""


def own_text(
    model: PreTrainedModel,
    config: OwnTextConfig,
    processes: Processes | None = None,
    starts: Tensor | None = None,
) -> list[Tensor]:
    """Sample text from a causal LM, or read from the cache what it sampled before.

    An end of text within a sequence is a token like any other: what follows is the model's next document. The outcome
    depends on the arguments and the rounding of the logits alone, not on the global random state (which stays), nor on
    the number of processes.

    Args:
        model: The model, where it is; its modes and config stay.
        config: How much, and how.
        processes: Those that hold copies of this model, and share the work; all of them call this. By default this
            process alone.
        starts: (any,) int64 tokens that the first token of each sequence is drawn from, such as those of
            :func:`calibration_starts`; by default it is the model's beginning-of-text token.

    Returns:
        This process's part: batches of (batch, seq_len) int64 token ids on the CPU.

    Raises:
        FaspError: If a process is left without a sequence, a start is not in the vocabulary, or the logits are not
            finite.
        RuntimeError: If another process raised an error.
    """
    processes = processes or Processes()
    config = within_positions(model, config)
    if config.sequences < processes.count:
        raise FaspError(
            f"own_text.tokens must give each of {processes.count} processes a sequence of {config.seq_len}, "
            f"got {config.tokens}"
        )
    if starts is not None:
        check_vocabulary(starts, ModelInputs(model).vocabulary, OWN_TEXT)
    text = _Text(model, config, starts)
    if text.folder is None:
        mine = _sampled(text, processes)
    else:
        mine = _kept(text, processes, weights_digest)[processes.rank :: processes.count]
    return list(mine.split(max(1, BATCH_TOKENS // config.seq_len)))


def text_at_hand(
    model: PreTrainedModel, config: OwnTextConfig, starts: Tensor | None, digest: Callable[[PreTrainedModel], str]
) -> list[Tensor] | None:
    """What :func:`own_text` has put into its cache; ``None`` where it is not there. Nothing is sampled.

    Args:
        model: As there; it may be on ``meta``.
        config: As there.
        starts: As there.
        digest: Hashes the weights; asked only where the cache holds anything.
    """
    text = _Text(model, within_positions(model, config), starts)
    folder = text.folder
    if folder is None or not folder.is_dir() or not any(folder.glob("*.ids")):
        return None
    ids = read_ids(text.place(digest), text.shape)
    return None if ids is None else list(ids.split(max(1, BATCH_TOKENS // text.config.seq_len)))


def own_sequences(
    model: PreTrainedModel, configs: Iterable[OwnTextConfig], processes: Processes, starts: Tensor | None = None
) -> Iterator[Tensor]:
    """Sample pieces of a long text one by one: each is kept in its cache as soon as it is written.

    Args:
        model: As for :func:`own_text`, as the others; its weights are hashed once.
        configs: One for each piece, with a folder as ``cache_dir`` and a seed of its own.
        processes: Those that share the work; all of them call this.
        starts: Tokens that the first token of each sequence is drawn from.

    Yields:
        All of the piece's sequences in every process: (sequences, seq_len) int64 token ids on the CPU.

    Raises:
        FaspError: If a start is not in the vocabulary, or the logits are not finite.
        RuntimeError: If another process raised an error.
    """
    if starts is not None:
        check_vocabulary(starts, ModelInputs(model).vocabulary, OWN_TEXT)
    digest = functools.cache(weights_digest)
    for config in configs:
        yield _kept(_Text(model, config, starts), processes, digest)


def within_positions(model: PreTrainedModel, config: OwnTextConfig) -> OwnTextConfig:
    """The settings with sequences no longer than the model's positions; its weights are not needed."""
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    if isinstance(longest, int) and config.seq_len > longest:
        return replace(config, seq_len=longest)
    return config


class _Text(NamedTuple):
    """What decides on own text."""

    model: PreTrainedModel
    config: OwnTextConfig
    starts: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, seq_len) of all of it."""
        return self.config.sequences, self.config.seq_len

    @property
    def folder(self) -> Path | None:
        """Where it is kept, if it is."""
        cache = self.config.cache_dir
        return None if cache in (None, "auto") else Path(str(cache)).expanduser()

    def place(self, digest: Callable[[PreTrainedModel], str]) -> Path:
        """The file that it is kept in."""
        return Path(str(self.folder)) / f"{fingerprint(FORMAT, digest(self.model), self.settings())}.ids"

    def settings(self) -> dict[str, Any]:
        """All of it but the model, as plain data."""
        config, starts = self.config, None if self.starts is None else self.starts.tolist()
        return {"shape": self.shape, "temperature": config.temperature, "seed": config.seed, "starts": starts}


def _sampled(text: _Text, processes: Processes) -> Tensor:
    """This process's sequences, every n-th one; all numbers are drawn for all of them."""
    model, config, starts = text
    generator = torch.Generator().manual_seed(config.seed)
    if starts is None:
        starts = first_tokens(model, config.sequences, generator)
    else:
        starts = starts[torch.randint(len(starts), (config.sequences,), generator=generator)]
    # with the 24 random bits of float32, a draw times a total in float64 stays below the total
    draws = torch.rand(config.sequences, config.seq_len - 1, generator=generator)
    mine = slice(processes.rank, None, processes.count)
    with processes.together():
        return sample(model, starts[mine], draws[mine], config.temperature)


def _kept(text: _Text, processes: Processes, digest: Callable[[PreTrainedModel], str]) -> Tensor:
    """All of it in every process: from a file of the first one's if there is one; else sampled, and put there."""
    found = None
    with processes.together():
        if processes.is_first:
            path = text.place(digest)
            found = path, read_ids(path, text.shape)
    path, ids = processes.from_first(found)
    if ids is not None:
        return ids
    whole = torch.empty(text.shape, dtype=torch.long)
    for rank, part in enumerate(processes.gather(_sampled(text, processes))):
        whole[rank :: processes.count] = part
    if processes.is_first:
        write_ids(path, whole)
    return whole


def calibration_starts(batches: list[Any], processes: Processes | None = None) -> Tensor | None:
    """The first token of every calibration sequence: own text that starts like them is what the model is used on.

    A beginning-of-text token starts own text where the calibration text has it. Where it has none, that token can be
    the wrong start: in chat models it may open a turn, and what follows from it alone is no text.

    Args:
        batches: Calibration batches of this process.
        processes: As in :func:`own_text`.

    Returns:
        (sequences of all processes,) int64, sorted, so that their order decides nothing; ``None`` if there are none.

    Raises:
        FaspError: If a batch is refused; see :func:`~fasp_lightning.text.batches.read_batch`.
        RuntimeError: If another process raised an error.
    """
    processes = processes or Processes()
    with processes.together():
        mine = [token for batch in batches for token in _starts(batch)]
    found = sorted(token for tokens in processes.gather(mine) for token in tokens)
    return torch.tensor(found) if found else None


def _starts(batch: Any) -> list[int]:
    """The first real token of each sequence that has one."""
    given = read_batch(batch)
    mask = given.attention_mask
    real = torch.ones_like(given.input_ids, dtype=torch.bool) if mask is None else mask.bool()
    rows = real.any(1)
    return given.input_ids.gather(1, real.int().argmax(1, keepdim=True))[rows, 0].tolist()


def share_weight(share: float, calibration: float, tokens: int) -> float:
    """Weight of each token of own text with which it holds ``share`` of the whole weight.

    w · tokens = share · (w · tokens + calibration).

    Args:
        share: In (0, 1).
        calibration: Σ weight over the tokens of all other batches.
        tokens: Tokens of own text.
    """
    return share / (1 - share) * calibration / tokens


def mixed(batches: Iterable[Any], own: list[Tensor], share: float, processes: Processes | None = None) -> list[Any]:
    """Calibration batches, and after them own text with the weight that gives it its share.

    Args:
        batches: As :meth:`FASPPruner.prune` takes them; with a share of 1 they are not read.
        own: Batches of :func:`own_text`.
        share: In (0, 1].
        processes: As in :func:`own_text`; weights are summed over all of them.

    Raises:
        FaspError: If a batch is refused, or there is no token of calibration text, but it should have a share.
        RuntimeError: If another process raised an error.
    """
    if share == 1:
        return labelled(own, OWN_TEXT)
    processes = processes or Processes()
    with processes.together():
        given = list(batches)
        weight = sum(batch.weight * batch.tokens for batch in map(read_batch, given))
    calibration, tokens = processes.total(weight, sum(ids.numel() for ids in own))
    if calibration == 0:
        raise FaspError(
            "batches must hold at least one calibration token, got none; "
            "set own_text.share to 1 to calibrate on own text alone"
        )
    return [*given, *labelled(own, OWN_TEXT, share_weight(share, calibration, int(tokens)))]
