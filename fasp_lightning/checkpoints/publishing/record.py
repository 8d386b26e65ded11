"""What a saved model's report says beside the pruning's own figures: what was written, out of what, as it is known."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.checkpoints.publishing.base import base_of
from fasp_lightning.staging import read_json, write_beside
from fasp_lightning.structure.configs.text_part import auto_class, text_family, whole_class
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters, parameter_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAMPLED = 64
"""Values of each parameter that tell whether it was trained."""
PACKAGES = ("fasp_lightning", "torch", "transformers")
WHOLE = ("made_with", "continuation")
"""Entries that stay word for word: settings that a later run compares with its own, and text."""


def mark_of(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """A mark of a model's weights, another one as soon as they are trained: a hash of some values of each parameter.

    Args:
        model: The model.
        dtype: What weights of the model's dtype are rounded to first; the mark of what is loaded from such a file.
    """
    found, last = hashlib.sha256(), getattr(model, "fasp_sampled", {})
    for name, parameter in sorted(model.named_parameters()):
        values = last[name] if parameter.is_meta else sampled(parameter)
        if dtype is not None and parameter.dtype == model.dtype:
            values = values.to(dtype)
        found.update(name.encode() + values.to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()[:32]


def sampled(parameter: Tensor) -> Tensor:
    """Some values of a parameter; a model that is on ``meta`` between keeps its last ones as ``fasp_sampled``."""
    return parameter.detach().reshape(-1)[:: max(1, parameter.numel() // SAMPLED)]


def record_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """The report that is saved with a model: its own one, what was written, and what it was pruned from.

    Args:
        model: The model, which carries a plan.
        dtype: Dtype of the stored weights.

    Returns:
        ``saved``: both sparsities that were reached, ``parameters`` and ``original_parameters``, ``dtype``,
        ``versions``, and ``measured``, whether the weights are still those whose perplexities the report has,
        ``auto_class``, which loads them in transformers, and ``text_part``, the family of the decoder that was pruned
        inside a model that takes more than text, ``dequantized_from``, how the weights were stored that were read.
        ``tasks``: the answers that these weights gave; those that others gave are left out.
        ``base``: see :func:`~fasp_lightning.checkpoints.publishing.base.base_of`. No path of this machine.
    """
    report = dict(getattr(model, "fasp_report", {}))
    mark, stored = mark_of(model), mark_of(model, dtype)
    measured = report.get("weights") == mark
    if measured:
        report["weights"] = stored
    if "tasks" in report:
        entries = entries_in(report, "tasks")
        report["tasks"] = [entry | {"weights": stored} for entry in entries if entry.get("weights") == mark]
    saved = {
        "measured": measured,
        **sizes_of(model),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": _versions(),
        "auto_class": auto_class(model.config).__name__,
    }
    if method := getattr(model, "fasp_dequantized", None):
        saved["dequantized_from"] = method
    if whole_class(model.config) is not None:
        saved["text_part"] = text_family(model.config)
    report |= {"saved": saved, "base": base_of(model, report)}
    return {name: value if name in WHOLE else without_paths(value) for name, value in report.items()}


def sizes_of(model: PreTrainedModel) -> dict[str, float]:
    """Both sparsities of a model as it is, its parameters and those of the original, tied ones once."""
    pairs = [pair for block in resolve_pruned(model) for pair in block]
    gone = sum((pair.layout.width - pair.kept.numel()) * pair.unit_cost for pair in pairs)
    left, linear = parameter_count(model), linear_parameters(model, spec_for(model))
    return {
        "sparsity": gone / (linear + gone),
        "sparsity_total": gone / (left + gone),
        "parameters": left,
        "original_parameters": left + gone,
    }


def entries_in(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of mappings in a report, such as its ``exports``; what is damaged counts as not there."""
    found = report.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def add_to_report(
    folder: str | Path, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> bool:
    """Change a list of mappings in the report of a pruned folder.

    Args:
        folder: The folder.
        name: Of the list in the report.
        change: Gives what is to stand there instead of what does.

    Returns:
        Whether it was written: not where the folder has no report, or is not writable, which is logged.

    Raises:
        FaspError: If the report is damaged.
    """
    file = Path(folder) / REPORT_FILE
    if not file.is_file():
        return False
    report = read_json(file)
    report[name] = change(entries_in(report, name))
    try:
        write_beside(file, (json.dumps(report, separators=(",", ":")) + "\n").encode())
    except OSError as error:  # what came of a folder that may only be read is shown all the same
        log.info("the result is not in %s: %s", file, error)
        return False
    return True


def _versions() -> dict[str, str]:
    return {name: str(import_module(name).__version__) for name in PACKAGES}


def without_paths(value: Any) -> Any:
    """Plain data in which an absolute path is its last part: reports are published along with the model.

    What a separator of documents may be, such as ``"/"``, or one name in the root folder, is left as it is.
    """
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "\n" not in value and PurePath(value).is_absolute():
        return PurePath(value).name if len(PurePath(value).parts) > 2 else value
    return value
