"""The table of architectures, one row a ``config.model_type``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.causal_lm import require_causal_lm
from fasp_lightning.structure.configs.text_part import placed, text_family
from fasp_lightning.structure.spec import ArchitectureSpec, CoupledPair, Experts

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = ArchitectureSpec(
    layers="model.layers",
    pairs=(
        CoupledPair("self_attn.o_proj", producers=("self_attn.v_proj",), kind="value", groups=_QKV),
        CoupledPair("mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"), kind="ffn"),
    ),
)

_VALUE, _DENSE = _LLAMA.pairs
_VALUE_ALONE = replace(_VALUE, groups=())  # norms over all heads at once, or something of each head's own


def _ffn(module: str, width_field: str | None = None) -> CoupledPair:
    """An FFN with a gate, in a module of a block."""
    down, gate, up = (f"{module}.{name}_proj" for name in ("down", "gate", "up"))
    return CoupledPair(down, (gate, up), "ffn", width_field=width_field)


def _experts(around: Experts, width_field: str | None = None, fused: str = "concatenated") -> CoupledPair:
    """The experts of a block as transformers has them since its version 5, beside their router."""
    module = around.router.rpartition(".")[0]
    paths = (f"{module}.experts.down_proj", (f"{module}.experts.gate_up_proj",))
    return CoupledPair(*paths, "experts", fused, width_field=width_field, experts=around)


_MOE = "moe_intermediate_size"
_DEEPSEEK = ArchitectureSpec(  # latent attention: no linear layer makes values alone
    "model.layers",
    (_DENSE, _ffn("mlp.shared_experts", _MOE), _experts(Experts("mlp.gate", "n_routed_experts", "n_group"), _MOE)),
    attention="self_attn",
)

_SHARED: dict[ArchitectureSpec, tuple[str, ...]] = {
    _LLAMA: (
        *(
            "cohere",
            "cohere2",
            "ernie4_5",
            "exaone4",
            "granite",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "ministral3",
        ),
        *("mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "gemma", "gemma2", "gemma3_text"),
    ),
    replace(_LLAMA, pairs=(_VALUE_ALONE, _DENSE)): ("olmo2", "olmo3", "stablelm"),
    # hybrids: some blocks have another mixer in the place of attention, which takes no position_ids
    replace(_LLAMA, pairs=(_VALUE_ALONE, _DENSE), packing=False): ("olmo_hybrid", "qwen3_5_text"),
    ArchitectureSpec("model.layers", (_VALUE, CoupledPair("mlp.down_proj", ("mlp.up_proj",), "ffn"))): (
        *("apertus", "arcee", "nemotron"),
    ),
    ArchitectureSpec("model.layers", (_VALUE, CoupledPair("mlp.c_proj", ("mlp.c_fc",), "ffn"))): ("starcoder2",),
    ArchitectureSpec(
        layers="model.layers",
        pairs=(_VALUE, CoupledPair("mlp.down_proj", ("mlp.gate_up_proj",), "ffn", fused="concatenated")),
    ): ("glm", "glm4"),
}
"""A row that several families have, and these."""

_REGISTRY: dict[str, ArchitectureSpec] = {
    **{model_type: spec for spec, model_types in _SHARED.items() for model_type in model_types},
    "opt": ArchitectureSpec(
        layers="model.decoder.layers",
        pairs=(
            CoupledPair("self_attn.out_proj", producers=("self_attn.v_proj",), kind="value"),
            CoupledPair("fc2", producers=("fc1",), kind="ffn"),
        ),
        width_field="ffn_dim",
        packing=False,  # OPTDecoder.forward (models/opt/modeling_opt.py) makes its mask without position_ids
    ),
    "phi": ArchitectureSpec(
        layers="model.layers",
        pairs=(
            CoupledPair("self_attn.dense", producers=("self_attn.v_proj",), kind="value", groups=_QKV),
            CoupledPair("mlp.fc2", producers=("mlp.fc1",), kind="ffn"),
        ),
    ),
    "phi3": ArchitectureSpec(
        layers="model.layers",
        pairs=(
            CoupledPair(
                "self_attn.o_proj",
                producers=("self_attn.qkv_proj",),
                kind="value",
                fused="concatenated",
                groups=("self_attn.qkv_proj",),
            ),
            CoupledPair("mlp.down_proj", ("mlp.gate_up_proj",), kind="ffn", fused="concatenated"),
        ),
    ),
    "gpt2": ArchitectureSpec(
        layers="transformer.h",
        pairs=(
            CoupledPair("attn.c_proj", producers=("attn.c_attn",), kind="value", fused="concatenated"),
            CoupledPair("mlp.c_proj", producers=("mlp.c_fc",), kind="ffn"),
        ),
        width_field="n_inner",
        transposed=True,
    ),
    "gpt_neox": ArchitectureSpec(
        layers="gpt_neox.layers",
        pairs=(
            CoupledPair("attention.dense", ("attention.query_key_value",), kind="value", fused="interleaved"),
            CoupledPair("mlp.dense_4h_to_h", producers=("mlp.dense_h_to_4h",), kind="ffn"),
        ),
    ),
    "bloom": ArchitectureSpec(
        layers="transformer.h",
        pairs=(
            CoupledPair("self_attention.dense", ("self_attention.query_key_value",), "value", "interleaved"),
            CoupledPair("mlp.dense_4h_to_h", producers=("mlp.dense_h_to_4h",), kind="ffn"),
        ),
        width_field=None,  # 4 · hidden_size is fixed in its code
        packing=False,  # it takes no position_ids
    ),
    "falcon": ArchitectureSpec(
        layers="transformer.h",
        pairs=(
            CoupledPair("self_attention.dense", ("self_attention.query_key_value",), "value", "interleaved"),
            CoupledPair("mlp.dense_4h_to_h", producers=("mlp.dense_h_to_4h",), kind="ffn"),
        ),
        width_field="ffn_hidden_size",
        packing=False,  # FalconModel.forward (models/falcon/modeling_falcon.py) makes its mask without position_ids
    ),
    "mixtral": ArchitectureSpec("model.layers", (_VALUE, _experts(Experts("mlp.gate", "num_local_experts")))),
    "qwen3_moe": ArchitectureSpec("model.layers", (_VALUE, _DENSE, _experts(Experts("mlp.gate"), _MOE))),
    "olmoe": ArchitectureSpec("model.layers", (_VALUE_ALONE, _experts(Experts("mlp.gate")))),
    "qwen2_moe": ArchitectureSpec(
        "model.layers",
        (
            _VALUE,
            _DENSE,
            _ffn("mlp.shared_expert", "shared_expert_intermediate_size"),
            _experts(Experts("mlp.gate"), _MOE),
        ),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": replace(_DEEPSEEK, pairs=(_VALUE_ALONE, *_DEEPSEEK.pairs), attention=None),
    "gpt_oss": ArchitectureSpec(  # each head has a sink of its own
        "model.layers",
        (
            _VALUE_ALONE,
            _experts(Experts("mlp.router", "num_local_experts", transposed=True), fused="interleaved"),
        ),
        packing=False,  # GptOssModel.forward (models/gpt_oss/modeling_gpt_oss.py) makes its mask without position_ids
    ),
    "ernie4_5_moe": ArchitectureSpec(
        "model.layers",
        (
            _VALUE_ALONE,
            _DENSE,
            _ffn("mlp.shared_experts", _MOE),
            _experts(Experts("mlp.gate", "moe_num_experts"), _MOE),
        ),
    ),
    "granitemoe": ArchitectureSpec(
        "model.layers", (_VALUE_ALONE, _experts(Experts("block_sparse_moe.router", "num_local_experts")))
    ),
    "phimoe": ArchitectureSpec("model.layers", (_VALUE_ALONE, _experts(Experts("mlp.router", "num_local_experts")))),
    "qwen3_5_moe_text": ArchitectureSpec(
        "model.layers",
        (
            _VALUE_ALONE,
            _ffn("mlp.shared_expert", "shared_expert_intermediate_size"),
            _experts(Experts("mlp.gate"), _MOE),
        ),
        packing=False,  # the mixer of some of its blocks carries its state from one sequence into the next
    ),
}

_SHIPPED = dict(_REGISTRY)

_EXAMPLE = (
    'register_architecture("{model_type}", ArchitectureSpec(layers="model.layers", pairs=('
    'CoupledPair("self_attn.o_proj", producers=("self_attn.v_proj",), kind="value"), '
    'CoupledPair("mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"), kind="ffn"))))'
)


def known_architectures() -> tuple[str, ...]:
    """The registered model types, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def register_architecture(model_type: str, spec: ArchitectureSpec, overwrite: bool = False) -> None:
    """Add a row to the table.

    Args:
        model_type: The ``config.model_type`` of the family.
        spec: Where its pairs are.
        overwrite: Replace an existing row.

    Raises:
        FaspError: If there is such a row, and ``overwrite`` is false.

    Example::

        from fasp_lightning import ArchitectureSpec, CoupledPair, register_architecture

        value = CoupledPair("self_attn.o_proj", producers=("self_attn.v_proj",), kind="value")
        ffn = CoupledPair("mlp.down_proj", producers=("mlp.gate_proj", "mlp.up_proj"), kind="ffn")
        register_architecture("my_type", ArchitectureSpec(layers="model.layers", pairs=(value, ffn)))
    """
    if model_type in _REGISTRY and not overwrite:
        raise FaspError(f"model_type {model_type!r} is registered already; pass overwrite=True to replace its row")
    _REGISTRY[model_type] = spec


