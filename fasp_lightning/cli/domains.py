"""Whether a text is of the kind that a model was calibrated on, as far as its source tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fasp_lightning.pruning.text import TextConfig, describe
from fasp_lightning.pruning.text_files import local_files

CALIBRATED, OTHER = "calibrated", "other"


def domain_of(text: TextConfig, calibration: Iterable[TextConfig]) -> str:
    """``"calibrated"`` if a text comes from a source of the calibration text, else ``"other"``.

    Local files of one folder count as one source; which split or part of it is taken does not matter.

    Args:
        text: A text that perplexity is measured on.
        calibration: The texts that the model is calibrated on.
    """
    source = _source(text)
    return CALIBRATED if any(source & _source(one) for one in calibration) else OTHER


def missing_domain(domains: Iterable[str]) -> str | None:
    """What a reader of the figures lacks if they are all of one domain."""
    found = set(domains)
    if found == {OTHER}:
        return (
            "no text that is measured comes from the source of the calibration text: the figures say what pruning "
            "does to other text alone; --evaluation can name held-out text of that source"
        )
    if found == {CALIBRATED}:
        return (
            "every text that is measured comes from the source of the calibration text, where pruning does least harm; "
            "--other_text names another"
        )
    return None


def single_source(calibration: Sequence[TextConfig], own: bool) -> str | None:
    """What a user risks who calibrates on text of one source.

    Args:
        calibration: The texts that are read.
        own: Whether the model's own text is in the calibration too.
    """
    if own or OTHER in {domain_of(text, calibration[:1]) for text in calibration}:
        return None
    return (
        f"all calibration text is of one source, {describe(calibration[0])}: the pruned model may get worse on other "
        "text than the figures on this one say; mix in another by --further_calibration, or the model's own by "
        "--pruning.own_text"
    )


def _source(text: TextConfig) -> set[tuple[str | None, ...] | Path]:
    if text.kind == "local":
        return {file.resolve().parent for file in local_files(text.source)}
    return {(text.source, text.subset)}
