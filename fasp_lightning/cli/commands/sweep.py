"""``fasp sweep``: one model at several sparsities; what these have in common is done once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fasp_lightning
from fasp_lightning.checkpoints.dry_save import require_savable
from fasp_lightning.checkpoints.forms import choose_form
from fasp_lightning.checkpoints.loading import load_config
from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE, form_in
from fasp_lightning.checkpoints.source import weight_files
from fasp_lightning.checkpoints.tasks.answers import Measured
from fasp_lightning.checkpoints.tasks.entries import entry_of
from fasp_lightning.cli.checks import check_output_dir, claimed_output, texts_of, tokenizer_of
from fasp_lightning.cli.commands.sweep_tables import Finished, print_sweep, write_sweep
from fasp_lightning.cli.console import PruningProgress, dtype_name, gibibytes, note, percent, shown_warnings
from fasp_lightning.cli.generation import check_prompt, continuation
from fasp_lightning.cli.jobs import PruneJob, TaskOptions
from fasp_lightning.cli.measured import domains_of, measure, place, prune_measured, save
from fasp_lightning.cli.model_setup import Setup, bytes_before, load, memory_of, remarks, saved_dtype, set_up
from fasp_lightning.cli.quiet import quiet_libraries
from fasp_lightning.cli.tasks.harness import Tasks, find_tasks, run_tasks
from fasp_lightning.cli.texts import (
    Calibration,
    Text,
    begins_with,
    load_calibration,
    load_text,
    missing_domain,
    single_source,
)
from fasp_lightning.errors import FaspError, FaspFileExistsError
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.own_text.cache import digest_of, weights_digest
from fasp_lightning.pruning.perplexity import PerplexityResult
from fasp_lightning.pruning.prepare import Prepared
from fasp_lightning.staging import read_json, require_space
from fasp_lightning.streaming.pruner import FASPPruner

Settings = dict[str, Any]


@dataclass(frozen=True)
class SweepJob(PruneJob, TaskOptions):
    """Prune a causal language model to several sparsities, measure it at each, and save each.

    A sparsity that an earlier run has finished with the same settings is not computed again.

    Attributes:
        output_dir: Folder for sweep.md, sweep.json, sweep.png and a folder for each sparsity.
        overwrite: Replace the models in output_dir that were made with other settings.
        sparsities: The sparsities, which stand for pruning.sparsity; each is reached from the model as it is loaded.
    """

    output_dir: str | None = "outputs/sweep"
    sparsities: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.2, 0.3])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_tasks()
        if self.speedup is not None:
            raise FaspError(f"speedup must be null in a sweep, whose sparsities are given, got {self.speedup}")
        if self.stream:
            raise FaspError("stream must be null in a sweep, which prunes copies in memory, got true; use fasp prune")
        _ = self.folder  # refuses null
        if self.push_to_hub is not None:
            raise FaspError(
                f"push_to_hub must be null for a sweep, which saves several models, got {self.push_to_hub!r}; "
                "upload the folder of one with `hf upload`"
            )
        if not self.sparsities or len(set(self.sparsities)) < len(self.sparsities):
            raise FaspError(f"sparsities must be one or more different numbers, got {self.sparsities}")
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                raise FaspError(f"sparsities must be in (0, 1), got {sparsity}")

    @property
    def folder(self) -> Path:
        """The folder of the sweep.

        Raises:
            FaspError: If ``output_dir`` is null.
        """
        if self.output_dir is None:
            raise FaspError("output_dir must be a folder for a sweep, got null")
        return Path(self.output_dir)

    def folder_at(self, sparsity: float) -> Path:
        """The folder of the model that is pruned to a sparsity."""
        return self.folder / f"sparsity_{_digits(sparsity)}"

    def points(self) -> list[PruneJob]:
        """The job of each sparsity, in rising order. What one replaces is for :func:`_left` to decide."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(PruneJob)}
        return [
            PruneJob(
                **shared
                | {
                    "pruning": dataclasses.replace(self.pruning, sparsity=sparsity),
                    "output_dir": str(self.folder_at(sparsity)),
                    "overwrite": True,
                }
            )
            for sparsity in sorted(self.sparsities)
        ]


JOB = SweepJob