def has_row(config: Any) -> bool:
    """Whether a config's family is in the table, or the config carries the row that its model was pruned by."""
    return text_family(config) in _REGISTRY or _carried(config) is not None


def carried_row(model_type: str, spec: ArchitectureSpec) -> dict[str, Any]:
    """What a pruned model's config has to say of its row: nothing of a shipped one."""
    return {} if _SHIPPED.get(model_type) == spec else {"row": asdict(spec)}


def _carried(config: Any) -> ArchitectureSpec | None:
    """The row that the config of a pruned model carries as ``config.fasp["row"]``.

    Raises:
        FaspError: If that is no row.
    """
    data = getattr(config, "fasp", None)
    row = data.get("row") if isinstance(data, dict) else None
    if row is None:
        return None
    try:
        return ArchitectureSpec(**{**row, "pairs": tuple(CoupledPair(**pair) for pair in row["pairs"])})
    except (KeyError, TypeError) as error:
        raise FaspError(f"config.fasp must hold the row that its model was pruned by, damaged: {error}") from None


@contextmanager
def registered(model_type: str, spec: ArchitectureSpec) -> Iterator[None]:
    """Have a row in the table while inside, in the place of that which may be there."""
    before = _REGISTRY.get(model_type)
    _REGISTRY[model_type] = spec
    try:
        yield
    finally:
        if before is None:
            del _REGISTRY[model_type]
        else:
            _REGISTRY[model_type] = before


def spec_for(model_or_config: Any) -> ArchitectureSpec:
    """The row of a model, or of its config; of one that takes more than text, the row of the decoder in it.

    Args:
        model_or_config: A causal LM, or a config with ``model_type``, whose row has the path of a causal LM's blocks.

    Raises:
        FaspError: If its ``model_type`` is not in the table: the message lists the known ones and shows the row
            that would register it. If a model is wrapped, headless or has another head: it says what to pass.
    """
    if isinstance(model_or_config, nn.Module) or not hasattr(model_or_config, "model_type"):
        require_causal_lm(model_or_config)
    config = getattr(model_or_config, "config", model_or_config)
    model_type = text_family(config)
    row = _REGISTRY.get(model_type) or _carried(config)
    if row is None:
        raise FaspError(
            f"model_type must be one of {', '.join(known_architectures())}, got {model_type!r}; infer_spec finds "
            f"the row of most others, and prove tries it; or register a row: {_EXAMPLE.format(model_type=model_type)}"
        )
    return placed(row, model_or_config) if isinstance(model_or_config, nn.Module) else row
