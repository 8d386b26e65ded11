"""How the engine goes about it: passes, stand-ins, places, repetition, and what it says."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from oracle import mask_units
from tiny import HIDDEN, LAYERS, TINY, random_tokens, tiny_model
from torch import Tensor, nn

from fasp_lightning import FASPPruner, PruningConfig, apply_plan, spec_for
from fasp_lightning.pruning import pruner
from fasp_lightning.pruning.pruner import ProgressEvent
from fasp_lightning.pruning.standins import StandIn
from fasp_lightning.structure.compact import inner
from fasp_lightning.structure.resolve import find_blocks

BOTH = PruningConfig(0.2, attention="value_dims")


def calibration(batches: int = 3) -> list[Any]:
    """Enough tokens for the widest tiny pair, one batch of them left-padded."""
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    padded = {"input_ids": random_tokens(2, 40, seed=99), "attention_mask": mask}
    return [padded, *(random_tokens(2, 40, seed=seed) for seed in range(batches - 1))]


def pruned(
    name: str = "llama", config: PruningConfig = BOTH, batches: list[Any] | None = None, **options: Any
) -> nn.Module:
    model = tiny_model(name, **options)
    FASPPruner(config).prune(model, batches or calibration())
    return model


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    assert first.fasp_plan == second.fasp_plan
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], **tolerance or {"atol": 0, "rtol": 0})


def leftovers(model: nn.Module) -> list[str]:
    """Stand-ins and hooks that a model still has."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, StandIn) or module._forward_hooks or module._forward_pre_hooks
    ]


# --- passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["value_dims", "none"])
@pytest.mark.parametrize("family", TINY)
def test_every_projection_runs_once_a_calibration_batch(family: str, attention: str) -> None:
    model, calls = tiny_model(family), Counter()
    spec, batches = spec_for(model), calibration()
    blocks = find_blocks(model, spec)
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
                module.register_forward_pre_hook(lambda m, args, key=(index, name): calls.update([key]))
    FASPPruner(PruningConfig(0.2, attention=attention)).prune(model, batches)
    # one call more in block 0: the form of a block's output is learned by running it once
    runs = {key: count - (key[0] == 0) for key, count in calls.items()}
    assert len(runs) == len(blocks) * len({name for _, name in runs})
    assert runs == dict.fromkeys(runs, len(batches))


def test_batches_are_read_once() -> None:
    batches = iter(calibration())
    assert_same(pruned(batches=batches), pruned())
    assert next(batches, None) is None


