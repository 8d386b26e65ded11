"""CausalLMModule: builds, trains and measures, on dense and pruned shapes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from tiny import random_tokens, tiny_model
from tiny_lightning import SCRATCH, Folder, loader, logits, sgd, steps, trainer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from fasp_lightning import perplexity
from fasp_lightning.training import module as module_file
from fasp_lightning.training.modeling.lora import LoRAConfig
from fasp_lightning.training.module import CausalLMModule


def test_fit_lowers_the_loss_and_moves_every_parameter(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()), optimizer=sgd)
    before = {name: value.clone() for name, value in module.named_parameters()}
    runner = trainer(tmp_path, max_epochs=6)
    start = runner.validate(module, loader(), verbose=False)[0]["val_loss"]
    runner.fit(module, loader())
    assert runner.callback_metrics["train_loss"].item() < start
    assert [name for name, value in module.named_parameters() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_over_all_predicted_tokens(stage: str, tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()))
    data = DataLoader(random_tokens(10), batch_size=4)  # the last batch is smaller
    (found,) = getattr(trainer(tmp_path), stage)(module, data, verbose=False)
    expected = perplexity(module.model, [random_tokens(10)])
    prefix = "val" if stage == "validate" else "test"
    assert found[f"{prefix}_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found[f"{prefix}_loss"] == pytest.approx(math.log(found[f"{prefix}_perplexity"]), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_it_trains_in_any_precision_of_the_trainer(
    precision: Any, gradient_checkpointing: bool, tiny_folder: Folder, tmp_path: Path
) -> None:
    losses = {}
    for name in ("32-true", precision):
        module = CausalLMModule(str(tiny_folder()), optimizer=sgd, gradient_checkpointing=gradient_checkpointing)
        runner = trainer(tmp_path, precision=name, max_epochs=4)
        before = runner.validate(module, loader(), verbose=False)[0]["val_loss"]
        runner.fit(module, loader(), loader())
        losses[name] = runner.callback_metrics["val_loss"].item()
        assert losses[name] < before
    assert losses[precision] == pytest.approx(losses["32-true"], rel=2e-2)  # rounded steps drift apart


def test_a_second_evaluation_starts_from_zero(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    runner.validate(module, loader(seed=1), verbose=False)
    (second,) = runner.validate(module, loader(seed=2), verbose=False)
    (fresh,) = trainer(tmp_path).validate(CausalLMModule(str(tiny_folder())), loader(seed=2), verbose=False)
    assert second == fresh


def padded(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Rows with three tokens of padding on the left."""
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0))
    rows = torch.nn.functional.pad(tokens, (3, 0), value=7)
    return [{"input_ids": ids, "attention_mask": real} for ids, real in zip(rows, mask, strict=True)]


def test_padding_on_the_left_changes_no_figure(tiny_folder: Folder, tmp_path: Path) -> None:
    """GPT-2 would count it along."""
    module, tokens = CausalLMModule(str(tiny_folder("gpt2"))), random_tokens(4)
    (found,) = trainer(tmp_path).validate(module, DataLoader(padded(tokens), batch_size=2), verbose=False)
    assert found["val_perplexity"] == pytest.approx(perplexity(module.model, [tokens]), rel=1e-5)
    (batch,) = DataLoader(padded(tokens), batch_size=4)
    with torch.no_grad():
        plain, shifted = (module.eval().predict_step(one)["nll"] for one in (tokens, batch))
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=0)


