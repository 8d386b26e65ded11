"""Distillation in a run: the loss before and after the first event, what is measured, and where the teacher is not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from runs import FFN_ONLY, HALF_FFN, Memory, UserModule, half, half_dead, trainer
from runs import loader as batches
from tiny import random_tokens, tiny_model
from tiny_lightning import SCRATCH, Folder, loader
from tiny_pruning import pruned
from torch import Tensor
from transformers import PreTrainedModel

from fasp_lightning import CausalLMModule, DistillationConfig, FASPPruning, LoRAConfig, load_pruned, save_pruned
from fasp_lightning.text.batches import read_batch
from fasp_lightning.training.distilling.distiller import distiller_of
from fasp_lightning.training.distilling.loss import distillation_loss, summed_divergence
from fasp_lightning.training.distilling.teacher import LiveTeacher
from fasp_lightning.training.modeling.lora import attach_lora

KL = DistillationConfig()
EVENTS = [{"step": 2, "sparsity": 0.2}, {"step": 5, "sparsity": 0.4}]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def module_of(source: Any, config: DistillationConfig | None = KL, **options: Any) -> CausalLMModule:
    torch.manual_seed(0)
    return CausalLMModule(str(source), distillation=config, optimizer=adamw, **options)


def fit(
    folder: Path, module: Any, *more: Any, events: Any = EVENTS, data: Any = None, **options: Any
) -> tuple[FASPPruning | None, Memory]:
    """A run of 8 steps, two validation batches."""
    log = Memory()
    callback = FASPPruning(events, FFN_ONLY, calibration_sequences=8, validation_batches=2) if events else None
    options = {"max_steps": 8, "logger": log, "log_every_n_steps": 1, "num_sanity_val_steps": 0} | options
    callbacks = [callback, *more] if callback else more
    trainer(folder, *callbacks, **options).fit(module, data or loader(40), loader(8, seed=5))
    return callback, log


def teacher_of(module: Any) -> LiveTeacher:
    distiller = distiller_of(module)
    assert distiller is not None
    assert isinstance(distiller.teacher, LiveTeacher)
    return distiller.teacher


def divergence(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """The plain formula, mean over the predicted tokens."""
    with torch.no_grad():
        p, q = (one(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for one in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_loss_is_next_token_before_the_first_event_and_divergence_after_it(tiny_folder: Folder, tmp_path: Path) -> None:
    _, log = fit(tmp_path, module_of(tiny_folder()))
    _, plain = fit(tmp_path, module_of(tiny_folder(), None))
    losses, others = log.steps("train_loss"), plain.steps("train_loss")
    assert [losses[step] for step in (0, 1)] == [others[step] for step in (0, 1)]
    assert log.steps("train_kl") == {step: losses[step] for step in range(2, 8)}
    assert plain.steps("train_kl") == {}
    assert max(losses[step] for step in range(2, 8)) < 0.1 * losses[0]


def test_label_weight_is_the_share_of_the_next_token_loss(tiny_folder: Folder, tmp_path: Path) -> None:
    _, log = fit(tmp_path, module_of(tiny_folder(), DistillationConfig(label_weight=0.5, temperature=2.0)))
    losses, divergences = log.steps("train_loss"), log.steps("train_kl")
    halves = [losses[step] - 0.5 * 2.0**2 * divergences[step] for step in range(2, 8)]
    assert all(half == pytest.approx(0.5 * losses[0], rel=0.3) for half in halves)
    assert all(value > 0 for value in divergences.values())


def test_teacher_is_the_model_before_the_first_event_at_every_event(tiny_folder: Folder, tmp_path: Path) -> None:
    module = module_of(tiny_folder("llama"))
    callback, log = fit(tmp_path, module, events=[{"step": 0, "sparsity": 0.2}, {"step": 4, "sparsity": 0.4}])
    assert callback is not None
    dense, teacher = tiny_model("llama"), teacher_of(module)
    assert callback.teacher is teacher
    assert teacher.identity.source == str(tiny_folder("llama"))  # which was read again
    assert torch.equal(teacher.model(random_tokens()).logits, dense(random_tokens()).logits)
    first, second = callback.records
    assert 0 < first.kl_pruned < second.kl_pruned
    assert log.steps("fasp/kl_pruned") == {0: first.kl_pruned, 4: second.kl_pruned}
    assert log.steps("fasp/kl_recovered") == {4: first.kl_recovered, 8: second.kl_recovered}
    data = [batch["input_ids"] for batch in loader(8, seed=5)]
    assert 0.3 < second.kl_recovered / divergence(module.model, dense, torch.cat(data)) < 3


def test_teacher_of_a_model_that_was_trained_before_is_written_beside_the_checkpoints(
    tiny_folder: Folder, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=8)
    module = module_of(tiny_folder(), lora=LoRAConfig(rank=2))
    fit(tmp_path, module, saver, enable_checkpointing=True)
    (folder,) = (tmp_path / "saved").glob("teacher-*")
    assert teacher_of(module).identity.source == str(folder)
    assert not torch.equal(
        teacher_of(module).model(random_tokens()).logits, tiny_model("llama")(random_tokens()).logits
    )


def test_divergence_of_a_model_from_itself_is_0() -> None:
    model, batch = tiny_model("llama"), random_tokens()
    with torch.no_grad():
        logits = model(input_ids=batch).logits
    assert summed_divergence(logits, LiveTeacher(model, None, KL), read_batch(batch), KL) == pytest.approx(0, abs=1e-6)


def test_likeliest_tokens_are_all_that_a_teacher_says() -> None:
    model, batch, config = tiny_model("llama"), random_tokens(), DistillationConfig(top_k=8, temperature=2.0)
    told = LiveTeacher(tiny_model("llama", seed=1), None, config)(read_batch(batch))
    assert [part.shape[-1] for part in told] == [8, 8]
    logits = model(input_ids=batch).logits
    whole = distillation_loss(logits, LiveTeacher(tiny_model("llama", seed=1), None, KL), batch, config)
    cut = distillation_loss(logits, LiveTeacher(tiny_model("llama", seed=1), None, config), batch, config)
    assert 0 < cut < whole


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_teacher_is_in_no_state_optimizer_average_pickle_or_export(tiny_folder: Folder, tmp_path: Path) -> None:
    average, module = EMAWeightAveraging(decay=0.9), module_of(tiny_folder())
    run = trainer(tmp_path, half(2), average, max_steps=4)
    run.fit(module, loader(40))
    run.save_checkpoint(tmp_path / "end.ckpt")
    student = sum(value.numel() for value in module.model.parameters())
    teacher = {id(value) for value in teacher_of(module).model.parameters()}
    (optimizer,) = run.optimizers
    for held in (module.parameters(), average._average_model.parameters(), optimizer.param_groups[0]["params"]):
        found = list(held)
        assert sum(value.numel() for value in found) == student
        assert not teacher & {id(value) for value in found}
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["fasp_teacher"] == teacher_of(module).identity._asdict()
    assert sum(v.numel() for k, v in checkpoint["state_dict"].items() if k.startswith("model.")) == student
    assert pickle.loads(pickle.dumps(distiller_of(module))).teacher is None
    assert load_pruned(module.export(tmp_path / "out")).num_parameters() == student


def test_model_that_starts_pruned_learns_from_a_named_teacher_throughout(tiny_folder: Folder, tmp_path: Path) -> None:
    save_pruned(pruned(), tmp_path / "pruned")
    config = DistillationConfig(teacher=str(tiny_folder("llama")))
    module = module_of(tmp_path / "pruned", config)
    _, log = fit(tmp_path, module, events=None)
    losses = log.steps("train_loss")
    assert log.steps("train_kl") == losses
    assert losses[7] < losses[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "checkpointing": {},
    "adapters": {},
    "iterative": {},
}


class Taught(UserModule):
    """Learns from a teacher, whether it is pruned or not."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.teaching = [LiveTeacher(tiny_model("llama", seed=1), None, KL)]

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        logits = self.lm(input_ids=batch, use_cache=False).logits
        loss = distillation_loss(logits, self.teaching[0], batch, KL)
        self.losses.append(loss.item())
        return loss


