"""A tiny random model of the same class and config: on it is found out, in seconds, what holds for the large one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fasp_lightning.errors import FaspError, as_refusal, of_library, one_line
from fasp_lightning.structure.configs.text_part import auto_class, text_config, with_fields
from fasp_lightning.structure.modes import own_modes

MOST_BLOCKS = 12
"""Blocks of a twin, of a model whose blocks are all of other shapes."""

HIDDEN, HEADS, FFN, VOCABULARY = 64, 4, 96, 128

_SIZES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (r"vocab", lambda value, _: min(value, VOCABULARY)),
    (r"token_(id|index)$|^mask_index$|_ids?$", lambda value, _: value if value < VOCABULARY else 3 + value % 100),
    (r"position|n_ctx|max_seq|context_length|max_length|mem_len", lambda value, _: min(value, 128)),
    (r"window|^local_attention|chunk_(length|size)$", lambda value, _: min(value, 8)),
    (r"experts_per|topk$|^top_k|moe_k$|moe_top|experts_top", lambda value, _: min(value, 2)),
    (r"topk_group|shared_experts$|zero_expert", lambda value, _: min(value, 1)),
    (r"(n|expert)_groups?$|ngroups|^o_groups", lambda value, _: min(value, 2)),
    (r"experts$|expert_num$", lambda value, _: min(value, 8)),
    (r"(key_value|kv)_heads$|query_groups", lambda value, heads: _kv_heads(value, heads)),
    (r"linear_num_key_heads", lambda value, _: min(value, 2)),
    (r"mamba_n(um)?_heads|n_mamba_heads", lambda value, _: min(value, 8)),
    (r"mamba_(d_head|head_?dim)", lambda value, _: 16),
    (r"d_ssm$|^lru_width", lambda value, _: 128),
    (r"qk_head_dim", lambda value, _: 32),
    (r"^rotary_dim", lambda value, _: min(value, 8)),
    (r"head_?(dim|size)$|(d|dim)_head$|kv_channels", lambda value, _: min(value, 16)),
    (r"(^|_)heads?(_per_layer)?$", lambda value, _: _heads(value)),
    (r"lora_rank|_rank$", lambda value, _: min(value, 12)),
    (r"moe_.*(ffn|intermediate)|expert.*(ffn|intermediate)|(ffn|intermediate).*expert", lambda value, _: min(value, 40)),  # noqa: E501
    (r"intermediate|ffn|inner|feed_forward|^dff$|dim_ff$", lambda value, _: min(value, FFN)),
)  # fmt: skip
"""How configs call their sizes, and what a twin has instead, of the value and the number of heads.

