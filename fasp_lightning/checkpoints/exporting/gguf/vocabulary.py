"""A Hugging Face tokenizer as the keys of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fasp_lightning.checkpoints.exporting.gguf.fields import CONVERTER
from fasp_lightning.errors import FaspError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_SMALL, _LARGE = f"{_START}{_UPPER}*{_LOWER}+", f"{_START}{_UPPER}+{_LOWER}*"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

SPLITS = {
    ("digits", "gpt2"): "smollm",
    ("gpt2",): "gpt-2",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "dbrx",
    (rf"{_SMALL}|{_LARGE}|\p{{N}}{_SLASH}",): "tekken",
    (rf"{_SMALL}{_END}|{_LARGE}{_END}|\p{{N}}{{1,3}}{_SLASH}",): "gpt-4o",
}
"""How a byte-level tokenizer splits a text, one after another → llama.cpp's name of it (``tokenizer.ggml.pre``)."""

SPACE = "\u2581"


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Write a tokenizer.

    Args:
        writer: A ``gguf.GGUFWriter``, or ``None`` to check alone.
        tokenizer: A fast Hugging Face tokenizer.
        size: Rows of the model's embeddings; ids beyond the tokenizer's are filled up.

    Raises:
        FaspError: If llama.cpp has no such tokenizer.
    """
    data = _data(tokenizer)
    pieces, sentence = data["model"]["vocab"], _is_sentencepiece(data)
    pre = "default" if sentence else pre_tokenizer(data)
    highest = max([*pieces.values(), *(token["id"] for token in data["added_tokens"])])
    if highest >= size:
        raise FaspError(f"tokenizer must have ids below the model's {size} embeddings, got {highest}; resize them")
    first, last = _ends(tokenizer)
    if writer is None:
        return
    tokens, kinds = _tokens(data, size, sentence)
    writer.add_tokenizer_model("llama" if sentence else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
    if sentence:
        writer.add_token_scores(_scores(data, merges, size))
        writer.add_add_space_prefix(_prepends(data))
    else:
        writer.add_token_merges([" ".join(part.replace(" ", "\u0120") for part in merge) for merge in merges])
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    _add_template(writer, tokenizer)


def _data(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as ``tokenizer.json`` has it.

    Raises:
        FaspError: If it is no fast one with a BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise _refused("tokenizer must be a fast one", type(tokenizer).__name__)
    data: dict[str, Any] = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE":
        raise _refused("tokenizer must be a BPE", data["model"]["type"])
    return data


def _refused(rule: str, found: str) -> FaspError:
    return FaspError(f"{rule} for a GGUF file, got {found}; {CONVERTER.format(outtype='f16')}")


def _parts(step: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence."""
    if step is not None:
        yield from step[name] if step["type"] == "Sequence" else [step]


def _is_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether spaces are marked as SentencePiece does, and bytes are tokens."""
    steps = [*_parts(data["normalizer"], "normalizers"), *_parts(data["pre_tokenizer"], "pretokenizers")]
    marks = any(step.get("content") == SPACE or step.get("replacement") == SPACE for step in steps)
    return bool(marks and data["model"].get("byte_fallback"))


def _prepends(data: dict[str, Any]) -> bool:
    """Whether a text begins with a space that is not there."""
    prepended = any(step["type"] == "Prepend" for step in _parts(data["normalizer"], "normalizers"))
    spaces = [step for step in _parts(data["pre_tokenizer"], "pretokenizers") if step["type"] == "Metaspace"]
    return prepended or any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits a text.

    Args:
        data: As ``tokenizer.json`` has it.

    Raises:
        FaspError: If it splits in a way that has no name there.
    """
    odd = [step["type"] for step in _parts(data["normalizer"], "normalizers") if step["type"] != "NFC"]
    splits = tuple(filter(None, (_split(step) for step in _parts(data["pre_tokenizer"], "pretokenizers"))))
    name = SPLITS.get(splits)
    if odd or name is None:
        found = f"a normalizer {odd[0]}" if odd else f"{data['pre_tokenizer']!s:.200}"
        raise _refused(f"pre-tokenizer must be one that llama.cpp knows ({', '.join(SPLITS.values())})", found)
    return "llama-bpe" if name == "dbrx" and data["model"].get("ignore_merges") else name


def _split(step: dict[str, Any]) -> str | None:
    """What a step of a pre-tokenizer splits at, ``None`` if nowhere."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2" if step["use_regex"] else None
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"unknown: {step['type']}"


def _tokens(data: dict[str, Any], size: int, sentence: bool) -> tuple[list[str], list[int]]:
    """Text and kind of every id."""
    import gguf

    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    unknown = data["model"].get("unk_token")
    for text, number in data["model"]["vocab"].items():
        is_byte = sentence and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
        tokens[number], kinds[number] = text, int(gguf.TokenType.UNKNOWN if sentence and text == unknown else kind)
    for token in data["added_tokens"]:
        number, special = token["id"], token["special"]
        tokens[number] = token["content"] if special else token["content"].replace(SPACE, " ")
        if kinds[number] != gguf.TokenType.UNKNOWN:
            kinds[number] = int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    return tokens, kinds


def _scores(data: dict[str, Any], merges: list[list[str]], size: int) -> list[float]:
    """What is merged first has the highest score; a token that no merge makes has the lowest."""
    scores = [-1e6] * size
    for rank in range(len(merges) - 1, -1, -1):
        scores[data["model"]["vocab"]["".join(merges[rank])]] = -float(rank)
    return scores


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a token of its beginning, and one of its end.

    Raises:
        FaspError: If it gets something else.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last:
            return first, last
    raise _refused("tokenizer must put nothing around a text but its beginning and end", str(whole))


def _add_template(writer: Any, tokenizer: Any) -> None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
