"""``fasp prune --stream``: a model that is larger than the memory is measured, pruned and saved a block at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.devices import free_memory, home
from fasp_lightning.checkpoints.refused_models import require_unpacked
from fasp_lightning.checkpoints.saving import SavedModel
from fasp_lightning.checkpoints.streaming.disk import Traffic
from fasp_lightning.cli.console import PruningProgress, gibibytes, note, results
from fasp_lightning.cli.jobs import PruneJob
from fasp_lightning.cli.measured import reported
from fasp_lightning.cli.model_setup import Setup
from fasp_lightning.cli.texts import Calibration, Text
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.perplexity import PerplexityResult
from fasp_lightning.pruning.report import PruningReport
from fasp_lightning.streaming.folder import FolderPruning, require_streamable


@dataclass(frozen=True)
class Streamed:
    """What has come of it.

    Attributes:
        report: Of the pruning, perplexities among it.
        saved: What was written.
        traffic: What was read and written on the way.
        calibration: The calibration text, without own text where that was not at hand.
    """

    report: PruningReport
    saved: SavedModel
    traffic: Traffic
    calibration: Calibration


def streams(job: PruneJob, setup: Setup) -> bool:
    """Whether the model is streamed: as asked, or because its weights would take more than half of the free memory.

    Raises:
        FaspError: If it is asked for, and something else is that needs the whole model.
    """
    if job.stream is not None:
        if job.stream:
            _require_streamable(job, setup)
        return job.stream
    size, free = setup.budget.parameters_before * setup.dtype.itemsize, free_memory()
    elsewhere = home(setup.device, 2 * size)[0].type != "cpu"
    if free is None or size <= free / 2 or elsewhere:
        return False
    large = f"the weights take {gibibytes(size)}, more than half of the {gibibytes(free)} of memory that are free"
    try:
        _require_streamable(job, setup)
    except FaspError as error:
        note(f"warning: {large}, but the model is not streamed: {error}")
        return False
    note(f"{large}: the model is streamed, a block at a time (stream=false loads it as a whole)")
    return True


def prune_streamed(
    job: PruneJob, setup: Setup, tokenizer: Any, calibration: Calibration, evaluation: list[Text]
) -> Streamed:
    """Measure, prune, measure again and save; what an earlier run that was stopped has done is taken up.

    Args:
        job: The job.
        setup: Its setup.
        tokenizer: Saved along.
        calibration: The calibration text.
        evaluation: The texts to measure.
    """
    folder = _opened(job, setup)
    if folder.folder.is_dir() and not job.overwrite:
        note(f"what was begun in {folder.folder.name} is taken up")
    with folder.begun(calibration.batches):
        calibration = _with_text_at_hand(folder, calibration)
        before = _measured(folder, evaluation, "before")
        with PruningProgress() as progress:
            report = folder.prune(progress)
        after = _measured(folder, evaluation, "after")
        model = folder.streamed.model
        folder.streamed.sample_rest()
        reported(model, report, job, setup, calibration, evaluation, (before, after, [None] * len(evaluation)))
        note(f"saving to {job.output_dir}")
        saved = folder.save(tokenizer, job.verify, push_to_hub=job.push_to_hub, private=job.private)
        return Streamed(report, saved, folder.streamed.disk.traffic, calibration)


def print_traffic(traffic: Traffic) -> None:
    """How much was read and written, and how fast, beside the computing."""
    parts = (("read", traffic.read, traffic.read_seconds), ("written", traffic.written, traffic.written_seconds))
    told = (f"{gibibytes(size)} {what} at {size / 1e6 / seconds:,.0f} MB/s" for what, size, seconds in parts if seconds)
    results().print(f"disk, beside the computing: {', '.join(told)}", soft_wrap=True)


def _require_streamable(job: PruneJob, setup: Setup) -> None:
    """Refuse what reads the whole model more than a few times.

    Raises:
        FaspError: If such a thing is asked for.
    """
    require_streamable(setup.pruning)
    if job.output_dir is None:
        raise FaspError("output_dir must be a folder for stream=true, got null: finished blocks are written there")
    for name in ("prompt", "speedup"):
        if (given := getattr(job, name)) is not None:
            raise FaspError(f"{name} must be null for stream=true, got {given!r}, which runs the model as a whole")
    require_unpacked(setup.config, setup.source.name)
    if setup.source.gguf_file is not None:
        raise FaspError(
            f"model must have safetensors files for stream=true, got the GGUF file {setup.source.gguf_file!r}, "
            "which is read as a whole; save it as such on a machine that has the memory (load_model, save_pretrained)"
        )


def _opened(job: PruneJob, setup: Setup) -> FolderPruning:
    return FolderPruning.open(
        setup.pruning,
        job.model.name_or_path,
        Path(str(job.output_dir)),
        dtype=setup.dtype,
        save_dtype=setup.stored,
        form=setup.form,
        overwrite=job.overwrite,
        revision=job.model.revision,
        trust_remote_code=job.model.trust_remote_code,
        attn_implementation=job.model.attn_implementation,
    )


def _with_text_at_hand(folder: FolderPruning, calibration: Calibration) -> Calibration:
    """Own text, if it is in its cache, else none of it: to sample it would read the whole model for each token.

    Raises:
        FaspError: If there is no other text.
    """
    own = folder.config.own_text
    if own is None or folder.text_at_hand(own):
        return calibration
    if own.share == 1:
        raise FaspError("own_text.share must be less than 1 for stream=true, got 1, and no own text in its cache")
    note("own text is not in its cache, and left out: sampling would read the whole model for each token")
    folder.config = replace(folder.config, own_text=None)
    return replace(calibration, own=None)


def _measured(folder: FolderPruning, texts: list[Text], when: str) -> list[PerplexityResult]:
    found = []
    for number, text in enumerate(texts):
        note(f"perplexity, {when}: {text.name}")
        found.append(folder.perplexity(f"{when}-{number}", text.batches))
    return found
