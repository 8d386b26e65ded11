"""A streamed pruning that was stopped goes on where it was."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import prune_until
from processes import run_forked
from tiny_pruning import BOTH, FFN, basic, calibration
from tiny_streaming import assert_same_folder, saved

from fasp_lightning import FaspError, FASPPruner, PruningConfig
from fasp_lightning.pruning.progress import ProgressEvent
from fasp_lightning.staging import read_json

KILLED = {
    "ffn": FFN,
    "rounds": basic(attention="value_dims", allocation="adaptive", rounds=2, offload="disk"),
}
PARTS = 4
"""Of the sweep, so that it is spread over workers."""


def stopped_in_block(folder: Path, output: Path, config: PruningConfig, block: int) -> None:
    """Prune, and be interrupted when a block has begun."""

    def stop(event: ProgressEvent) -> None:
        if event.block == block:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FASPPruner(config).prune_folder(folder, output, calibration(), progress=stop)


@pytest.mark.parametrize("step", [pytest.param(step, id=f"at-{step}") for step in (12, 23)])
def test_killed_at_a_step_it_ends_as_if_it_was_not(step: int, tmp_path: Path) -> None:
    assert_taken_up(step, saved(tmp_path), tmp_path, FFN)


@pytest.mark.laws
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("settings", KILLED)
def test_killed_at_any_step_it_ends_as_if_it_was_not(settings: str, part: int, tmp_path: Path) -> None:
    folder, config = saved(tmp_path), KILLED[settings]
    run_forked(prune_until, tmp_path, (None, str(folder), str(tmp_path / "counted"), config.to_dict()))
    steps = int((tmp_path / "counted.steps").read_text())
    for step in range(part, steps, PARTS):
        assert_taken_up(step, folder, tmp_path, config)


def assert_taken_up(step: int, folder: Path, tmp_path: Path, config: PruningConfig) -> None:
    """Kill a pruning at a step, give its command again, and compare with one that was not stopped."""
    if not (tmp_path / "whole").exists():
        FASPPruner(config).prune_folder(folder, tmp_path / "whole", calibration())
    output = tmp_path / "killed"
    ((status, errors),) = run_forked(prune_until, tmp_path, (step, str(folder), str(output), config.to_dict()))
    assert status == -signal.SIGKILL, errors
    if not output.exists():  # else only what is left beside it was still to be removed
        FASPPruner(config).prune_folder(folder, output, calibration())
        assert not (tmp_path / ".killed.stream").exists()
    assert_same_folder(output, tmp_path / "whole")
    shutil.rmtree(output)
    shutil.rmtree(tmp_path / ".killed.stream", ignore_errors=True)


@pytest.mark.parametrize("settings", KILLED)
def test_interrupted_it_goes_on_with_the_next_block(settings: str, tmp_path: Path) -> None:
    folder, config = saved(tmp_path), KILLED[settings]
    FASPPruner(config).prune_folder(folder, tmp_path / "whole", calibration())
    stopped_in_block(folder, tmp_path / "stopped", config, 1)
    seen: list[ProgressEvent] = []
    report = FASPPruner(config).prune_folder(folder, tmp_path / "stopped", calibration(), progress=seen.append)
    assert_same_folder(tmp_path / "stopped", tmp_path / "whole")
    saved_report = read_json(tmp_path / "whole" / "fasp_report.json")
    assert [pair.layer for pair in report.pairs] == [pair["layer"] for pair in saved_report["pairs"]]
    if config.rounds == 1:
        assert {event.block for event in seen} == {1}
        assert seen[-1].done == seen[-1].total


@pytest.mark.parametrize(
    ("change", "name"),
    [({"config": BOTH}, "settings"), ({"batches": calibration()[1:]}, "calibration"), ({"touch": True}, "model")],
)
def test_what_was_begun_with_others_is_refused_unless_it_may_be_overwritten(
    change: dict[str, Any], name: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path)
    stopped_in_block(folder, tmp_path / "out", FFN, 1)
    if "touch" in change:
        weights = sorted(folder.glob("*.safetensors"))[0]
        weights.write_bytes(weights.read_bytes())
    config, batches = change.get("config", FFN), change.get("batches", calibration())
    with pytest.raises(FaspError, match=f"got one of other {name};"):
        FASPPruner(config).prune_folder(folder, tmp_path / "out", batches)
    FASPPruner(config).prune_folder(folder, tmp_path / "out", batches, overwrite=True)
    FASPPruner(config).prune_folder(folder, tmp_path / "whole", batches)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_a_refusal_before_the_first_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FaspError, match="vocabulary"):
        FASPPruner(FFN).prune_folder(saved(tmp_path), tmp_path / "out", [torch.full((1, 8), 1000)])
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
