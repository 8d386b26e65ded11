"""Laws that hold for every family, with each attention implementation it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import consumer_columns, consumer_weight, mask_units, reference
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic
from torch import Tensor, nn

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.structure.plan import resolve_pruned

VARIANTS = {f"{name}-{kind}": (name, kind) for name, tiny in TINY.items() for kind in tiny.attention}
every_variant = pytest.mark.parametrize(("name", "kind"), VARIANTS.values(), ids=VARIANTS)
SETTINGS = {
    "default": basic(0.3, attention="value_dims"),
    "ffn-only": basic(0.2, attention="none", damping=1e-2),
    "paper": PruningConfig.paper(0.25),
}


def padded_batch(side: str, padding: int, seed: int = 0) -> dict[str, Tensor]:
    """Three sequences, two of them padded on one side with ``padding``-chosen token ids."""
    tokens, mask = random_tokens(3, 24, seed=seed), torch.ones(3, 24, dtype=torch.long)
    noise = random_tokens(3, 24, seed=padding)
    for row, length in ((1, 5), (2, 11)):
        gone = slice(0, length) if side == "left" else slice(24 - length, 24)
        tokens[row, gone], mask[row, gone] = noise[row, gone], 0
    return {"input_ids": tokens, "attention_mask": mask}


def calibration() -> list[Any]:
    """Plain, left- and right-padded batches; more tokens than any tiny pair is wide."""
    padded = [padded_batch("left", 7, seed=1), padded_batch("right", 8, seed=2)]
    return [random_tokens(3, 40, seed=3), *padded, random_tokens(2, 40, seed=4)]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(real tokens, vocabulary) logits."""
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


@pytest.mark.sampled
@every_variant
def test_cut_model_equals_masked_model(name: str, kind: str) -> None:
    cut = tiny_model(name, kind)
    original = copy.deepcopy(cut)
    FASPPruner(basic(0.3, attention="value_dims", restoration="none")).prune(cut, calibration())
    assert [len(block) for block in cut.fasp_plan.blocks] == [2] * len(cut.fasp_plan.blocks)  # both pairs
    masked = mask_units(copy.deepcopy(original), cut.fasp_plan)
    batch = padded_batch("left", 5, seed=9)
    torch.testing.assert_close(logits(cut, batch), logits(masked, batch), atol=1e-4, rtol=0)
    assert (logits(cut, batch) - logits(original, batch)).abs().max() > 1e-2
    options = {"attention_mask": batch["attention_mask"], "do_sample": False, "use_cache": True}
    options |= {"max_new_tokens": 6, "min_new_tokens": 6}
    tokens = [model.generate(batch["input_ids"], **options) for model in (cut, masked)]
    assert torch.equal(*tokens)


@pytest.mark.sampled(pairs=True)
@pytest.mark.parametrize("setting", SETTINGS)
@every_variant
def test_engine_equals_naive_oracle(name: str, kind: str, setting: str) -> None:
    model, batches, config = tiny_model(name, kind), calibration(), SETTINGS[setting]
    naive = copy.deepcopy(model)
    expected = reference(naive, batches, config)
    report = FASPPruner(config).prune(model, batches)
    assert {p.solver for p in report.pairs} <= {"cholesky", "none"}
    for index, block in enumerate(model.fasp_plan.blocks):
        assert {path: list(pair.kept) for path, pair in block.items()} == expected[index]
        for pair in resolve_pruned(model)[index]:
            columns = consumer_columns(pair.layout, pair.kept.tolist())
            wanted = consumer_weight(naive, index, pair.spec.consumer)[:, columns]
            torch.testing.assert_close(
                pair.weight, wanted, atol=2e-4, rtol=1e-3, msg=lambda m, p=pair: f"{p.name}: {m}"
            )
    batch = padded_batch("right", 6, seed=10)
    torch.testing.assert_close(logits(model, batch), logits(naive, batch), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", TINY)
def test_sparsity_zero_is_the_identity(family: str) -> None:
    model, original = tiny_model(family), tiny_model(family)
    report = FASPPruner(basic(0.0, attention="value_dims")).prune(model, calibration())
    assert report.sparsity == report.sparsity_total == 0
    assert report.pairs == []
    assert not any(model.fasp_plan.blocks)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.sampled
@every_variant
def test_padding_enters_no_statistic(name: str, kind: str) -> None:
    outcomes = []
    for padding in (100, 200):  # the pad tokens differ, and nothing else
        model = tiny_model(name, kind)
        batches = [padded_batch(side, padding, seed) for seed in range(3) for side in ("left", "right")]
        report = FASPPruner(basic(0.2, attention="value_dims")).prune(model, batches)
        assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
        outcomes.append(model)
    first, second = outcomes
    assert first.fasp_plan == second.fasp_plan
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["opt", "llama-gqa", "bloom", "gemma2"])
def test_right_padded_batches_equal_shorter_ones(name: str) -> None:
    padded, short = tiny_model(name), tiny_model(name)
    tokens = random_tokens(12, 30)
    wide = torch.nn.functional.pad(tokens, (0, 10), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 10))
    config = basic(0.2, attention="value_dims")
    FASPPruner(config).prune(padded, [{"input_ids": wide, "attention_mask": mask}])
    FASPPruner(config).prune(short, [tokens])
    assert padded.fasp_plan == short.fasp_plan
    for one, other in zip(padded.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
