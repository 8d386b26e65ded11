"""How a model is served, which decides how much faster a pruning makes it: a frozen dataclass that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fasp_lightning.errors import FaspError

PHASES = ("prefill", "decode")
"""Reading the prompt, and writing a token more."""

CHOICES = (*PHASES, "both")


@dataclass(frozen=True)
class Serving:
    """How the model will be served.

    Attributes:
        prompt: Tokens of the prompt, which prefill reads in one forward pass.
        new: Tokens that are written one by one after it; a decode step is timed in the middle of them.
        batch: Sequences at a time.
        phase: What is to be faster: "prefill", "decode", or "both", each by itself.

    Raises:
        FaspError: If a field is outside its range.
    """

    prompt: int = 512
    new: int = 64
    batch: int = 1
    phase: Literal["prefill", "decode", "both"] = "both"

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "batch"):
            if getattr(self, name) < 1:
                raise FaspError(f"serving.{name} must be at least 1, got {getattr(self, name)}")
        if self.phase not in CHOICES:
            raise FaspError(f"serving.phase must be one of {', '.join(map(repr, CHOICES))}, got {self.phase!r}")

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that are to be faster."""
        return PHASES if self.phase == "both" else (self.phase,)


def require_speedup(factor: float) -> None:
    """Refuse a speed-up that is none.

    Raises:
        FaspError: If it is not more than 1.
    """
    if not 1 < factor < float("inf"):
        raise FaspError(f"speedup must be a number above 1, such as 1.3, got {factor}")
