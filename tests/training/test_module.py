"""CausalLMModule: builds, trains, measures, saves and loads, on dense and pruned shapes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from tiny import FFN, HIDDEN, VOCAB, random_tokens, tiny_model
from tiny_pruning import BOTH, calibration, pruned
from torch.utils.data import DataLoader

from fasp_lightning import FASPPruner, load_pruned, perplexity, save_pruned
from fasp_lightning.training import module as module_file
from fasp_lightning.training.lora import LoRAConfig, has_lora, merge_lora
from fasp_lightning.training.module import CausalLMModule

SCRATCH = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
Folder = Callable[..., Path]


def loader(sequences: int = 16, seed: int = 0, batch_size: int = 4) -> DataLoader[Any]:
    """Random tokens, as dict batches; the first label of each sequence is ignored."""
    ids = random_tokens(sequences, seed=seed)
    labels = ids.clone()
    labels[:, 3] = -100
    return DataLoader([{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)], batch_size)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    return L.Trainer(accelerator="cpu", devices=1, **quiet | {"max_epochs": 1} | options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def logits(module: CausalLMModule) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(random_tokens())


def steps(module: CausalLMModule, count: int = 3) -> list[float]:
    """Losses of a few optimizer steps by hand."""
    optimizer, losses = sgd([p for p in module.parameters() if p.requires_grad]), []
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    for index in range(count):
        loss = module.training_step(random_tokens(seed=index), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_names(module: CausalLMModule) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


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
    assert losses[precision] == pytest.approx(losses["32-true"], rel=2e-2)  # from 5.5, over 16 rounded steps


def test_a_second_evaluation_starts_from_zero(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    runner.validate(module, loader(seed=1), verbose=False)
    (second,) = runner.validate(module, loader(seed=2), verbose=False)
    (fresh,) = trainer(tmp_path).validate(CausalLMModule(str(tiny_folder())), loader(seed=2), verbose=False)
    assert second == fresh


def test_predict_gives_each_sequence_its_likelihood(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()))
    batches = trainer(tmp_path).predict(module, loader())
    nll, tokens = (torch.cat([batch[name] for batch in batches]) for name in ("nll", "tokens"))
    (expected,) = trainer(tmp_path).validate(module, loader(), verbose=False)
    assert nll.shape == (16,)
    assert (nll.sum() / tokens.sum()).item() == pytest.approx(expected["val_loss"], rel=1e-6)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3)])
def test_a_pruned_checkpoint_resumes_in_a_fresh_dense_module(
    lora: LoRAConfig | None, tiny_folder: Folder, tmp_path: Path
) -> None:
    def fresh() -> CausalLMModule:
        return CausalLMModule(str(tiny_folder()), lora=lora)

    half, whole, resumed = fresh(), fresh(), fresh()
    for module in (half, whole):
        FASPPruner(BOTH).prune(module.model, calibration())
    runner = trainer(tmp_path)
    runner.fit(half, loader())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2).fit(whole, loader())
    trainer(tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.model.fasp_plan == whole.model.fasp_plan
    assert trained_names(resumed) == trained_names(whole)
    expected = dict(whole.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.named_parameters())


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3, targets=("v_proj", "down_proj"))])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_load_from_checkpoint_rebuilds_the_pruned_module(
    name: str, lora: LoRAConfig | None, weights_only: bool, tiny_folder: Folder, tmp_path: Path
) -> None:
    if name == "gpt2" and lora:
        lora = LoRAConfig(rank=3, targets=("c_attn", "c_fc"))
    module = CausalLMModule(str(tiny_folder(name)), lora=lora, optimizer=sgd)
    FASPPruner(BOTH).prune(module.model, calibration())
    runner, checkpoint = trainer(tmp_path), tmp_path / "last.ckpt"
    runner.fit(module, loader())
    runner.save_checkpoint(checkpoint, weights_only=weights_only)
    loaded = CausalLMModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert torch.equal(logits(loaded), logits(module))
    assert loaded.model.fasp_plan == module.model.fasp_plan
    assert trained_names(loaded) == trained_names(module)


def test_validate_takes_a_checkpoint_of_other_shapes_in_both_directions(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    (dense,) = runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "dense.ckpt")
    FASPPruner(BOTH).prune(module.model, calibration())
    (cut,) = runner.validate(module, loader(), verbose=False)
    runner.save_checkpoint(tmp_path / "cut.ckpt")
    for name, expected in (("dense", dense), ("cut", cut)):
        assert runner.validate(module, loader(), ckpt_path=tmp_path / f"{name}.ckpt", verbose=False) == [expected]


def test_a_pruned_folder_is_loaded_with_its_plan_and_trains(tmp_path: Path) -> None:
    model = pruned("llama", BOTH)
    save_pruned(model, tmp_path / "compact", form="compact")
    module = CausalLMModule(str(tmp_path / "compact"), optimizer=sgd)
    assert module.model.fasp_plan == model.fasp_plan
    losses = steps(module)
    assert all(map(math.isfinite, losses))
    trainer(tmp_path).fit(module, loader())
    assert module.model.fasp_plan == model.fasp_plan


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


def test_from_scratch_it_trains_prunes_and_loads(tmp_path: Path) -> None:
    module, runner = CausalLMModule(config=SCRATCH), trainer(tmp_path)
    FASPPruner(BOTH).prune(module.model, calibration())
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(logits(CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")), logits(module))


def test_the_scheduler_is_stepped_once_per_optimizer_step(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(
        str(tiny_folder()), optimizer=sgd, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    )
    runner = trainer(tmp_path, accumulate_grad_batches=2)
    runner.fit(module, loader())
    assert runner.global_step == 2
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_a_scheduler_that_watches_a_metric_is_stepped_once_per_epoch(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(
        str(tiny_folder()), optimizer=sgd, lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val_loss")
    )
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(module, loader(), loader())
    assert runner.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_hyperparameters_are_plain_data_without_optimizer_and_scheduler(tiny_folder: Folder) -> None:
    module = CausalLMModule(
        tiny_folder(),  # type: ignore[arg-type]
        lora=LoRAConfig(targets=("q_proj",)),
        optimizer=sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        dtype=torch.float32,  # type: ignore[arg-type]
    )
    hparams = dict(module.hparams)
    assert hparams["name_or_path"] == str(tiny_folder())
    assert hparams["dtype"] == "float32"
    assert hparams["lora"] == LoRAConfig(targets=("q_proj",)).to_dict()
    assert not {"optimizer", "lr_scheduler"} & set(hparams)


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


@pytest.mark.parametrize("cut", [False, True])
def test_it_travels_between_processes(cut: bool, tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3), gradient_checkpointing=True)
    if cut:
        FASPPruner(BOTH).prune(module.model, calibration())
    assert torch.equal(logits(pickle.loads(pickle.dumps(module))), logits(module))


def test_it_starts_in_training_mode(tiny_folder: Folder) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(dropout=0.5))
    assert all(part.training for part in module.modules())


def test_export_of_a_pruned_module_merges_its_lora_and_leaves_it_as_it_was(
    tiny_folder: Folder, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3), optimizer=sgd)
    FASPPruner(BOTH).prune(module.model, calibration())
    steps(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert module.export(tmp_path / "out", tiny_tokenizer, form="compact") == tmp_path / "out"
    assert module.model.training
    assert has_lora(module.model)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert math.isfinite(steps(module, 1)[0])
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    module.load_state_dict(before)
    with torch.no_grad():
        found = load_pruned(tmp_path / "out")(input_ids=random_tokens()).logits
    torch.testing.assert_close(found, logits(module), atol=1e-5, rtol=1e-5)


def test_export_of_a_dense_module_loads_with_transformers(tiny_folder: Folder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = CausalLMModule(str(tiny_folder()), lora=LoRAConfig(rank=3))
    steps(module)
    module.export(tmp_path / "out")
    merge_lora(module.model)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=random_tokens()).logits, logits(module), atol=1e-6, rtol=1e-6)


def test_export_refuses_a_folder_that_holds_something_else(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()))
    with pytest.raises(FileExistsError, match="must be empty"):
        module.export(tiny_folder())
    with pytest.raises(ValueError, match="'auto' or 'stock'"):
        module.export(tmp_path / "out", form="compact")
    assert not (tmp_path / "out").exists()


def test_merging_by_the_module_leaves_a_checkpoint_that_loads(tiny_folder: Folder, tmp_path: Path) -> None:
    module, runner = CausalLMModule(str(tiny_folder())), trainer(tmp_path)
    module.attach_lora(LoRAConfig(rank=3))
    runner.fit(module, loader())
    runner.save_checkpoint(tmp_path / "attached.ckpt")
    module.merge_lora()
    runner.save_checkpoint(tmp_path / "merged.ckpt")
    assert has_lora(CausalLMModule.load_from_checkpoint(tmp_path / "attached.ckpt"))
    assert torch.equal(logits(CausalLMModule.load_from_checkpoint(tmp_path / "merged.ckpt")), logits(module))


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
