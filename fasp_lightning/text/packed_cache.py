"""Tokenised text in a cache: packed sequences in an Arrow file, memory-mapped by ``datasets``."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspOSError
from fasp_lightning.staging import fingerprint, place, read_json, staged, write_json
from fasp_lightning.text.batches import check_vocabulary
from fasp_lightning.text.splits import distinct
from fasp_lightning.text.tokens import Packing, document_groups, draw

FORMAT = 5
"""Goes into every key: a change of the packing makes old files unused."""

SEQUENCES_FILE, ABOUT_FILE = "sequences.arrow", "about.json"
"""What a text's folder in the cache holds: its sequences, and what they are."""

log = logging.getLogger(__name__)


class TooShort(FaspError):
    """A text has not one sequence, or fewer than are asked for."""


@dataclass(frozen=True)
class Tokenised:
    """A text as packed sequences.

    Attributes:
        key: What it was made of, hashed.
        sequences: A ``datasets.Dataset`` with the column input_ids, ``seq_len`` ids a row, memory-mapped.
        documents: Marks of the documents that were read, as :func:`~fasp_lightning.text.splits.distinct` gives them.
        content: Hash of the sequences themselves, the same wherever and whenever the text's files were copied.
        largest: Largest token id of the text, which what is drawn of it may not have.
    """

    key: str
    sequences: Any
    documents: frozenset[str]
    content: str
    largest: int

    def check_vocabulary(self, vocab_size: int, name: str) -> None:
        """Refuse sequences with a token that has no embedding.

        Args:
            vocab_size: Number of embeddings.
            name: Name of the text, for the message.

        Raises:
            FaspError: If there is one.
        """
        if self.largest >= vocab_size:
            for rows in self.sequences.iter(1000):
                check_vocabulary(rows["input_ids"], vocab_size, name)


def default_cache() -> Path:
    """Folder beside the data sets that ``datasets`` caches; HF_HOME and HF_DATASETS_CACHE move it."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "fasp_lightning"


def tokenised(
    folder: Path,
    key: str,
    documents: Callable[[], Iterable[str]],
    packing: Packing,
    limit: int | None = None,
) -> Tokenised:
    """Load a text's sequences from the cache, or tokenise it and put them there.

    An entry that is damaged is made anew, and the log says so.

    Args:
        folder: The cache.
        key: Name of the text in it, which tells apart whatever gives other sequences.
        documents: Opens the text; called only if the cache hasn't it.
        packing: How it is cut.
        limit: Number of sequences to stop at; ``None`` takes all.

    Returns:
        The sequences: the documents end to end, cut without overlap; the rest at the end is left out.

    Raises:
        TooShort: If the text is shorter than one sequence.
        FaspOSError: If what was just written cannot be read.
    """
    entry = folder / key

    def write(part: Path) -> None:
        _write(part, documents(), packing, limit)

    if not entry.is_dir():
        place(entry, write)
    elif (found := _read(entry)) is not None:
        return found
    else:
        with staged(entry) as part:
            write(part)
    found = _read(entry)
    if found is None:
        raise FaspOSError(f"{entry} must be readable once it is written, and is damaged again; check the disk")
    return found


def drawn(text: Tokenised, wanted: int, seed: int) -> Tokenised:
    """Draw sequences of a text, by :func:`fasp_lightning.text.tokens.draw`.

    Args:
        text: The text, or as much of its start as they are drawn from.
        wanted: Number of sequences.
        seed: What they depend on.

    Raises:
        TooShort: If the text has fewer.
    """
    available = len(text.sequences)
    if available < wanted:
        raise TooShort(f"it has {available} sequences, and sequences={wanted} are asked for")
    if available == wanted:
        return text
    sequences = text.sequences.select(draw(available, wanted, seed).tolist())
    return replace(text, sequences=sequences, content=fingerprint(text.content, wanted, seed))


def _read(entry: Path) -> Tokenised | None:
    """What an entry holds; ``None``, and a line in the log, if it is damaged."""
    from datasets import Dataset
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    file = entry / SEQUENCES_FILE
    try:
        about = read_json(entry / ABOUT_FILE)
        if file.stat().st_size != about["bytes"]:
            raise FaspError(f"{file.name} must have {about['bytes']} bytes, got {file.stat().st_size}")
        rows = Dataset.from_file(str(file)).with_format("torch")
        return Tokenised(entry.name, rows, frozenset(about["documents"]), about["content"], about["largest"])
    except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("the cached text %s is damaged (%s): it is tokenised anew", entry, reason)
        return None


def _write(part: Path, documents: Iterable[str], packing: Packing, limit: int | None) -> None:
    """Write the two files of an entry."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    seen: dict[str, None] = {}
    content, largest = hashlib.sha256(), 0
    features = Features({"input_ids": Sequence(Value("int32"), length=packing.seq_len)})
    with ArrowWriter(path=str(part / SEQUENCES_FILE), features=features) as writer:
        for blocks in pack(_noting(documents, seen), packing, limit):
            ids = array("q", chain.from_iterable(blocks))
            content.update(ids.tobytes())
            largest = max(largest, max(ids))
            writer.write_batch({"input_ids": blocks})
        writer.finalize()
    size = (part / SEQUENCES_FILE).stat().st_size
    about = {"documents": list(seen), "content": content.hexdigest(), "largest": largest, "bytes": size}
    write_json(part / ABOUT_FILE, about)


def _noting(documents: Iterable[str], seen: dict[str, None]) -> Iterator[str]:
    """Pass documents on, and remember them."""
    for document in documents:
        if (mark := distinct(document)) is not None:
            seen[mark] = None
        yield document


def pack(documents: Iterable[str], packing: Packing, limit: int | None = None) -> Iterator[list[list[int]]]:
    """Cut documents, put end to end, into sequences; yields some at a time.

    Args:
        documents: The text.
        packing: How it is cut.
        limit: Number of sequences to stop at; ``None`` takes all.

    Yields:
        One or more sequences, each a list of ``packing.seq_len`` ids; what is left at the end of the text is left out.

    Raises:
        TooShort: At the end, if there was not one.
    """
    tokens: list[int] = []
    total = count = 0
    for group in document_groups(documents):
        ids, taken = packing.encode(group), packing.taken
        tokens, total = tokens + ids, total + len(ids)
        starts = range(0, len(tokens) - taken + 1, taken)[: None if limit is None else limit - count]
        blocks = [packing.sequence(tokens[start : start + taken]) for start in starts]
        tokens = tokens[len(starts) * taken :]
        count += len(blocks)
        if blocks:
            yield blocks
        if limit is not None and count >= limit:
            return
    if not count:
        raise TooShort(f"it has {total} tokens, and {packing.need}")


def without(documents: Iterable[str], taken: Set[str]) -> Iterator[str]:
    """Documents without those that another role has, of which ``taken`` holds the marks."""
    return (document for document in documents if not taken or distinct(document) not in taken)
