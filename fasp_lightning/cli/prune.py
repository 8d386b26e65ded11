"""``fasp prune``: prune a model, measure it before and after, save it, check what was saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasp_lightning.cli.checks import (
    Calibration,
    Text,
    check_output_dir,
    check_room,
    load_calibration,
    load_text,
    texts_of,
    tokenizer_of,
)
from fasp_lightning.cli.console import (
    PruningProgress,
    dtype_name,
    gibibytes,
    note,
    percent,
    shown_warnings,
    tracked,
)
from fasp_lightning.cli.domains import OTHER, domain_of, missing_domain, single_source
from fasp_lightning.cli.generation import continuation
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.prune_tables import print_continuations, print_loaders, print_results
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.cli.setup import Setup, already_pruned, load, memory_of, set_up
from fasp_lightning.pruning.checkpoint import SavedModel, save_pruned
from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity
from fasp_lightning.pruning.plan import apply_plan, plan_of
from fasp_lightning.pruning.prepare import Prepared
from fasp_lightning.pruning.pruner import FASPPruner
from fasp_lightning.pruning.report import PruningReport, TextReport, peak_memory, restoration_warning

JOB = PruneJob


def run(job: PruneJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    check_output_dir(job)
    calibration_configs, evaluation_configs = texts_of(job)
    setup = set_up(job)
    if job.output_dir is not None:
        check_room(Path(job.output_dir), setup.stored_bytes)
    tokenizer = tokenizer_of(job.model)
    calibration = load_calibration(calibration_configs, setup.pruning.own_text, tokenizer, setup.model)
    evaluation = [load_text(text, tokenizer, setup.model, "evaluation") for text in evaluation_configs]
    announce(job, setup, calibration, evaluation)
    with shown_warnings():
        model = load_home(job, setup)
        before = measure(model, evaluation, "dense" if not setup.already_pruned else "as it is")
        dense_text = _continue(model, tokenizer, job)
        report = prune_measured(model, job, setup, calibration, evaluation, before, again=lambda: load_home(job, setup))
        pruned_text = _continue(model, tokenizer, job)
    saved = save(model, tokenizer, job, setup)
    report.peak_memory = peak_memory(setup.device)  # with the evaluation, and the copy that verified
    print_results(job, setup, calibration, report)
    if job.prompt is not None:
        print_continuations(job.prompt, dense_text, pruned_text)
    if saved is not None:
        print_loaders(saved)
    return 0


def announce(job: PruneJob, setup: Setup, calibration: Calibration, evaluation: list[Text]) -> None:
    """Say what is about to happen, what it will take, and what the figures will not show."""
    memory = memory_of(setup, job, calibration.tokens)
    if setup.already_pruned:
        note(already_pruned(setup))
    note(
        f"pruning {setup.source.name} to {percent(setup.widths.sparsity)} sparsity on {calibration.tokens:,} tokens "
        f"of {calibration.name}, in {dtype_name(setup.dtype)} on {setup.device}; "
        f"about {gibibytes(memory.total)} of memory"
    )
    if job.output_dir is None:
        note("output_dir is null: the pruned model will not be saved")
    if warning := single_source(calibration.configs, calibration.own is not None):
        note(f"warning: {warning}")
    if missing := missing_domain(domains_of(job, calibration, evaluation)):
        note(missing)


def load_home(job: PruneJob, setup: Setup) -> Any:
    """The model, on the compute device if it has room for it, else on the CPU."""
    note("loading the weights")
    return load(job.model, setup.config, setup.dtype, home(setup))


def home(setup: Setup) -> torch.device:
    """An accelerator keeps the whole model if as much room again is left for the work on it."""
    if setup.device.type != "cuda":
        return setup.device
    needed = 2 * setup.widths.parameters_before * setup.dtype.itemsize
    free = torch.cuda.mem_get_info(setup.device)[0]
    if needed <= free:
        return setup.device
    note(
        f"the model stays on the CPU and its blocks go to {setup.device} one by one, which would need "
        f"{gibibytes(needed)} and has {gibibytes(free)} free; perplexity is measured on the CPU"
    )
    return torch.device("cpu")


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
    plain = _unrestored(model, again(), evaluation) if job.compares else [None] * len(evaluation)
    domains = domains_of(job, calibration, evaluation)
    names = [text.name for text in evaluation]
    report.evaluation = [TextReport(*row) for row in zip(names, domains, before, after, plain, strict=True)]
    if message := single_source(calibration.configs, calibration.own is not None):
        report.warnings.append(message)  # announced before
    if message := restoration_warning(report.evaluation):
        report.warnings.append(message)
        warnings.warn(message, stacklevel=2)
    model.fasp_report = {
        **report.to_dict(),
        "model": job.model.name_or_path,
        "calibration": calibration.to_dict(),
    }
    return report


def _unrestored(pruned: Any, model: Any, texts: list[Text]) -> list[PerplexityResult]:
    """Perplexities with the same columns, chosen on restored activations, but the weights as they were."""
    plan = plan_of(pruned)
    assert plan is not None
    return measure(apply_plan(model, plan), texts, "nothing restored")


def domains_of(job: PruneJob, calibration: Calibration, evaluation: list[Text]) -> list[str]:
    """Whether each text comes from the calibration's source; the one that `other_text` names is not of its kind."""
    domains = [domain_of(text.config, calibration.configs) for text in evaluation]
    return domains if job.other_text is None else [*domains[:-1], OTHER]


def _continue(model: Any, tokenizer: Any, job: PruneJob) -> str:
    return "" if job.prompt is None else continuation(model, tokenizer, job.prompt, job.new_tokens)


def save(model: Any, tokenizer: Any, job: PruneJob, setup: Setup) -> SavedModel | None:
    """Save a pruned model with its report, if the job names a folder."""
    if job.output_dir is None:
        return None
    note(f"saving to {job.output_dir}")
    return save_pruned(model, job.output_dir, tokenizer, form=setup.form, verify=job.verify, overwrite=job.overwrite)
