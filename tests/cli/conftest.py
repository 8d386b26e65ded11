"""Running commands in this process on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fasp_lightning.cli.main import main
from fasp_lightning.pruning import loading

TEXT = "{source: builtin:topics, split: test, seq_len: 16, sequences: 4, batch_size: 2}"


class Outcome(NamedTuple):
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def fasp(capsys: pytest.CaptureFixture[str]) -> Command:
    """``fasp("prune", …)`` runs the command."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def prune(fasp: Command, tmp_path: Path) -> Command:
    """``prune(folder, …)`` prunes a folder with small texts to ``tmp_path / "pruned"``; later options win."""

    def run(folder: object, *more: object) -> Outcome:
        small = ["--calibration.seq_len", 16, "--calibration.sequences", 8, "--evaluation", f"[{TEXT}]"]
        where = ["--output_dir", tmp_path / "pruned", "--device", "cpu"]
        return fasp("prune", "--model.name_or_path", folder, *small, *where, *more)

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def read(*_: object, **__: object) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(loading, "_load_dense", read)
    monkeypatch.setattr(loading, "load_pruned", read)
