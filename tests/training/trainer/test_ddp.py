"""Runs in two processes: both stay alike to the end, and do together what one does on all the data."""

from __future__ import annotations

import multiprocessing.context
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import ddp_run
import pytest
import torch
from ddp_run import GROUPS, INGREDIENTS, distilled, fasp, plain
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from processes import prepared, raised_elsewhere, run_ranks
from runs import UserModule, half, trainer
from tiny import random_tokens, tiny_model
from tiny_lightning import SCRATCH
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from fasp_lightning import load_pruned
from fasp_lightning.training.modeling.lora import LoRAConfig
from fasp_lightning.training.module import CausalLMModule
from fasp_lightning.training.trainer.checks import check_trainer

pytestmark = pytest.mark.slow

Found = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """Folder of what the processes of ``ddp_run.py`` wrote, exit status and standard error of each."""
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run_ranks(ddp_run.main, folder, folder)


@pytest.fixture(scope="module")
def found(ended: tuple[Path, list[tuple[int, str]]]) -> Found:
    """What both processes have after a run."""
    folder, errors = ended

    def load(run: str) -> list[dict[str, Any]]:
        paths = [folder / f"{run}-{rank}.pt" for rank in range(2)]
        assert all(path.exists() for path in paths), errors
        return [torch.load(path) for path in paths]

    return load


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(module, callback) of the run "none" in this process, on all the data."""
    module, _, callback = plain(tmp_path_factory.mktemp("alone"), processes=1)
    return module, callback


@pytest.mark.parametrize(
    "run", ["none", "ingredients", "groups", "distilled", "answered", "learned", "full", "lora", "whole"]
)
def test_weights_and_optimizer_state_stay_the_same_in_both(run: str, found: Found) -> None:
    first, second = found(run)
    assert first["plan"] == second["plan"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    for state, other in zip(first["moments"], second["moments"], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert first["losses"] is None or first["losses"] != second["losses"]  # though each saw data of its own


@pytest.mark.parametrize("run", ["full", "lora"])
def test_what_recovery_trains_takes_steps(run: str, found: Found) -> None:
    """DDP would not notice by itself that other parameters require gradients; a frozen base keeps no state."""
    for process in found(run):
        stepped = [state for state in process["moments"] if state]
        adapters = len(process["moments"]) - len(process["weights"])
        assert len(stepped) == (adapters if run == "lora" else len(process["moments"])) > 0
        assert all(state["exp_avg"].abs().sum() > 0 for state in stepped)


@pytest.mark.parametrize(
    ("run", "options"),
    [("none", {}), ("ingredients", {"pruning": INGREDIENTS}), ("groups", {"pruning": GROUPS})],
    ids=["none", "ingredients", "groups"],
)
def test_run_in_two_processes_equals_one_on_all_the_data(
    run: str, options: dict[str, Any], found: Found, tmp_path: Path
) -> None:
    """Each process writes its part of the own text, and measures the sensitivity of its part of the calibration."""
    module, _, _ = plain(tmp_path, processes=1, **options)
    for process in found(run):
        assert process["plan"] == module.lm.fasp_plan.to_json()
        assert process["weights"].keys() == module.lm.state_dict().keys()
        for name, value in module.lm.state_dict().items():
            torch.testing.assert_close(process["weights"][name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("run", "top_k"), [("distilled", None), ("answered", 8)])
def test_distillation_in_two_processes_equals_one_on_all_the_data(
    run: str, top_k: int | None, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", None)  # and put back afterwards
    module, _, callback = distilled(tmp_path, processes=1, top_k=top_k)
    expected = [(record.kl_pruned, record.kl_recovered) for record in callback.records]
    assert not any(None in pair for pair in expected)
    for process in found(run):
        for divergences, pair in zip(process["divergences"], expected, strict=True):
            assert divergences == pytest.approx(pair, rel=1e-3, abs=1e-6)
        for name, value in module.lm.state_dict().items():
            torch.testing.assert_close(process["weights"][name], value, atol=1e-5, rtol=1e-5)


def test_perplexity_is_that_of_all_validation_data(alone: Any, found: Found) -> None:
    _, callback = alone
    for process in found("none"):
        for record, perplexities in zip(callback.records, process["perplexities"], strict=True):
            expected = record.perplexity_before, record.perplexity_pruned, record.perplexity_recovered
            assert perplexities == pytest.approx(expected, rel=1e-5)


def test_calibration_is_divided_among_the_processes(alone: Any, found: Found) -> None:
    """Two events of 9 sequences: 5 in the first process and 4 in the second."""
    module, _ = alone
    # each run begins with a look at its first batch of two
    drawn = [[tuple(one.tolist()) for one in process["calibrated"][2:]] for process in found("none")]
    whole = [tuple(one.tolist()) for one in module.calibrated[2:]]
    assert [len(process) for process in drawn] == [10, 8]
    for event in range(2):
        first, second = drawn[0][5 * event :][:5], drawn[1][4 * event :][:4]
        assert sorted(first + second) == sorted(whole[9 * event :][:9])
        assert len(set(first + second)) == 9


def test_resumed_run_ends_as_the_uninterrupted_one(found: Found) -> None:
    """Each process has random state of its own, which its dropout draws from."""
    for whole, resumed in zip(found("whole"), found("resumed"), strict=True):
        assert whole["plan"] == resumed["plan"]
        assert whole["perplexities"] == resumed["perplexities"]
        assert all(torch.equal(value, resumed["weights"][name]) for name, value in whole["weights"].items())
        for state, other in zip(whole["moments"], resumed["moments"], strict=True):
            assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("run", ["token", "validation"])
def test_error_in_one_process_is_told_in_both(run: str, found: Found) -> None:
    """It comes from that process's part of the calibration, or of the validation data."""
    first, second = (process["message"] for process in found(run))
    assert second.startswith("FaspError: input_ids must be in [0, 97)")
    assert first == f"{raised_elsewhere(second)}: process 1 stopped with {second}"


