"""An unknown family's row, inferred and proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fasp_lightning.errors import FaspError
from fasp_lightning.proving.proof import Proof, prove
from fasp_lightning.structure.inferring.inference import infer_spec
from fasp_lightning.structure.spec import ArchitectureSpec


class Inferred(NamedTuple):
    """A row that was found and holds.

    Attributes:
        spec: The row.
        proof: What was tried of it.
        dropped: What was found first and does not hold, with the reason.
    """

    spec: ArchitectureSpec
    proof: Proof
    dropped: tuple[str, ...]


def infer_proved(model_or_config: Any) -> Inferred:
    """Infer the row of a family, and leave out what of it does not hold.

    Args:
        model_or_config: A causal LM on any device, ``meta`` included, or its config.

    Raises:
        FaspError: If no row is found, or nothing of it holds; the message says what was found.
    """
    refusals: list[str] = []
    for spec in _parts(infer_spec(model_or_config)):
        try:
            return Inferred(spec, prove(model_or_config, spec), tuple(refusals))
        except FaspError as error:
            refusals.append(str(error))
    raise FaspError(f"{refusals[0]}; register its row with register_architecture")


def _parts(spec: ArchitectureSpec) -> Iterator[ArchitectureSpec]:
    """A row, and ever less of it: without KV groups, without values, without the FFN."""
    value = [pair for pair in spec.pairs if pair.kind == "value"]
    ffn = [pair for pair in spec.pairs if pair.kind == "ffn"]
    yield spec
    if value and value[0].groups:
        yield replace(spec, pairs=(replace(value[0], groups=()), *ffn))
    if value and ffn:
        yield replace(spec, pairs=tuple(ffn), attention=None)
        yield replace(spec, pairs=(replace(value[0], groups=()),))
