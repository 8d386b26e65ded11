"""Loss sensitivity of tiny models, and the naive way to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from oracle import consumer_columns
from tiny import with_positions
from tiny_pruning import basic, calibration
from torch import Tensor, nn

from fasp_lightning.pruning.blocks.capture import capture
from fasp_lightning.pruning.blocks.sensitivity import fisher_scores
from fasp_lightning.pruning.blocks.session import Session
from fasp_lightning.pruning.processes import Processes
from fasp_lightning.pruning.progress import Progress
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.plan import resolve_pruned

WAYS = pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
Scores = list[list[Tensor]]


def scores(
    model: Any,
    batches: Iterable[Any] | None = None,
    device: str = "cpu",
    kv_groups: bool = False,
    whole: bool | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Of samples taken in evaluation mode; the scores are asked for in the model's own mode, with gradients on."""
    pairs = resolve_pruned(model, whole={"groups"} if kv_groups else ())
    session = Session.start(basic(device=device), pairs, progress, processes)
    with session.store:
        with evaluating(model):
            samples, hidden = capture(model, batches or calibration(2), None, session.store)
        return fisher_scores(session, model, pairs, samples, hidden, whole=whole)


def assert_close(found: Scores, expected: Scores, rtol: float = 1e-4) -> None:
    for block, wanted in zip(found, expected, strict=True):
        for score, target in zip(block, wanted, strict=True):
            assert score.dtype == torch.float64
            torch.testing.assert_close(score, target.double(), rtol=rtol, atol=rtol * 1e-3 * float(target.max()))


def naive(model: Any, batches: list[Any], kv_groups: bool = False) -> Scores:
    """Every gradient that autograd can give is kept, and the loss is written out; weights train."""
    pairs, found = resolve_pruned(model, whole={"groups"} if kv_groups else ()), {}
    for batch in batches:
        kept, handles = {}, []
        for i, block in enumerate(pairs):
            for j, pair in enumerate(block):

                def keep(_: nn.Module, args: Any, key: Any = (i, j), kept: Any = kept) -> None:
                    args[0].retain_grad()
                    kept[key] = args[0]

                handles.append(pair.consumer.register_forward_pre_hook(keep))
        given = with_positions(model, batch)
        log_p = model(**given, use_cache=False).logits.double().log_softmax(-1)
        ids, mask = given["input_ids"], given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        losses = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        losses[mask[:, 1:] & mask[:, :-1]].sum().backward()
        for key, inputs in kept.items():
            products = (inputs * inputs.grad).detach().double().reshape(mask.numel(), -1)[mask.reshape(-1)]
            found[key] = found.get(key, 0) + products.square().sum(0)
        for handle in handles:
            handle.remove()
    return [[_units(pair, found[i, j]) for j, pair in enumerate(block)] for i, block in enumerate(pairs)]


def _units(pair: Any, columns: Tensor) -> Tensor:
    left = consumer_columns(pair.layout, pair.kept.tolist())
    fed = [[left.index(c) for c in consumer_columns(pair.layout, [unit])] for unit in pair.kept.tolist()]
    return torch.stack([columns[index].sum() for index in fed])
