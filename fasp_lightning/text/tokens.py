"""Text for calibration and evaluation: which documents, and how they become batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fasp_lightning.errors import FaspError
from fasp_lightning.text.batches import labelled
from fasp_lightning.text.config import OWN_TEXT, TextConfig, describe, unknown_split
from fasp_lightning.text.corpora import builtin_splits
from fasp_lightning.text.reading.chats import Chat, rendered
from fasp_lightning.text.reading.documents import hub_documents, local_documents
from fasp_lightning.text.splits import split_of
from fasp_lightning.text.tokenizer import bos_of

POOL_BLOCKS, POOL_FACTOR = 1024, 16
"""n sequences are drawn from the first max(``POOL_BLOCKS``, ``POOL_FACTOR`` · n); what lies beyond is not read, so
that a data set of any size costs little."""

GROUP_LENGTH = 1_000_000
"""Characters, at least, tokenized by one call: tokenizers are fast on many texts at once."""


class ReadText(NamedTuple):
    """A text, read.

    Attributes:
        batches: (batch_size, seq_len) int64 token ids.
        documents: Number of documents that were read.
        chats: Number of those of which the tokenizer's chat template made text.
    """

    batches: list[Tensor]
    documents: int
    chats: int


@dataclass(frozen=True)
class Packing:
    """How documents are put end to end and cut into sequences, in memory, for the cache and in a stream.

    Attributes:
        tokenizer: A tokenizer of transformers. It adds no special tokens by itself.
        seq_len: Tokens of a sequence.
        separator: Text between two documents; ``None`` puts the tokenizer's end-of-text token there, or two line feeds
            where it has none.
        bos: The first of a sequence's tokens; ``None`` where all of them are the text's.
    """

    tokenizer: Any
    seq_len: int
    separator: str | None = None
    bos: int | None = None

    @classmethod
    def of(cls, text: TextConfig, tokenizer: Any, seq_len: int) -> Packing:
        """That of a text.

        Raises:
            FaspError: If its sequences should begin with a token that the tokenizer hasn't.
        """
        return cls(tokenizer, seq_len, text.separator, bos_of(tokenizer, text.add_bos, describe(text)))

    @property
    def taken(self) -> int:
        """Tokens of the text that a sequence takes."""
        return self.seq_len - (self.bos is not None)

    def sequence(self, tokens: list[int]) -> list[int]:
        """A sequence of ``taken`` tokens of the text."""
        return tokens if self.bos is None else [self.bos, *tokens]

    def encode(self, group: list[str]) -> list[int]:
        """Token ids of documents end to end, by :func:`encode_documents`.

        Where every sequence begins with the beginning-of-text token, a document's own one, as a chat's template writes
        it, is left out: a sequence would begin with two.
        """
        if self.bos is not None:
            own = self.tokenizer.bos_token
            group = [rendered(document, self.tokenizer).removeprefix(own) for document in group]
        return encode_documents(group, self.tokenizer, self.separator)

    @property
    def need(self) -> str:
        """What a sequence needs, for messages."""
        begin = "" if self.bos is None else ", its beginning-of-text token aside"
        return f"one sequence of seq_len={self.seq_len} needs {self.taken}{begin}"


def documents(config: TextConfig) -> Iterator[str]:
    """Yield the documents of a text, reading no further than is asked for.

    Args:
        config: The text. A split of local text holds the documents whose content hashes to it, so equal
            documents are in one split, and a document stays in its split wherever it stands.

    Raises:
        FaspFileNotFoundError: If a local file isn't there.
        FaspError: If built-in text is asked for without a split, the source can't be read, or it is own text.
    """
    kind, split = config.kind, config.split
    if kind == "hub":
        yield from hub_documents(config.source, config.subset, split, config.column)
    elif kind == "local":
        found = local_documents(config.source, config.column, in_pieces=split is not None)
        yield from (document for document in found if split is None or split_of(document) == split)
    elif kind == "own":
        raise FaspError(
            f"source {OWN_TEXT} must be one of a data module, whose run has the model that writes it; to calibrate on "
            "own text alone, set share of the pruning's own_text to 1"
        )
    elif split is None:
        raise FaspError(unknown_split(config))
    else:
        yield from builtin_splits(config.source)[split]


def pool_size(wanted: int) -> int:
    """Number of sequences from a text's start of which ``wanted`` are drawn."""
    return max(POOL_BLOCKS, POOL_FACTOR * wanted)


