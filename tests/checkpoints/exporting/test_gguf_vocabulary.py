"""The tokenizer in a GGUF file splits texts as the Hugging Face one does; others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB, tiny_model
from tiny_gguf import byte_level_tokenizer, sentencepiece_tokenizer
from tiny_text import with_bos
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fasp_lightning import FaspError, export_gguf
from fasp_lightning.checkpoints.exporting.gguf.llama_cpp import ask
from fasp_lightning.checkpoints.exporting.gguf.vocabulary import SPLITS, add_vocabulary, pre_tokenizer

TEXT = "the theme is 12345 thises!\n\n \n  I'll 'LL an/or\n THis  is"


def steps_of(splits: tuple[str, ...]) -> list[Any]:
    """The steps of a pre-tokenizer that splits so."""
    if splits[-1] == "gpt2":
        digits = [pre_tokenizers.Digits(individual_digits=True)] if len(splits) > 1 else []
        return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(splits[0]), "isolated"), bytes_alone]


@pytest.mark.parametrize("splits", SPLITS, ids=SPLITS.values())
def test_llama_cpp_splits_a_text_into_the_same_tokens(splits: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer, file = byte_level_tokenizer(*steps_of(splits)), tmp_path / "model.gguf"
    export_gguf(tiny_model("llama"), file, tokenizer, check=False)
    ((answer),) = ask(file, [("/tokenize", {"content": TEXT, "add_special": True})])
    assert answer["tokens"] == tokenizer(TEXT)["input_ids"]


def test_the_beginning_of_text_is_put_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer, file = with_bos(byte_level_tokenizer()), tmp_path / "model.gguf"
    export_gguf(tiny_model("llama"), file, tokenizer, check=False)
    ((answer),) = ask(file, [("/tokenize", {"content": "is", "add_special": True})])
    assert answer["tokens"] == tokenizer("is")["input_ids"] == [1, *byte_level_tokenizer()("is")["input_ids"]]


def test_llama_3_is_told_from_others_that_split_like_it() -> None:
    splits = next(splits for splits, name in SPLITS.items() if name == "dbrx")
    steps = pre_tokenizers.Sequence(steps_of(splits))
    names = []
    for ignore in (True, False):
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], ignore_merges=ignore))
        tokenizer.pre_tokenizer = steps
        import json

        names.append(pre_tokenizer(json.loads(tokenizer.to_str())))
    assert names == ["llama-bpe", "dbrx"]


def unigram() -> PreTrainedTokenizerFast:
    model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")


def lower_case() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (unigram, "tokenizer must be a BPE for a GGUF file, got Unigram"),
        (lower_case, "pre-tokenizer must be one that llama.cpp knows .*got a normalizer Lowercase"),
        (lambda: byte_level_tokenizer(pre_tokenizers.Whitespace()), "must be one that llama.cpp knows .*Whitespace"),
        (sentencepiece_tokenizer, f"must have ids below the model's {VOCAB} embeddings, got"),
        (object, "tokenizer must be a fast one for a GGUF file, got object"),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(FaspError, match=message):
        add_vocabulary(None, tokenizer(), VOCAB)
