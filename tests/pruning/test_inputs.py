"""Every input that changes what a model computes is passed on, derived, or refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny import TINY, VOCAB, random_tokens, tiny_model
from tiny_pruning import BOTH, INGREDIENTS, assert_same, assert_unchanged
from torch import Tensor
from transformers import BatchEncoding, DataCollatorWithFlattening

from fasp_lightning import FaspError, FASPPruner, perplexity, spec_for
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.pruning.own_text import writing
from fasp_lightning.pruning.perplexity import measure_perplexity
from fasp_lightning.text.batches import read_batch

Named = dict[str, Any]
PADDED = ["gpt2", "opt", "llama-gqa", "bloom", "falcon-alibi", "gpt_neox"]


def pad(tokens: Tensor, side: str) -> Named:
    """Five tokens of padding on one side, or on both."""
    sides = {"left": (5, 0), "right": (0, 5), "both": (2, 3)}[side]
    mask = torch.nn.functional.pad(torch.ones_like(tokens), sides)
    return {"input_ids": torch.nn.functional.pad(tokens, sides, value=5), "attention_mask": mask}


def sequences(rows: int = 6) -> list[Tensor]:
    """Of different lengths."""
    return [random_tokens(1, 17 + 3 * row, seed=row)[0] for row in range(rows)]


def packed(**options: Any) -> Named:
    return dict(DataCollatorWithFlattening(**options)([{"input_ids": one.tolist()} for one in sequences()]))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", PADDED)
def test_padding_changes_no_perplexity(family: str, side: str) -> None:
    model, tokens = tiny_model(family), random_tokens(2, 20)
    plain, found = (measure_perplexity(model, [batch]) for batch in (tokens, pad(tokens, side)))
    assert found.perplexity == pytest.approx(plain.perplexity, rel=1e-5)
    assert found.tokens == plain.tokens == 2 * 19


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
@pytest.mark.parametrize("side", ["left", "both"])
def test_padding_changes_no_pruning(family: str, side: str) -> None:
    padded, plain, tokens = tiny_model(family), tiny_model(family), random_tokens(12, 20)
    FASPPruner(INGREDIENTS["fisher"]).prune(padded, [pad(tokens, side)])
    FASPPruner(INGREDIENTS["fisher"]).prune(plain, [tokens])
    assert_same(padded, plain, 1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_have_the_perplexity_of_the_same_apart(attention: str) -> None:
    model = tiny_model("llama", attention)
    apart = measure_perplexity(model, [one[None] for one in sequences()])
    found = measure_perplexity(model, [packed()])
    assert found.perplexity == pytest.approx(apart.perplexity, rel=1e-5)
    assert found.tokens == apart.tokens
    with torch.no_grad():
        own = model(**packed(), use_cache=False).loss  # beside a cache transformers takes nothing for packed
    assert found.perplexity == pytest.approx(float(own.exp()), rel=1e-5)


@pytest.mark.parametrize(("family", "attention"), [(name, kind) for name in TINY for kind in TINY[name].attention])
def test_the_row_says_whether_packed_sequences_are_kept_apart(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    first, second = random_tokens(1, 5), random_tokens(1, 7, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packs = "position_ids" in inspect.signature(model.forward).parameters
    if packs:
        with torch.no_grad():
            found = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits[:, 5:]
            packs = torch.allclose(found, model(second, use_cache=False).logits, atol=1e-4)
    assert spec_for(model).packing == packs


@pytest.mark.parametrize("family", [name for name in TINY if not spec_for(TINY[name].config()).packing])
def test_packed_sequences_that_would_see_each_other_are_refused(family: str) -> None:
    model, batch = tiny_model(family), packed()
    for use in (perplexity, FASPPruner(BOTH).prune):
        with pytest.raises(FaspError, match=r"must not have (packed sequences|position_ids).*a row of its own"):
            use(model, [batch])
    assert_unchanged(model, family)


@pytest.mark.parametrize("setting", ["fisher", "wanda"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_sequences_prune_like_the_same_apart(family: str, setting: str) -> None:
    config = INGREDIENTS.get(setting, BOTH)
    together, apart = tiny_model(family), tiny_model(family)
    FASPPruner(config).prune(together, [packed(return_flash_attn_kwargs=True, return_seq_idx=True)])
    FASPPruner(config).prune(apart, [one[None] for one in sequences()])
    assert_same(together, apart, 1e-3)


def test_labels_say_what_is_predicted_as_in_the_models_own_loss() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 12)
    labels = tokens.clone()
    labels[:, :7] = -100
    batch = {"input_ids": tokens, "labels": labels}
    with torch.no_grad():
        assert perplexity(model, [batch]) == pytest.approx(float(model(**batch).loss.exp()), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("gpt2", {"token_type_ids": torch.ones(2, 12).long()}, "not have token_type_ids, which changes what GPT2LM"),
        ("llama", {"inputs_embeds": torch.ones(2, 12, 32)}, "not have inputs_embeds.*leave it out"),
        ("llama", {"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "not have cu_seq_lens_q.*give position_ids"),
        ("bloom", {"position_ids": torch.arange(12).expand(2, 12)}, "not have position_ids for BloomForCausalLM"),
        ("gpt2", {"position_ids": torch.arange(53, 65).expand(2, 12)}, r"in \[0, 64\).*GPT2LMHeadModel.*got 64"),
        ("gpt2", {"position_ids": torch.arange(-1, 11).expand(2, 12)}, r"in \[0, 64\).*got -1"),
        (
            "llama",
            {"labels": torch.full((2, 12), VOCAB)},
            rf"labels must be in \[0, {VOCAB}\).*got {VOCAB}; the text is",
        ),
    ],
)
def test_what_would_be_dropped_or_crash_is_refused_by_name(family: str, more: Named, message: str) -> None:
    model, batch = tiny_model(family), {"input_ids": random_tokens(), **more}
    for use in (lambda: perplexity(model, [batch]), lambda: FASPPruner(BOTH).prune(model, [batch])):
        with pytest.raises(ValueError, match=message):
            use()
    assert_unchanged(model, family)


def test_what_the_model_knows_nothing_of_is_passed_over() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    more = {"token_type_ids": torch.ones_like(tokens), "length": [12, 12], "idx": 3, "inputs_embeds": None}
    assert perplexity(model, [{"input_ids": tokens, **more}]) == perplexity(model, [tokens])


@pytest.mark.parametrize("form", [BatchEncoding, dict, lambda batch: batch["input_ids"]])
def test_a_single_batch_counts_as_one(form: Any) -> None:
    batch = form({"input_ids": random_tokens(8, 20)})
    assert perplexity(tiny_model("llama"), batch) == perplexity(tiny_model("llama"), [batch])
    one, other = tiny_model("llama"), tiny_model("llama")
    FASPPruner(BOTH).prune(one, batch)
    FASPPruner(BOTH).prune(other, [batch])
    assert_same(one, other)


def test_sensitivity_without_a_token_to_predict_is_refused() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    with pytest.raises(ValueError, match="at least one token to predict where loss sensitivity is measured"):
        FASPPruner(INGREDIENTS["fisher"]).prune(model, [{"input_ids": tokens, "labels": torch.full_like(tokens, -100)}])
    assert_unchanged(model)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_sequences_beyond_learned_positions_are_refused_before_own_text(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "sample", lambda *_: pytest.fail("own text was sampled"))
    model, batches = tiny_model(family), [random_tokens(1, 64), random_tokens(1, 65)]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    for use in (perplexity, FASPPruner(INGREDIENTS["own-text"]).prune):
        with pytest.raises(ValueError, match=r"must have at most 64 tokens, the positions that .* has learned, got 65"):
            use(model, batches)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_takes_no_learned_position(family: str) -> None:
    model, tokens = tiny_model(family), random_tokens(2, 62)
    assert perplexity(model, [pad(tokens, "left")]) == pytest.approx(perplexity(model, [tokens]), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_computed_positions_have_no_end(family: str) -> None:
    assert perplexity(tiny_model(family), [random_tokens(1, 80)]) > 1


def test_computed_positions_beyond_those_trained_on_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 61  # warned of once a process: no other test has this one
    for length in (61, 62, 63):
        perplexity(model, [random_tokens(1, length)])
    lines = [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]
    assert len(lines) == 1
    assert "longer than the 61 positions that LlamaForCausalLM was trained on" in lines[0]


def test_derived_positions_are_those_of_generate() -> None:
    model, batch = tiny_model("gpt2"), pad(random_tokens(), "left")
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options).logits[0]
    with torch.no_grad():
        found = model(**ModelInputs(model)(read_batch(batch))).logits[:, -1]
    torch.testing.assert_close(found, expected)