def test_activations_of_one_process_that_are_not_finite_end_both(found: Found) -> None:
    first, second = (process["message"] for process in found("finite"))
    assert first == second
    assert "activations must be finite, got NaN or Inf at the input of model.layers.0" in first


def test_error_that_nobody_catches_ends_both_processes(ended: tuple[Path, list[tuple[int, str]]]) -> None:
    (first, errors), (second, _) = ended[1]
    assert (first, second) == (1, 1)  # and not the signal that ends a process whose time is up
    assert "RuntimeError: process 1 stopped with OSError: disk gone" in errors


def test_spawned_processes_give_back_what_they_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process's module gets the new shapes and the weights; the adapters were attached in the workers."""
    module = CausalLMModule(config=SCRATCH)
    callback = fasp(recovery="lora", lora=LoRAConfig(rank=2), export_to=str(tmp_path / "out"))
    keys = module.model.state_dict().keys()
    data = torch.utils.data.DataLoader(random_tokens(40), batch_size=2)
    made = trainer(tmp_path, callback, max_steps=5, strategy="ddp_spawn", devices=2)
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "spawn", prepared())  # type: ignore[attr-defined]
    made.fit(module, data, data)
    loaded = load_pruned(tmp_path / "out")  # written by the first worker
    assert module.model.fasp_plan == loaded.fasp_plan
    assert module.model.state_dict().keys() == keys
    for name, value in loaded.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value), name
    assert made.callback_metrics["fasp/sparsity"] == pytest.approx(0.2, abs=0.02)
    assert [record.step for record in callback.records] == [1, 3]
    assert callback.records[-1].parameters == loaded.num_parameters()


def test_spawned_processes_are_refused_for_a_module_that_could_not_load_their_state(tmp_path: Path) -> None:
    module, callback = UserModule(tiny_model("llama")), half()
    made = trainer(tmp_path, callback, strategy="ddp_spawn", devices=2)
    with pytest.raises(ValueError, match=r"strategy must be 'ddp' for UserModule.*call carry_structure\(self\)"):
        callback.setup(made, module, "fit")


def strategies() -> list[Any]:
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its __init__ needs the package
    return [FSDPStrategy(), deepspeed]


@pytest.mark.parametrize("strategy", strategies(), ids=lambda strategy: type(strategy).__name__)
def test_other_sharded_strategies_are_refused_by_name(strategy: Any) -> None:
    made = SimpleNamespace(strategy=strategy, callbacks=[])
    with pytest.raises(ValueError, match=f"got {type(strategy).__name__}; prune first .* train the saved folder"):
        check_trainer(made)  # type: ignore[arg-type]


def test_compressed_gradients_with_memory_are_refused() -> None:
    state = PowerSGDState(process_group=None)
    made = SimpleNamespace(strategy=DDPStrategy(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook), callbacks=[])
    with pytest.raises(ValueError, match="strategy must have no PowerSGDState"):
        check_trainer(made)  # type: ignore[arg-type]