def draw(available: int, wanted: int, seed: int) -> Tensor:
    """Draw sequences of a text without replacement: the same for the engine and for a data module.

    Args:
        available: Number of sequences to draw from.
        wanted: Number of sequences to draw, no more than there are.
        seed: What alone decides on them; the global random state is not used.

    Returns:
        (wanted,) int64 places in [0, available), rising: drawn sequences keep the order of the text.
    """
    if wanted == available:
        return torch.arange(available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[:wanted].sort().values


def token_batches(config: TextConfig, tokenizer: Any) -> list[Tensor]:
    """Turn a text into batches of token ids: the documents end to end, cut into sequences without overlap.

    Args:
        config: The text; what it leaves open are 64 sequences of 512 tokens, one a batch, drawn by seed 0.
        tokenizer: A tokenizer of transformers. Its end-of-text token, or two line feeds where it has none, stand
            between documents, unless ``config.separator`` says otherwise; its beginning-of-text token begins every
            sequence where ``config.add_bos`` says so, and it adds no other special tokens.

    Returns:
        Batches of (batch_size, seq_len) int64 token ids, the last one possibly smaller: every full sequence
        of the text, or a sample of ``config.sequences``, in the order of the text, that depends on
        ``config.seed`` alone. ``config.token_weight`` is not in them; see :func:`calibration_batches`.

    Raises:
        FaspFileNotFoundError: If a local file isn't there.
        FaspError: If the source can't be read, has fewer tokens than ``sequences`` (without it: one) sequences, or
            the tokenizer has no beginning-of-text token and should.
    """
    return read_text(config, tokenizer).batches


def read_text(config: TextConfig, tokenizer: Any) -> ReadText:
    """Turn a text into batches, as :func:`token_batches`, and say what was read for them."""
    wanted, seq_len, batch_size, seed = config.extent()
    packing = Packing.of(config, tokenizer, seq_len)
    limit = None if wanted is None else pool_size(wanted) * packing.taken
    tokens, documents, chats = _tokens(config, packing, limit)
    blocks = tokens[: len(tokens) // packing.taken * packing.taken].view(-1, packing.taken)
    if len(blocks) < (wanted or 1):
        raise FaspError(_shortage(config, len(tokens), packing))
    if wanted is not None:
        blocks = blocks[draw(len(blocks), wanted, seed)]
    if packing.bos is not None:
        blocks = functional.pad(blocks, (1, 0), value=packing.bos)
    return ReadText(list(blocks.split(batch_size)), documents, chats)


def calibration_batches(texts: Iterable[TextConfig], tokenizer: Any) -> list[Any]:
    """The batches of several texts, each of its ``token_weight``, as :meth:`FASPPruner.prune` takes them.

    Args:
        texts: The texts.
        tokenizer: As for :func:`token_batches`.

    Returns:
        Mappings with (batch_size, seq_len) int64 token ids as ``input_ids``, the ``weight`` of each token, and the
        name of the text as ``source``.

    Raises:
        FaspFileNotFoundError: If a local file isn't there.
        FaspError: As in :func:`token_batches`.
    """
    return [
        batch for text in texts for batch in labelled(token_batches(text, tokenizer), describe(text), text.token_weight)
    ]


def _shortage(config: TextConfig, found: int, packing: Packing) -> str:
    """Say what is missing of a text that is too short."""
    sequences, seq_len = config.extent().sequences or 1, packing.seq_len
    split = f" (split {config.split!r})" if config.split else ""
    return (
        f"source {config.source!r}{split} is too short: it has {found} tokens, and sequences={sequences} of "
        f"seq_len={seq_len} need {sequences * packing.taken}; give more text, or lower one of the two"
    )


def _tokens(config: TextConfig, packing: Packing, limit: int | None) -> tuple[Tensor, int, int]:
    """Tokenize documents until there are ``limit`` tokens (``None``: all of them).

    Returns:
        (tokens,) int64, the number of documents, and of chats among them.
    """
    tokens: list[int] = []
    count = chats = 0
    for group in document_groups(documents(config)):
        tokens += packing.encode(group)
        count, chats = count + len(group), chats + sum(isinstance(one, Chat) for one in group)
        if limit is not None and len(tokens) >= limit:
            break
    return torch.tensor(tokens[:limit], dtype=torch.long), count, chats


def encode_documents(group: list[str], tokenizer: Any, separator: str | None = None) -> list[int]:
    """Token ids of documents end to end, with what stands between two also after the last one.

    Args:
        group: The documents; blank ones are passed over, unless a separator is given. Of chats, the text is what the
            tokenizer's chat template makes of them.
        tokenizer: A tokenizer of transformers. It adds no special tokens.
        separator: Text between two documents; ``None`` puts the tokenizer's end-of-text token there, or two line
            feeds where it has none.
    """
    group = [rendered(document, tokenizer) for document in group]
    end = tokenizer.eos_token_id
    if separator is None and end is None:
        separator = "\n\n"
    if separator is not None:
        return _encode(tokenizer, [separator.join([*group, ""])])[0]
    texts = [document for document in group if document.strip()]
    tokens: list[int] = []
    for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
        ended = text.rstrip().endswith(tokenizer.eos_token)  # as a chat's template does
        tokens += ids if ended else [*ids, end]
    return tokens


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. ``verbose`` would warn that a document is longer than the model's context."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def document_groups(texts: Iterable[str], characters: int | None = None) -> Iterator[list[str]]:
    """Gather texts into lists of ``characters`` (``None``: of ``GROUP_LENGTH``) characters or a little more."""
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
