"""What came of giving each loader a tiny model of each family in each form: ``loaders.json`` beside this file holds it.

``examples/benchmarks/loaders.py`` tries, and writes that file; ``fasp plan``, ``fasp prune`` and the README draw on it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

LOADERS = {
    "load_pruned": "fasp_lightning.load_pruned",
    "transformers": "transformers AutoModelForCausalLM",
    "older": "transformers 4",
    "gguf": "llama.cpp, fasp export --to gguf",
    "converter": "llama.cpp, its own converter",
    "vllm": "vLLM",
    "vllm_export": "vLLM, fasp export --to vllm",
    "onnx": "ONNX Runtime, fasp export --to onnx",
}
"""The loaders, in the order in which they are shown, and how each comes by a saved model."""

INSTEAD = {
    "transformers": ("load_pruned",),
    "older": ("load_pruned",),
    "gguf": ("converter",),
    "converter": ("gguf",),
    "vllm": ("vllm_export",),
}
"""Other ways to the same end."""

TRIED_FORMS = ("stock", "stock, fewer KV groups", "zero_filled", "compact", "compact, FFNs alone")
"""A form, and what of it decides on the loaders; FFNs were cut to a width a block where the form holds that."""


class Trial(NamedTuple):
    """One row of the table.

    Attributes:
        form: One of :data:`TRIED_FORMS`.
        loader: A key of :data:`LOADERS`, or ``"any"``.
        version: What it was tried with.
        verdict: ``"same"`` for the 40 greedy tokens of ``transformers``; ``"other"`` tokens; ``"refused"``; or
            ``"no form"`` where models of the family are not saved so.
        why: What it said; of the same text: under which name the loader builds the model, if not under the family's.
        families: Of which this is true.
    """

    form: str
    loader: str
    version: str
    verdict: str
    why: str
    families: tuple[str, ...]


@cache
def trials() -> tuple[Trial, ...]:
    """The table."""
    rows = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(Trial(**{**row, "families": tuple(row["families"])}) for row in rows)


def trial_of(family: str, form: str, loader: str) -> Trial | None:
    """What came of a loader with a family in one of :data:`TRIED_FORMS`; ``None`` if it was not tried."""
    rows = (row for row in trials() if row.form == form and row.loader in (loader, "any") and family in row.families)
    return next(rows, None)


def takes(family: str, form: str, loader: str) -> bool:
    """Whether a loader gave the same text."""
    row = trial_of(family, form, loader)
    return row is not None and row.verdict == "same"


def way_out(family: str, form: str, loader: str) -> str:
    """What to do where a loader does not take a form: another way to it, else another form, as far as tried."""
    for other in INSTEAD.get(loader, ()):
        if takes(family, form, other):
            return f"use {LOADERS[other]}"
    if form == "stock, fewer KV groups":  # which the other forms hold as it does
        return "prune with attention='none'" if takes(family, "stock", loader) else "no way was found"
    for other in ("zero_filled", "compact"):
        if takes(family, other, loader):
            return f"save it in form {other}"
    return "no way was found"