def run(job: SweepJob) -> int:
    """Run the command; returns the exit code."""
    quiet_libraries()
    _check_folders(job)
    with claimed_output(job):
        _run(job)
    return 0


def _run(job: SweepJob) -> None:
    calibration_configs, evaluation_configs = texts_of(job)
    tasks = find_tasks(job)
    points = _set_up(job.points())
    setup = points[0][1]
    require_space(job.folder / "sweep", max(setup.stored_bytes for _, setup in points))
    tokenizer = tokenizer_of(job.model)
    require_savable(setup.model, tokenizer)
    check_prompt(setup.model, tokenizer, job.prompt, job.new_tokens)
    calibration = load_calibration(calibration_configs, setup.pruning.own_text, tokenizer, setup.model)
    evaluation = [load_text(text, tokenizer, setup.model, "evaluation") for text in evaluation_configs]
    with shown_warnings():
        note("loading the weights")
        dense = load(job.model, setup.config, setup.dtype, torch.device("cpu"))
        sweep = _Sweep(job, setup, dense, tokenizer, calibration, evaluation, tasks)
        left = [point for point in points if sweep.is_left(point[0])]
        sweep.announce(points, left)
        for point in left:
            sweep.prune(*point)
            write_sweep(sweep.finished(points), job.folder)
    finished = sweep.finished(points)
    write_sweep(finished, job.folder)
    print_sweep(finished, setup.source.name, job.folder)


def _check_folders(job: SweepJob) -> None:
    """Refuse a folder that is taken by something else than a sweep, before anything is read."""
    if job.folder.exists() and not job.folder.is_dir():
        raise FaspError(f"output_dir must be a folder, got the file {job.output_dir!r}")
    for point in job.points():
        check_output_dir(point)


def _set_up(jobs: list[PruneJob]) -> list[tuple[PruneJob, Setup]]:
    """Each job with its setup; the model's config and shapes are read once."""
    first = set_up(jobs[0])

    def at(job: PruneJob) -> Setup:
        pruning = dataclasses.replace(first.pruning, sparsity=job.pruning.sparsity)
        budget = decide_budget(first.model, pruning)
        form = choose_form(job.form, first.spec, budget.cuts)
        return dataclasses.replace(first, pruning=pruning, budget=budget, cuts=budget.cuts, form=form)

    return [(job, at(job)) for job in jobs]


