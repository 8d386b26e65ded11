"""Who gets a document: which split it is in, and which of the roles that read it may have it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

SHARES: dict[str, float] = {"calibration": 0.40, "train": 0.30, "test": 0.19, "validation": 0.11}
"""Share of the text that each split gets. Of Python 3.11's topics they make 36k, 26k, 19k and 10k SmolLM2
tokens; of those of 3.10 to 3.14 no less than 36k, 23k, 17k and 9k: enough for the usual 64 calibration
sequences of 512 tokens, and for 32 to test on."""

HUB_SHARES = {"train": 0.90, "calibration": 0.06, "test": 0.02, "validation": 0.02}
"""How roles divide a split of a data set on the hub that they share: that is commonly large, and calibration
needs little. Built-in and local text is divided by ``SHARES``, so that a role gets the split of its name."""

DISTINCT_LENGTH = 80
"""A document of fewer characters (a heading, a lone sentence) recurs by nature and may stand in two texts."""

Claim = tuple[str, str | None]
"""A role, and the split of a local file that it reads; ``None`` is all of the file."""


def deal(fraction: float, shares: Mapping[str, float] = SHARES) -> str:
    """Name the owner of a place in [0, 1), which is divided in the proportion and order of the shares.

    Args:
        fraction: The place.
        shares: Name → share; they need not add up to 1.
    """
    place, end = fraction * math.fsum(shares.values()), 0.0
    for name, share in shares.items():
        end += share
        if place < end:
            return name
    return name  # the last one where rounding has put the place at the very end


def digest(text: str) -> str:
    """Hash a text: the same on every machine and in every process, unlike :func:`hash`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def distinct(document: str) -> str | None:
    """A mark, 64 bits of hash, by which a document is found again; ``None`` if it is so short that it may recur."""
    return digest(document)[:16] if len(document) >= DISTINCT_LENGTH else None


def split_of(document: str) -> str:
    """Name the split of one document of a stream: by its content alone, so equal documents share a split."""
    return deal(_place(document))


def owner(document: str, sharing: Sequence[str], shares: Mapping[str, float] = SHARES, salt: str = "") -> str:
    """Name the role that a document falls to: by content alone, in the proportion of the roles' shares.

    Args:
        document: The document.
        sharing: The roles that read it, in the order of ``SHARES``. If they are all four, and without salt,
            the role is the split that the document is in.
        shares: Role → share.
        salt: Hashed along, which makes the choice independent of one by another salt.
    """
    return deal(_place(salt + document), {name: shares[name] for name in sharing})


def claimant(document: str, claims: Iterable[Claim]) -> Claim | None:
    """Name the role that a document of a local file falls to, and the split in which it stands.

    Args:
        document: The document.
        claims: The roles that read the file. Where none names a split, the roles divide the whole; else the
            document's split comes first, and those that read this split, or all of the file, divide it.

    Returns:
        The role, and the split or ``None`` where no role names one; ``None`` if no role reads the document's split.
    """
    claims = list(claims)
    split = split_of(document) if any(claimed is not None for _, claimed in claims) else None
    reading = {role for role, claimed in claims if meet(claimed, split)}
    if not reading:
        return None
    # The hash that has decided on the split would send all of one split to the same role.
    salt = "" if split is None else "role "
    return owner(document, [role for role in SHARES if role in reading], SHARES, salt), split


def meet(one: str | None, other: str | None) -> bool:
    """Tell whether two splits of a file have documents in common; ``None`` is all of it."""
    return one is None or other is None or one == other


def deal_corpus(documents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Deal a whole corpus, so that each split gets its share of the characters to within half a document.

    The documents are put into the order of the hashes of their names and cut where the shares end. Few and
    unequal documents would miss the shares by a quarter if each were dealt by its own hash.

    Args:
        documents: Pairs of name and text.

    Returns:
        Split → texts. A document is in exactly one split; which one depends on the names and sizes, not on
        positions.
    """
    ordered = sorted(documents, key=lambda item: (digest(item[0]), item[1]))
    total = sum(len(text) for _, text in ordered)
    dealt: dict[str, list[str]] = {name: [] for name in SHARES}
    before = 0
    for _, text in ordered:
        dealt[deal((before + len(text) / 2) / total)].append(text)
        before += len(text)
    return dealt


def _place(text: str) -> float:
    """A place in [0, 1) that depends on the text alone."""
    return int(digest(text)[:12], 16) / 16**12
