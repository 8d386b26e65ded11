"""Pruning in two processes, without Lightning: as in one on all the data, and alike in both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from processes import raised_elsewhere, run_forked
from tiny import tiny_model
from tiny_pruning import INGREDIENTS, basic, calibration

from fasp_lightning import FASPPruner, PruningPlan
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.own_text.writing import calibration_starts, own_sequences, own_text
from fasp_lightning.pruning.processes import Processes

Found = Callable[[str], list[dict[str, Any]]]
FAMILIES = ["llama-gqa", "opt"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both processes have after a case of ``two_processes.py``."""
    folder = tmp_path_factory.mktemp("processes")
    ended = run_forked(two_processes.main, folder, (folder, 0), (folder, 1))
    assert [status for status, _ in ended] == [0, 0], ended
    return lambda case: [torch.load(folder / f"{case}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_prune_as_one_does_on_all_the_data(family: str, found: Found) -> None:
    model = tiny_model(family)
    report = FASPPruner(basic(0.2, attention="value_dims")).prune(model, calibration(3))
    for process in found(family):
        assert process["plan"] == model.fasp_plan.to_json()
        assert process["tokens"] == report.tokens
        assert process["errors"] == pytest.approx([pair.error_after for pair in report.pairs], rel=1e-4)
        assert process["weights"].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(process["weights"][name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", INGREDIENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_mean_the_same_in_two_processes(family: str, settings: str, found: Found) -> None:
    """Loss sensitivity, own text and tokens held back are those of all processes together."""
    model = tiny_model(family)
    report = FASPPruner(INGREDIENTS[settings]).prune(model, calibration(8))
    for process in found(f"{family}-{settings}"):
        assert process["plan"] == model.fasp_plan.to_json()
        assert process["tokens"] == report.tokens
        assert process["dampings"] == [pair.damping for pair in report.pairs]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(process["weights"][name], value, atol=1e-5, rtol=1e-4)


def test_columns_learned_in_two_processes_on_the_same_text_are_those_of_one(found: Found) -> None:
    model = tiny_model("llama-gqa")
    FASPPruner(two_processes.LEARNED).prune(model, calibration(8))
    for process in found("learned"):
        assert process["plan"] == model.fasp_plan.to_json()


MIXED = [f"{family}-{settings}" for family in FAMILIES for settings in INGREDIENTS]


@pytest.mark.parametrize("case", [*FAMILIES, *MIXED, "solver"])
def test_both_processes_have_the_same_model(case: str, found: Found) -> None:
    """Bit for bit; also where the pruning stopped half-way."""
    first, second = found(case)
    assert first["plan"] == second["plan"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pair_is_solved_once(family: str, found: Found) -> None:
    first, second = found(family)
    assert first["solved"] == sum(map(len, PruningPlan.from_json(first["plan"]).blocks)) == 4
    assert second["solved"] == 0


@pytest.mark.parametrize(
    ("case", "culprit", "message"),
    [
        ("token", 1, "FaspError: input_ids must be in [0, 97)"),
        ("nothing", 1, "FaspError: batches must hold at least one calibration batch"),
        ("breaks", 1, "OSError: disk gone"),
        ("solver", 0, "RuntimeError: no solution"),
        ("own", 1, "FaspError: the logits must be finite to sample own text"),
    ],
)
def test_error_in_one_process_ends_both(case: str, culprit: int, message: str, found: Found) -> None:
    processes = found(case)
    own, other = processes[culprit]["message"], processes[1 - culprit]["message"]
    assert own.startswith(message)
    assert other == f"{raised_elsewhere(own)}: process {culprit} stopped with {own}"


def test_processes_write_together_what_one_does(found: Found) -> None:
    config = OwnTextConfig(tokens=5 * 20, seq_len=20)
    whole = torch.cat(own_text(tiny_model("opt"), config, starts=calibration_starts(calibration(3))))
    for rank, process in enumerate(found("own")):
        for case in process["written"]:  # sampled, put into a cache, and read from it
            assert torch.equal(torch.cat(case), whole[rank::2])
        assert process["files"] == 1


def test_each_process_has_all_of_what_is_written_in_pieces(found: Found, tmp_path: Path) -> None:
    whole = list(own_sequences(tiny_model("opt"), two_processes.pieces(tmp_path), Processes()))
    for process in found("own"):
        assert all(map(torch.equal, process["pieces"], whole))


def test_own_text_has_its_share_over_all_processes(found: Found) -> None:
    weights = set()
    for process in found("own"):
        own = [batch for batch in process["batches"] if isinstance(batch, dict) and "weight" in batch]
        weights |= {batch["weight"] for batch in own}
        assert len(own) == 1
    calibrated = 3 * 80 - 9  # one of three batches is padded
    (weight,) = weights
    assert 100 * weight == pytest.approx(0.4 * (100 * weight + calibrated))


def test_each_process_must_have_own_text() -> None:
    class Six(Processes):
        count = 6

    with pytest.raises(ValueError, match="each of 6 processes a sequence of 20, got 100"):
        own_text(tiny_model("opt"), OwnTextConfig(tokens=100, seq_len=20), Six())


def test_blocks_done_before_an_error_stay_pruned(found: Found) -> None:
    for process in found("solver"):
        first, second = PruningPlan.from_json(process["plan"]).blocks
        assert first
        assert all(len(left.kept) == left.layout.width for left in second.values())


def test_a_single_process_asks_nobody() -> None:
    processes = Processes.everyone()
    assert (processes.count, processes.rank) == (1, 0)
    assert processes.total(1.5, 2) == [1.5, 2.0]
    assert processes.is_first
    assert processes.from_first("own") == "own"
    with pytest.raises(KeyError), processes.together():
        raise KeyError("as it is")
