"""Resume law: a run stopped or killed anywhere, and resumed from its newest checkpoint, ends as one that was not.

The same to the bit are weights, optimizer and schedule states, the callback's records, and the last value of each
logged metric at each step. ``make test`` tries some points, ``make laws`` every one.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_forked
from resume_run import Lines, Run, fit, newest
from resume_stops import BATCHES, EPOCHS, Stop, StoppedError
from tiny_text import words, write_rows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore:.*(workers|interval|eval mode|not resumable|treespec|not empty).*")

RUNS = {
    "own": Run(),
    "own-full-by-steps": Run(recovery="full", accumulate=2, by_steps=True),
    "own-lora": Run(recovery="lora", validate_every=2),
    "own-lora-of-the-module": Run(recovery="lora", lora=True, accumulate=2),
    "own-saved-amid-accumulation": Run(accumulate=2, saves="validation", validate_every=3),
    "own-plateau": Run(plateau=True, saves="epoch"),
    "own-plateau-by-steps": Run(plateau=True, saves="epoch", by_steps=True, accumulate=2),
    "own-saved-on-error": Run(recovery="lora", saves="error", accumulate=2),
    "own-everything": Run(settings="everything", recovery="lora"),
    "own-distilled": Run(recovery="lora", accumulate=2, distilled=True),
    "own-learned-distilled": Run(settings="learned", recovery="lora", distilled=True, saves="epoch"),
    "own-groups": Run(settings="groups", recovery="full", accumulate=2),
    "foreign": Run(foreign=True, saves="epoch"),
    "foreign-full-by-steps": Run(foreign=True, recovery="full", saves="epoch", by_steps=True),
    "foreign-lora": Run(foreign=True, recovery="lora", saves="validation", accumulate=2),
    "foreign-everything": Run(foreign=True, settings="everything", saves="epoch", accumulate=2),
    "foreign-groups": Run(foreign=True, settings="groups", recovery="lora", saves="epoch"),
}
VALIDATION = {"val_loss", "val_perplexity"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of all runs, and of the text and tokenizer they read."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text").mkdir()
    tiny_tokenizer.save_pretrained(folder / "text" / "tokenizer")
    for seed, (role, count) in enumerate({"train": 30, "validation": 10, "calibration": 10}.items()):
        write_rows(folder / "text" / f"{role}.jsonl", words(count, seed))
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Path]:
    """Folder of a run that is not stopped."""

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            fit(RUNS[name], path)
        return path

    return folder


@pytest.fixture
def folder(root: Path) -> Iterator[Path]:
    """Folder of a run that is."""
    path = root / "stopped"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def stop_by_error(run: Run, folder: Path, stop: Stop) -> None:
    """In this process."""
    if stop.how == "early":
        fit(run, folder, stop)
    else:
        with pytest.raises(StoppedError):
            fit(run, folder, stop)


def stop_by_kill(run: Run, folder: Path, stop: Stop) -> None:
    """With SIGKILL, in a process of its own."""
    ((status, errors),) = run_forked(fit, folder, (run, folder, stop))
    assert status == -signal.SIGKILL, errors
    assert not (folder / "outcome.pt").exists()


def assert_law(run: Run, folder: Path, whole: Path, *stops: Stop) -> None:
    """Stop it, or kill it, so many times; then let it end."""
    for stop in stops:
        (stop_by_kill if stop.how == "kill" else stop_by_error)(run, folder, stop)
    written = newest(folder)
    if written is not None:
        torch.load(written, weights_only=True)
    fit(run, folder)
    found, expected = torch.load(folder / "outcome.pt"), torch.load(whole / "outcome.pt")
    assert list(differences(found, expected)) == []
    assert metrics(folder, stops[-1], run) == metrics(whole, stops[-1], run)


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two nested states are not the same to the bit."""
    if isinstance(expected, Tensor):
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            yield path
    elif isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        for key in expected:
            yield from differences(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif found != expected:
        yield path


def metrics(folder: Path, stop: Stop, run: Run) -> dict[tuple[int, str], float]:
    """Last value of each metric at each step, but for those that say nothing of the law."""
    values = Lines(folder / "metrics.jsonl").last()
    return {key: value for key, value in values.items() if key[1] != "fasp/seconds" and not lost(*key, stop, run)}


def lost(step: int, name: str, stop: Stop, run: Run) -> bool:
    """What no resumed run can log, and what a run logs only since it stops."""
    begun, ended = steps(stop.count, run)
    if stop.how == "early":  # Lightning validates, and the callback tells how the model ends
        return (step == ended and name.startswith("fasp")) or (step == begun - 1 and name in VALIDATION)
    if stop.point == "saved" or (stop.point == "step" and run.saves == "error"):
        # Lightning logs a step after it has written the checkpoint
        return step == begun - 1 and name in {"train_loss", "epoch"} | (VALIDATION if is_last(stop, run) else set())
    if stop.point == "validation" and is_last(stop, run):
        return step == steps(BATCHES * EPOCHS, run)[0] - 1 and name in VALIDATION
    # the mean of an epoch is in no checkpoint that is written before it is logged
    return stop.point == "epoch" and run.saves == "validation" and name == "train_loss_epoch"


def is_last(stop: Stop, run: Run) -> bool:
    """Whether the checkpoint has all of ``max_steps``, so that Lightning, resumed, begins nothing."""
    batches = BATCHES * ((stop.count + 2) // 3) if stop.point == "validation" else stop.count
    return run.by_steps and run.saves == "step" and batches >= BATCHES * EPOCHS


def steps(batches: int, run: Run) -> tuple[int, int]:
    """Optimizer steps begun and ended in so many batches; an epoch's last batch ends one."""
    epochs, rest = divmod(batches, BATCHES)
    before = epochs * -(-BATCHES // run.accumulate)
    return before + -(-rest // run.accumulate), before + rest // run.accumulate


SAMPLE = [
    ("own", Stop("validation", 4)),
    ("own-full-by-steps", Stop("pruned", 4)),
    ("own-full-by-steps", Stop("end", 1)),
    ("own-lora", Stop("step", 12)),
    ("own-lora-of-the-module", Stop("calibration", 9)),
    ("own-saved-amid-accumulation", Stop("step", 5)),
    ("own-plateau", Stop("step", 7, "early")),
    ("foreign-full-by-steps", Stop("batch", 8)),
    ("foreign-lora", Stop("calibration", 30)),
    ("own-everything", Stop("calibration", 20)),
    ("own-groups", Stop("step", 4)),
    ("foreign-everything", Stop("pruned", 8)),
    ("foreign-groups", Stop("batch", 12)),
    ("own-lora", Stop("calibration", 7, "kill")),
    ("own-lora-of-the-module", Stop("saved", 8, "kill")),
    ("own-distilled", Stop("step", 8, "kill")),
]


def label(value: Any) -> str:
    return f"{value.point}-{value.count}-{value.how}" if isinstance(value, Stop) else str(value)


@pytest.mark.parametrize(("name", "stop"), SAMPLE, ids=label)
def test_resumed_run_ends_as_the_uninterrupted(name: str, stop: Stop, whole: Any, folder: Path) -> None:
    assert_law(RUNS[name], folder, whole(name), stop)


def test_run_resumed_twice_ends_as_the_uninterrupted(whole: Any, folder: Path) -> None:
    name = "foreign-full-by-steps"
    assert_law(RUNS[name], folder, whole(name), Stop("batch", 7), Stop("batch", 7))


def test_run_killed_in_an_accumulation_after_a_resume_ends_as_the_uninterrupted(whole: Any, folder: Path) -> None:
    name = "own-full-by-steps"
    assert_law(RUNS[name], folder, whole(name), Stop("step", 3), Stop("batch", 2))


def test_checkpoint_from_the_middle_of_a_pruning_is_refused(folder: Path) -> None:
    run = RUNS["own-saved-on-error"]
    stop_by_error(run, folder, Stop("calibration", 5))
    with pytest.raises(ValueError, match="ckpt_path must not be written in the middle of a pruning"):
        fit(run, folder)


def points(name: str) -> Iterator[Stop]:
    """Every point of a run to stop at, each once."""
    run = RUNS[name]
    batches = BATCHES * EPOCHS
    validations = EPOCHS * (BATCHES // (run.validate_every or BATCHES))
    for point in ("batch", "pruned", "step", *(["saved"] if run.saves == "step" else [])):
        yield from (Stop(point, count) for count in range(1, batches + 1))
    if run.saves != "error":  # which is refused
        yield from (Stop("calibration", count) for count in range(1, UNITS + 1))
    yield from (Stop("validation", count) for count in range(1, 3 * validations + 1))
    yield from (Stop("validated", count) for count in range(1, validations + 1))
    yield from (Stop("epoch", count) for count in range(1, EPOCHS + 1))
    # the last checkpoint comes before a plateau's last move, and Lightning begins nothing that it takes for ended: nor
    # does it where that was written at the end of a last epoch which a stop had cut short
    if not run.plateau:
        yield Stop("end", 1)
    if not run.foreign:
        end = batches - BATCHES * (run.saves == "epoch" and not run.by_steps) - run.plateau
        yield from (Stop("step", count, "early") for count in range(1, end + 1))


UNITS = 36
"""Of the pruner's work in both events: passes over the three calibration batches, for two pairs and the outputs."""

SWEEP = [(name, stop) for name in RUNS for stop in points(name)]
KILLS = [Stop(point, count, "kill") for point in ("step", "saved") for count in range(1, BATCHES * EPOCHS + 1)]


@pytest.mark.laws
@pytest.mark.parametrize(("name", "stop"), SWEEP, ids=label)
def test_law_holds_at_every_point(name: str, stop: Stop, whole: Any, folder: Path) -> None:
    assert_law(RUNS[name], folder, whole(name), stop)


@pytest.mark.laws
@pytest.mark.parametrize("stop", KILLS, ids=label)
def test_law_holds_after_a_kill_at_every_step(stop: Stop, whole: Any, folder: Path) -> None:
    assert_law(RUNS["own-lora"], folder, whole("own-lora"), stop)


@pytest.mark.laws
@pytest.mark.parametrize("stop", [Stop("calibration", count, "kill") for count in range(1, UNITS + 1, 5)], ids=label)
def test_law_holds_after_a_kill_in_the_middle_of_a_pruning(stop: Stop, whole: Any, folder: Path) -> None:
    assert_law(RUNS["foreign-lora"], folder, whole("foreign-lora"), stop)
