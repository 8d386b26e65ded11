"""Refuse before spending: what can be wrong with a job is found before the model's weights are read."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fasp_lightning.cli.console import megabytes
from fasp_lightning.cli.jobs import ModelConfig, PruneJob
from fasp_lightning.errors import FaspError, FaspOSError, FaspPermissionError
from fasp_lightning.pruning.batches import check_vocabulary, weighted
from fasp_lightning.pruning.own_text import OwnTextConfig, within_positions
from fasp_lightning.pruning.text import TextConfig, describe, for_role, token_batches
from fasp_lightning.pruning.text_files import local_files


@dataclass(frozen=True)
class Text:
    """A text that is ready to be measured.

    Attributes:
        name: For tables.
        batches: (batch, seq) token ids.
        config: Where it came from.
    """

    name: str
    batches: list[Tensor]
    config: TextConfig

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(batch.numel() for batch in self.batches)


@dataclass(frozen=True)
class Calibration:
    """All text that a model is calibrated on.

    Attributes:
        texts: Texts that are read; none where own text is all.
        own: What the model will write itself, if it does.
    """

    texts: list[Text]
    own: OwnTextConfig | None

    @property
    def name(self) -> str:
        """For tables."""
        return calibration_name(self.configs, self.own)

    @property
    def configs(self) -> list[TextConfig]:
        """Where the texts that are read came from."""
        return [text.config for text in self.texts]

    @property
    def tokens(self) -> int:
        """All tokens, own text among them."""
        return sum(text.tokens for text in self.texts) + own_tokens(self.own)

    @property
    def batches(self) -> list[Any]:
        """For the pruner, own text aside."""
        return [batch for text in self.texts for batch in weighted(text.batches, text.config.weight)]

    def to_dict(self) -> dict[str, Any]:
        """What the report says of it: the first text's settings, and those of further ones."""
        first, *further = map(dataclasses.asdict, self.configs) if self.texts else [{}]
        return {"name": self.name, **first, **({"further": further} if further else {})}


def calibration_name(texts: Sequence[TextConfig], own: OwnTextConfig | None) -> str:
    """Name a mix for a table: "topics (calibration), 0.5 x articles.jsonl, own text"."""
    names = [describe(text) if text.weight == 1 else f"{text.weight:g} x {describe(text)}" for text in texts]
    return ", ".join([*names, *(["own text"] if own is not None else [])])


def own_tokens(own: OwnTextConfig | None) -> int:
    """Tokens of own text."""
    return 0 if own is None else own.sequences * own.seq_len


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


def load_text(config: TextConfig, tokenizer: Any, model: Any, name: str) -> Text:
    """Tokenize a text, and check that the model can take it.

    Args:
        config: The text.
        tokenizer: The model's tokenizer.
        model: The model, on any device.
        name: The option's name, for messages.

    Raises:
        FaspError: If the text is too short, its sequences too long, or a token has no embedding.
        FaspOSError: If a file cannot be read.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and config.seq_len > longest:
        raise FaspError(f"{name}.seq_len must be at most {longest}, the positions of the model, got {config.seq_len}")
    batches = token_batches(config, tokenizer)
    vocabulary = model.get_input_embeddings().num_embeddings
    for batch in batches:
        check_vocabulary(batch, vocabulary)
    return Text(describe(config), batches, config)


def load_calibration(texts: list[TextConfig], own: OwnTextConfig | None, tokenizer: Any, model: Any) -> Calibration:
    """Tokenize the calibration texts, and check that the model can take them.

    Args:
        texts: Those of :func:`texts_of`.
        own: The settings of own text.
        tokenizer: The model's tokenizer.
        model: The model, on any device.

    Raises:
        FaspError: As in :func:`load_text`.
        FaspOSError: If a file cannot be read.
    """
    own = own and within_positions(model, own)
    names = ("further_calibration" if index else "calibration" for index in range(len(texts)))
    return Calibration([load_text(text, tokenizer, model, name) for text, name in zip(texts, names, strict=True)], own)


def tokenizer_of(model: ModelConfig) -> Any:
    """The tokenizer a job names, or the model's own.

    Raises:
        FaspOSError: If there is none.
    """
    from fasp_lightning.pruning.loading import load_tokenizer

    if model.tokenizer is not None:
        return load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    try:
        return load_tokenizer(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except OSError as error:
        raise FaspOSError(f"{error} with --model.tokenizer") from error


def check_room(path: Path, size: int) -> None:
    """Refuse an output folder whose disk cannot take the model, or may not be written to.

    Args:
        path: The folder; it need not exist.
        size: Bytes that will be written. What is overwritten goes afterwards, so it makes no room.

    Raises:
        FaspOSError: If there is no room.
        FaspPermissionError: If the place is not writable.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise FaspPermissionError(f"output_dir {str(path)!r} cannot be made: {str(parent)!r} is not writable")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise FaspOSError(f"output_dir {str(path)!r} needs {megabytes(size)}, but only {megabytes(free)} are free")


def check_output_dir(job: PruneJob) -> None:
    """Refuse an output folder that is taken, or that is the model's own.

    Raises:
        FaspFileExistsError: If it is not empty and may not be overwritten.
        FaspError: If it is a file, or the folder that is pruned.
    """
    from fasp_lightning.pruning.checkpoint import check_output

    if job.output_dir is None:
        return
    path = Path(job.output_dir)
    if path.exists() and not path.is_dir():
        raise FaspError(f"output_dir must be a folder, got the file {job.output_dir!r}")
    if path.exists() and path.resolve() == Path(job.model.name_or_path).expanduser().resolve():
        raise FaspError(f"output_dir must not be the folder of the model that is pruned, got {job.output_dir!r}")
    check_output(path, job.overwrite)
