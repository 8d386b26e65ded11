"""Which split a document belongs to."""

from __future__ import annotations

import hashlib

SHARES: dict[str, float] = {"calibration": 0.40, "train": 0.30, "test": 0.19, "validation": 0.11}
"""Share of the text that each split gets. Of Python 3.11's topics they make 36k, 26k, 19k and 10k SmolLM2
tokens; of those of 3.10 to 3.14 no less than 36k, 23k, 17k and 9k: enough for the usual 64 calibration
sequences of 512 tokens, and for 32 to test on."""


def deal(fraction: float) -> str:
    """Name the split that owns a place in [0, 1), where the splits lie in the order of `SHARES`."""
    end = 0.0
    for name, share in SHARES.items():
        end += share
        if fraction < end:
            return name
    return name


def digest(text: str) -> str:
    """Hash a text: the same on every machine and in every process, unlike :func:`hash`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_of(document: str) -> str:
    """Name the split of one document of a stream: by its content alone, so equal documents share a split."""
    return deal(int(digest(document)[:12], 16) / 16**12)