def test_later_blocks_see_the_pruned_ones() -> None:
    """Statistics of block 1 from the dense block 0 would give another plan or other weights."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    FASPPruner(BOTH).prune(model, calibration())
    plan = copy.deepcopy(model.fasp_plan)
    spec = spec_for(dense)
    inputs = {}
    for name, which in (("pruned", model), ("dense", dense)):
        handle = find_blocks(which, spec)[1].mlp.down_proj.register_forward_pre_hook(
            lambda m, args, name=name: inputs.update({name: args[0]})
        )
        with torch.no_grad():
            which(calibration()[1])
        handle.remove()
    kept = list(plan.blocks[1]["mlp.down_proj"].kept)
    assert (inputs["pruned"] - inputs["dense"][..., kept]).norm() > 0.05 * inputs["pruned"].norm()


# --- what is put back --------------------------------------------------------------------------------------------


def test_nothing_temporary_is_left_after_pruning() -> None:
    model = tiny_model("gemma3")
    modes = {name: name.endswith("mlp") for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        module.training = modes[name]
    FASPPruner(BOTH).prune(model, calibration())
    assert leftovers(model) == []
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_run_time_modules_take_over_the_training_flag(training: bool) -> None:
    model = tiny_model("llama").train(training)
    FASPPruner(BOTH).prune(model, calibration())
    assert {module.training for module in model.modules()} == {training}


class Boom(Exception):
    """Raised by a hook in the midst of a pruning."""


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.act_fn"])
def test_stand_ins_are_gone_after_an_exception(path: str) -> None:
    model = tiny_model("llama").train()
    modules = {name: module for name, module in model.named_modules() if "layers.1" in name}

    def boom(module: nn.Module, args: Any) -> None:
        raise Boom

    handle = model.get_submodule(f"model.layers.1.{path}").register_forward_pre_hook(boom)
    with pytest.raises(Boom):
        FASPPruner(BOTH).prune(model, calibration())
    handle.remove()
    assert leftovers(model) == []
    assert all(module.training for module in model.modules())
    assert {name: inner(model.get_submodule(name)) for name in modules} == modules
    assert set(model.fasp_plan.blocks[0]) == {"self_attn.o_proj", "mlp.down_proj"}
    fresh = apply_plan(tiny_model("llama"), model.fasp_plan)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    with torch.no_grad():
        assert model.eval()(random_tokens()).logits.isfinite().all()


def test_stand_ins_are_gone_after_a_failing_batch() -> None:
    def batches() -> Any:
        yield random_tokens()
        raise Boom

    model = tiny_model("llama")
    with pytest.raises(Boom):
        FASPPruner(BOTH).prune(model, batches())
    assert leftovers(model) == []
    assert_unchanged(model)


def assert_unchanged(model: nn.Module, name: str = "llama") -> None:
    original = tiny_model(name).state_dict()
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("broken", "named"),
    [("self_attn.v_proj", "model.layers.1.self_attn.o_proj"), ("mlp.up_proj", "model.layers.1.mlp.down_proj")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite_names_the_layer(broken: str, named: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{broken}").weight[0, 0] = value
    with pytest.raises(ValueError, match=rf"activations must be finite.*{named}"):
        FASPPruner(BOTH).prune(model, calibration())
    assert leftovers(model) == []


# --- the same outcome --------------------------------------------------------------------------------------------


def test_same_seed_same_plan() -> None:
    first = pruned("gemma3")
    torch.manual_seed(123)
    assert_same(first, pruned("gemma3"))


@pytest.mark.parametrize("offload", ["disk", "accelerator"])
@pytest.mark.parametrize("family", ["opt", "bloom", "gemma3"])
def test_offload_changes_nothing(family: str, offload: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = pruned(family, PruningConfig(0.2, attention="value_dims", offload=offload))
    assert_same(elsewhere, pruned(family))
    assert list(tmp_path.iterdir()) == []


def test_disk_is_freed_after_an_exception(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("llama")
    seen = []

    def boom(module: nn.Module, args: Any) -> None:
        seen.extend(tmp_path.rglob("*.pt"))
        raise Boom

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(boom)
    with pytest.raises(Boom):
        FASPPruner(PruningConfig(0.2, offload="disk")).prune(model, calibration())
    assert seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gemma2"])
def test_micro_batches_change_nothing(family: str) -> None:
    config = PruningConfig(0.2, attention="value_dims", micro_batch_size=1)
    assert_same(pruned(family, config), pruned(family), atol=1e-4, rtol=1e-4)


def test_device_asked_for_is_where_the_model_is() -> None:
    assert_same(pruned(config=PruningConfig(0.2, attention="value_dims", device="cpu")), pruned())


@pytest.mark.cuda
@pytest.mark.parametrize("offload", ["cpu", "accelerator", "disk"])
def test_model_on_the_cpu_is_pruned_on_the_accelerator_block_by_block(offload: str) -> None:
    model = pruned("llama-gqa", PruningConfig(0.2, attention="value_dims", device="cuda", offload=offload))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert_same(model, pruned("llama-gqa"), atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("family", TINY)
def test_pruning_on_the_accelerator_equals_that_on_the_cpu(family: str) -> None:
    model = tiny_model(family).to("cuda")
    FASPPruner(BOTH).prune(model, calibration())
    assert_same(model.cpu(), pruned(family), atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
def test_block_returns_from_the_accelerator_after_an_exception() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="activations must be finite"):
        FASPPruner(PruningConfig(0.2, device="cuda")).prune(model, calibration())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2", "bloom"])
def test_half_precision_model_is_pruned(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    report = FASPPruner(BOTH).prune(model, calibration())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    exact = FASPPruner(BOTH).prune(tiny_model(family), calibration())
    for found, wanted in zip(report.pairs, exact.pairs, strict=True):
        assert found.error_after == pytest.approx(wanted.error_after, rel=0.1), found.layer
    with torch.no_grad():
        assert model(random_tokens()).logits.isfinite().all()


# --- restoration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [BOTH, PruningConfig.paper(0.2), PruningConfig.paper(0.2, damping=10.0)],
    ids=["default", "paper", "paper-overdamped"],
)
@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2"])
def test_restoration_never_raises_the_calibration_error(family: str, config: PruningConfig) -> None:
    report = FASPPruner(config).prune(tiny_model(family), calibration())
    assert all(0 < pair.error_after <= pair.error_before < 1 for pair in report.pairs)
    assert (config.damping > 1) == all(pair.solver == "none" for pair in report.pairs)


def test_reported_error_is_that_of_the_outputs() -> None:
    """‖WX − ŴX_M‖/‖WX‖ of the first consumer, from the model's own activations."""
    model, dense, batches = tiny_model("opt"), tiny_model("opt"), [random_tokens(6, 40)]
    report = FASPPruner(PruningConfig(0.3, attention="value_dims")).prune(model, batches)
    found = {}
    for key, which in (("pruned", model), ("dense", dense)):
        handle = which.model.decoder.layers[0].self_attn.out_proj.register_forward_hook(
            lambda m, args, output, key=key: found.update({key: output})
        )
        with torch.no_grad():
            which(*batches)
        handle.remove()
    bias = dense.model.decoder.layers[0].self_attn.out_proj.bias
    error = (found["pruned"] - found["dense"]).norm() / (found["dense"] - bias).norm()
    assert report.pairs[0].layer == "model.decoder.layers.0.self_attn.out_proj"
    assert report.pairs[0].error_after == pytest.approx(error.item(), rel=1e-3)


