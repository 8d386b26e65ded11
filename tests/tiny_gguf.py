"""A tokenizer that a GGUF file can hold, for the tiny models' vocabulary of 97."""

from __future__ import annotations

from typing import Any

from tiny import VOCAB
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"), ("a", "n")]
LETTERS = "ĊĠ" + "".join(chr(code) for code in range(33, 127) if chr(code) not in "`|~<>{}[]\\^")


def byte_level_tokenizer(*splits: Any) -> PreTrainedTokenizerFast:
    """Characters and a few merges, split as GPT-2 does unless another way is given."""
    merged = ["".join(pair) for pair in MERGES]
    pieces = [*SPECIALS, *LETTERS, *merged]
    pieces += [f"<more{number}>" for number in range(VOCAB - len(pieces))]
    vocab = {token: index for index, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    steps = splits or (pre_tokenizers.ByteLevel(add_prefix_space=False),)
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, bytes and a few merges, with spaces marked as in Llama's and Gemma's."""
    merges = [(first.replace("Ġ", "▁"), second) for first, second in MERGES]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS[2:]]
    pieces += ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    pad, bos, eos, unk = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )
