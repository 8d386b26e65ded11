"""Columns are learned: within the budget, better than the start, without a trace, the same every time."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import assert_same, assert_unchanged, basic, calibration, leftovers, pruned
from torch import nn
from transformers import AutoModelForCausalLM

from fasp_lightning import FASPPruner, ProgressEvent, PruningConfig, save_pruned
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import LearningConfig
from fasp_lightning.pruning.learned import learning
from fasp_lightning.pruning.learned.state import StateFile

CONFIG = basic(
    0.3, attention="none", score="learned", multiple_of=4, learning=LearningConfig(steps=12, tokens=40, rate=0.1)
)
TEXT = [random_tokens(2, 20, seed=seed) for seed in range(8)]


def steps(count: int, config: PruningConfig = CONFIG, **changes: Any) -> PruningConfig:
    """So many steps."""
    return replace(config, learning=replace(config.learning, steps=count, **changes))


def sure(name: str = "llama-gqa") -> nn.Module:
    """A model that is sure of what it says: from random weights, what it diverges by is noise."""
    model = tiny_model(name)
    model.get_output_embeddings().weight.data *= 20
    return model


def test_no_steps_prune_as_loss_sensitivity_does() -> None:
    fisher = replace(CONFIG, score="fisher")
    assert_same(pruned("llama-gqa", steps(0), TEXT), pruned("llama-gqa", fisher, TEXT))


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_divergence_on_held_back_tokens_falls(allocation: Any) -> None:
    report = FASPPruner(replace(CONFIG, allocation=allocation)).prune(sure(), TEXT)
    (found,) = report.learning
    assert found.chosen > 0
    assert found.divergence_after < found.divergence_before
    assert found.tokens == 2 * 2 * 19  # two of eight batches are held back, of which all but the first are predicted


def test_steps_that_do_harm_are_not_taken() -> None:
    model = sure()
    (found,) = FASPPruner(steps(10, rate=50.0)).prune(model, TEXT).learning
    assert found.divergence_after <= found.divergence_before
    assert found.chosen in (0, 10)


def test_same_seed_same_columns_and_another_seed_other_steps() -> None:
    first, second = (pruned("llama-gqa", CONFIG, TEXT) for _ in range(2))
    assert_same(first, second)
    other = pruned("llama-gqa", steps(12, seed=1), TEXT)
    assert other.fasp_report["learning"] != first.fasp_report["learning"]


def test_learned_model_is_one_that_stock_code_loads(tmp_path: Path) -> None:
    model = pruned("llama-gqa", CONFIG, TEXT)
    assert save_pruned(model, tmp_path / "m").form == "stock"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded(TEXT[0]).logits, model(TEXT[0]).logits)


@pytest.mark.parametrize("stopped", [False, True])
def test_learning_leaves_weights_gradients_modes_and_flags_as_they_were(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.train()
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    pruner, calls = FASPPruner(CONFIG), []

    def stop(*args: Any) -> None:
        calls.append(args)
        if stopped and len(calls) == 3:
            raise KeyboardInterrupt
        if not stopped and len(calls) == 1 + CONFIG.learning.steps:  # learned; nothing is cut yet
            raise KeyboardInterrupt

    original = learning.distillation_loss
    monkeypatch.setattr(learning, "distillation_loss", lambda *args: (stop(), original(*args))[1])
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(model, TEXT)
    assert calls
    assert not leftovers(model)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in parameters] == [index != 1 for index in range(len(parameters))]
    assert [parameter.grad is None for parameter in parameters] == [index != 2 for index in range(len(parameters))]
    assert_unchanged(model)


class Killed(BaseException):
    """As if the process had died."""


def killed_at(step: int, config: PruningConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle of its learning."""
    original = learning._Learning._step

    def step_or_die(self: Any, number: int, optimizer: Any) -> None:
        if number == step:
            raise Killed
        original(self, number, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(learning._Learning, "_step", step_or_die)
        with pytest.raises(Killed):
            FASPPruner(config).prune(sure(), TEXT)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were taken."""
    taken: list[int] = []
    original = learning._Learning._step
    monkeypatch.setattr(
        learning._Learning,
        "_step",
        lambda self, step, optimizer: (taken.append(step), original(self, step, optimizer)),
    )
    return taken


def test_killed_learning_goes_on_bit_for_bit_and_a_finished_one_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    config = steps(14, cache_dir=str(tmp_path / "cache"))
    whole = sure()
    FASPPruner(steps(14)).prune(whole, TEXT)
    killed_at(12, config, monkeypatch)
    counted.clear()
    again = [sure(), sure()]
    for model in again:
        FASPPruner(config).prune(model, TEXT)
        assert counted == [10, 11, 12, 13]
        assert_same(model, whole)
        assert model.fasp_report["learning"] == whole.fasp_report["learning"]


@pytest.mark.parametrize(
    "change", [{"sparsity": 0.4}, {"multiple_of": 8}, {"learning": LearningConfig(steps=11, tokens=40, rate=0.1)}]
)
def test_other_settings_have_another_state(change: dict[str, Any], tmp_path: Path, counted: list[int]) -> None:
    kept = steps(12, cache_dir=str(tmp_path))
    FASPPruner(kept).prune(sure(), TEXT)
    counted.clear()
    other = replace(kept, **change)
    other = replace(other, learning=replace(other.learning, cache_dir=str(tmp_path)))
    FASPPruner(other).prune(sure(), TEXT)
    assert counted[0] == 0


def test_damaged_state_is_learned_anew(tmp_path: Path, counted: list[int], caplog: pytest.LogCaptureFixture) -> None:
    config = steps(3, cache_dir=str(tmp_path))
    FASPPruner(config).prune(sure(), TEXT)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    FASPPruner(config).prune(sure(), TEXT)
    assert counted == [0, 1, 2] * 2
    assert "is damaged: columns are learned from the start" in caplog.text


def test_nothing_is_kept_in_python_unless_it_is_asked_for() -> None:
    assert StateFile.of(None, None, [], None, CONFIG).path is None  # type: ignore[arg-type]


def test_progress_counts_to_its_total() -> None:
    seen: list[ProgressEvent] = []
    FASPPruner(CONFIG).prune(sure(), TEXT, progress=seen.append)
    assert sum(event.phase == "learning" for event in seen) == CONFIG.learning.steps * 2
    assert seen[-1].done == seen[-1].total
    assert len({event.total for event in seen}) == 1


def test_padding_and_untold_tokens_teach_nothing() -> None:
    """What stands at padding changes neither the steps nor their outcome."""
    padded = calibration(8)
    other = copy.deepcopy(padded)
    other[0]["input_ids"][0, :9] = 5
    models = [pruned("llama-gqa", replace(CONFIG, learning=replace(CONFIG.learning, tokens=80)), text) for text in
              (padded, other)]  # fmt: skip
    assert models[0].fasp_report["learning"] == models[1].fasp_report["learning"]


def test_model_elsewhere_is_refused_before_anything_is_read() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    with pytest.raises(FaspError, match=r"score='learned' must have the whole model where it computes, .* 'fisher'"):
        FASPPruner(replace(CONFIG, device="meta")).prune(tiny_model("llama-gqa"), never())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"learning\.steps must be 0 or more, got -1"),
        ({"tokens": 1}, r"learning\.tokens must be 2 or more, got 1"),
        ({"rate": 0.0}, r"learning\.rate must be positive and finite, got 0\.0"),
        ({"cache_dir": ""}, r"learning\.cache_dir must be a folder, 'auto' or null, got ''"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FaspError, match=message):
        LearningConfig(**options)