def test_refitted_bias_lowers_the_error() -> None:
    errors = {}
    for refit in (True, False):
        report = FASPPruner(PruningConfig(0.2, attention="value_dims", refit_bias=refit)).prune(
            tiny_model("opt"), calibration()
        )
        errors[refit] = report.pairs[0].error_after
    assert errors[True] < errors[False]


def test_dead_columns_go_first_and_do_not_break_the_solve() -> None:
    model = tiny_model("llama")
    dead = [3, 7, 20]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[dead] = 0
    for score in ("wanda", "magnitude"):
        candidate = copy.deepcopy(model)
        report = FASPPruner(PruningConfig(0.2, attention="none", score=score, damping=0.0)).prune(
            candidate, calibration()
        )
        assert all(not set(dead) & set(block["mlp.down_proj"].kept) for block in candidate.fasp_plan.blocks), score
        assert report.warnings == []


def test_dead_columns_that_stay_do_not_break_the_solve() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:40] = 0  # more than go
    report = FASPPruner(PruningConfig(0.2, attention="none", damping=0.0)).prune(model, calibration())
    assert report.warnings == []
    assert all(pair.solver == "cholesky" and pair.error_after < 1e-6 for pair in report.pairs)


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_score_decides_what_stays(score: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :10] *= 1e-2  # small weights …
            layer.mlp.up_proj.weight[:10] *= 1e4  # … on inputs that make up for it
    FASPPruner(PruningConfig(0.2, attention="none", score=score)).prune(model, calibration())
    kept = set(model.fasp_plan.blocks[0]["mlp.down_proj"].kept)
    assert set(range(10)) <= kept if score == "wanda" else not kept & set(range(10))


# --- pruning further ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gpt2", "gpt_neox", "phi3", "bloom"])
def test_pruning_further_counts_from_the_original(family: str) -> None:
    model, once = tiny_model(family), tiny_model(family)
    config = {sparsity: PruningConfig(sparsity, attention="value_dims") for sparsity in (0.1, 0.3)}
    FASPPruner(config[0.1]).prune(model, calibration())
    first = model.fasp_plan
    further = FASPPruner(config[0.3]).prune(model, calibration())
    direct = FASPPruner(config[0.3]).prune(once, calibration())
    assert further.sparsity == direct.sparsity
    assert further.sparsity_total == direct.sparsity_total
    assert [p.shape for p in model.parameters()] == [p.shape for p in once.parameters()]
    for before, after in zip(first.blocks, model.fasp_plan.blocks, strict=True):
        assert all(set(after[path].kept) < set(pair.kept) for path, pair in before.items())
    masked = mask_units(tiny_model(family), model.fasp_plan)  # wrapped once only, and runs
    with torch.no_grad():
        assert model(random_tokens()).logits.shape == masked(random_tokens()).logits.shape


