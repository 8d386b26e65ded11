"""Loss sensitivity: against a naive oracle, in both ways, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from oracle import consumer_columns, mask_units
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, calibration, leftovers, pruned
from torch import Tensor, nn

from fasp_lightning import spec_for
from fasp_lightning.pruning import sensitivity
from fasp_lightning.pruning.capture import Sample, capture
from fasp_lightning.pruning.plan import record_plan, resolve_pruned
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.sensitivity import fisher_scores
from fasp_lightning.pruning.standins import evaluating
from fasp_lightning.pruning.store import TensorStore
from fasp_lightning.training.lora import LoRAConfig, attach_lora, merge_lora

WAYS = pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
Scores = list[list[Tensor]]


def scores(model: Any, batches: Iterable[Any] | None = None, device: str = "cpu", **options: Any) -> Scores:
    """As the engine asks for them."""
    with evaluating(model), TensorStore("cpu", torch.device(device)) as store:
        samples = capture(model, spec_for(model), batches or calibration(2), None, store)
        return fisher_scores(model, resolve_pruned(model), samples, store, **options)


def assert_close(found: Scores, expected: Scores, rtol: float = 1e-4) -> None:
    for block, wanted in zip(found, expected, strict=True):
        for score, target in zip(block, wanted, strict=True):
            assert score.dtype == torch.float64
            torch.testing.assert_close(score, target.double(), rtol=rtol, atol=rtol * 1e-3 * float(target.max()))


def naive(model: Any, batches: list[Any]) -> Scores:
    """Every gradient that autograd can give is kept, and the loss is written out; weights train."""
    pairs, found = resolve_pruned(model), {}
    for batch in batches:
        kept, handles = {}, []
        for i, block in enumerate(pairs):
            for j, pair in enumerate(block):

                def keep(_: nn.Module, args: Any, key: Any = (i, j), kept: Any = kept) -> None:
                    args[0].retain_grad()
                    kept[key] = args[0]

                handles.append(pair.consumer.register_forward_pre_hook(keep))
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        log_p = model(**given, use_cache=False).logits.double().log_softmax(-1)
        ids, mask = given["input_ids"], given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        losses = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        losses[mask[:, 1:] & mask[:, :-1]].sum().backward()
        for key, inputs in kept.items():
            squares = (inputs.double() * inputs.grad.double()).square()[mask].sum(0).detach()
            found[key] = found.get(key, 0) + squares
        for handle in handles:
            handle.remove()
    return [[_units(pair, found[i, j]) for j, pair in enumerate(block)] for i, block in enumerate(pairs)]


def _units(pair: Any, columns: Tensor) -> Tensor:
    left = consumer_columns(pair.layout, pair.kept.tolist())
    fed = [[left.index(c) for c in consumer_columns(pair.layout, [unit])] for unit in pair.kept.tolist()]
    return torch.stack([columns[index].sum() for index in fed])


@WAYS
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "opt", "gpt2"])
def test_scores_are_the_definition(name: str, whole: bool) -> None:
    assert_close(scores(tiny_model(name), whole=whole), naive(tiny_model(name), calibration(2)))


@pytest.mark.parametrize(
    ("family", "attention"), [(name, attention) for name, tiny in TINY.items() for attention in tiny.attention]
)
def test_both_ways_give_the_same(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    assert_close(scores(model, whole=True), scores(model, whole=False))


def unevenly_cut(name: str) -> nn.Module:
    """Another number of value dims in each KV head."""
    model = tiny_model(name)
    pairs = resolve_pruned(model)
    pairs[0][0].cut(torch.tensor([0, 2, 3, *range(8, pairs[0][0].layout.width)]))
    record_plan(model, pairs)
    return model


def adapted(model: nn.Module) -> nn.Module:
    attach_lora(model, LoRAConfig(rank=3, alpha=6.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_()  # for the oracle
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@WAYS
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "gpt2", "phi3"])
def test_pruned_and_adapted_models_have_scores_of_what_is_left(name: str, whole: bool) -> None:
    for make in (pruned, lambda name: adapted(pruned(name)), unevenly_cut):
        model = make(name)
        assert_close(scores(model, whole=whole), naive(model, calibration(2)))


@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_merging_adapters_changes_no_score(name: str) -> None:
    model = adapted(tiny_model(name))
    attached = scores(model)
    merge_lora(model)
    assert_close(scores(model), attached, rtol=1e-3)


@WAYS
@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox", "opt"])
def test_units_without_weights_have_no_score_and_the_others_those_of_the_cut_model(name: str, whole: bool) -> None:
    cut = pruned(name, type(BOTH)(0.2, attention="value_dims", restoration="none"))
    masked = scores(mask_units(tiny_model(name), cut.fasp_plan), whole=whole)
    for block, blocks_pairs, left in zip(masked, resolve_pruned(cut), scores(cut, whole=whole), strict=True):
        for score, pair, expected in zip(block, blocks_pairs, left, strict=True):
            gone = torch.ones(score.numel(), dtype=torch.bool)
            gone[pair.kept] = False
            assert gone.any()
            assert not score[gone].any()
            torch.testing.assert_close(score[pair.kept], expected, rtol=1e-4, atol=1e-6)


@WAYS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_gives_nothing(name: str, side: str, whole: bool) -> None:
    tokens = random_tokens(2, 10)
    width = [(0, 4), (4, 0)][side == "left"]
    ids, mask = nn.functional.pad(tokens, width, value=7), nn.functional.pad(torch.ones_like(tokens), width)
    padded = {"input_ids": ids, "attention_mask": mask}
    model = tiny_model(name)
    assert_close(scores(model, [padded], whole=whole), scores(model, [tokens], whole=whole), rtol=1e-3)


@WAYS
def test_a_weight_counts_as_often_as_it_says(whole: bool) -> None:
    model, (first, second) = tiny_model("llama"), [random_tokens(seed=seed) for seed in range(2)]
    heavy = scores(model, [{"input_ids": first, "weight": 2.5}, second], whole=whole)
    one, other = (scores(model, [batch], whole=whole) for batch in (first, second))
    assert_close(heavy, [[2.5 * a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)])


@WAYS
def test_pieces_change_nothing(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(tiny_model("opt"), whole=whole)
    monkeypatch.setattr(sensitivity, "PIECE_TOKENS", 1)
    assert_close(scores(tiny_model("opt"), whole=whole), expected)


def test_sums_are_over_all_processes() -> None:
    class Alike(Processes):
        def add(self, tensor: Tensor) -> None:
            tensor.mul_(3)

    expected = [[3 * score for score in block] for block in scores(tiny_model("opt"))]
    assert_close(scores(tiny_model("opt"), processes=Alike()), expected)


@pytest.mark.parametrize("whole", [True, False, None])
def test_every_block_and_sample_is_told(whole: bool | None) -> None:
    told: list[int] = []
    scores(tiny_model("gemma3"), calibration(3), whole=whole, tick=told.append)
    assert sorted(told) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_what_does_not_fit_at_once_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory ends in the midst of a sample, which is not counted twice."""
    expected, told, calls = scores(tiny_model("opt"), calibration(3)), [], []
    backward = sensitivity._Passes._backward

    def limited(self: Any, *args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError
        backward(self, *args)

    monkeypatch.setattr(sensitivity, "PIECE_TOKENS", 1)  # two pieces a sample
    monkeypatch.setattr(sensitivity._Passes, "_backward", limited)
    assert_close(scores(tiny_model("opt"), calibration(3), whole=True, tick=told.append), expected)
    assert sorted(told) == [0, 0, 0, 1, 1, 1]
    assert len(calls) == 4 + 4


@WAYS
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_training_mode_matters_not(name: str, whole: bool) -> None:
    model = tiny_model(name).train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert_close(scores(model, whole=whole), scores(tiny_model(name), whole=whole), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["opt", "llama-gqa", "bloom"])
def test_half_precision_has_about_the_same_scores(name: str, dtype: torch.dtype) -> None:
    found, exact = scores(tiny_model(name, dtype=dtype)), scores(tiny_model(name))
    for score, expected in zip(sum(found, []), sum(exact, []), strict=True):
        assert torch.corrcoef(torch.stack([score, expected]))[0, 1] > 0.97


@pytest.fixture(params=["none", "middle", "head"])
def state_kept(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A model that trains in part; afterwards it is as it was. It breaks in a hook, if at all."""
    model = tiny_model("llama-gqa").train()
    model.model.layers[1].mlp.eval()
    model.model.norm.requires_grad_(False)
    model(random_tokens()).logits.sum().backward()
    parameters = {name: (p.requires_grad, p.grad, p.clone(), p.data_ptr()) for name, p in model.named_parameters()}
    modes = {name: (module.training, module) for name, module in model.named_modules()}

    def boom(*_: Any) -> None:
        raise ArithmeticError

    broken = {"none": None, "middle": model.model.layers[1].mlp.act_fn, "head": model.lm_head}[request.param]
    handle = broken and broken.register_forward_pre_hook(boom)
    model.expects_error = bool(broken)
    yield model
    if handle:
        handle.remove()
    assert {name: (module.training, module) for name, module in model.named_modules()} == modes
    assert leftovers(model) == []
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        wanted, gradient, value, address = parameters[name]
        assert parameter.requires_grad == wanted
        assert parameter.grad is gradient
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == address


@WAYS
def test_model_is_as_before(state_kept: Any, whole: bool) -> None:
    gradients = {name: p.grad.clone() for name, p in state_kept.named_parameters() if p.grad is not None}
    with TensorStore("cpu", torch.device("cpu")) as store:
        with evaluating(tiny_model("llama-gqa")) as _:
            samples = capture(tiny_model("llama-gqa"), spec_for(state_kept), calibration(2), None, store)
        arguments = (state_kept, resolve_pruned(state_kept), samples, store)
        if state_kept.expects_error:
            with pytest.raises(ArithmeticError):
                fisher_scores(*arguments, whole=whole)
        else:
            fisher_scores(*arguments, whole=whole)
    assert gradients
    for name, parameter in state_kept.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("whole", [True, False])
def test_samples_go_on_to_the_engine(whole: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk nothing is lost, and nothing is left but the samples' own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("opt")
    with evaluating(model), TensorStore("disk", torch.device("cpu")) as store:
        samples = capture(model, spec_for(model), calibration(3), None, store)
        before = [(sample.hidden, store.get(sample.hidden).clone()) for sample in samples]
        fisher_scores(model, resolve_pruned(model), samples, store, whole=whole)
        assert [(sample.hidden, sample.attention, sample.inputs) for sample in samples] == [
            (path, None, None) for path, _ in before
        ]
        assert all(torch.equal(store.get(path), value) for path, value in before)
        assert sorted(tmp_path.rglob("*.pt")) == sorted(path for path, _ in before)


@WAYS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("broken", "kind", "layer"),
    [
        ("model.layers.0.mlp.up_proj", "activations", "model.layers.0.mlp.down_proj"),
        ("model.layers.1.self_attn.v_proj", "activations", "model.layers.1.self_attn.o_proj"),
        ("lm_head", "gradients", "model.layers.1.mlp.down_proj"),
    ],
)
def test_what_is_not_finite_is_named(broken: str, kind: str, layer: str, value: float, whole: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(broken).weight[0, 0] = value
    with pytest.raises(ValueError, match=f"{kind} must be finite, got NaN or Inf at the input of {layer}; check"):
        scores(model, whole=whole)
    assert leftovers(model) == []


def test_layer_without_a_gradient_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match=r"must depend on the input of model\.layers\.1\.mlp\.down_proj"):
        scores(model)


@pytest.mark.cuda
@pytest.mark.parametrize("family", TINY)
def test_model_on_the_cpu_is_scored_on_the_accelerator_block_by_block(family: str) -> None:
    model = tiny_model(family)
    assert_close(scores(model, device="cuda"), scores(model), rtol=1e-3)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_one_token_is_no_loss() -> None:
    sample: Sample
    model = tiny_model("llama")
    both = scores(model, [random_tokens(2, 1), random_tokens()])
    assert_close(both, scores(model, [random_tokens()]))
