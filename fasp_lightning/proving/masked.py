"""A model whose units are masked instead of cut, and what is compared with it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.inferring.twin import random_tokens
from fasp_lightning.structure.modes import hooked
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.pruning_plan import PruningPlan, targets


def masked(model: Any, plan: PruningPlan) -> Any:
    """A copy of a whole model with zeros in the consumers' columns of the units that a plan removes."""
    copied = copy.deepcopy(model)
    pairs = resolve_pruned(copied, whole=plan.cuts.kinds)
    for pair, kept in targets(copied, pairs, plan):
        with torch.no_grad():
            pair.shut(kept)
    return copied


@torch.no_grad()
def errors_of(model: Any, mask: Any, plan: PruningPlan, tokens: Tensor) -> dict[str, float]:
    """‖W X‖ of the removed columns over that of all, by layer, whole forwards of the masked model; none of experts."""
    pairs = resolve_pruned(model, whole=plan.cuts.kinds)
    wanted = [(pair, kept) for pair, kept in targets(model, pairs, plan) if pair.spec.experts is None]
    seen: dict[str, Tensor] = {}

    def note(layer: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        seen[layer] = args[0].reshape(-1, args[0].shape[-1]).double()

    with hooked(before=[(mask.get_submodule(pair.layer), partial(note, pair.layer)) for pair, _ in wanted]):
        mask(input_ids=tokens, use_cache=False)
    errors = {}
    for pair, kept in wanted:
        gone = torch.ones(pair.columns, dtype=torch.bool)
        gone[pair.layout.columns(kept)] = False
        inputs, weight = seen[pair.layer], pair.weight.double()
        whole, lost = inputs @ weight.T, inputs[:, gone] @ weight[:, gone].T
        errors[pair.layer] = float(lost.norm() / whole.norm())
    return errors


def same(found: Tensor, expected: Tensor) -> None:
    """Refuse logits that differ by more than rounding.

    Raises:
        FaspError: If they do.
    """
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= 1e-3 * max(scale, 1.0):
        raise FaspError(f"logits of up to {scale:.3g} differ by {difference:.3g}")


def _unguided(model: Any) -> Any:
    """The model without what its own generation config says of tokens that a twin lacks."""
    model.generation_config = type(model.generation_config)()
    return model


def same_text(first: Any, second: Any) -> None:
    """Refuse two models of which a cache makes other text.

    Raises:
        FaspError: If it does.
    """
    from transformers import GenerationConfig

    tokens = random_tokens(first, 2, 6, seed=2)
    own = GenerationConfig(max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    options = {"attention_mask": torch.ones_like(tokens), "generation_config": own}
    one, other = (model.generate(tokens, **options) for model in (_unguided(first), _unguided(second)))
    if not torch.equal(one, other):
        raise FaspError(f"generated {one.tolist()} instead of {other.tolist()}")
