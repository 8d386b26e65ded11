"""Pruning during fit where FSDP2 shards the model: the laws of DDP hold, and each process keeps its part alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharded_run
import torch
from processes import raised_elsewhere, run_ranks
from tiny_pruning import basic

pytestmark = pytest.mark.slow

Found = Callable[[str], list[dict[str, Any]]]


def ranks(folder: Path, count: int, more: bool) -> tuple[Found, list[tuple[int, str]]]:
    """What the processes have after each run, and how they ended."""
    ended = run_ranks(sharded_run.main, folder, folder, count, more, count=count)

    def load(run: str) -> list[dict[str, Any]]:
        paths = [folder / f"{run}-{rank}.pt" for rank in range(count)]
        assert all(path.exists() for path in paths), ended
        return [torch.load(path) for path in paths]

    return load, ended


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit for bit: plan, weights and moments."""
    assert first["plan"] == second["plan"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    for state, other in zip(first["moments"], second["moments"], strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def assert_dead_neuron_law(found: Found) -> None:
    """To train with units that are dead from the start is to train a model that they are cut from."""
    for dense, cut in zip(found("dense"), found("cut"), strict=True):
        assert cut["weights"]["model.layers.0.mlp.down_proj.weight"].shape == (32, 24)
        torch.testing.assert_close(torch.tensor(cut["losses"]), torch.tensor(dense["losses"]), atol=1e-6, rtol=0)
        assert len(set(dense["losses"])) > 5
        # SGD has no moments before its first step; AdamW's are cut along
        assert all(
            state["exp_avg"].shape == weight.shape
            for state, weight in zip(cut["moments"], cut["weights"].values(), strict=True)
        )


def assert_spread(found: Found, run: str) -> None:
    """Each process has its part of the parameters, in three units as before, and the optimizer has the new ones."""
    processes = found(run)
    total = sum(value.numel() for value in processes[0]["weights"].values())
    assert sum(process["own"] for process in processes) == total
    assert all(process["own"] < 0.6 * total for process in processes)
    assert all(process["held"] and process["units"] == 3 for process in processes)
    for process in processes[1:]:
        assert_same(processes[0], process)


def assert_equals_one_process(found: Found, run: str, folder: Path, **options: Any) -> None:
    module, made = sharded_run.plain(folder, processes=1, **options)
    alone = sharded_run.found(module, made)
    for process in found(run):
        assert process["plan"] == alone["plan"]
        assert process["weights"].keys() == alone["weights"].keys()
        for name, value in alone["weights"].items():
            torch.testing.assert_close(process["weights"][name], value, atol=1e-5, rtol=1e-5)
        assert process["metrics"].keys() == alone["metrics"].keys()
        for name, value in alone["metrics"].items():
            assert process["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def assert_ended(ended: list[tuple[int, str]]) -> None:
    """By an error, and not by the signal that ends a process whose time is up."""
    assert [status for status, _ in ended] == [1] * len(ended)
    assert "RuntimeError: process 1 stopped with OSError: disk gone" in ended[0][1]


def test_laws_hold_in_two_processes(tmp_path: Path) -> None:
    """In one go, since processes take long to start."""
    found, ended = ranks(tmp_path, 2, more=False)
    assert_dead_neuron_law(found)
    assert_spread(found, "cut")
    assert_spread(found, "plain")
    assert_equals_one_process(found, "plain", tmp_path)
    for whole, before, after in zip(found("whole"), found("from-0"), found("from-1"), strict=True):
        assert_same(whole, before)  # saved before the event, resumed in a model of the same shapes
        assert_same(whole, after)  # saved after it, resumed in a model that is not pruned
    assert_ended(ended)


@pytest.mark.laws
def test_more_laws_hold_in_four_processes(tmp_path: Path) -> None:
    found, ended = ranks(tmp_path, 4, more=True)
    assert_dead_neuron_law(found)
    for run in ("cut", "plain", "rounds"):
        assert_spread(found, run)
    assert_equals_one_process(found, "plain", tmp_path)
    assert_equals_one_process(found, "rounds", tmp_path, pruning=basic(attention="value_dims", rounds=2))
    for run in ("from-0", "from-1", "file", "file-0", "file-1"):
        for whole, resumed in zip(found("whole"), found(run), strict=True):
            assert_same(whole, resumed)
    for whole, resumed in zip(found("window"), found("resumed"), strict=True):
        assert_same(whole, resumed)  # saved with gradients that no optimizer step has taken yet
    for run in ("token", "validation"):
        first, second, *others = (process["message"] for process in found(run))
        assert second.startswith("FaspError: input_ids must be in [0, 97)")
        assert {first, *others} == {f"{raised_elsewhere(second)}: process 1 stopped with {second}"}
    (message,) = {process["message"] for process in found("finite")}
    assert "activations must be finite, got NaN or Inf at the input of model.layers.0" in message
    assert_ended(ended)
