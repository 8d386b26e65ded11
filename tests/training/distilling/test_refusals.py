"""What is refused of distillation, before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import FFN_ONLY, half, trainer
from tiny import VOCAB, tiny_model
from tiny_lightning import Folder, loader
from tiny_pruning import pruned

from fasp_lightning import CausalLMModule, DistillationConfig, FASPPruning, save_pruned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"label_weight": 1.0}, r"label_weight must be in \[0, 1\), got 1.0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"teacher_dtype": "fp8"}, "teacher_dtype must be 'auto' or one of"),
    ],
)
def test_setting_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**options)


def other_vocabulary(folder: Path) -> str:
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(folder / "other")
    return str(folder / "other")


def test_teacher_of_another_vocabulary(tiny_folder: Folder, tmp_path: Path) -> None:
    module = CausalLMModule(str(tiny_folder()), distillation=DistillationConfig(teacher=other_vocabulary(tmp_path)))
    with pytest.raises(ValueError, match=r"teacher must have the student's vocabulary of 97 tokens, got '.*' with 100"):
        trainer(tmp_path, half()).fit(module, loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": VOCAB}, "top_k must be less than the student's vocabulary of 97, got 97"),
        ({"teacher": "/no/such/teacher"}, "no model at '/no/such/teacher'"),
        ({"teacher_device": "nowhere"}, "device must be 'auto' or a torch device"),
    ],
)
def test_setting_that_does_not_fit_the_model(
    options: dict[str, Any], message: str, tiny_folder: Folder, tmp_path: Path
) -> None:
    module = CausalLMModule(str(tiny_folder()), distillation=DistillationConfig(**options))
    with pytest.raises((ValueError, OSError), match=message):
        trainer(tmp_path).fit(module, loader())


def test_model_that_is_pruned_already_and_does_not_know_its_teacher(tmp_path: Path) -> None:
    save_pruned(pruned(), tmp_path / "pruned")
    module = CausalLMModule(str(tmp_path / "pruned"), distillation=DistillationConfig())
    with pytest.raises(ValueError, match="teacher must be named for a model that is pruned already"):
        trainer(tmp_path).fit(module, loader())


def test_resuming_with_another_teacher(tiny_folder: Folder, tmp_path: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")

    def fit(config: DistillationConfig, steps: int, ckpt_path: Any = None) -> Any:
        module = CausalLMModule(str(tiny_folder("llama")), distillation=config)
        callback = FASPPruning([{"step": 0, "sparsity": 0.3}], FFN_ONLY, calibration_sequences=8, validation_batches=0)
        run = trainer(tmp_path, callback, max_steps=steps)
        run.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True)
        return run

    fit(DistillationConfig(), 1).save_checkpoint(tmp_path / "first.ckpt")
    other = DistillationConfig(teacher=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"teacher must be that of the run that is resumed, .* got '.*other' with"):
        fit(other, 2, tmp_path / "first.ckpt")
    fit(DistillationConfig(teacher=str(tiny_folder("llama"))), 2, tmp_path / "first.ckpt")  # the same by another name
    weights = CausalLMModule.load_from_checkpoint(tmp_path / "first.ckpt", distillation=other, weights_only=True)
    trainer(tmp_path, max_steps=1).fit(weights, loader())
