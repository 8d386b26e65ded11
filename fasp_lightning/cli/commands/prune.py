"""``fasp prune``: prune a model, measure it before and after, save it, check what was saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.dry_save import require_savable
from fasp_lightning.checkpoints.publishing.hub import check_hub
from fasp_lightning.cli.checks import check_output_dir, claimed_output, texts_of, tokenizer_of
from fasp_lightning.cli.commands.prune_streamed import Streamed, print_traffic, prune_streamed, streams
from fasp_lightning.cli.commands.prune_tables import print_continuations, print_loaders, print_results, print_speedup
from fasp_lightning.cli.console import dtype_name, gibibytes, note, percent, shown_warnings
from fasp_lightning.cli.generation import check_prompt, continuation
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.measured import domains_of, measure, place, prune_measured, save
from fasp_lightning.cli.model_setup import (
    Setup,
    load,
    memory_of,
    remarks,
    saved_dtype,
    set_up,
)
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.cli.texts import (
    Calibration,
    Text,
    begins_with,
    load_calibration,
    load_text,
    missing_domain,
    single_source,
)
from fasp_lightning.pruning.latency.speedup import Speedup, SpeedupPlan, measure_speedup
from fasp_lightning.pruning.progress import peak_memory
from fasp_lightning.staging import require_space

JOB = PruneJob


def run(job: PruneJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    check_output_dir(job)
    check_hub(job.push_to_hub, job.private)
    with claimed_output(job):
        _run(job)
    return 0


def _run(job: PruneJob) -> None:
    calibration_configs, evaluation_configs = texts_of(job)
    setup = set_up(job)
    if job.output_dir is not None:
        require_space(Path(job.output_dir), setup.stored_bytes)
    tokenizer = tokenizer_of(job.model)
    if job.output_dir is not None:
        require_savable(setup.model, tokenizer)
    check_prompt(setup.model, tokenizer, job.prompt, job.new_tokens)
    calibration = load_calibration(calibration_configs, setup.pruning.own_text, tokenizer, setup.model)
    evaluation = [load_text(text, tokenizer, setup.model, "evaluation") for text in evaluation_configs]
    streamed = streams(job, setup)
    announce(job, setup, calibration, evaluation, streamed)
    with shown_warnings():
        if streamed:
            _show_streamed(job, setup, prune_streamed(job, setup, tokenizer, calibration, evaluation))
            return
        model = load_home(job, setup)
        before = measure(model, evaluation, "dense" if not setup.already_pruned else "as it is")
        dense_text = _continue(model, tokenizer, job)
        report = prune_measured(model, job, setup, calibration, evaluation, before, again=lambda: load_home(job, setup))
        pruned_text = _continue(model, tokenizer, job)
        measured = None if setup.speedup is None else _measure_speedup(model, job, setup, setup.speedup)
    saved = save(model, tokenizer, job, setup)
    report.peak_memory = peak_memory(setup.device)  # with the evaluation, and the copy that verified
    print_results(job, setup, calibration, report, saved)
    print_speedup(setup, measured)
    if job.prompt is not None:
        print_continuations(job.prompt, dense_text, pruned_text)
    if saved is not None:
        print_loaders(saved, setup)


def _show_streamed(job: PruneJob, setup: Setup, found: Streamed) -> None:
    found.report.peak_memory = peak_memory(setup.device)
    print_results(job, setup, found.calibration, found.report, found.saved)
    print_traffic(found.traffic)
    print_loaders(found.saved, setup)


def announce(
    job: PruneJob, setup: Setup, calibration: Calibration, evaluation: list[Text], streamed: bool = False
) -> None:
    """Say what is about to happen, what it will take, and what the figures will not show."""
    memory = memory_of(setup, job, calibration.tokens, streamed)
    for remark in remarks(setup):
        note(remark)
    note(
        f"pruning {setup.source.name} to {percent(setup.budget.sparsity)} sparsity on {calibration.tokens:,} tokens "
        f"of {calibration.name}, in {dtype_name(setup.dtype)} on {setup.device}; "
        f"about {gibibytes(memory.total)} of memory{saved_dtype(setup) if job.output_dir else ''}"
    )
    if job.output_dir is None:
        note("output_dir is null: the pruned model will not be saved")
    if warning := single_source(calibration.configs, calibration.own is not None):
        note(f"warning: {warning}")
    if begin := begins_with([*calibration.texts, *evaluation]):
        note(begin)
    if missing := missing_domain(domains_of(job, calibration, evaluation)):
        note(missing)


def load_home(job: PruneJob, setup: Setup) -> Any:
    """The model, on the compute device if it has room for it, else on the CPU."""
    note("loading the weights")
    return load(job.model, setup.config, setup.dtype, place(setup))


def _measure_speedup(model: Any, job: PruneJob, setup: Setup, planned: SpeedupPlan) -> Speedup:
    """Time the dense and the pruned model in turn; both figures go into the report that is saved."""
    measured = measure_speedup(load_home(job, setup), model, job.serving)
    model.fasp_report |= {"speedup": dataclasses.asdict(planned) | {"measured": dataclasses.asdict(measured)}}
    return measured


def _continue(model: Any, tokenizer: Any, job: PruneJob) -> str:
    return "" if job.prompt is None else continuation(model, tokenizer, job.prompt, job.new_tokens)