def test_packed_sequences_have_the_figures_of_the_same_apart(tiny_folder: Folder, tmp_path: Path) -> None:
    module, rows = CausalLMModule(str(tiny_folder())), [random_tokens(1, length)[0] for length in (7, 11, 5)]
    packed = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    (found,) = trainer(tmp_path).validate(module, DataLoader([packed], batch_size=None), verbose=False)
    assert found["val_perplexity"] == pytest.approx(perplexity(module.model, [row[None] for row in rows]), rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((1, 8), 97), r"input_ids must be in \[0, 97\).*got 97.*resize_token_embeddings"),
        (random_tokens(1, 65), "must have at most 64 tokens.*got 65"),
    ],
)
def test_a_batch_that_the_model_would_crash_on_is_refused_by_name(
    batch: torch.Tensor, message: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(CausalLMModule(str(tiny_folder("gpt2"))), DataLoader(batch))


def test_predict_gives_each_sequence_its_likelihood(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()))
    batches = trainer(tmp_path).predict(module, loader())
    nll, tokens = (torch.cat([batch[name] for batch in batches]) for name in ("nll", "tokens"))
    (expected,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert nll.shape == (16,)
    assert (nll.sum() / tokens.sum()).item() == pytest.approx(expected["val_loss"], rel=1e-6)


def test_lora_trains_the_adapters_alone(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()), lora={"rank": 3}, optimizer=sgd)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(tmp_path).fit(module, loader())
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_adapters_are_drawn_from_the_seed(tiny_folder: Folder) -> None:
    first, second, other = (
        CausalLMModule(str(tiny_folder()), lora=LoRAConfig(), seed=seed).state_dict() for seed in (1, 1, 2)
    )
    key = next(key for key in first if "lora_A" in key)
    assert torch.equal(first[key], second[key])
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3)])
def test_gradient_checkpointing_changes_no_loss(lora: LoRAConfig | None, tiny_folder: Folder) -> None:
    plain, saving = (
        CausalLMModule(str(tiny_folder()), lora=lora, gradient_checkpointing=flag) for flag in (False, True)
    )
    assert steps(saving) == steps(plain)


def test_gradient_checkpointing_computes_each_block_twice(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(), gradient_checkpointing=True)
    calls = []
    module.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    steps(module, 1)
    assert len(calls) == 2


def test_from_scratch_the_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = CausalLMModule(config=SCRATCH, seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = CausalLMModule(config=SCRATCH, seed=5)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(logits(first), logits(CausalLMModule(config=SCRATCH, seed=6)))


def test_the_scheduler_is_stepped_once_per_optimizer_step(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(
        str(tiny_folder()), optimizer=sgd, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    )
    runner = trainer(tmp_path, accumulate_grad_batches=2)
    runner.fit(module, loader())
    assert runner.global_step == 2
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_a_scheduler_that_ends_before_the_run_is_refused_at_its_start(tiny_folder: Folder, tmp_path: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2, cycle_momentum=False)

    module = CausalLMModule(str(tiny_folder()), optimizer=sgd, lr_scheduler=scheduler)
    trainer(tmp_path, max_steps=2).fit(module, loader())
    with pytest.raises(ValueError, match=r"total_steps of lr_scheduler must be at least the run's max_steps, 3, got 2"):
        trainer(tmp_path, max_steps=3).fit(module, loader())


def test_a_scheduler_that_watches_a_metric_is_stepped_once_per_epoch(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(
        str(tiny_folder()), optimizer=sgd, lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val_loss")
    )
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(module, loader(), loader())
    assert runner.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_the_optimizer_gets_what_requires_a_gradient_when_it_is_made(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig())
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    optimizer = module.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


def test_a_frozen_model_is_refused(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()))
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen as a whole"):
        module.configure_optimizers()


def test_the_default_optimizer_is_the_one_the_signature_shows(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()))
    shown = module_file._defaults()[3]
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert module.optimizer is not shown
    assert module.optimizer(parameters).defaults == shown(parameters).defaults
    assert type(module.optimizer(parameters)) is type(shown(parameters))


def test_it_starts_in_training_mode(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(dropout=0.5))
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of name_or_path and config must be given, got neither"),
        ({"name_or_path": "x", "config": SCRATCH}, "exactly one of .*, got both"),
        ({"config": {"vocab_size": 5}}, "config must name a model_type, one of .*opt.*, got None"),
        ({"config": {"model_type": "bert"}}, "config must name a model_type.*got 'bert'"),
        ({"config": SCRATCH | {"hiden_size": 5}}, "fields of a opt model, got hiden_size"),
        ({"config": SCRATCH | {"num_attention_heads": 5}}, "config makes no opt model: .*"),
        ({"config": SCRATCH, "dtype": "float12"}, "dtype must be .*'float12'"),
        ({"config": SCRATCH, "lora": LoRAConfig(targets=("query",))}, "targets must be among .*'query'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMModule(**arguments)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, OSError), match="no_such_model"):
        CausalLMModule(str(tmp_path / "no_such_model"))


def test_16_bit_weights_train_in_16_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    module = CausalLMModule(str(tmp_path / "model"), dtype="bf16", lora=LoRAConfig())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert all(map(math.isfinite, steps(module)))