def twice() -> FASPPruning:
    """Half of what is dead, and later the rest."""
    events = [{"step": 2, "sparsity": HALF_FFN / 2}, {"step": 4, "sparsity": HALF_FFN}]
    return FASPPruning(events, FFN_ONLY, calibration_sequences=8, validation_batches=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_dead_units_that_are_cut_change_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    pruning = twice() if name == "iterative" else half(step=3)
    for callbacks in ((), (pruning,)):
        torch.manual_seed(0)
        module = Taught(half_dead())
        if name == "checkpointing":
            module.lm.gradient_checkpointing_enable({"use_reentrant": False})
        if name in ("adapters", "iterative"):
            attach_lora(module.lm, LoRAConfig(rank=3))
        trainer(tmp_path, *callbacks, max_steps=6, **OPTIONS[name]).fit(module, batches())
        runs.append(module)
    dense, cut = runs
    assert cut.lm.get_submodule("model.layers.0.mlp.down_proj").weight.shape == (32, 24)
    torch.testing.assert_close(torch.tensor(cut.losses), torch.tensor(dense.losses), atol=1e-6, rtol=0)
    assert len(set(dense.losses)) > 5


def test_option_of_the_module_and_the_trainer_go_with_a_teacher(tiny_folder: Folder, tmp_path: Path) -> None:
    module = module_of(tiny_folder(), gradient_checkpointing=True)
    event = [{"step": 0, "sparsity": HALF_FFN}]
    _, log = fit(tmp_path, module, events=event, precision="bf16-mixed", accumulate_grad_batches=2, max_steps=4)
    divergences = list(log.steps("train_kl").values())
    assert divergences[-1] < divergences[0]


def test_resumed_run_reads_the_same_teacher_again(tiny_folder: Folder, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    events = [{"step": 0, "sparsity": 0.3}]
    whole = module_of(tiny_folder())
    fit(tmp_path, whole, saver, events=events, data=loader(12), enable_checkpointing=True, max_steps=6)
    assert not list((tmp_path / "saved").glob("teacher-*"))
    resumed = module_of(tiny_folder())
    callback = FASPPruning(events, FFN_ONLY, calibration_sequences=8, validation_batches=2)
    run = trainer(tmp_path, callback, max_steps=6, num_sanity_val_steps=0)
    run.fit(resumed, loader(12), loader(8, seed=5), ckpt_path=tmp_path / "saved" / "step=3.ckpt", weights_only=True)
    assert teacher_of(resumed).identity == teacher_of(whole).identity
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_module_from_scratch_learns_from_a_copy(tmp_path: Path) -> None:
    module = CausalLMModule(config=SCRATCH, distillation=KL, optimizer=adamw)
    _, log = fit(tmp_path, module)
    assert list(log.steps("train_kl")) == [2, 3, 4, 5, 6, 7]
    assert teacher_of(module).identity.source is None  # no checkpoints to be written beside
