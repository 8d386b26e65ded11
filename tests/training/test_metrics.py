"""Perplexity: exp of the mean cross entropy, whatever the dtype, the padding and the number of processes."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import VOCAB, random_tokens, tiny_model
from tiny_lightning import silent
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from fasp_lightning.ops import likelihood
from fasp_lightning.pruning.perplexity import perplexity
from fasp_lightning.training.metrics import Perplexity


def logits_for(tokens: Tensor, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*tokens.shape, VOCAB, generator=torch.Generator().manual_seed(1))


def reference(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> float:
    """exp of the mean cross entropy in float64, with the shift written out."""
    context, targets = logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    return math.exp(functional.cross_entropy(context, targets, ignore_index=ignore_index))


def measured(logits: Tensor, labels: Tensor, mask: Tensor | None = None, **options: int) -> float:
    metric = Perplexity(**options)
    metric.update(logits, labels, mask)
    return float(metric.compute())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_exponential_of_the_mean_cross_entropy(dtype: torch.dtype) -> None:
    tokens = random_tokens(3, 20)
    logits = logits_for(tokens).to(dtype)
    assert measured(logits, tokens) == pytest.approx(reference(logits, tokens), rel=1e-6)


def test_it_equals_the_perplexity_of_the_engine() -> None:
    model, tokens = tiny_model("llama"), random_tokens(3, 20)
    with torch.no_grad():
        logits = model(tokens).logits
    assert measured(logits, tokens) == pytest.approx(perplexity(model, [tokens]), rel=1e-9)


def test_a_large_gap_between_logits_is_no_infinity() -> None:
    tokens = torch.zeros(1, 2, dtype=torch.long)
    logits = torch.zeros(1, 2, VOCAB)
    logits[0, 0, 1] = 120.0
    assert measured(logits, tokens) == pytest.approx(math.exp(120), rel=1e-5)


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_labels_do_not_count(ignore_index: int) -> None:
    labels = random_tokens(3, 20)
    labels[0, :9] = ignore_index  # the token after them is predicted all the same, as in the loss
    labels[2, 15:] = ignore_index
    logits = logits_for(labels)
    expected = reference(logits, labels, ignore_index)
    assert measured(logits, labels, ignore_index=ignore_index) == pytest.approx(expected, rel=1e-6)


def test_the_label_of_the_loss_is_ignored_beside_the_own_one() -> None:
    labels = random_tokens(2, 20)
    logits, hundred = logits_for(labels), labels.clone()
    hundred[:, 10:] = -100
    assert measured(logits, hundred, ignore_index=2) == pytest.approx(reference(logits, hundred), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    tokens = random_tokens(1, 12)
    logits = logits_for(tokens)
    pad = (5, 0) if side == "left" else (0, 5)
    padded, mask = functional.pad(tokens, pad), functional.pad(torch.ones_like(tokens), pad)
    wide = functional.pad(logits, (0, 0, *pad))
    assert measured(wide, padded, mask) == pytest.approx(reference(logits, tokens), rel=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = random_tokens(2, 20)
    labels[0, 4:11] = -100
    whole = measured(logits_for(labels), labels)
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 3 * VOCAB)
    assert measured(logits_for(labels), labels) == pytest.approx(whole, rel=1e-12)


def test_batches_of_any_size_add_up() -> None:
    tokens = random_tokens(5, 20)
    logits, metric = logits_for(tokens), Perplexity()
    for rows in (slice(0, 1), slice(1, 5)):
        metric.update(logits[rows], tokens[rows])
    assert float(metric.compute()) == pytest.approx(reference(logits, tokens), rel=1e-6)


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "set_dtype"])
def test_states_stay_float64_and_exact(cast: str) -> None:
    tokens = random_tokens(3, 20)
    module = torch.nn.Module()
    module.metric = metric = Perplexity()
    metric.update(logits_for(tokens), tokens)
    exact = metric.nll_sum.clone()
    if cast == "to":
        module.to(torch.bfloat16)
    elif cast == "set_dtype":
        metric.set_dtype(torch.float16)
    else:
        getattr(module, cast)()
    assert metric.nll_sum.dtype == metric.tokens.dtype == torch.float64
    assert torch.equal(metric.nll_sum, exact)
    metric.reset()
    assert metric.nll_sum.dtype == torch.float64


def test_states_follow_to_another_device() -> None:
    metric = Perplexity().to("meta")
    assert metric.nll_sum.device.type == metric.device.type == "meta"
    metric.reset()
    assert metric.tokens.device.type == "meta"


def test_two_processes_weigh_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(4, 20)
    logits, ranks = logits_for(tokens), [Perplexity(), Perplexity()]
    ranks[0].update(logits[:3], tokens[:3])
    ranks[1].update(logits[3:], tokens[3:])
    states = [[rank.nll_sum, rank.tokens] for rank in ranks]
    turn = iter(zip(*states, strict=True))
    ranks[0].sync(dist_sync_fn=lambda *_, **__: list(next(turn)), distributed_available=lambda: True)
    monkeypatch.setattr(ranks[0], "_to_sync", False)
    assert float(ranks[0].compute()) == pytest.approx(reference(logits, tokens), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*dataloader.*")
def test_it_is_right_in_a_module_trained_in_bfloat16(tmp_path: Path) -> None:
    tokens = random_tokens(64, 40)
    logits = logits_for(tokens)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.perplexity = Perplexity()

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.perplexity.update(logits[8 * index : 8 * index + 8], batch)
            self.log("ppl", self.perplexity)

    trainer = silent(tmp_path, precision="bf16-true")
    (result,) = trainer.validate(Module(), DataLoader(tokens, batch_size=8), verbose=False)
    assert result["ppl"] == pytest.approx(reference(logits, tokens), rel=1e-6)


def test_no_counted_token_is_nan() -> None:
    labels = torch.full((2, 5), -100)
    assert math.isnan(measured(logits_for(labels), labels))


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \(batch, seq\), got \(2, 6, 97\) and \(2, 5\)"):
        Perplexity().update(torch.zeros(2, 6, VOCAB), torch.zeros(2, 5, dtype=torch.long))


def test_on_a_device_without_float64_the_sums_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS is one; here the meta device plays it."""
    monkeypatch.setattr(likelihood, "_makes_float64", lambda device: device != "meta")
    tokens = random_tokens(3, 20)
    metric = Perplexity()
    metric.update(logits_for(tokens), tokens)
    before = metric.compute()
    metric.to("meta")
    assert metric.device.type == "meta"
    assert [(value.device.type, value.dtype) for value in metric.metric_state.values()] == [("cpu", torch.float64)] * 2
    assert metric.compute() == before
    metric.reset()
    metric.update(logits_for(tokens), tokens)
    assert metric.compute() == before
