"""A model that does not run its blocks as a chain is refused before anything is spent on it, and the place is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import OWN, assert_unchanged, basic, calibration, leftovers
from torch import nn
from torch.nn import functional

from fasp_lightning import FaspError, FASPPruner
from fasp_lightning.pruning.blocks import capture as capturing
from fasp_lightning.pruning.blocks.rehearsal import rehearse, require_turnable
from fasp_lightning.structure.plan import resolve_pruned


@pytest.mark.parametrize("length", [1, 20])
def test_every_family_passes(tiny: Any, length: int) -> None:
    rehearse(tiny, resolve_pruned(tiny), {"input_ids": random_tokens(1, length)})
    assert leftovers(tiny) == []


def test_every_family_bears_another_basis_of_its_values(tiny: Any) -> None:
    require_turnable(tiny, resolve_pruned(tiny), {"input_ids": random_tokens(1, 20)})
    assert leftovers(tiny) == []


def test_values_behind_a_gate_are_not_turned() -> None:
    """What stands between V and O acts on single dims."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].sigmoid(),))
    config = basic(attention="value_dims", value_basis="principal")
    with pytest.raises(FaspError, match=r"value_basis must be 'given' for model\.layers\.1\.self_attn\.o_proj"):
        FASPPruner(config).prune(model, calibration())
    assert_unchanged(model)


class Blocks(nn.ModuleList):
    """Blocks that the model runs in an order of their own, some of them several times."""

    order: list[int]

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return [super(Blocks, self).__getitem__(i) for i in self.order] if isinstance(index, slice) else found


def ordered(order: list[int]) -> Any:
    def change(model: Any) -> None:
        blocks = Blocks(model.model.layers)
        blocks.order = order
        model.model.layers = blocks
        model.config.num_hidden_layers = len(order)

    return change


def twice(path: str) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]

    return change


def consumer(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: mlp.down_proj(mlp.up_proj(hidden)) + mlp.down_proj(mlp.gate_proj(hidden))


def scaled(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def reused(model: Any) -> None:
    """The second block's FFN looks at the first one's, too."""
    mlp = model.model.layers[1].mlp
    other, forward = model.model.layers[0].mlp, mlp.forward
    mlp.forward = lambda hidden: forward(hidden) + other(hidden)


def head(model: Any) -> None:
    """The causal LM runs its base model twice."""
    forward = model.forward
    model.forward = lambda **inputs: (model.model(**inputs), forward(**inputs))[1]


class Binary(nn.Linear):
    """Computes with fewer bits than it stores."""

    def forward(self, hidden: Any) -> Any:
        """Signs alone."""
        return functional.linear(hidden, self.weight.sign() * self.weight.abs().mean())


def rounded(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.__class__ = Binary


CHANGES: dict[str, tuple[Any, str]] = {
    "base-twice": (head, r"model\.layers\.0 must be called once .* of the blocks 0, 1, 0, 1"),
    "rounded": (rounded, r"layers\.1\.mlp\.down_proj must compute its weight times .* output of Binary; prune before"),
    "looped": (
        ordered([0, 1, 0, 1]),
        r"model\.layers\.0 must be called once .* of the blocks 0, 1, 0, 1; a model that",
    ),
    "repeated": (ordered([0, 0, 1]), r"model\.layers\.1 must be called once .* of the blocks 0, 0, 1"),
    "skipped": (ordered([0]), r"model\.layers\.1 must be called once .* of the blocks 0"),
    "none": (ordered([]), r"model\.layers\.0 must be called once .* of the blocks none"),
    "reordered": (ordered([1, 0]), r"model\.layers\.0 must be called once .* of the blocks 1, 0"),
    "block-twice": (twice("model.layers.1"), r"model\.layers\.1\.self_attn\.o_proj must be called once .* got 2 calls"),
    "consumer-twice": (consumer, r"layers\.1\.mlp\.down_proj must be called once .* got 2 calls"),
    "ffn-twice": (twice("model.layers.1.mlp"), r"layers\.1\.mlp\.\w+ must be called once .* got 2 calls"),
    "of-another": (reused, r"layers\.0\.mlp\.\w+ must be called once by its block's forward, got 2 calls"),
    "between": (scaled, r"model\.layers\.1 must be called with what the block before it returned"),
}


@pytest.mark.parametrize(("change", "error"), CHANGES.values(), ids=CHANGES)
def test_blocks_that_are_no_chain_are_refused_before_own_text(
    change: Any, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    change(model)
    monkeypatch.setattr("fasp_lightning.pruning.prepare.own_text", lambda *_: pytest.fail("own text was written"))
    with pytest.raises(FaspError, match=error):
        FASPPruner(basic(own_text=OWN)).prune(model, calibration())
    assert_unchanged(model)


def test_a_block_that_is_skipped_on_some_texts_is_refused_before_the_first_cut() -> None:
    """Early exit: no rehearsal on a few tokens shows it."""
    model = tiny_model("llama")
    blocks = Blocks(model.model.layers)
    model.model.layers, blocks.order = blocks, [0, 1]

    def leave_early(_: nn.Module, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        blocks.order = [0] if (ids == 96).any() else [0, 1]

    model.model.register_forward_pre_hook(leave_early, with_kwargs=True)
    with pytest.raises(FaspError, match=r"model\.layers\.1 must be called once"):
        FASPPruner(basic()).prune(model, [random_tokens(2, 40), torch.full((1, 40), 96)])
    assert_unchanged(model)


@pytest.mark.parametrize("family", ["opt", "gemma2"])
def test_padding_that_gives_nan_is_refused_before_the_first_cut(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager masks of float64 (transformers, masking_utils.py) are -inf in the float32 of the softmax."""
    model = tiny_model(family, "eager").double()
    monkeypatch.setattr(capturing, "stand_ins", lambda *_: pytest.fail("a batch was captured"))
    unpadded, padded = random_tokens(2, 40), calibration()[0]
    with pytest.raises(FaspError, match=r"activations must be finite.*layers\.1.*run the model in float32"):
        FASPPruner(basic()).prune(model, [unpadded, padded])


def test_nan_weights_are_named(tiny: Any) -> None:
    *_, pair = resolve_pruned(tiny)[-1]
    name = f"{pair.layer}.weight"
    with torch.no_grad():
        tiny.get_parameter(name).view(-1)[0] = torch.nan
    with pytest.raises(FaspError, match=rf"activations must be finite.*parameter {name} is not; check"):
        FASPPruner(basic()).prune(tiny, calibration())
