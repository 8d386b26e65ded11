"""RoPE as llama.cpp has it: keys, and tensors of factors."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.exporting.gguf.fields import CONVERTER, Family, head_size
from fasp_lightning.errors import FaspError

log = logging.getLogger(__name__)

YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
"""What of YaRN may be set; llama.cpp (xllamacpp 2026.10) gives other logits for another ``beta_slow``."""
BETAS = {"beta_fast": 32, "beta_slow": 1}


def rope_of(config: Any) -> dict[str, Any]:
    """The parameters of the blocks without a sliding window."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention") or parameters


def require_rope(config: Any, family: Family, outtype: str) -> None:
    """Refuse RoPE that llama.cpp has not, or computes otherwise.

    Raises:
        FaspError: If the model has such one; it is named.
    """
    if not family.ropes:
        return
    full, sliding = rope_of(config), _sliding(config)
    kind = full.get("rope_type", "default")
    partial = full.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    others = {name for name, value in full.items() if name not in YARN and value not in (None, BETAS.get(name))}
    wrong = (
        (kind not in family.ropes, f"of type {' or '.join(family.ropes)}", f"type {kind!r}"),
        (kind == "yarn" and bool(others), "yarn without settings of its own", f"{', '.join(sorted(others))}"),
        (sliding.get("rope_type", "default") != "default", "plain in blocks with a sliding window", str(sliding)),
        (partial != 1.0 and family.architecture != "phi3", "of whole heads", f"partial_rotary_factor {partial}"),
    )
    for fails, rule, found in wrong:
        if fails:
            command = CONVERTER.format(outtype=outtype)
            raise FaspError(f"RoPE must be {rule} for architecture {family.architecture!r}, got {found}; {command}")


def add_rope(writer: Any, config: Any, family: Family) -> None:
    """Write the keys of RoPE."""
    import gguf

    if not family.ropes:
        return
    full, sliding = rope_of(config), _sliding(config)
    kind = full.get("rope_type", "default")
    writer.add_rope_dimension_count(_turned(config))
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(full["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(_trained(config))
    elif family.architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    if kind == "longrope":
        log.info("llama.cpp takes the factors for long texts once its context (-c) is longer than %d", _trained(config))
        writer.add_rope_scaling_attn_factors(_attention_factor(config))


def rope_tensors(config: Any, family: Family) -> dict[str, Tensor]:
    """Name → what the angles of each pair of dims are divided by."""
    full = rope_of(config) if family.ropes else {}
    kind = full.get("rope_type", "default")
    if kind == "longrope":
        return {f"rope_factors_{side}.weight": torch.tensor(full[f"{side}_factor"]) for side in ("long", "short")}
    return {"rope_freqs.weight": _llama3(config, full)} if kind == "llama3" else {}


def _llama3(config: Any, full: dict[str, Any]) -> Tensor:
    """Plain angles divided by those of transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    plain = 1.0 / full["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled


def _sliding(config: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return parameters.get("sliding_attention") or {}


def _turned(config: Any) -> int:
    partial = rope_of(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    return int(head_size(config) * partial)


def _trained(config: Any) -> int:
    """Tokens of the context before it was made longer."""
    own = getattr(config, "original_max_position_embeddings", None)
    return int(rope_of(config).get("original_max_position_embeddings") or own or config.max_position_embeddings)


def _attention_factor(config: Any) -> float:
    """What cosines and sines are multiplied by: _compute_longrope_parameters (transformers, modeling_rope_utils.py)."""
    given, trained = rope_of(config).get("attention_factor"), _trained(config)
    factor = config.max_position_embeddings / trained
    if given is not None:
        return float(given)
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