class _Sweep:
    """What all sparsities share: the model as it was loaded, on the CPU, the texts, and what is known of both."""

    def __init__(
        self,
        job: SweepJob,
        setup: Setup,
        dense: Any,
        tokenizer: Any,
        calibration: Calibration,
        evaluation: list[Text],
        tasks: Tasks | None,
    ) -> None:
        self.stored, self.bytes_before, self._model = setup.stored, bytes_before(setup, job), weights_digest(dense)
        self.job, self.dense, self.tokenizer = job, dense, tokenizer
        self.calibration, self.evaluation, self.tasks = calibration, evaluation, tasks
        self._shared: tuple[list[PerplexityResult], Measured, Prepared] | None = None

    def settings(self, job: PruneJob) -> Settings:
        """All that decides what comes out, as plain data."""
        return {
            "version": fasp_lightning.__version__,
            "model": self._model,
            "pruning": job.pruning.to_dict(),
            "calibration": [[text.config.token_weight, _digest(text)] for text in self.calibration.texts],
            "evaluation": [_digest(text) for text in self.evaluation],
            "tasks": None if self.tasks is None else self.tasks.questions,
            "form": job.form,
            "save_dtype": str(self.stored),
            "compare_unrestored": job.compares,
        }

    def is_left(self, job: PruneJob) -> bool:
        """Whether a sparsity is to be computed.

        Raises:
            FaspFileExistsError: If its folder was made with other settings, and may not be overwritten.
        """
        report = _report(self.job.folder_at(job.pruning.sparsity))
        if report is None:
            return True
        made_with, wanted = report.get("made_with", {}), self.settings(job)
        changed = [name for name in wanted if made_with.get(name) != wanted[name]]
        if changed and not self.job.overwrite:
            raise FaspFileExistsError(
                f"{job.output_dir} was made with other settings ({', '.join(changed)}); choose another output_dir, "
                "or overwrite it"
            )
        return bool(changed)

    def announce(self, points: list[tuple[PruneJob, Setup]], left: list[tuple[PruneJob, Setup]]) -> None:
        """Say what is about to happen, and what it will take."""
        done = f"; {len(points) - len(left)} of {len(points)} are finished" if len(left) < len(points) else ""
        sparsities = ", ".join(percent(setup.budget.sparsity) for _, setup in points)
        note(f"sweep of {points[0][1].source.name} over {sparsities} sparsity{done}")
        if self.job.pruning.sparsity != PruningConfig.sparsity:
            note(f"pruning.sparsity, {self.job.pruning.sparsity}, is not used: sparsities take its place")
        if begin := begins_with([*self.calibration.texts, *self.evaluation]):
            note(begin)
        if missing := missing_domain(domains_of(self.job, self.calibration, self.evaluation)):
            note(missing)
        if warning := single_source(self.calibration.configs, self.calibration.own is not None):
            note(f"warning: {warning}")
        if not left:
            return
        job, setup = left[0]
        memory = memory_of(setup, job, self.calibration.tokens)
        for remark in remarks(setup):
            note(remark)
        note(
            f"each on {self.calibration.tokens:,} tokens of {self.calibration.name}, in {dtype_name(setup.dtype)} on "
            f"{setup.device}; about {gibibytes(memory.total + memory.weights)} of memory{saved_dtype(setup)}"
        )

    def prune(self, job: PruneJob, setup: Setup) -> None:
        """Prune a copy to one sparsity, measure it and save it."""
        fresh = self._copies(place(setup))
        before, answered, prepared = self._shared = self._shared or self._share(fresh(), setup)
        note(f"sparsity {percent(setup.budget.sparsity)}")
        model = fresh()
        prune_measured(model, job, setup, self.calibration, self.evaluation, before, fresh, prepared)
        model.fasp_report["made_with"] = self.settings(job)
        if self.tasks is not None:
            answers = run_tasks(model, self.tokenizer, self.tasks).answers
            model.fasp_report["tasks"] = [entry_of(model, answers, answered)]
        if job.prompt is not None:
            text = continuation(model, self.tokenizer, job.prompt, job.new_tokens)
            model.fasp_report["continuation"] = {"prompt": job.prompt, "text": text}
        save(model, self.tokenizer, job, setup)

    def _share(self, model: Any, setup: Setup) -> tuple[list[PerplexityResult], Measured, Prepared]:
        """Perplexities and answers before, and own text and loss sensitivity for the pruning to any sparsity."""
        before = measure(model, self.evaluation, "dense" if not setup.already_pruned else "as it is")
        answers = run_tasks(model, self.tokenizer, self.tasks).answers
        answered = Measured(self.job.model.name_or_path, dtype_name(model.dtype), answers)
        with PruningProgress() as progress:
            return before, answered, FASPPruner(setup.pruning).prepare(model, self.calibration.batches, progress)

    def _copies(self, device: torch.device) -> Callable[[], Any]:
        return lambda: copy.deepcopy(self.dense).to(device)

    def finished(self, points: list[tuple[PruneJob, Setup]]) -> list[Finished]:
        """What is on disk of this sweep."""
        rows = []
        for job, _ in points:
            folder = self.job.folder_at(job.pruning.sparsity)
            report = _report(folder)
            if report is not None and report.get("made_with") == self.settings(job):
                sizes = (self.bytes_before, sum(file.stat().st_size for file in weight_files(folder)))
                rows.append(Finished(job.pruning.sparsity, folder, form_in(load_config(folder), folder), report, sizes))
        return rows


def _report(folder: Path) -> dict[str, Any] | None:
    """The report in the folder of a sparsity, if a model is there."""
    return read_json(file) if (file := folder / REPORT_FILE).is_file() else None


def _digest(text: Text) -> str:
    """What stands for a text: name and tokens."""
    return f"{text.name}: {digest_of(text.batches)}"


def _digits(sparsity: float) -> str:
    """At least two decimals, and all there are."""
    return f"{sparsity:.2f}" if round(sparsity, 2) == sparsity else repr(sparsity)
