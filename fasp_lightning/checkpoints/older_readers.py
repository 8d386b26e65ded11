"""Fields of a saved folder that transformers 4 and converters read, beside those of transformers 5."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasp_lightning.errors import of_library
from fasp_lightning.staging import read_json

COMPACT_PREFIX = "FaspCompact"
"""What a compact folder's architecture begins with: loaders that go by it then refuse what they would misread."""

ROPE_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""Entries of ``rope_parameters``, and what transformers 4 calls them; a family has one of the names."""

TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of transformers 5 that 4 does not know, and what it calls them; 5 takes both names."""


BOS_BY_DEFAULT = ("LlamaTokenizer", "GemmaTokenizer")
"""Classes that begin every text with a BOS in transformers 4 unless they are told not to; in 5 the file decides."""


def dress(folder: Path, config_class: type, tokenizer: Any = None) -> None:
    """Add what older readers look for to a folder that transformers 5 has written, which reads it as before.

    Args:
        folder: Holds ``config.json``, and ``tokenizer_config.json`` if a tokenizer was saved along.
        config_class: Class of the model's config.
        tokenizer: What was saved along.
    """
    _write(folder / "config.json", _dressed_config(read_json(folder / "config.json"), config_class))
    file = folder / "tokenizer_config.json"
    if file.is_file():
        _write(file, _dressed_tokenizer(read_json(file), tokenizer))


def _dressed_config(saved: dict[str, Any], config_class: Any) -> dict[str, Any]:
    dressed = dict(saved)
    if "dtype" in saved:
        dressed["torch_dtype"] = saved["dtype"]
    for choices in _older_rope(saved.get("rope_parameters") or {}):
        dressed |= _first_that_changes_nothing(dressed, choices, config_class)
    if saved.get("fasp", {}).get("form") == "compact":
        dressed["architectures"] = [COMPACT_PREFIX + name for name in saved["architectures"]]
    return dressed


def _older_rope(parameters: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """For each thing to say, how transformers 4 might want it said."""
    by_layer = all(isinstance(value, dict) for value in parameters.values())
    whole = parameters.get("full_attention", {}) if by_layer else parameters
    for entry, names in ROPE_NAMES.items():
        if entry in whole:
            yield [{name: whole[entry]} for name in names]
    if by_layer and "sliding_attention" in parameters:
        yield [{"rope_local_base_freq": parameters["sliding_attention"]["rope_theta"]}]
    if whole.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in whole.items() if name not in ROPE_NAMES}
        # Phi3Config of transformers 4 takes these three and no others
        bare = {"type": whole["rope_type"], **{name: whole.get(name) for name in ("short_factor", "long_factor")}}
        yield [{"rope_scaling": bare}] * ("short_factor" in whole) + [{"rope_scaling": scaling}]


def _first_that_changes_nothing(
    saved: dict[str, Any], choices: list[dict[str, Any]], config_class: Any
) -> dict[str, Any]:
    """The first choice that transformers 5 understands, else the first that it stores without another effect."""
    plain = _read(saved, config_class)
    harmless = []
    for choice in choices:
        try:
            read = _read(saved | choice, config_class)
        except Exception as error:  # config classes raise whatever their validators do
            if not of_library(error):
                raise
            continue
        if _contains(read, plain):
            harmless.append(choice)
            if read.keys() == plain.keys():
                return choice
    return harmless[0] if harmless else {}


def _read(saved: dict[str, Any], config_class: Any) -> dict[str, Any]:
    # PreTrainedConfig._dict_from_json_file undoes what its to_json_string makes of an infinite number
    decoded = config_class._decode_special_floats(copy.deepcopy(saved))
    read: dict[str, Any] = config_class.from_dict(decoded).to_dict()
    return read


def _contains(read: Any, plain: Any) -> bool:
    """Whether everything that was read plainly was read again; ``type`` beside ``rope_type`` may come on top."""
    if isinstance(plain, dict) and isinstance(read, dict):
        return all(name in read and _contains(read[name], value) for name, value in plain.items())
    return bool(read == plain)


def _dressed_tokenizer(saved: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    dressed = dict(saved)
    if saved.get("tokenizer_class") in TOKENIZERS:
        dressed["tokenizer_class"] = TOKENIZERS[saved["tokenizer_class"]]
    if names := getattr(tokenizer, "model_input_names", None):  # of which older classes have other defaults
        dressed.setdefault("model_input_names", list(names))
    if saved.get("tokenizer_class") in BOS_BY_DEFAULT and tokenizer and not _begins_with_bos(tokenizer):
        dressed.setdefault("add_bos_token", False)
    if isinstance(saved.get("extra_special_tokens"), list):  # which transformers 4 takes for a dict of named ones
        dressed["additional_special_tokens"] = dressed.pop("extra_special_tokens")
    return dressed


def _begins_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _write(file: Path, data: dict[str, Any]) -> None:
    """Laid out as transformers does, for people to read."""
    file.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
