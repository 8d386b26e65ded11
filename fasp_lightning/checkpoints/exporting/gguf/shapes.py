"""The shapes in which a GGUF file holds a pruned model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fasp_lightning.checkpoints.exporting.gguf.fields import Family
from fasp_lightning.errors import FaspError
from fasp_lightning.structure.plan import plan_in
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan
from fasp_lightning.structure.registry import spec_for

log = logging.getLogger(__name__)

BLOCK = 32
"""Values that quantised types round together; a row must divide by it."""


@dataclass(frozen=True)
class Shapes:
    """What the tensors of the blocks measure.

    Attributes:
        architecture: Of llama.cpp.
        per_block: Whether it takes lists of widths.
        ffn: FFN width of each block in the file; what is beyond the model's is zero.
        heads: Query heads.
        kv_heads: KV heads.
        attention: The part of the plan that the file holds of the attention; what it does not is zero-filled.
    """

    architecture: str
    per_block: bool
    ffn: tuple[int, ...]
    heads: int
    kv_heads: int
    attention: PruningPlan


def shapes_of(config: Any, family: Family, outtype: str, pad: bool, architecture: str) -> Shapes:
    """The shapes of a model in a GGUF file.

    Args:
        config: The model's config, with its plan.
        family: Its row.
        outtype: Type of the weights.
        pad: Pad FFN widths with zeros to a multiple of 32.
        architecture: ``"auto"``, or one of the family's.

    Raises:
        FaspError: If ``architecture`` is not the family's, or a quantised type cannot take the widths.
    """
    plan = plan_in(config) or PruningPlan(config.model_type, tuple({} for _ in range(config.num_hidden_layers)))
    widths = _ffn_widths(config, plan)
    fewer = family.whole_heads and "groups" in plan.cuts.kinds
    chosen = _architecture(config, family, architecture, fewer or len(set(widths)) > 1)
    if chosen != family.uneven:
        if len(set(widths)) > 1:
            log.info("blocks of different FFN widths are padded with zeros to the widest, %d, as %r has one for all",
                     max(widths), chosen)  # fmt: skip
        widths = [max(widths)] * len(widths)
    if pad:
        widths = [-(-width // BLOCK) * BLOCK for width in widths]
    odd = sorted({width for width in widths if width % BLOCK})
    if outtype.startswith("q") and odd:
        raise FaspError(
            f"FFN widths must divide by {BLOCK} for outtype {outtype!r}, got {', '.join(map(str, odd))}: pad=True "
            "(--pad) fills them up with zeros, which changes no output; or prune with multiple_of=32"
        )
    whole = family.whole_heads and chosen == family.architecture
    attention, heads, kv_heads = _attention(config, plan, whole)
    return Shapes(chosen, chosen == family.uneven, tuple(widths), heads, kv_heads, attention)


def _architecture(config: Any, family: Family, asked: str, wanted: bool) -> str:
    known = [name for name in (family.architecture, family.uneven) if name]
    if asked not in ("auto", *known):
        raise FaspError(f"architecture must be 'auto' or one of {', '.join(map(repr, known))} for {config.model_type}, "
                        f"got {asked!r}")  # fmt: skip
    fits = family.uneven != "openelm" or config.tie_word_embeddings
    if asked == family.uneven and not fits:
        raise FaspError("architecture 'openelm' must have a tied head, got one of its own; use 'auto'")
    if asked == "auto":
        return family.uneven if wanted and family.uneven and fits else family.architecture
    return asked


def _ffn_widths(config: Any, plan: PruningPlan) -> list[int]:
    """FFN width of each block."""
    spec = spec_for(config)
    for (_, layout), units in plan.widths.items():
        if layout.kind == "ffn":
            return list(units.values())
    width = getattr(config, spec.width_field or "", None) or 4 * config.hidden_size
    return [int(width)] * len(plan.blocks)


def _attention(config: Any, plan: PruningPlan, whole: bool) -> tuple[PruningPlan, int, int]:
    """What stays of the plan's KV groups, as many in every block, and the heads that they have."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks: tuple[dict[str, PairPlan], ...] = tuple({} for _ in plan.blocks)
    for (path, layout), units in plan.widths.items():
        if layout.kind != "groups":
            continue
        kv_heads = layout.width if whole else max(units.values())
        heads = kv_heads * layout.repeats
        for part, block in zip(blocks, plan.blocks, strict=True):
            if path in block and kv_heads < layout.width:
                part[path] = block[path].padded(kv_heads)
    return PruningPlan(plan.model_type, blocks), heads, kv_heads
