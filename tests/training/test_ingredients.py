"""Every setting of the engine works in the middle of a run: the dead-neuron law, with other units dead in each block.

See ``test_dead_neurons.py``. Loss sensitivity is a backward pass beside the run's own, and own text a draw beside its
random state: whatever either one left behind would show in the losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from runs import Batches, UserModule, loader, trainer
from tiny import tiny_model
from tiny_pruning import basic
from transformers import AutoModelForCausalLM

from fasp_lightning import PruningConfig, load_pruned
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.training.callback import FASPPruning
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora

OWN = OwnTextConfig(tokens=60, seq_len=12)
EVERY_SECOND = tuple(range(0, 48, 2))


@dataclass(frozen=True)
class Case:
    """Settings, and units of each block that are dead: KV groups or value dims, and FFN units."""

    settings: dict[str, Any]
    attention: tuple[tuple[int, ...], ...] = ((), ())
    ffn: tuple[tuple[int, ...], ...] = (EVERY_SECOND, EVERY_SECOND)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PruningConfig:
        return basic(**{"attention": "none", **self.settings})


UNEVEN: dict[str, Any] = {"ffn": (tuple(range(0, 16)), tuple(range(3, 35)))}
CASES = {
    "fisher": Case({"score": "fisher"}),
    "own-text": Case({"score": "fisher", "own_text": OWN}),
    "own-text-alone": Case({"score": "wanda", "own_text": OwnTextConfig(tokens=480, seq_len=12, share=1.0)}),
    "auto-damping": Case({"score": "fisher", "damping": "auto"}),
    "adaptive": Case({"score": "fisher", "allocation": "adaptive"}, **UNEVEN),
    "free-heads": Case(
        {"attention": "value_dims", "head_balance": "free", "score": "fisher", "allocation": "adaptive"},
        attention=((0, 1, 2, 3, 9), (20, 21, 22)),
        ffn=(tuple(range(0, 10)), tuple(range(3, 35))),
    ),
    "rounds": Case({"score": "fisher", "own_text": OWN, "rounds": 3}),
    "adaptive-rounds": Case({"score": "fisher", "allocation": "adaptive", "rounds": 2}, **UNEVEN),
    "groups": Case({"attention": "kv_groups", "score": "fisher"}, attention=((1, 3), (0, 2))),
    "groups-wanda": Case({"attention": "kv_groups", "score": "wanda"}, attention=((0, 3), (1, 2))),
    "everything": Case(
        {
            "attention": "value_dims",
            "head_balance": "free",
            "score": "fisher",
            "allocation": "adaptive",
            "damping": "auto",
            "own_text": OWN,
            "sensitivity_tokens": 48,
        },
        attention=((0, 1, 2, 3, 9), (20, 21, 22)),
        ffn=(tuple(range(0, 10)), tuple(range(3, 35))),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@torch.no_grad()
def dead(case: Case) -> tuple[Any, float]:
    """A tiny llama in which units of the case give nothing and get no gradient, and the sparsity that they make."""
    model: Any = tiny_model("llama").train()
    gone = 0
    for index, block in enumerate(resolve_pruned(model, whole=case.config.whole)):
        for pair, units in zip(block, (case.attention[index], case.ffn[index]), strict=True):
            units = torch.tensor(units, dtype=torch.long)
            pair.consumer.weight[:, pair.layout.columns(units)] = 0
            for place, producer in enumerate(pair.producers):
                producer.weight[pair.layout.unit_rows(place, units)] = 0
            gone += len(units) * pair.unit_cost
    return model, gone / (2 * (4 * 32 * 32 + 3 * 32 * 48))


def pruning(case: Case, sparsity: float, step: int = 4, **options: Any) -> FASPPruning:
    settings: dict[str, Any] = {"calibration_sequences": 16, "validation_batches": 0, **options}
    return FASPPruning([{"step": step, "sparsity": sparsity}], case.config, **settings)


def assert_law(tmp_path: Any, case: Case, prepare: Any = None, **options: Any) -> Any:
    """Run twice, without and with the cut, and compare every loss."""
    runs = []
    for cut in (False, True):
        torch.manual_seed(0)
        model, sparsity = dead(case)
        if prepare is not None:
            prepare(model)
        module = UserModule(model)
        trainer(tmp_path, *([pruning(case, sparsity)] if cut else []), **options).fit(module, loader())
        runs.append(module)
    dense, cut = runs
    torch.testing.assert_close(torch.tensor(cut.losses), torch.tensor(dense.losses), atol=1e-6, rtol=0)
    assert len(set(dense.losses)) > 5  # it did train
    paths = ("self_attn.o_proj", "mlp.down_proj")
    for index, block in enumerate(cut.lm.fasp_plan.blocks):
        for path, units in zip(paths, (case.attention[index], case.ffn[index]), strict=True):
            if units:
                assert not set(units) & set(block[path].kept)
                assert len(units) + len(block[path].kept) == block[path].layout.width
            else:
                assert path not in block
    return cut


@pytest.mark.parametrize("name", CASES)
def test_run_goes_on_across_the_cut(name: str, tmp_path: Any) -> None:
    assert_law(tmp_path, CASES[name])


def test_optimizer_state_of_turned_value_dims_starts_anew(tmp_path: Any) -> None:
    """Squares of gradients cannot be turned; that of all other layers goes on."""
    config = basic(attention="value_dims", value_basis="principal")
    callback = FASPPruning([{"step": 4, "sparsity": 0.3}], config, calibration_sequences=16, validation_batches=0)
    module = UserModule(tiny_model("llama").train())
    run = trainer(tmp_path, callback)
    run.fit(module, loader())
    turned = {pair["layer"].rpartition(".")[0] for pair in module.lm.fasp_report["pairs"] if pair["basis"] != "given"}
    assert turned
    for name, parameter in module.lm.named_parameters():
        state, (layer, _, linear) = run.optimizers[0].state[parameter], name.removesuffix(".weight").rpartition(".")
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"] == (6 if layer in turned and linear in ("v_proj", "o_proj") else 10)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["everything", "groups"])
def test_trainer_option_goes_on_across_the_cut(name: str, option: str, tmp_path: Any) -> None:
    assert_law(tmp_path, CASES[name], **OPTIONS[option])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["everything", "groups"])
def test_gradient_checkpointing_goes_on(name: str, reentrant: bool, tmp_path: Any) -> None:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    assert_law(tmp_path, CASES[name], prepare)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["everything", "groups"])
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_compiled_model_is_compiled_anew(name: str, part: str, tmp_path: Any) -> None:
    def prepare(model: Any) -> None:
        for module in (model,) if part == "model" else model.model.layers:
            module.compile(backend="aot_eager")

    assert_law(tmp_path, CASES[name], prepare)


@pytest.mark.parametrize("name", ["adaptive", "own-text"])
def test_adapters_follow_the_cut(name: str, tmp_path: Any) -> None:
    assert_law(tmp_path, CASES[name], lambda model: attach_lora(model, LoRAConfig(rank=3)))


@pytest.mark.parametrize("name", ["everything", "groups"])
def test_an_event_disturbs_neither_order_nor_random_state_of_the_training(name: str, tmp_path: Any) -> None:
    runs = []
    for step in (2, 7):
        model, sparsity = dead(CASES[name])
        torch.manual_seed(0)
        batches = Batches()
        callback = pruning(CASES[name], sparsity, step)
        trainer(tmp_path, callback, batches, max_steps=12).fit(UserModule(model), loader(shuffle=True))
        runs.append(batches.seen)
    assert runs[0] == runs[1]


def test_gradients_and_what_trains_are_as_before(tmp_path: Any) -> None:
    """Loss sensitivity freezes all weights for a while, and leaves the last step's gradients where they are."""

    class Around(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                parameters = dict(pl_module.named_parameters())
                self.seen.append({name: (p.requires_grad, p.grad) for name, p in parameters.items()})

    before, after = Around(), Around()
    model, sparsity = dead(CASES["fisher"])
    model.model.norm.requires_grad_(False)
    run = trainer(tmp_path, before, pruning(CASES["fisher"], sparsity), after, accumulate_grad_batches=2)
    run.fit(UserModule(model), loader())
    (first, _), (second, _) = before.seen, after.seen
    assert first.keys() == second.keys()
    assert not first["lm.model.norm.weight"][0]
    for name, (trains, gradient) in first.items():
        assert second[name][0] == trains
        assert (second[name][1] is None) == (gradient is None) == (not trains)
        if "mlp" not in name and trains:
            assert torch.equal(second[name][1], gradient)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("name", ["everything", "groups"])
def test_averaged_copy_has_the_shapes_of_the_model(name: str, tmp_path: Any) -> None:
    class Shapes(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copy = average._average_model.module.lm
            assert [one.shape for one in copy.parameters()] == [one.shape for one in pl_module.lm.parameters()]
            assert copy.config.num_key_value_heads == pl_module.lm.config.num_key_value_heads

    average = EMAWeightAveraging(decay=0.9)
    model, sparsity = dead(CASES[name])
    module = UserModule(model)
    trainer(tmp_path, pruning(CASES[name], sparsity), average, Shapes()).fit(module, loader())
    with torch.no_grad():
        assert module.lm(loader().dataset[0][None]).logits.isfinite().all()  # the averaged weights, swapped in


def exported(name: str, tmp_path: Any, form: str) -> Any:
    model, sparsity = dead(CASES[name])
    module = UserModule(model)
    callback = pruning(CASES[name], sparsity, export_to=str(tmp_path / "out"), form=form)
    trainer(tmp_path, callback).fit(module, loader())
    return module.lm.eval()


@pytest.mark.parametrize(
    ("name", "form"),
    [("adaptive", "auto"), ("adaptive", "compact"), ("free-heads", "zero_filled"), ("groups", "auto")],
)
def test_exported_model_is_the_trained_one(name: str, form: str, tmp_path: Any) -> None:
    model = exported(name, tmp_path, form)
    loaders = [load_pruned] if form == "compact" else [load_pruned, AutoModelForCausalLM.from_pretrained]
    for load in loaders:
        with torch.no_grad():
            logits = load(tmp_path / "out")(loader().dataset[0][None]).logits
            torch.testing.assert_close(logits, model(loader().dataset[0][None]).logits, atol=1e-5, rtol=1e-5)
    assert load_pruned(tmp_path / "out").fasp_plan == model.fasp_plan


@pytest.mark.parametrize(
    ("name", "reason"),
    [("adaptive", "blocks have different FFN widths"), ("free-heads", "stock attention has one head size")],
)
def test_stock_form_of_what_stock_code_cannot_hold_is_refused_at_the_start(
    name: str, reason: str, tmp_path: Any
) -> None:
    class Untouched(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            pytest.fail("a batch was trained on")

    model, sparsity = dead(CASES[name])
    callback = pruning(CASES[name], sparsity, export_to=str(tmp_path / "out"), form="stock")
    with pytest.raises(ValueError, match=f"form 'stock' cannot hold this model: {reason}"):
        trainer(tmp_path, callback, Untouched()).fit(UserModule(model), loader())


def test_second_event_goes_on_where_blocks_differ(tmp_path: Any) -> None:
    config = CASES["everything"].config
    events = [{"step": 2, "sparsity": 0.1}, {"step": 5, "sparsity": 0.25}]
    callback = FASPPruning(events, config, calibration_sequences=16, validation_batches=2)
    module = UserModule(tiny_model("llama").train())
    trainer(tmp_path, callback).fit(module, loader(), loader(4))
    assert [record.sparsity for record in callback.records] == pytest.approx([0.1, 0.25], abs=0.004)
    assert module.lm.fasp_plan.cuts == Cuts(frozenset({"value", "ffn"}), uneven=True)
