"""Text for calibration and evaluation: which documents, and how they become batches of token ids."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.batches import weighted
from fasp_lightning.pruning.corpora import BUILTIN, SHARES, builtin_splits, split_of
from fasp_lightning.pruning.text_files import hub_documents, is_local, local_documents

SPLITS = tuple(SHARES)
"""The splits of built-in and local text."""

POOL_BLOCKS, POOL_FACTOR = 1024, 16
"""A sample of n sequences is drawn from the first max(`POOL_BLOCKS`, `POOL_FACTOR` · n) blocks; what lies
beyond is not read, so that a data set of any size costs little."""

GROUP_LENGTH = 1_000_000
"""Characters, at least, tokenized by one call: tokenizers are fast on many texts at once."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HUB_SPLITS = {"calibration": "train"}  # no data set on the hub has a calibration split


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how much of it.

    Attributes:
        source: builtin:topics (Python's help topics), builtin:docstrings (of the standard library's modules),
            a local .txt, .jsonl or .parquet file, a folder or glob pattern of such files, or the id of a data
            set on the hub.
        subset: The configuration of a data set on the hub, where it has several.
        split: For built-in and local text one of calibration, train, test, validation, which share no
            document; None is all of a local text. For the hub a split of the data set.
        column: The column or key of a .jsonl file, .parquet file or data set that holds the text.
        seq_len: Tokens of a sequence.
        sequences: Number of sequences, drawn at random where the text has more; None takes the whole text.
        seed: Seed of that drawing.
        batch_size: Sequences of a batch.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there. WikiText,
            whose rows on the hub are paragraphs, is commonly joined with two line feeds.
        weight: How much each token of this text counts beside other calibration texts; for calibration alone.

    Raises:
        FaspError: If a field is outside its range, or the source is neither of those above.
    """

    source: str = "builtin:topics"
    subset: str | None = None
    split: str | None = None
    column: str = "text"
    seq_len: int = 512
    sequences: int | None = 64
    seed: int = 0
    batch_size: int = 1
    separator: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        kind = self.kind  # refuses an unknown source
        if kind != "hub" and self.split is not None and self.split not in SPLITS:
            raise FaspError(_bad_split(self))
        if kind != "hub" and self.subset is not None:
            raise FaspError(f"subset is for the hub alone, got {self.subset!r} with source {self.source!r}")
        if self.seq_len < 2:
            raise FaspError(f"seq_len must be 2 or more, got {self.seq_len}: one token predicts nothing")
        for name, value in (("sequences", self.sequences), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise FaspError(f"{name} must be 1 or more, got {value}")
        if not 0 < self.weight < math.inf:
            raise FaspError(f"weight must be positive and finite, got {self.weight}")

    @property
    def kind(self) -> str:
        """Where the text is: "builtin", "local" or "hub". A path that exists is never taken for a hub id."""
        if self.source in BUILTIN:
            return "builtin"
        if not self.source.startswith("builtin:") and self.source:
            if is_local(self.source):
                return "local"
            if _HUB_ID.fullmatch(self.source):
                return "hub"
        raise FaspError(
            f"source must be one of {', '.join(BUILTIN)}, a .txt, .jsonl or .parquet file, a folder or glob "
            f"pattern of them, or a data set on the hub, got {self.source!r}"
        )


def for_role(config: TextConfig, role: str) -> TextConfig:
    """Fill in the split that a text in some role should come from, where the config leaves it open.

    Args:
        config: The text.
        role: What it serves for, one of `SPLITS`.

    Returns:
        The config with that split (of the hub: "train" for calibration); unchanged where a split is set, and
        for local text, all of which is meant unless a split is named.

    Raises:
        FaspError: If there is no such role, or a text has a weight that does not serve for calibration.
    """
    if role not in SPLITS:
        raise FaspError(f"role must be one of {', '.join(SPLITS)}, got {role!r}")
    if role != "calibration" and config.weight != 1:
        raise FaspError(
            f"weight must be 1 for all but calibration text, got {config.weight} for {describe(config)}: each token of "
            "a text counts alike in its perplexity"
        )
    if config.split is not None or config.kind == "local":
        return config
    split = role if config.kind == "builtin" else _HUB_SPLITS.get(role, role)
    return dataclasses.replace(config, split=split)


def describe(config: TextConfig) -> str:
    """Name a text for a table: "topics (test)", "articles.jsonl", "wikitext, wikitext-2-raw-v1 (test)"."""
    name = config.source.removeprefix("builtin:")
    name = Path(name).name or name
    subset = f", {config.subset}" if config.subset else ""
    split = f" ({config.split})" if config.split else ""
    return f"{name}{subset}{split}"


def documents(config: TextConfig) -> Iterator[str]:
    """Yield the documents of a text, reading no further than is asked for.

    Args:
        config: The text. A split of local text holds the documents whose content hashes to it, so equal
            documents are in one split, and a document stays in its split wherever it stands.

    Raises:
        FaspFileNotFoundError: If a local file isn't there.
        FaspError: If built-in text is asked for without a split, or the source can't be read.
    """
    kind, split = config.kind, config.split
    if kind == "hub":
        yield from hub_documents(config.source, config.subset, split, config.column)
    elif kind == "local":
        found = local_documents(config.source, config.column, in_pieces=split is not None)
        yield from (document for document in found if split is None or split_of(document) == split)
    elif split is None:
        raise FaspError(_bad_split(config))
    else:
        yield from builtin_splits(config.source)[split]


def token_batches(config: TextConfig, tokenizer: Any) -> list[Tensor]:
    """Turn a text into batches of token ids: the documents end to end, cut into sequences without overlap.

    Args:
        config: The text.
        tokenizer: A tokenizer of transformers. It adds no special tokens; its end-of-text token, or two line
            feeds where it has none, stand between documents, unless `config.separator` says otherwise.

    Returns:
        Batches of (batch_size, seq_len) int64 token ids, the last one possibly smaller: every full sequence
        of the text, or a sample of `config.sequences`, in the order of the text, that depends on
        `config.seed` alone. `config.weight` is not in them; see :func:`calibration_batches`.

    Raises:
        FaspFileNotFoundError: If a local file isn't there.
        FaspError: If the source can't be read, or has fewer tokens than `sequences` (without it: one)
            sequences.
    """
    wanted = config.sequences
    limit = None if wanted is None else max(POOL_BLOCKS, POOL_FACTOR * wanted) * config.seq_len
    tokens = _tokens(config, tokenizer, limit)
    blocks = tokens[: len(tokens) // config.seq_len * config.seq_len].view(-1, config.seq_len)
    if len(blocks) < (wanted or 1):
        raise FaspError(_shortage(config, len(tokens)))
    if wanted is not None and len(blocks) > wanted:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))
        blocks = blocks[order[:wanted].sort().values]
    return list(blocks.split(config.batch_size))


def calibration_batches(texts: Iterable[TextConfig], tokenizer: Any) -> list[Any]:
    """The batches of several texts, each of its weight, as :meth:`FASPPruner.prune` takes them.

    Args:
        texts: The texts.
        tokenizer: As for :func:`token_batches`, which also says what is refused.
    """
    return [batch for text in texts for batch in weighted(token_batches(text, tokenizer), text.weight)]


def _bad_split(config: TextConfig) -> str:
    """Say which splits there are."""
    return f"split of source {config.source!r} must be one of {', '.join(SPLITS)}, got {config.split!r}"


def _shortage(config: TextConfig, found: int) -> str:
    """Say what is missing of a text that is too short."""
    wanted = config.sequences or 1
    split = f" (split {config.split!r})" if config.split else ""
    return (
        f"source {config.source!r}{split} is too short: it has {found} tokens, and sequences={wanted} of "
        f"seq_len={config.seq_len} need {wanted * config.seq_len}; give more text, or lower one of the two"
    )


def _tokens(config: TextConfig, tokenizer: Any, limit: int | None) -> Tensor:
    """Tokenize documents until there are `limit` tokens (None: all of them), giving (tokens,) int64."""
    tokens: list[int] = []
    for group in document_groups(documents(config)):
        tokens += encode_documents(group, tokenizer, config.separator)
        if limit is not None and len(tokens) >= limit:
            return torch.tensor(tokens[:limit], dtype=torch.long)
    return torch.tensor(tokens, dtype=torch.long)


def encode_documents(group: list[str], tokenizer: Any, separator: str | None = None) -> list[int]:
    """Token ids of documents end to end, with what stands between two also after the last one.

    Args:
        group: The documents; blank ones are passed over, unless a separator is given.
        tokenizer: A tokenizer of transformers. It adds no special tokens.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there, or two line
            feeds where it has none.
    """
    end = tokenizer.eos_token_id
    if separator is None and end is None:
        separator = "\n\n"
    if separator is not None:
        return _encode(tokenizer, [separator.join([*group, ""])])[0]
    tokens: list[int] = []
    for ids in _encode(tokenizer, [document for document in group if document.strip()]):
        tokens += [*ids, end]
    return tokens


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. `verbose` would warn that a document is longer than the model's context."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def document_groups(texts: Iterable[str], characters: int | None = None) -> Iterator[list[str]]:
    """Gather texts into lists of `characters` (None: of `GROUP_LENGTH`) characters or a little more."""
    characters = GROUP_LENGTH if characters is None else characters
    group: list[str] = []
    length = 0
    for text in texts:
        group.append(text)
        length += len(text)
        if length >= characters:
            yield group
            group, length = [], 0
    if group:
        yield group
