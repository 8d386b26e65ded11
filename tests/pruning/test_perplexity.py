"""Perplexity of tiny models, against the definition and against transformers' own loss."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasp_lightning.pruning.perplexity import PerplexityResult, measure_perplexity, perplexity

VOCABULARY = 8


class Uniform(nn.Module):
    """A language model to which every token is equally likely; it notes what it was called with."""

    def __init__(self, fill: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 2)
        self.dropout = nn.Dropout()
        self.fill = fill
        self.calls: list[dict[str, Any]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    get_output_embeddings = get_input_embeddings  # tied

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        self.calls.append({"training": self.training, "grad": torch.is_grad_enabled(), **options})
        logits = torch.full((*input_ids.shape, VOCABULARY), self.fill)
        return SimpleNamespace(logits=logits)


def ids(batch: int, seq_len: int, below: int = VOCABULARY) -> Tensor:
    return torch.randint(below, (batch, seq_len), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    assert perplexity(Uniform(), [ids(2, 5)]) == pytest.approx(VOCABULARY)


def test_perplexity_is_exp_of_transformers_loss(llama: PreTrainedModel) -> None:
    tokens = ids(3, 12, llama.config.vocab_size)
    with torch.no_grad():
        loss = llama(tokens, labels=tokens).loss
    assert perplexity(llama, [tokens]) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_batching_does_not_change_it(llama: PreTrainedModel) -> None:
    tokens = ids(5, 12, llama.config.vocab_size)
    whole = perplexity(llama, [tokens])
    assert perplexity(llama, iter(tokens.split(2))) == pytest.approx(whole, rel=1e-6)


def test_tokens_weigh_the_same_in_sequences_of_any_length(llama: PreTrainedModel) -> None:
    batches = [ids(1, 12, llama.config.vocab_size), ids(1, 3, llama.config.vocab_size)]
    results = [measure_perplexity(llama, [batch]) for batch in batches]
    expected = math.exp(sum(result.nll for result in results) / (11 + 2))
    assert perplexity(llama, batches) == pytest.approx(expected, rel=1e-6)


def test_padding_on_the_right_does_not_change_it(llama: PreTrainedModel) -> None:
    tokens = ids(2, 9, llama.config.vocab_size)
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 4)], dim=1).long()
    plain = measure_perplexity(llama, [tokens])
    result = measure_perplexity(llama, [{"input_ids": padded, "attention_mask": mask}])
    assert result.tokens == plain.tokens == 2 * 8
    assert result.perplexity == pytest.approx(plain.perplexity, rel=1e-5)


def test_result_counts_predictions_and_sequences() -> None:
    result = measure_perplexity(Uniform(), [ids(2, 5), ids(1, 9)])
    assert (result.tokens, result.sequences, result.seq_len) == (2 * 4 + 8, 3, 9)
    assert result.nll == pytest.approx(16 * math.log(VOCABULARY))
    assert result.tokens_per_second == pytest.approx(16 / result.seconds)


def test_result_is_plain_data() -> None:
    result = measure_perplexity(Uniform(), [ids(2, 5)])
    assert PerplexityResult(**json.loads(json.dumps(result.to_dict()))) == result


def test_model_runs_in_eval_mode_without_gradients_or_cache() -> None:
    model = Uniform().train()
    perplexity(model, [ids(2, 5)])
    assert model.calls == [{"training": False, "grad": False, "use_cache": False}]


@pytest.mark.parametrize("batch", [ids(2, 5), ids(2, 5) + VOCABULARY], ids=["success", "error"])
def test_modes_and_gradients_are_as_before(batch: Tensor) -> None:
    model = Uniform().train()
    model.embedding.eval()
    try:
        perplexity(model, [batch])
    except ValueError:
        assert int(batch.max()) >= VOCABULARY
    assert (model.training, model.dropout.training, model.embedding.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_id_outside_the_vocabulary_is_refused_before_the_model_runs() -> None:
    model = Uniform()
    with pytest.raises(ValueError, match=rf"\[0, {VOCABULARY}\).*got {VOCABULARY};"):
        perplexity(model, [torch.tensor([[1, VOCABULARY]])])
    assert model.calls == []


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [ids(3, 1)],
        [{"input_ids": ids(1, 4), "attention_mask": torch.tensor([[1, 0, 0, 0]])}],
    ],
    ids=["no batch", "one token", "all masked"],
)
def test_nothing_to_predict_is_refused(batches: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one token to predict"):
        perplexity(Uniform(), batches)


def test_broken_logits_give_nan_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert math.isnan(perplexity(Uniform(fill=math.nan), [ids(1, 4)]))
    assert "NaN" in caplog.text


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    class Wrong(Uniform):
        def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
            logits = torch.zeros(*input_ids.shape, VOCABULARY)
            logits[..., 0] = 1e4
            return SimpleNamespace(logits=logits)

    assert perplexity(Wrong(), [torch.ones(1, 4, dtype=torch.long)]) == math.inf


@pytest.mark.cuda
def test_inputs_go_where_the_model_is(llama: PreTrainedModel) -> None:
    tokens = ids(2, 12, llama.config.vocab_size)
    expected = perplexity(llama, [tokens])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert perplexity(llama.cuda(), [batch]) == pytest.approx(expected, rel=1e-3)