def test_further_cut_model_equals_masked_model() -> None:
    model = tiny_model("llama-gqa")
    for sparsity in (0.1, 0.3):
        config = PruningConfig(sparsity, attention="value_dims", restoration="none")
        FASPPruner(config).prune(model, calibration())
    masked = mask_units(tiny_model("llama-gqa"), model.fasp_plan)
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens()).logits, masked(random_tokens()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2])
def test_sparsity_that_is_reached_already_is_refused(sparsity: float) -> None:
    model = pruned()
    with pytest.raises(ValueError, match=rf"sparsity must exceed 0\.\d+.* got {sparsity}"):
        FASPPruner(PruningConfig(sparsity, attention="value_dims")).prune(model, calibration())


# --- what it says ------------------------------------------------------------------------------------------------


def test_few_tokens_are_warned_of_with_both_numbers() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 20)
    with pytest.warns(UserWarning, match=r"40 calibration tokens are fewer than the 48 columns"):
        report = FASPPruner(BOTH).prune(model, [tokens])
    assert len([message for message in report.warnings if "40" in message and "48" in message]) == 1


def test_enough_tokens_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = FASPPruner(BOTH).prune(tiny_model("llama"), [random_tokens(2, 24)])
    assert (report.tokens, report.warnings) == (48, [])


def test_singular_gram_is_warned_of_by_layer() -> None:
    config = PruningConfig(0.2, attention="none", damping=0.0)
    with pytest.warns(
        UserWarning, match=r"model\.layers\.1\.mlp\.down_proj: the gram was singular; solved by cholesky"
    ):
        report = FASPPruner(config).prune(tiny_model("llama"), [random_tokens(1, 20)])
    assert all(pair.damping > 0 for pair in report.pairs)


def test_progress_ends_at_its_total() -> None:
    events: list[ProgressEvent] = []
    FASPPruner(BOTH).prune(tiny_model("llama"), calibration(), events.append)
    assert [event.done for event in events] == list(range(1, events[-1].total + 1))
    assert {event.total for event in events} == {events[-1].done}
    assert [event.block for event in events] == sorted(event.block for event in events)
    assert {event.blocks for event in events} == {LAYERS}


def test_report_holds_widths_errors_and_seconds() -> None:
    model = tiny_model("llama")
    report = FASPPruner(BOTH).prune(model, calibration())
    assert [pair.kind for pair in report.pairs] == ["value", "ffn"] * LAYERS
    assert [pair.width_before for pair in report.pairs] == [HIDDEN, 48] * LAYERS
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert {"capture", "forward", "gram", "solve", "cut", "apply", "total"} <= set(report.seconds)
    parts = sum(seconds for phase, seconds in report.seconds.items() if phase != "total")
    assert 0 < parts <= report.seconds["total"]
    assert report.peak_memory["rss"] > 1e7
    plain = report.to_dict()
    assert plain["pairs"][0]["width_after"] == report.pairs[0].width_after
    assert model.fasp_report == plain


def test_error_leaves_the_model_alone_when_nothing_can_be_computed() -> None:
    for batches, error in (([], "at least one calibration batch"), ([torch.tensor([[1, 97]])], r"\[0, 97\).*97")):
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=error):
            FASPPruner(BOTH).prune(model, batches)
        assert_unchanged(model)


def test_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(TINY["llama"].config())
    with pytest.raises(ValueError, match=r"weights in memory, got .* on the meta device"):
        FASPPruner().prune(model, calibration())


def test_refusals_come_before_the_first_batch() -> None:
    def batches() -> Any:
        pytest.fail("a batch was read")
        yield

    for config in (PruningConfig(0.99), PruningConfig(multiple_of=1000)):
        with pytest.raises(ValueError, match="must be"):
            FASPPruner(config).prune(tiny_model("llama"), batches())


def test_defaults_prune_a_fifth() -> None:
    assert pruner.FASPPruner().config == PruningConfig()
