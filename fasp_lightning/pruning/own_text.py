"""Calibration text sampled from the model itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OwnTextConfig:
    """How much text the model writes itself for its calibration, and how.

    Attributes:
        tokens: How many tokens in all.
        share: Weight of this text in the whole calibration, in (0, 1]; 1 is this text alone.
        seq_len: Tokens of a sequence; many short ones are sampled in a batch.
        temperature: Of the sampling; 1 is the model's own distribution.
        seed: Seed of the sampling.
        cache_dir: Folder in which sampled text is kept for the next run; null keeps none.
    """

    tokens: int = 16384
    share: float = 0.33
    seq_len: int = 128
    temperature: float = 1.0
    seed: int = 0
    cache_dir: str | None = None
