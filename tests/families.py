"""Families that share no row with a tiny model; ``prove`` tries theirs on a twin."""

from __future__ import annotations

from typing import Any

PROVED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "glm4": ({}, ("ffn", "value", "groups")),
    "nemotron": ({"num_key_value_heads": 8}, ("ffn", "value", "groups")),
    "olmo2": ({}, ("ffn", "value")),
    "qwen3_5_text": ({"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}, ("ffn", "value")),
    "starcoder2": ({}, ("ffn", "value", "groups")),
}
"""Type → what its default config lacks, and the kinds of pairs that it has."""
