"""Tokenised text in a cache: packed sequences in an Arrow file, memory-mapped by `datasets`."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError
from fasp_lightning.staging import place
from fasp_lightning.text.roles import distinct
from fasp_lightning.text.tokens import document_groups, encode_documents

FORMAT = 2
"""Goes into every key: a change of the packing makes old files unused."""


class TooShort(FaspError):
    """A text has not one sequence."""


@dataclass(frozen=True)
class Tokenised:
    """A text as packed sequences.

    Attributes:
        key: What it was made of, hashed.
        sequences: A `datasets.Dataset` with the column input_ids, `seq_len` ids a row, memory-mapped.
        documents: What :func:`distinct` says of its documents.
        content: Hash of the sequences themselves, the same wherever and whenever the text's files were copied.
    """

    key: str
    sequences: Any
    documents: frozenset[str]
    content: str


def default_cache() -> Path:
    """Folder beside the data sets that `datasets` caches; HF_HOME and HF_DATASETS_CACHE move it."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "fasp_lightning"


def key_of(**parts: Any) -> str:
    """Hash plain data that decides on a cached text."""
    return hashlib.sha256(json.dumps([FORMAT, parts], sort_keys=True).encode()).hexdigest()[:32]


def tokenised(
    folder: Path,
    key: str,
    documents: Callable[[], Iterable[str]],
    tokenizer: Any,
    seq_len: int,
    separator: str | None = None,
    limit: int | None = None,
) -> Tokenised:
    """Load a text's sequences from the cache, or tokenise it and put them there.

    Args:
        folder: The cache.
        key: Name of the text in it, which tells apart whatever gives other sequences.
        documents: Opens the text; called only if the cache hasn't it.
        tokenizer: A tokenizer of transformers.
        seq_len: Tokens of a sequence.
        separator: Text between two documents; None puts the tokenizer's end-of-text token there.
        limit: Number of sequences to stop at; None takes all.

    Returns:
        The sequences: the documents end to end, cut without overlap; the rest at the end is left out.

    Raises:
        TooShort: If the text is shorter than one sequence.
    """
    from datasets import Dataset

    entry = folder / key
    if not entry.is_dir():
        place(entry, lambda part: _write(part, documents(), tokenizer, seq_len, separator, limit))
    about = json.loads((entry / "about.json").read_text("utf-8"))
    rows = Dataset.from_file(str(entry / "sequences.arrow")).with_format("torch")
    return Tokenised(key, rows, frozenset(about["documents"]), about["content"])


def _write(
    part: Path, documents: Iterable[str], tokenizer: Any, seq_len: int, separator: str | None, limit: int | None
) -> None:
    """Write the two files of an entry."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    seen: dict[str, None] = {}
    content = hashlib.sha256()
    features = Features({"input_ids": Sequence(Value("int32"), length=seq_len)})
    with ArrowWriter(path=str(part / "sequences.arrow"), features=features) as writer:
        for blocks in pack(_noting(documents, seen), tokenizer, seq_len, separator, limit):
            content.update(array("q", chain.from_iterable(blocks)).tobytes())
            writer.write_batch({"input_ids": blocks})
        writer.finalize()
    about = {"documents": list(seen), "content": content.hexdigest()}
    (part / "about.json").write_text(json.dumps(about), "utf-8")


def _noting(documents: Iterable[str], seen: dict[str, None]) -> Iterator[str]:
    """Pass documents on, and remember them."""
    for document in documents:
        if (mark := distinct(document)) is not None:
            seen[mark] = None
        yield document


def pack(
    documents: Iterable[str], tokenizer: Any, seq_len: int, separator: str | None = None, limit: int | None = None
) -> Iterator[list[list[int]]]:
    """Cut documents, put end to end, into sequences of `seq_len` ids; yields some at a time.

    Raises:
        TooShort: At the end, if there was not one.
    """
    tokens: list[int] = []
    total = count = 0
    for group in document_groups(documents):
        ids = encode_documents(group, tokenizer, separator)
        tokens, total = tokens + ids, total + len(ids)
        ends = range(seq_len, len(tokens) + 1, seq_len)
        blocks = [tokens[end - seq_len : end] for end in ends][: None if limit is None else limit - count]
        tokens = tokens[len(ends) * seq_len :]
        count += len(blocks)
        if blocks:
            yield blocks
        if limit is not None and count >= limit:
            return
    if not count:
        raise TooShort(f"it has {total} tokens, and one sequence of seq_len={seq_len} needs {seq_len}")


def without(documents: Iterable[str], taken: Set[str]) -> Iterator[str]:
    """The documents that another role hasn't."""
    return (document for document in documents if not taken or distinct(document) not in taken)
