"""Refuse before spending: what can be wrong with a job is found before the model's weights are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.loading import load_tokenizer
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.cli.jobs import ModelConfig, PruneJob
from fasp_lightning.errors import FaspError, FaspOSError
from fasp_lightning.staging import claimed
from fasp_lightning.text.config import TextConfig, describe, for_role
from fasp_lightning.text.reading.files import local_files


def texts_of(job: PruneJob) -> tuple[list[TextConfig], list[TextConfig]]:
    """Calibration and evaluation texts with their splits, which must not overlap.

    Raises:
        FaspError: If a text would serve for both.
        FaspError: If an evaluation text has a weight.
    """
    calibration = [for_role(text, "calibration") for text in job.calibrated()]
    if job.seed is not None:
        calibration = [dataclasses.replace(text, seed=job.seed) for text in calibration]
    evaluation = [for_role(text, "test") for text in job.evaluated()]
    for text in evaluation:
        if any(overlap(one, text) for one in calibration):
            raise FaspError(
                f"calibration and evaluation must not share text, got {describe(text)} for both; "
                "set another source, or another split"
            )
    return calibration, evaluation


def overlap(first: TextConfig, second: TextConfig) -> bool:
    """Whether two texts may share documents. Splits of one source do not; local text without one is whole."""
    if first.kind != second.kind:
        return False
    if first.kind == "local":
        same = bool(set(_files(first)) & set(_files(second)))
        return same and (first.split == second.split or None in (first.split, second.split))
    return (first.source, first.subset, first.split) == (second.source, second.subset, second.split)


def _files(text: TextConfig) -> list[Path]:
    return [file.resolve() for file in local_files(text.source)]


def tokenizer_name(tokenizer: Any, model: str) -> Any:
    """Where the tokenizer comes from: the model, where no other place is named.

    Args:
        tokenizer: The place that is named, or ``None``.
        model: The model's name.
    """
    return model if tokenizer is None else tokenizer


def tokenizer_of(model: ModelConfig) -> Any:
    """The tokenizer of a job.

    Raises:
        FaspOSError: If there is none.
    """
    own = model.tokenizer is None  # another repository has revisions of its own
    revision = model.revision if own else None
    name = tokenizer_name(model.tokenizer, model.name_or_path)
    try:
        return load_tokenizer(name, revision=revision, trust_remote_code=model.trust_remote_code)
    except FaspOSError as error:
        if own:
            raise FaspOSError(f"{error} with --model.tokenizer") from error
        raise


@contextmanager
def claimed_output(job: PruneJob) -> Iterator[None]:
    """Keep the output folder of a job for it, from its start to its end.

    Raises:
        FaspFileExistsError: If another job that lives has it.
    """
    with nullcontext() if job.output_dir is None else claimed(Path(job.output_dir)):
        yield


def check_output_dir(job: PruneJob) -> None:
    """Refuse an output folder that is taken, or that is the model's own.

    Raises:
        FaspFileExistsError: If it is not empty and may not be overwritten.
        FaspError: If it is a file, or the folder that is pruned.
    """
    if job.output_dir is None:
        return
    path = Path(job.output_dir)
    if path.exists() and not path.is_dir():
        raise FaspError(f"output_dir must be a folder, got the file {job.output_dir!r}")
    if path.exists() and path.resolve() == Path(job.model.name_or_path).expanduser().resolve():
        raise FaspError(f"output_dir must not be the folder of the model that is pruned, got {job.output_dir!r}")
    check_output(path, job.overwrite)


def check_output_file(file: str | None) -> None:
    """Refuse, before anything is measured, a file that could not be written afterwards.

    Raises:
        FaspError: If it is a folder, or would stand where nothing can be written.
    """
    if file is None:
        return
    path = Path(file).absolute()
    if path.is_dir():
        raise FaspError(f"output_file must be a file, got the folder {file!r}; name a file in it")
    home = next(parent for parent in path.parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise FaspError(f"output_file must stand in a folder that can be written to, got {file!r}; name another place")
