"""A pruning that is measured before and after, and saved: what ``fasp prune`` and ``fasp sweep`` share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fasp_lightning.checkpoints.devices import home
from fasp_lightning.checkpoints.publishing.record import mark_of
from fasp_lightning.checkpoints.saving import SavedModel, require_plan, save_pruned
from fasp_lightning.cli.console import PruningProgress, dtype_name, note, tracked
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.model_setup import Setup
from fasp_lightning.cli.texts import OTHER, Calibration, Text, domain_of, single_source
from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity
from fasp_lightning.pruning.prepare import Prepared
from fasp_lightning.pruning.report import PruningReport, TextReport, restoration_warning
from fasp_lightning.streaming.pruner import FASPPruner
from fasp_lightning.structure.plan import apply_plan


def place(setup: Setup) -> torch.device:
    """Where to put the model: on the compute device if as much room again is left for the work on it."""
    device, reason = home(setup.device, 2 * setup.budget.parameters_before * setup.dtype.itemsize)
    if reason is not None:
        note(
            f"the model stays on the CPU and its blocks go to {setup.device} one by one, since {reason}; perplexity is "
            "measured on the CPU"
        )
    return device


def measure(model: Any, texts: list[Text], what: str) -> list[PerplexityResult]:
    """Perplexity of a model on each text.

    Args:
        model: The model.
        texts: The texts.
        what: What the model is, for the progress bar.
    """
    return [measure_perplexity(model, tracked(text.batches, f"perplexity, {what}: {text.name}")) for text in texts]


def prune_measured(
    model: Any,
    job: PruneJob,
    setup: Setup,
    calibration: Calibration,
    evaluation: list[Text],
    before: list[PerplexityResult],
    again: Callable[[], Any],
    prepared: Prepared | None = None,
) -> PruningReport:
    """Prune a model in place, measure it, and note on it what it was calibrated and measured on; it is saved along.

    Args:
        model: The model.
        job: The job.
        setup: Its setup.
        calibration: The calibration text.
        evaluation: The texts to measure.
        before: Their perplexities before.
        again: Gives the model as it was, to measure it without restoration; called if the job compares.
        prepared: What was prepared of the calibration text with the model as it was; by default that is done here.
    """
    with PruningProgress() as progress:
        report = FASPPruner(setup.pruning).prune(model, prepared or calibration.batches, progress=progress)
    after = measure(model, evaluation, "pruned")
    given = all(pair.basis == "given" for pair in report.pairs)  # else the weights as they were have other columns
    plain = _unrestored(model, again(), evaluation) if job.compares and given else [None] * len(evaluation)
    reported(model, report, job, setup, calibration, evaluation, (before, after, plain))
    return report


def reported(
    model: Any,
    report: PruningReport,
    job: PruneJob,
    setup: Setup,
    calibration: Calibration,
    evaluation: list[Text],
    perplexities: tuple[Sequence[PerplexityResult | None], ...],
) -> None:
    """Note on a pruned model what it was calibrated and measured on, and warn of what the figures say.

    Args:
        model: The model.
        report: Of the pruning.
        job: The job.
        setup: Its setup.
        calibration: The calibration text.
        evaluation: The texts that were measured.
        perplexities: Theirs before, after, and with nothing restored, where that was measured.
    """
    domains = domains_of(job, calibration, evaluation)
    names, begins = [text.name for text in evaluation], [text.bos for text in evaluation]
    rows: Any = zip(names, domains, *perplexities, begins, strict=True)
    report.evaluation = [TextReport(*row) for row in rows]
    if message := single_source(calibration.configs, calibration.own is not None):
        report.warnings.append(message)  # announced before
    if message := restoration_warning(report.evaluation):
        report.warnings.append(message)
        warnings.warn(message, stacklevel=3)
    model.fasp_report = {
        **report.to_dict(),
        "model": job.model.name_or_path,
        "calibration": calibration.to_dict(),
        "computed": {"dtype": dtype_name(setup.dtype), "device": str(setup.device)},
        "weights": mark_of(model),  # those that were measured
    }


def _unrestored(pruned: Any, model: Any, texts: list[Text]) -> list[PerplexityResult]:
    """Perplexities with the same columns, chosen on restored activations, but the weights as they were."""
    return measure(apply_plan(model, require_plan(pruned)), texts, "nothing restored")


def domains_of(job: PruneJob, calibration: Calibration, evaluation: list[Text]) -> list[str]:
    """Whether each text comes from the calibration's source; the one that ``other_text`` names is not of its kind."""
    domains = [domain_of(text.config, calibration.configs) for text in evaluation]
    return domains if job.other_text is None else [*domains[:-1], OTHER]


def save(model: Any, tokenizer: Any, job: PruneJob, setup: Setup) -> SavedModel | None:
    """Save a pruned model with its report, if the job names a folder."""
    if job.output_dir is None:
        return None
    note(f"saving to {job.output_dir}")
    return save_pruned(
        model,
        job.output_dir,
        tokenizer,
        form=setup.form,
        verify=job.verify,
        overwrite=job.overwrite,
        dtype=setup.stored,
        push_to_hub=job.push_to_hub,
        private=job.private,
    )
