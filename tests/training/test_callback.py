"""Events of the callback: when they run, what they measure, and what they tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from runs import FFN_ONLY, HALF_FFN, Batches, Memory, UserModule, half, loader, trainer
from tiny import tiny_model
from tiny_pruning import basic

from fasp_lightning import FASPPruner, PruningConfig, load_pruned, perplexity
from fasp_lightning.pruning.config import LearningConfig
from fasp_lightning.training.callback import FASPPruning

TWO = [{"step": 2, "sparsity": 0.1}, {"step": 5, "sparsity": 0.2}]


def fit(tmp_path: Any, callback: FASPPruning, *others: L.Callback, data: Any = None, **options: Any) -> Any:
    """(trainer, module) after a run of a user's own module with validation data."""
    torch.manual_seed(0)
    module = UserModule(tiny_model("llama").train())
    run = trainer(tmp_path, callback, *others, **options)
    run.fit(module, data or loader(), loader(4))
    return run, module


class Widths(L.Callback):
    """Notes FFN width, global step and batch before each training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        width = pl_module.lm.get_submodule("model.layers.0.mlp.down_proj").weight.shape[1]
        self.seen.append((trainer.global_step, width, trainer.current_epoch))


def test_events_run_before_the_step_they_name(tmp_path: Any) -> None:
    widths = Widths()
    fit(tmp_path, FASPPruning(TWO, FFN_ONLY, calibration_sequences=8), widths)
    steps = {width: min(step for step, found, _ in widths.seen if found == width) for _, width, _ in widths.seen}
    assert list(steps.values()) == [0, 2, 5]


def test_event_waits_for_the_accumulation_boundary(tmp_path: Any) -> None:
    widths = Widths()
    fit(tmp_path, half(step=1), widths, accumulate_grad_batches=4, max_steps=3)
    assert [width for _, width, _ in widths.seen] == [48, 24, 24]


def test_event_of_an_epoch_runs_at_its_start(tmp_path: Any) -> None:
    widths = Widths()
    schedule = [{"epoch": 1, "sparsity": HALF_FFN}]
    fit(tmp_path, FASPPruning(schedule, FFN_ONLY, calibration_sequences=8), widths, max_steps=-1, max_epochs=2)
    assert {(width, epoch) for _, width, epoch in widths.seen} == {(48, 0), (24, 1)}


LEARNED = basic(score="learned", learning=LearningConfig(steps=6, tokens=24, rate=0.5))


@pytest.mark.parametrize("config", [PruningConfig(), LEARNED], ids=["default", "learned"])
def test_model_is_pruned_as_the_engine_alone_prunes_it(config: PruningConfig, tmp_path: Any) -> None:
    module = UserModule(tiny_model("llama").train(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    data = loader(8)
    callback = FASPPruning([{"step": 0, "sparsity": 0.2}], config, calibration_sequences=8, validation_batches=0)
    trainer(tmp_path, callback, max_steps=1).fit(module, data)
    expected = tiny_model("llama")
    FASPPruner(replace(config, sparsity=0.2)).prune(expected, list(data))
    assert module.lm.fasp_plan == expected.fasp_plan
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.lm.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_metrics_reach_loggers_and_callbacks(tmp_path: Any) -> None:
    logger = Memory()
    callback = FASPPruning(TWO, FFN_ONLY, calibration_sequences=8, validation_batches=2)
    run, module = fit(tmp_path, callback, logger=logger)
    expected = {1: 0, 2: 0.1, 4: 0.1, 5: 0.2, 10: 0.2}  # stairs, and the end of the run
    assert logger.steps("fasp/sparsity") == {step: pytest.approx(one, abs=0.01) for step, one in expected.items()}
    assert 0 < logger.steps("fasp/sparsity_total")[5] < logger.steps("fasp/sparsity")[5]
    assert min(logger.steps("fasp/seconds").values()) > 0
    assert logger.steps("fasp/parameters")[5] == sum(one.numel() for one in module.lm.parameters())
    down = "model.layers.1.mlp.down_proj"
    assert logger.steps(f"fasp_width/{down}")[5] == module.lm.config.intermediate_size
    assert 0 < logger.steps(f"fasp_error/{down}")[5] <= logger.steps(f"fasp_error_unrestored/{down}")[5]
    assert 0 < logger.steps("fasp/output_error_ffn")[5] < 1
    assert run.callback_metrics["fasp/sparsity"] == pytest.approx(logger.steps("fasp/sparsity")[5])


def test_perplexities_tell_one_story(tmp_path: Any) -> None:
    logger = Memory()
    callback = FASPPruning(TWO, FFN_ONLY, calibration_sequences=8, validation_batches=2)
    run, module = fit(tmp_path, callback, logger=logger)
    first, second = callback.records
    assert first.perplexity_recovered == second.perplexity_before
    assert second.perplexity_recovered == pytest.approx(perplexity(module.lm, list(loader(4))))
    assert run.callback_metrics["fasp/perplexity_recovered"] == pytest.approx(second.perplexity_recovered)
    recovered = logger.steps("fasp/perplexity_recovered")
    assert recovered == {5: first.perplexity_recovered, 10: second.perplexity_recovered}
    assert len({first.perplexity_before, first.perplexity_pruned, second.perplexity_before}) == 3


def test_an_event_disturbs_neither_order_nor_random_state_of_the_training(tmp_path: Any) -> None:
    runs = []
    for step in (2, 7):
        batches = Batches()
        fit(tmp_path, half(step, validation_batches=2), batches, data=loader(shuffle=True), max_steps=25)
        runs.append(batches.seen)
    assert runs[0] == runs[1]


def test_merged_model_is_the_one_that_was_measured(tmp_path: Any) -> None:
    callback = FASPPruning(TWO, FFN_ONLY, recovery="lora", calibration_sequences=8, validation_batches=2)
    _, module = fit(tmp_path, callback)
    assert perplexity(module.lm, list(loader(4))) == pytest.approx(callback.records[-1].perplexity_recovered, rel=1e-5)


def test_export_is_the_recovered_model(tmp_path: Any) -> None:
    out = str(tmp_path / "out")
    callback = FASPPruning(TWO, FFN_ONLY, recovery="lora", calibration_sequences=8, validation_batches=2, export_to=out)
    _, module = fit(tmp_path, callback)
    reloaded = load_pruned(out)
    for name, value in module.lm.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name])
    assert [event["step"] for event in reloaded.fasp_report["events"]] == [2, 5]
    card = Path(out, "README.md").read_text()
    assert f"| {callback.records[-1].perplexity_recovered:.3f} |" in card.partition("## Training")[2]
    assert "model-index" not in card  # which would say on which text


def test_model_that_is_pruned_already_is_not_pruned_again(tmp_path: Any) -> None:
    _, module = fit(tmp_path, FASPPruning(TWO, FFN_ONLY, calibration_sequences=8))
    plan = module.lm.fasp_plan
    again = FASPPruning([*TWO, {"step": 7, "sparsity": 0.3}], FFN_ONLY, calibration_sequences=8)
    trainer(tmp_path, again).fit(module, loader(), loader(4))
    assert [record.step for record in again.records] == [7]
    assert module.lm.fasp_plan != plan
