"""Blocks of different FFN widths as DeciLM, which vLLM builds from a width for each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fasp_lightning.checkpoints.forms import stock_part
from fasp_lightning.staging import read_json, write_json
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.structure.spec import ArchitectureSpec

ARCHITECTURE = "DeciLMForCausalLM"
MODEL_TYPE = "nemotron-nas"
CONFIG_CODE = Path(__file__).with_name("configuration_decilm.py")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
}
"""Families that DeciLM computes, and what it must be told of each; it has their attention, SwiGLU and norms."""


def is_decilm(config: Any, plan: PruningPlan) -> bool:
    """Whether blocks differ in their FFN width and DeciLM computes the family.

    vLLM's LlamaMLP takes no other activation than SiLU.

    Args:
        config: The model's config.
        plan: Its plan.
    """
    uneven = any(layout.kind == "ffn" and len({*units.values()}) > 1 for (_, layout), units in plan.widths.items())
    return uneven and config.model_type in FAMILIES and config.hidden_act == "silu"


def decilm_part(plan: PruningPlan, spec: ArchitectureSpec) -> PruningPlan:
    """The part of a plan that DeciLM expresses: FFN widths as they are, of the attention what a stock config does."""
    stock = stock_part(plan, spec).blocks
    ffn = ({path: pair for path, pair in block.items() if pair.layout.kind == "ffn"} for block in plan.blocks)
    return PruningPlan(plan.model_type, tuple(part | own for part, own in zip(stock, ffn, strict=True)))


def describe_blocks(folder: Path, plan: PruningPlan) -> None:
    """Let a stock folder's config say DeciLM and the width of each block, and add the code that reads it.

    Args:
        folder: The folder, whose tensors have these widths.
        plan: The model's plan.
    """
    config = read_json(folder / "config.json")
    config.pop("fasp", None)  # it is no form that load_pruned reads
    heads = config["num_attention_heads"]
    group = heads // (config.get("num_key_value_heads") or heads)
    (widths,) = (units.values() for (_, layout), units in plan.widths.items() if layout.kind == "ffn")
    config |= FAMILIES[config["model_type"]] | {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{CONFIG_CODE.stem}.DeciLMConfig"},
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": group},
                "ffn": {"no_op": False, "intermediate_size": width},
            }
            for width in widths
        ],
    }
    write_json(folder / "config.json", config)
    shutil.copyfile(CONFIG_CODE, folder / CONFIG_CODE.name)
