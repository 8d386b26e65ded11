"""A model as a GGUF file: refused before anything is written, written beside and renamed, tried by llama.cpp."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.checkpoints.exporting.exported import Exported, LoaderCheck, expected_of
from fasp_lightning.checkpoints.exporting.gguf.fields import (
    Family,
    add_fields,
    context_of,
    family_of,
    require_computable,
)
from fasp_lightning.checkpoints.exporting.gguf.llama_cpp import answer, installed, require_installed
from fasp_lightning.checkpoints.exporting.gguf.quantising import FOUR_BITS
from fasp_lightning.checkpoints.exporting.gguf.rope import add_rope, require_rope
from fasp_lightning.checkpoints.exporting.gguf.shapes import Shapes, shapes_of
from fasp_lightning.checkpoints.exporting.gguf.tensors import OUTTYPES, entries_of
from fasp_lightning.checkpoints.exporting.gguf.vocabulary import add_vocabulary
from fasp_lightning.checkpoints.exporting.gguf.writing import write
from fasp_lightning.errors import FaspError, FaspFileExistsError
from fasp_lightning.staging import require_space, require_unclaimed, staged_file
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.plan import adopt_plan, plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@own_modes()
def export_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any,
    outtype: str = "f16",
    pad: bool = False,
    architecture: str = "auto",
    check: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write a pruned or whole model as a GGUF file for llama.cpp.

    Blocks of different FFN widths keep theirs where llama.cpp has an architecture that computes the same and takes a
    list of widths (``deci`` for llama, mistral and qwen2; ``openelm`` for qwen3 with a tied head), and are padded with
    zeros to the widest elsewhere. Value dims are zero-filled. Fewer KV groups stay fewer.

    Args:
        model: A causal LM, such as :func:`~fasp_lightning.load_pruned` gives.
        path: The file.
        tokenizer: Its Hugging Face tokenizer, which becomes part of the file.
        outtype: Type of the matrices: ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"``, ``"q4_0"`` or ``"q4_k_m"``, which
            are as llama.cpp quantises without an importance matrix; the rest is f32. 4 bits need ``xllamacpp``.
        pad: Fill FFN widths up with zeros to a multiple of 32, which the kernels of quantised types want.
        architecture: ``"auto"``, or an architecture of llama.cpp that holds the family.
        check: Load the file with llama.cpp, if ``xllamacpp`` is installed, and compare its answer.
        overwrite: Replace a GGUF file.

    Returns:
        What was written, and what llama.cpp makes of it.

    Raises:
        FaspError: As :func:`require_gguf`; if the model has adapters; or if llama.cpp does not load what was written.
        FaspFileExistsError: If the file is there and ``overwrite`` is false, or it is no GGUF file.
        FaspOSError: If the disk has too little room, or the place is not writable.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, export_gguf

        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        exported = export_gguf(model, f"{folder}/model.gguf", tokenizer, outtype="f32", check=False)
        print(exported.architecture, exported.bytes)
    """
    path = Path(path)
    if has_adapters(model):
        raise FaspError("model must have its LoRA merged before it is exported, or its keys would not be stock ones")
    family, shapes = require_gguf(model, tokenizer, outtype, pad, architecture)
    check_file(path, overwrite)
    adopt_plan(model)  # a zero-filled one, loaded by stock code, is no wider than its plan
    entries = entries_of(model, family, shapes, outtype)
    require_space(path, sum(entry.bytes for entry in entries))
    with staged_file(path) as new:
        write(new, shapes.architecture, partial(_add_keys, model, tokenizer, family, shapes, outtype), entries)
        found = _checked(model, tokenizer, family, new) if check else None
    return Exported(path, "gguf", shapes.architecture, path.stat().st_size, found)


def require_gguf(
    config_or_model: Any, tokenizer: Any, outtype: str = "f16", pad: bool = False, architecture: str = "auto"
) -> tuple[Family, Shapes]:
    """Refuse what a GGUF file cannot hold or llama.cpp would not compute, before anything is spent.

    Args:
        config_or_model: A model, or its config, with its plan.
        tokenizer: As :func:`export_gguf`, and so are the others.
        outtype: Type of the matrices.
        pad: Fill widths up.
        architecture: Of llama.cpp.

    Returns:
        The family's row, and the shapes of the file.

    Raises:
        FaspError: If the family, its RoPE, activation or windows, the tokenizer, or the widths cannot go, or 4 bits
            are asked for without ``xllamacpp``; the message says what to do.
    """
    config = getattr(config_or_model, "config", config_or_model)
    if outtype not in OUTTYPES:
        raise FaspError(f"outtype must be one of {', '.join(map(repr, OUTTYPES))}, got {outtype!r}")
    converters = outtype
    if outtype.upper() in FOUR_BITS:
        require_installed()
        converters = "f16"  # llama.cpp's converter has no 4 bits
    family = family_of(config, converters)
    require_computable(config, family, converters)
    require_rope(config, family, converters)
    add_vocabulary(None, tokenizer, config.vocab_size)
    return family, shapes_of(config, family, outtype, pad, architecture)


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file before anything is spent.

    Raises:
        FaspFileExistsError: If it is there and not to be overwritten, is no GGUF file, or another job's.
    """
    require_unclaimed(path)
    if not path.exists():
        return
    if path.is_dir():
        raise FaspFileExistsError(f"output file {path} must be no folder; choose another name")
    if not overwrite:
        raise FaspFileExistsError(f"output file {path} must not be there; choose another one, or overwrite it")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FaspFileExistsError(f"output file {path} is no GGUF file and is not overwritten; remove it first")


def _add_keys(
    model: PreTrainedModel, tokenizer: Any, family: Family, shapes: Shapes, outtype: str, writer: Any
) -> None:
    """Everything in the file but the tensors."""
    import gguf

    config: Any = model.config
    writer.add_type(gguf.GGUFType.MODEL)
    name = Path(str(getattr(config, "_name_or_path", "") or "model")).name
    writer.add_name(name)
    if plan_of(model) is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        writer.add_description(f"structurally pruned by fasp-lightning: {parameters:,} parameters are left")
    add_fields(writer, config, family, shapes)
    if context_of(config, family) < config.max_position_embeddings:
        log.info("context of the file is the sliding window, up to which llama.cpp computes the same")
    add_rope(writer, config, family)
    kind = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, tokenizer, config.vocab_size)


def _checked(model: PreTrainedModel, tokenizer: Any, family: Family, file: Path) -> LoaderCheck | None:
    """llama.cpp's answer to a text, tokenized by itself, beside that of the model in fp32."""
    if installed() is None:
        log.info("%s is not tried: llama.cpp is not there; pip install 'fasp-lightning[serve]'", file)
        return None
    full = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    return answer(file, expected_of(full, tokenizer, context_of(model.config, family)))
