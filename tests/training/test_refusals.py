"""What a run refuses, by name, before anything is spent."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from runs import FFN_ONLY, UserModule, half, loader, trainer
from tiny import tiny_model
from tiny_pruning import basic
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fasp_lightning.training.callback import FASPPruning

ONE = [{"step": 1, "sparsity": 0.2}]


class Untouched(L.Callback):
    """Notes whether a batch was trained on."""

    def __init__(self) -> None:
        self.trained = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.trained = True


def refused(tmp_path: Any, match: str, callback: FASPPruning, *others: L.Callback, **given: Any) -> None:
    """A fit that ends with a ValueError before its first batch."""
    module = given.pop("module", None) or UserModule(tiny_model("llama").train())
    data, untouched = given.pop("data", loader()), Untouched()
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, callback, *others, untouched, **given).fit(module, data)
    assert not untouched.trained


class Nothing(UserModule):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2))


def test_module_without_a_causal_lm(tmp_path: Any) -> None:
    refused(tmp_path, "Nothing must hold one Hugging Face causal LM, found none", half(), module=Nothing())


def test_module_with_two_causal_lms(tmp_path: Any) -> None:
    module = UserModule(tiny_model("llama"))
    module.teacher = tiny_model("opt")
    refused(tmp_path, "found 'lm', 'teacher'; name it by attribute=", half(), module=module)


def test_attribute_that_is_not_there(tmp_path: Any) -> None:
    refused(tmp_path, "attribute must be the path of a model in UserModule, got 'net'", half(attribute="net"))


def test_sparsity_that_cannot_be_reached(tmp_path: Any) -> None:
    refused(tmp_path, "sparsity must be at most", FASPPruning([{"step": 1, "sparsity": 0.9}], FFN_ONLY))


def test_event_with_the_widths_of_the_one_before_is_said_and_passed_over(tmp_path: Any) -> None:
    callback = FASPPruning([{"step": 1, "sparsity": 0.2}, {"step": 2, "sparsity": 0.21}], basic(multiple_of=16))
    module = UserModule(tiny_model("llama").train())
    with pytest.warns(UserWarning, match=r"entries that change no width are passed over: 1 \(0.21\);"):
        trainer(tmp_path, callback, max_steps=3).fit(module, loader())
    assert [record.step for record in callback.records] == [1]


def test_family_that_kv_groups_cannot_be_cut_from(tmp_path: Any) -> None:
    callback, module = FASPPruning(ONE, basic(attention="kv_groups")), UserModule(tiny_model("opt").train())
    refused(tmp_path, "attention='kv_groups' cannot be used with opt: ", callback, module=module)


def test_multiple_of_that_no_ffn_width_reaches(tmp_path: Any) -> None:
    refused(tmp_path, "multiple_of must be at most the FFN width 48, got 64", FASPPruning(ONE, basic(multiple_of=64)))


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        ({"step": 10, "sparsity": 0.2}, {"max_steps": 10}),
        ({"epoch": 2, "sparsity": 0.2}, {"max_steps": -1, "max_epochs": 2}),
        ({"step": 11, "sparsity": 0.2}, {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": 2}),
    ],
    ids=["step", "epoch", "accumulated"],
)
def test_event_beyond_the_run(entry: dict[str, Any], options: dict[str, Any], tmp_path: Any) -> None:
    refused(tmp_path, r"schedule entry 0, .* must happen within the run", FASPPruning([entry]), **options)


def two_optimizers() -> UserModule:
    """A module that steps two optimizers each batch, by itself: two global steps."""

    class Manual(UserModule):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            first, *rest = self.parameters()
            return torch.optim.SGD([first], lr=0.01, momentum=0.9), torch.optim.AdamW(rest)

    return Manual(tiny_model("llama").train())


def test_steps_of_a_module_that_optimizes_by_itself_are_not_guessed(tmp_path: Any) -> None:
    module = two_optimizers()
    with pytest.warns(UserWarning, match="the steps of the schedule are those of all 2 optimizers together"):
        trainer(tmp_path, half(14), max_steps=-1, max_epochs=1).fit(module, loader(20))  # 10 batches
    assert module.lm.config.intermediate_size == 24


def test_event_that_was_not_reached_is_warned_of(tmp_path: Any) -> None:
    module = two_optimizers()
    with pytest.warns(UserWarning, match=r"the run ended before schedule entry 0, \{'step': 20,"):
        trainer(tmp_path, half(20), max_steps=-1, max_epochs=1).fit(module, loader(20))
    assert module.lm.config.intermediate_size == 48


def test_fast_dev_run_takes_any_schedule(tmp_path: Any) -> None:
    module, run = UserModule(tiny_model("llama").train()), trainer(tmp_path, half(200), fast_dev_run=True)
    with pytest.warns(UserWarning, match="the run ended before schedule entry 0"):
        run.fit(module, loader())
    assert run.global_step == 1
    assert module.lm.config.intermediate_size == 48


def test_last_step_of_the_run_can_still_be_pruned_before(tmp_path: Any) -> None:
    module = UserModule(tiny_model("llama").train())
    trainer(tmp_path, half(9), max_steps=10).fit(module, loader())
    assert module.lm.config.intermediate_size == 24


def test_training_data_that_calibration_cannot_be_taken_from(tmp_path: Any) -> None:
    data = CombinedLoader([loader(), loader()])
    refused(tmp_path, r"calibration needs a calibration_dataloader\(\) .* got CombinedLoader", half(), data=data)


def test_hook_that_gives_several_training_loaders(tmp_path: Any) -> None:
    class Two(UserModule):
        def train_dataloader(self) -> Any:
            return [loader(), loader()]

    with pytest.raises(ValueError, match="got DataLoader, DataLoader"):
        trainer(tmp_path, half()).fit(Two(tiny_model("llama").train()))


def test_training_data_that_cannot_be_read_beside_the_training(tmp_path: Any) -> None:
    class Stream(IterableDataset):
        def __init__(self) -> None:
            self.rows = (torch.full((3,), index) for index in range(50))

        def __iter__(self) -> Any:
            return self.rows

    data = DataLoader(Stream(), batch_size=2)
    refused(tmp_path, r"Stream cannot .* give the datamodule or module a calibration_dataloader", half(), data=data)


def test_module_put_aside_for_training_beside_adapters(tmp_path: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_model("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), model)
    callback = half(export_to=str(tmp_path / "out"))
    refused(tmp_path, "must have no modules_to_save to be exported, got lm_head", callback, module=UserModule(model))


def test_averaging_that_keeps_old_shapes(tmp_path: Any) -> None:
    swa = StochasticWeightAveraging(swa_lrs=1e-3)
    refused(tmp_path, "callbacks must not hold StochasticWeightAveraging", half(), swa)


def test_masks_that_keep_old_shapes(tmp_path: Any) -> None:
    masks = ModelPruning("l1_unstructured", amount=0.1)
    refused(tmp_path, "callbacks must not hold ModelPruning .* make its masks permanent", half(), masks)


def test_export_folder_that_is_not_empty(tmp_path: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be empty"):
        trainer(tmp_path, half(export_to=str(tmp_path / "out"))).fit(UserModule(tiny_model("llama")), loader())


def test_form_that_cannot_hold_what_will_be_cut(tmp_path: Any) -> None:
    both = basic(attention="value_dims")
    options = {"pruning": both, "export_to": str(tmp_path / "out"), "form": "stock"}
    refused(tmp_path, "form 'stock' cannot hold this model", FASPPruning(ONE, **options))


def test_form_that_is_unknown(tmp_path: Any) -> None:
    refused(tmp_path, "form must be 'auto' or one of", half(export_to=str(tmp_path / "out"), form="small"))


def test_optimizer_without_the_parameters_of_recovery(tmp_path: Any) -> None:
    class Norms(UserModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([one for name, one in self.named_parameters() if "norm" in name], lr=0.1)

    module = Norms(tiny_model("llama"))
    match = r"recovery='full' needs its parameters in the optimizer, which lacks \d+"
    refused(tmp_path, match, half(recovery="full"), module=module)


def test_factored_optimizer_is_refused_by_name(tmp_path: Any) -> None:
    module = UserModule(tiny_model("llama"), lambda parameters: torch.optim.Adafactor(parameters))
    refused(tmp_path, r"optimizer Adafactor must have state of its weight's shape", half(), module=module)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recovery": "distil"}, "recovery must be one of 'none', 'full', 'blocks', 'lora', got 'distil'"),
        ({"calibration_sequences": 0}, "calibration_sequences must be at least 1, got 0"),
        ({"validation_batches": -1}, "validation_batches must be at least 0, got -1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FASPPruning(ONE, **options)


def test_model_that_could_not_be_exported(tmp_path: Any) -> None:
    module = UserModule(tiny_model("llama").train())
    module.lm.config.thing = object()
    refused(tmp_path, "cannot be saved by transformers", half(export_to=str(tmp_path / "out")), module=module)
