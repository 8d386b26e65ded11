"""Tiny random models, one or more for each family of the registry.

Widths are small and mutually different (vocabulary 97, hidden 32, FFN 48, head size 8 or 16), so that a
mixed-up dimension shows as an error. Every parameter is random, biases and norm weights included: code that
forgets one changes the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 97
HIDDEN = 32
FFN = 48
HEADS = 4
LAYERS = 2
EXPERTS = 6
SEQ_LEN = 12  # longer than any sliding window below
WINDOW = 5

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED_LAYERS = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        model_type: The registry's row it stands for.
        options: Config options that differ from the common ones.
        attention: Attention implementations the family has, the one to use by default last.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ("eager", "sdpa")

    def config(self) -> PretrainedConfig:
        """A new config."""
        return AutoConfig.for_model(self.model_type, **_COMMON | self.options)


TINY: dict[str, Tiny] = {
    "opt": Tiny("opt", {"ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}),
    "opt-350m": Tiny("opt", {"ffn_dim": FFN, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": Tiny("llama", {"num_key_value_heads": HEADS}),
    "llama-gqa": Tiny("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": Tiny("mistral", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "qwen2": Tiny("qwen2", {"num_key_value_heads": 2}),
    "qwen3": Tiny("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma": Tiny("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": Tiny(
        "gemma2",
        _MIXED_LAYERS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        attention=("eager",),
    ),
    "gemma3": Tiny("gemma3_text", _MIXED_LAYERS),
    "phi": Tiny("phi", {"num_key_value_heads": HEADS}),
    "phi3": Tiny("phi3", {"num_key_value_heads": 2}),
    "gpt2": Tiny("gpt2", {"n_inner": FFN}),
    "gpt_neox": Tiny("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-serial": Tiny("gpt_neox", {"use_parallel_residual": False}),
    "bloom": Tiny("bloom", attention=("eager",)),  # FFN of 4 · hidden, fixed in its code
    "falcon": Tiny(
        "falcon", {"ffn_hidden_size": FFN, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    ),
    "falcon-multi-query": Tiny("falcon", {"ffn_hidden_size": FFN, "multi_query": True}),
    "falcon-alibi": Tiny(  # its eager attention counts ALiBi twice (transformers 5.23): eager and sdpa differ
        "falcon",
        {"ffn_hidden_size": FFN, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}


_MIXTURE = {"num_key_value_heads": 2, "num_experts_per_tok": 2}

_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}

MIXTURES: dict[str, Tiny] = {
    "mixtral": Tiny("mixtral", _MIXTURE | {"num_local_experts": EXPERTS}),
    "qwen3_moe": Tiny(
        "qwen3_moe",
        _MIXTURE | {"head_dim": 16, "num_experts": EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "olmoe": Tiny("olmoe", _MIXTURE | {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen2_moe": Tiny(
        "qwen2_moe",
        _MIXTURE
        | {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        | {"mlp_only_layers": [0], "num_hidden_layers": 3},
    ),
    "deepseek_v2": Tiny("deepseek_v2", _LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v3": Tiny("deepseek_v3", _LATENT | {"n_group": 2, "topk_group": 1, "n_routed_experts": 8}),
    "glm4_moe": Tiny(
        "glm4_moe",
        _MIXTURE
        | {"head_dim": 16, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 24}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": Tiny(
        "gpt_oss",
        _MIXTURE
        | {"num_local_experts": EXPERTS, "head_dim": 16, "sliding_window": WINDOW, "intermediate_size": 40}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        attention=("eager",),
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe",
        {"num_key_value_heads": 2, "moe_k": 2, "moe_num_experts": EXPERTS, "moe_num_shared_experts": 2}
        | {"moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "granitemoe": Tiny("granitemoe", _MIXTURE | {"num_local_experts": EXPERTS, "residual_multiplier": 0.5}),
    "phimoe": Tiny("phimoe", _MIXTURE | {"num_local_experts": EXPERTS}),
    "qwen3_5_moe": Tiny(
        "qwen3_5_moe_text",
        _MIXTURE
        | {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    ),
}
"""Models with experts: ``tests/pruning/experts`` states their laws."""


def tiny_model(
    name: str,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A new tiny model in eval mode on the CPU.

    Args:
        name: A key of :data:`TINY` or :data:`MIXTURES`.
        attn_implementation: ``"eager"`` or ``"sdpa"``; by default sdpa where the family has it.
        dtype: Of its parameters; the values are the same in every dtype, up to rounding.
        seed: Of its values; the global random state is neither read nor changed.
    """
    tiny = (TINY | MIXTURES)[name]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            tiny.config(), attn_implementation=attn_implementation or tiny.attention[-1], dtype=dtype
        )
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter anew: matrices N(0, 0.2²), vectors (biases, norms) around their initial value."""
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise if parameter.dim() > 1 else parameter.float() + noise)


def random_tokens(batch: int = 2, seq_len: int = SEQ_LEN, seed: int = 0) -> torch.Tensor:
    """(batch, seq_len) token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def with_positions(model: PreTrainedModel, batch: torch.Tensor | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model is to be called with on a batch: GPT-2 counts padding along unless it is given positions."""
    named = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    if model.config.model_type == "gpt2" and "attention_mask" in named:
        named["position_ids"] = (named["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return named
