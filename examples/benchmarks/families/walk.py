"""Walk over every causal LM of the installed transformers: which have a row, get one inferred, or are refused, and why.

So are those walked over that take images and text, of which the decoder is pruned.

    python examples/benchmarks/families/walk.py --write examples/benchmarks/results/families.md

Each type is tried on a tiny random twin of its default config, which takes a few seconds: no weights are read. A row is
proved as ``fasp plan --prove`` proves it.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasp_lightning import FaspError, Proof, prove, spec_for
from fasp_lightning.errors import one_line
from fasp_lightning.proving.inferring import infer_proved
from fasp_lightning.proving.proof import CHECKS
from fasp_lightning.structure.registry import has_row

_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_ROPE = {"text_config": {"rope_parameters": _SECTIONS}}

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl"), _ROPE),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"), _ROPE),
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64, "hidden_size": 4096},
    "deepseek_v2": {"num_experts_per_tok": 6},
}
"""What the default config of a type lacks to make a model, or to make one with blocks of every kind."""


class Row(NamedTuple):
    """What came of one type.

    Attributes:
        model_type: The type.
        how: ``"row"``, ``"inferred"`` or ``"refused"``.
        proof: What held; none if it was refused.
        why: Why it was refused, or what was left out.
        seconds: That it took.
    """

    model_type: str
    how: str
    proof: Proof | None
    why: str
    seconds: float


def model_types() -> tuple[list[str], list[str]]:
    """Every type that the installed transformers has a causal LM of, and those that take images and text."""
    from transformers.models.auto import modeling_auto as auto

    images = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in images], list(images)


def config_of(model_type: str) -> Any:
    """The default config of a type, with what it lacks; encoders are taken as the decoders that they can be."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    decoder = {"is_decoder": True} if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else {}
    return AutoConfig.for_model(model_type, **decoder, **OPTIONS.get(model_type, {}))


def walk(model_type: str) -> Row:
    """Try one type."""
    start = time.process_time()

    def row(how: str, proof: Proof | None, why: str) -> Row:
        return Row(model_type, how, proof, why, time.process_time() - start)

    try:
        config = config_of(model_type)
        if has_row(config):
            return row("row", prove(config, spec_for(config)), "")
        found = infer_proved(config)
        return row("inferred", found.proof, "; ".join(found.dropped))
    except FaspError as error:
        return row("refused", None, one_line(error))
    except Exception as error:  # the default configs of some types make no model, or one that does not run
        return row("refused", None, f"a default one does not run: {type(error).__name__}: {one_line(error)}")


def markdown(text: list[Row], images: list[Row]) -> str:
    """Both tables."""
    import transformers

    lines = [
        "# Families",
        "",
        f"All that work were proved on a tiny random twin: {', '.join(CHECKS)}.",
        "",
        "    python examples/benchmarks/families/walk.py --write examples/benchmarks/results/families.md",
        "",
        *_table(f"Every causal LM of transformers {transformers.__version__} that takes text alone", text),
        "",
        *_table("Every type that takes images and text, of which the decoder is pruned", images),
    ]
    return "\n".join([*lines, ""])


def _table(title: str, rows: list[Row]) -> list[str]:
    """A table, and how many of each there are."""
    done = [row for row in rows if row.proof is not None]
    counts = {how: sum(row.how == how for row in rows) for how in ("row", "inferred", "refused")}
    kinds = {kind: sum(kind in row.proof.kinds for row in done if row.proof) for kind in ("ffn", "value", "groups")}
    return [
        f"{title}, {len(rows)} types: {counts['row']} with a shipped row, {counts['inferred']} whose row "
        f"is inferred, {counts['refused']} refused. Of the {len(done)} that work the FFN is pruned in {kinds['ffn']}, "
        f"value dims in {kinds['value']}, KV groups in {kinds['groups']}.",
        "",
        "| type | how | pairs | stock form | CPU seconds | left out, or why it is refused |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]


def _cells(row: Row) -> tuple[str, ...]:
    kinds, stock = (row.proof.kinds, row.proof.stock) if row.proof else ((), ())
    why = re.sub(rf"{re.escape(tempfile.gettempdir())}\S+", "a folder", row.why).replace("|", "/").replace("\n", " ")
    why = why if len(why) <= 260 else f"{why[:257]}..."
    return row.model_type, row.how, ", ".join(kinds), ", ".join(stock), f"{row.seconds:.1f}", why


def main() -> None:
    """Walk, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="types to try; by default all")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    text, images = model_types()
    tables = [list(map(_walked, types)) for types in ([options.types] if options.types else [text, images])]
    if options.write and not options.types:
        options.write.write_text(markdown(*tables), encoding="utf-8")


def _walked(model_type: str) -> Row:
    row = walk(model_type)
    print(*_cells(row), sep="\t", flush=True)
    return row


if __name__ == "__main__":
    main()
