"""Block influence: what it is of each block, over real tokens alone, with nothing left behind and no gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_pruning import assert_unchanged, basic, leftovers
from torch.nn.functional import cosine_similarity

from fasp_lightning import FASPPruner
from fasp_lightning.errors import FaspError

CONFIG = basic(allocation="block_influence", attention="none")
TEXT = [random_tokens(8)]


def turns(model: Any, batch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(blocks,) sums over real tokens, from the model's own hidden states."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, args, __, out: seen.extend([args[0], out]), with_kwargs=True)
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    pairs = zip(seen[::2], seen[1::2], strict=True)
    return torch.stack([((1 - cosine_similarity(x.double(), y.double(), dim=-1)) * mask).sum() for x, y in pairs])


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_it_is_the_mean_turn_of_real_tokens_by_the_weight_of_their_text(name: str) -> None:
    model, mask = tiny_model(name), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    first, second = random_tokens(2), random_tokens(2, seed=1)
    batches = [{"input_ids": first, "attention_mask": mask}, {"input_ids": second, "weight": 3.0}]
    found = FASPPruner(CONFIG).prepare(model, batches).influence
    expected = (turns(model, first, mask) + 3 * turns(model, second, torch.ones_like(mask))) / (20 + 3 * 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_unchanged(model, name)


def test_no_gradient_is_computed_and_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    model = tiny_model("llama")
    report = FASPPruner(CONFIG).prune(model, TEXT)
    assert report.sparsity == pytest.approx(0.2, abs=0.02)
    assert not leftovers(model)


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_batches_that_were_prepared_for_another_allocation_are_refused(allocation: Any) -> None:
    model = tiny_model("llama")
    given = FASPPruner(CONFIG).prepare(model, TEXT)
    with pytest.raises(FaspError, match="prepared with the score and allocation"):
        FASPPruner(replace(CONFIG, allocation=allocation)).prune(model, given)
