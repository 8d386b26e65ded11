"""The tiny models are fit to show errors."""

from __future__ import annotations

import pytest
import torch
from tiny import SEQ_LEN, TINY, VOCAB, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_model_depends_on_its_seed_alone(family):
    first = tiny_model(family).state_dict()
    torch.manual_seed(1)
    second, other = tiny_model(family).state_dict(), tiny_model(family, seed=1).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not torch.equal(value, other[name]), name


def test_no_bias_or_norm_of_a_tiny_model_is_trivial(tiny):
    for name, parameter in tiny.named_parameters():
        assert parameter.std() > 0.05, name
        assert (parameter != 0).all(), name


def test_padding_leaves_the_real_tokens_alone(tiny):
    tokens = random_tokens()
    padded = torch.nn.functional.pad(tokens, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(tiny(padded, attention_mask=mask).logits[:, :SEQ_LEN], tiny(tokens).logits)


def test_greedy_generation_with_cache_equals_that_without(tiny):
    tokens = random_tokens()
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
    options |= {"max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(tiny.generate(tokens, **options), tiny.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_sliding_window_is_shorter_than_the_sequence(tiny, family):
    config, kind = TINY[family].config(), TINY[family].attention[-1]
    config.sliding_window = 4 * SEQ_LEN
    wide = AutoModelForCausalLM.from_config(config, attn_implementation=kind).eval()
    wide.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        assert not torch.allclose(wide(random_tokens()).logits, tiny(random_tokens()).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "gemma3"])
def test_saved_folder_gives_the_same_logits_and_tokens(tiny, tiny_folder, tiny_tokenizer, family):
    folder, text = tiny_folder(family), "Prune it, line by line:\n  2 of 10 {columns}."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= VOCAB
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.shape == (1, len(text))
    assert tokenizer.decode(ids[0]) == text
    assert ids[0].tolist() == tiny_tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, tiny(ids).logits)
