"""How loss sensitivity is computed: over processes, where memory ends, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic, calibration, leftovers
from tiny_sensitivity import WAYS, assert_close, scores
from torch import Tensor, nn

from fasp_lightning.pruning.blocks import sensitivity
from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.sensitivity import fisher_scores
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.plan import resolve_pruned


def test_sums_are_over_all_processes() -> None:
    class Alike(Processes):
        def add(self, tensor: Tensor) -> None:
            tensor.mul_(3)

    expected = [[3 * score for score in block] for block in scores(tiny_model("opt"))]
    assert_close(scores(tiny_model("opt"), processes=Alike()), expected)


@pytest.mark.parametrize("whole", [True, False, None])
def test_every_block_and_sample_is_told(whole: bool | None) -> None:
    told: list[int] = []
    scores(tiny_model("gemma3"), calibration(3), whole=whole, progress=lambda event: told.append(event.block))
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
    assert_close(
        scores(tiny_model("opt"), calibration(3), whole=True, progress=lambda event: told.append(event.block)), expected
    )
    assert sorted(told) == [0, 0, 0, 1, 1, 1]
    assert len(calls) == 4 + 4


@pytest.fixture(params=["nowhere", "model.layers.1.mlp.act_fn", "lm_head"])
def state_kept(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A model that trains in part, and may break somewhere; afterwards it must be as it was."""
    model: Any = tiny_model("llama-gqa").train()
    model.model.layers[1].mlp.eval()
    model.model.norm.requires_grad_(False)
    model(random_tokens()).logits.sum().backward()
    before, modules = states(model), dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}

    def boom(*_: Any) -> None:
        raise ArithmeticError

    model.breaks = request.param != "nowhere"
    handle = (modules[request.param] if model.breaks else nn.Identity()).register_forward_pre_hook(boom)
    yield model
    handle.remove()
    assert leftovers(model) == []
    assert torch.is_grad_enabled()
    assert dict(model.named_modules()) == modules
    assert {name: module.training for name, module in modules.items()} == modes
    after = states(model)
    assert [p.grad is None for p in model.parameters()].count(True) == 1  # the norm's
    assert after.keys() == before.keys()
    for name, (requires_grad, address, tensors) in before.items():
        assert after[name][:2] == (requires_grad, address)
        assert all(map(torch.equal, after[name][2], tensors))


def states(model: nn.Module) -> dict[str, tuple[bool, int, list[Tensor]]]:
    """Of each parameter: whether it trains, its address, and copies of it and its gradient."""
    return {
        name: (p.requires_grad, p.data_ptr(), [t.clone() for t in (p.detach(), p.grad) if t is not None])
        for name, p in model.named_parameters()
    }


@WAYS
def test_model_is_as_before(state_kept: Any, whole: bool) -> None:
    pairs = resolve_pruned(state_kept)
    session = Session.start(basic(), pairs)
    with session.store:
        with evaluating(state_kept):
            samples, hidden = capture(state_kept, calibration(2), None, session.store)
        with pytest.raises(ArithmeticError) if state_kept.breaks else nullcontext():
            fisher_scores(session, state_kept, pairs, samples, hidden, whole=whole)


@WAYS
def test_samples_go_on_to_the_engine(whole: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk nothing is lost, and nothing is left but the samples' own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("opt")
    pairs = resolve_pruned(model)
    session = Session.start(basic(offload="disk"), pairs)
    with evaluating(model), session.store as store:
        samples, hidden = capture(model, calibration(3), None, store)
        before = [(path, store.get(path).clone()) for path in hidden]
        fisher_scores(session, model, pairs, samples, hidden, whole=whole)
        assert hidden == [path for path, _ in before]
        assert all(torch.equal(store.get(path), value) for path, value in before)
        assert sorted(tmp_path.rglob("*.pt")) == sorted(path for path, _ in before)
    assert not list(tmp_path.iterdir())


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