The first that fits counts; other numbers beyond 64 become the twin's hidden size if they are a multiple of the model's,
or else 16.
"""

_LAYERS = re.compile(r"(^|_)n?_?(layers?|blocks)$|^depth$")


class _Large(NamedTuple):
    """What of a model decides on its twin's sizes.

    Attributes:
        layers: Its decoder blocks.
        left: Those of the twin.
        decoder: The decoder's hidden size.
        beside: Whether what stands beside the decoder is made small in every size.
        heads: Attention heads of the part of the config that is read.
        hidden: Hidden size of that part.
    """

    layers: int
    left: int
    decoder: int
    beside: bool
    heads: int = 0
    hidden: int = 0


def twin(model_or_config: Any, seed: int = 0) -> Any:
    """A tiny random model of the same class and config as another: small sizes, few blocks, its pattern of layers.

    Args:
        model_or_config: A causal LM on any device, ``meta`` included, or its config.
        seed: Of its values; the global random state is neither read nor changed.

    Returns:
        A model in evaluation mode on the CPU, whose blocks come in every kind that the large one has.

    Raises:
        FaspError: If no small config makes a model that runs.
    """
    model = shapes_of(model_or_config)
    try:
        return _running(model, twin_config(model), seed)
    except FaspError:
        if text_config(model.config) is model.config:
            raise
        return _running(model, twin_config(model, beside=False), seed)


def _running(model: Any, config: Any, seed: int) -> Any:
    made = build(type(model), config, seed)
    with as_refusal(lambda error: FaspError(f"a tiny {config.model_type} model does not run: {one_line(error)}")):
        run(made)
    return made


def twin_config(model: Any, beside: bool = True) -> Any:
    """The small config of a model's twin.

    Args:
        model: A causal LM on any device.
        beside: What stands beside the decoder is made small in every size, and not in its layers alone: whose sizes
            have to fit each other in which way is not known of all that takes images.

    Raises:
        FaspError: If its class does not take the sizes.
    """
    config = model.config
    blocks = block_list(model)[1]
    layers = len(blocks)
    kinds = [_kind(block, index, config) for index, block in enumerate(blocks)]
    needed = max(map(kinds.index, set(kinds))) + 1
    left = min(max(2, needed), MOST_BLOCKS, layers)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("fasp", "quantization_config")}
    large = _Large(layers, left, _hidden_of(text_config(config).to_dict()), beside)
    with as_refusal(lambda error: _no_model(config, error)):
        return type(config).from_dict(dict(_shrunk(fields, large)))


@own_modes()
def build(model_class: Any, config: Any, seed: int = 0, **options: Any) -> Any:
    """A model of a config with random values, biases and norms included, in evaluation mode.

    Args:
        model_class: Its class.
        config: Its config.
        seed: Of its values.
        options: Further ones of ``_from_config``.

    Raises:
        FaspError: If the config makes none.
    """
    with torch.random.fork_rng(devices=[]), as_refusal(lambda error: _no_model(config, error)):
        model = model_class._from_config(config, dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else parameter.float() + noise)
    return model.eval()


def random_tokens(model: Any, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """(batch, length) token ids of a twin, none of them a special one."""
    high = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(high // 2, 64), high, (batch, length), generator=generator)


def run(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, seq, vocabulary) logits of a twin on some tokens."""
    tokens = random_tokens(model) if tokens is None else tokens
    with torch.no_grad():  # and no decorator, which would be a library's frame around this package's
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and modules of the decoder blocks: the list of modules with the most parameters that is in no other.

    Raises:
        FaspError: If there is none.
    """
    held: Any = model
    decoder = held.get_decoder() if hasattr(model, "get_decoder") else model
    inside = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    start = next((path for path, module in model.named_modules() if module is decoder), "") if inside else ""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.get_submodule(start).named_modules(prefix=start):
        inner = any(path.startswith(f"{outer}.") for _, outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            found.append((sum(parameter.numel() for parameter in module.parameters()), path, module))
    if not found:
        raise FaspError(f"{type(model).__name__} must have its blocks in a ModuleList, got none; it cannot be pruned")
    _, path, blocks = max(found, key=lambda entry: entry[0])
    return path, blocks


def _kind(block: nn.Module, index: int, config: Any) -> tuple[Any, ...]:
    """What tells blocks apart: names and shapes of their parameters, and what the config calls their layer."""
    types = getattr(text_config(config), "layer_types", None) or ()
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return shapes, types[index] if index < len(types) else None


def _shrunk(fields: dict[str, Any], large: _Large) -> Iterator[tuple[str, Any]]:
    """The fields of a config, made small."""
    heads = next((fields[name] for name in ("num_attention_heads", "n_head", "n_heads") if fields.get(name)), HEADS)
    part = large._replace(heads=heads, hidden=_hidden_of(fields))
    for name, value in fields.items():
        kept = name.endswith("_config") and name != "text_config" and isinstance(value, dict) and not large.beside
        yield name, dict(_shorter(value, large)) if kept else _small(name, value, part)


def _shorter(fields: dict[str, Any], large: _Large) -> Iterator[tuple[str, Any]]:
    """The fields of what stands beside a decoder, with fewer layers, and what it hands on to the decoder made small."""
    for name, value in fields.items():
        counted = isinstance(value, int) and not isinstance(value, bool)
        if counted and _LAYERS.search(name):
            value = min(value, large.left)
        elif counted and value == large.decoder and name != "hidden_size":
            value = HIDDEN
        yield name, value


def _hidden_of(fields: dict[str, Any]) -> int:
    return next((fields[name] for name in ("hidden_size", "d_model", "n_embd", "dim_model") if fields.get(name)), 0)


def _small(name: str, value: Any, large: _Large) -> Any:
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if not str(key).isdigit() or int(key) < large.left}
        if name.endswith("_config"):
            return dict(_shrunk(kept, large))
        return {key: _small(str(key), one, large) for key, one in kept.items()}
    if isinstance(value, (list, tuple)):
        return _small_list(name, list(value), large)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return value
    if _LAYERS.search(name):
        fewer = min(value, max(1, value * large.left // large.layers))
        return large.left if value == large.layers else fewer
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return size(value, large.heads)
    if value == large.decoder:
        return HIDDEN
    if large.hidden and value >= large.hidden and value % large.hidden == 0:
        return value // large.hidden * HIDDEN
    return 16 if value > HIDDEN else value


def _small_list(name: str, value: list[Any], large: _Large) -> list[Any]:
    """One entry a layer becomes one a layer left; numbers of layers beyond those are dropped."""
    counts = all(isinstance(one, int) and one == place for place, one in enumerate(value))
    if len(value) == large.layers and not counts:
        value = value[: large.left]
    elif re.search(r"layers?(_ids)?$|idxs$", name) and all(isinstance(one, int) for one in value):
        return [one for one in value if one < large.left]
    elif name.endswith("section"):  # of a rotary embedding: parts of half a head
        return [2, 3, 3][: len(value)]
    return [_small(name, one, large) for one in value]


def _heads(value: int) -> int:
    """The highest power of 2 up to a number of heads, and to the twin's: it divides the hidden size."""
    return 1 << min(value, HEADS).bit_length() - 1 if value else 0


def _kv_heads(value: int, heads: int) -> int:
    if value >= heads:
        return _heads(value)
    return 1 if value == 1 else 2


def shapes_of(model_or_config: Any) -> Any:
    """A model, or one of a config, without values."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    config = model_or_config
    with as_refusal(lambda error: _no_model(config, error)), torch.device("meta"):
        return auto_class(config).from_config(config)


def _no_model(config: Any, error: Exception) -> FaspError:
    return FaspError(f"a config of {config.model_type} makes no model: {one_line(error)}")


def built_with(model: Any, fields: dict[str, Any]) -> Any:
    """A model without values of a config with other fields; none if that makes no model."""
    try:
        with torch.device("meta"):
            return type(model)(with_fields(model.config, fields))
    except Exception as error:  # config classes and models raise whatever they like
        if not of_library(error):
            raise
        return None
