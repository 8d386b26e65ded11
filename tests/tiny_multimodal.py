"""Tiny models that take images too, one or more for each way in which a decoder stands in them."""

from __future__ import annotations

from typing import Any

import torch
from tiny import _COMMON, _MIXED_LAYERS, _randomise, random_tokens
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

IMAGE = 96
"""Token in the place of which a part of an image stands; the last one of the tiny vocabulary."""

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 24,
}
_SIGLIP = _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
_LINEAR = {f"linear_{name}": value for name, value in {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2,
           "num_value_heads": 2}.items()}  # fmt: skip

MULTIMODAL: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": _CLIP,
        "text_config": {"model_type": "llama", "num_key_value_heads": 2},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "mistral3": {
        "vision_config": {"model_type": "pixtral"} | {k: v for k, v in _CLIP.items() if k != "model_type"},
        "text_config": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "spatial_merge_size": 1,
    },
    "gemma3": {
        "vision_config": _SIGLIP,
        "text_config": {"model_type": "gemma3_text"} | _MIXED_LAYERS,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "qwen3_5": {
        "vision_config": _QWEN,
        "text_config": {
            "model_type": "qwen3_5_text",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        }
        | _LINEAR,
        "image_token_id": IMAGE,
    },
}
"""Config options of each, of the decoder those that differ from the tiny ones."""


def tiny_multimodal(name: str) -> PreTrainedModel:
    """A new one in evaluation mode."""
    options = MULTIMODAL[name]
    config = AutoConfig.for_model(name, **options | {"text_config": _COMMON | options["text_config"]})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(0))
    return model.eval()


def with_image(model: PreTrainedModel, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens of text, and an image of four tokens among them."""
    tokens = random_tokens(1, 12) % IMAGE
    tokens[:, 3:7] = IMAGE
    made = torch.Generator().manual_seed(seed)
    if model.config.model_type == "qwen3_5":
        given = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (tokens == IMAGE).int()}
        return given | {"input_ids": tokens, "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=made)}
    given = {"image_sizes": torch.tensor([[8, 8]])} if model.config.model_type == "mistral3" else {}
    return given | {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8, generator=made)}
