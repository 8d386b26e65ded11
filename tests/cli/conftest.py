"""Running commands in this process on tiny models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fasp_lightning.checkpoints import loading
from fasp_lightning.cli.main import main
from fasp_lightning.text import tokens

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "some", "dog", "ran", "off", "and", "rain", "fell")
BASIC = ("--pruning.score", "wanda", "--pruning.own_text", "null")
"""Neither gradients nor own text; later options win."""

TEXT = "{source: builtin:topics, split: test, seq_len: 16, sequences: 4, batch_size: 2}"


class Outcome(NamedTuple):
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, an empty one."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_more_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is tokenized by pieces of a size that suits small runs: whole, it takes most of their time."""
    monkeypatch.setattr(tokens, "GROUP_LENGTH", 20_000)


@pytest.fixture
def fasp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, user_cache: Path) -> Command:
    """``fasp("prune", …)`` runs the command."""
    # loggers of libraries hold on to the stderr of the test that imported them
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def prune(fasp: Command, tmp_path: Path) -> Command:
    """``prune(folder, …)`` prunes a folder with small texts to ``tmp_path / "pruned"``; later options win.

    Without gradients and own text, which are asked for where they matter.
    """

    def run(folder: object, *more: object) -> Outcome:
        small = ["--calibration.seq_len", 16, "--calibration.sequences", 8, "--evaluation", f"[{TEXT}]"]
        where = ["--output_dir", tmp_path / "pruned", "--device", "cpu"]
        return fasp("prune", "--model.name_or_path", folder, *BASIC, *small, *where, *more)

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*_: object, **__: object) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(loading, "_load_dense", read)
    monkeypatch.setattr(loading, "load_pruned", read)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file with enough text for every role of a training."""
    draw = torch.Generator().manual_seed(0)
    documents = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (40,), generator=draw)) for _ in range(600)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return path
