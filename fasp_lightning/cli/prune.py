"""``fasp prune``: prune a model, measure it before and after, save it, check what was saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fasp_lightning.cli.checks import Text, check_output_dir, check_room, load_text, texts_of, tokenizer_of
from fasp_lightning.cli.console import (
    PruningProgress,
    dtype_name,
    gibibytes,
    note,
    percent,
    shown_warnings,
    tracked,
)
from fasp_lightning.cli.generation import continuation
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.prune_tables import Measured, print_continuations, print_loaders, print_results
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.cli.setup import Setup, already_pruned, load, memory_of, set_up
from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity
from fasp_lightning.pruning.pruner import FASPPruner
from fasp_lightning.pruning.report import PruningReport, peak_memory

JOB = PruneJob


def run(job: PruneJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    check_output_dir(job)
    calibration_config, evaluation_configs = texts_of(job)
    setup = set_up(job)
    if job.output_dir is not None:
        check_room(Path(job.output_dir), setup.stored_bytes)
    tokenizer = tokenizer_of(job.model)
    calibration = load_text(calibration_config, tokenizer, setup.model, "calibration")
    evaluation = [load_text(text, tokenizer, setup.model, "evaluation") for text in evaluation_configs]
    _announce(job, setup, calibration)
    with shown_warnings():
        model = _load(job, setup)
        before = _measure(model, evaluation, "dense" if not setup.already_pruned else "as it is")
        dense_text = _continue(model, tokenizer, job)
        with PruningProgress() as progress:
            report = FASPPruner(setup.pruning).prune(model, calibration.batches, progress=progress)
        after = _measure(model, evaluation, "pruned")
        pruned_text = _continue(model, tokenizer, job)
    measured = [Measured(text.name, *pair) for text, *pair in zip(evaluation, before, after, strict=True)]
    _note_in_report(model, report, job, calibration, measured)
    saved = _save(model, tokenizer, job, setup)
    report.peak_memory = peak_memory(setup.device)  # with the evaluation, and the copy that verified
    print_results(job, setup, calibration, report, measured)
    if job.prompt is not None:
        print_continuations(job.prompt, dense_text, pruned_text)
    if saved is not None:
        print_loaders(saved)
    return 0


def _announce(job: PruneJob, setup: Setup, calibration: Text) -> None:
    """Say what is about to happen, and what it will take."""
    widths = setup.widths
    memory = memory_of(setup, job, calibration.tokens)
    if setup.already_pruned:
        note(already_pruned(setup))
    note(
        f"pruning {setup.source.name} to {percent(widths.sparsity)} sparsity on {calibration.tokens:,} tokens "
        f"of {calibration.name}, in {dtype_name(setup.dtype)} on {setup.device}; "
        f"about {gibibytes(memory.total)} of memory"
    )
    if job.output_dir is None:
        note("output_dir is null: the pruned model will not be saved")


def _load(job: PruneJob, setup: Setup) -> Any:
    """The model, on the compute device if it has room for it, else on the CPU."""
    note("loading the weights")
    return load(job.model, setup.config, setup.dtype, _home(setup))


def _home(setup: Setup) -> torch.device:
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


def _measure(model: Any, texts: list[Text], what: str) -> list[PerplexityResult]:
    return [measure_perplexity(model, tracked(text.batches, f"perplexity, {what}: {text.name}")) for text in texts]


def _continue(model: Any, tokenizer: Any, job: PruneJob) -> str:
    return "" if job.prompt is None else continuation(model, tokenizer, job.prompt, job.new_tokens)


def _note_in_report(
    model: Any, report: PruningReport, job: PruneJob, calibration: Text, measured: list[Measured]
) -> None:
    """Put beside the engine's report what it was calibrated and measured on; it is saved with the model."""
    model.fasp_report = {
        **report.to_dict(),
        "model": job.model.name_or_path,
        "calibration": {"name": calibration.name, **dataclasses.asdict(calibration.config)},
        "evaluation": [
            {"name": text.name, "before": text.before.to_dict(), "after": text.after.to_dict()} for text in measured
        ],
    }


def _save(model: Any, tokenizer: Any, job: PruneJob, setup: Setup) -> Any:
    from fasp_lightning.pruning.checkpoint import save_pruned

    if job.output_dir is None:
        return None
    note(f"saving to {job.output_dir}")
    return save_pruned(model, job.output_dir, tokenizer, form=setup.form, verify=job.verify, overwrite=job.overwrite)
