"""A model as a folder that vLLM serves."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.dry_save import require_savable, runs_remote_code, savable
from fasp_lightning.checkpoints.exporting.exported import Exported, LoaderCheck, expected_of
from fasp_lightning.checkpoints.exporting.vllm.answering import PYTHON, answer, python_with_vllm
from fasp_lightning.checkpoints.exporting.vllm.decilm import ARCHITECTURE, decilm_part, describe_blocks, is_decilm
from fasp_lightning.checkpoints.forms import choose_form, stock_part
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.checkpoints.publishing.record import record_of
from fasp_lightning.checkpoints.saving import (
    in_form,
    require_plan,
    write_folder,
    write_pruned,
)
from fasp_lightning.checkpoints.writing import bytes_of, stored_in, write_whole, zero_filled
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import require_space, staged, write_json
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.configs.stock_fields import cuts_in
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.plan import adopt_plan, plan_of
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@own_modes()
def export_vllm(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any = None,
    check: bool = True,
    overwrite: bool = False,
    dtype: str | torch.dtype = "auto",
) -> Exported:
    """Write a pruned or whole model as a folder that vLLM serves.

    Stock forms are served as they are: the folder is the one that :func:`~fasp_lightning.save_pruned` writes. Blocks of
    different FFN widths keep theirs in llama, mistral and qwen2, as ``DeciLMForCausalLM``, whose config needs
    ``trust_remote_code`` for a class of twenty lines in the folder; other families are padded with zeros to the widest.
    Value dims are zero-filled.

    Args:
        model: A causal LM, such as :func:`~fasp_lightning.load_pruned` gives.
        path: Folder to write.
        tokenizer: Saved along if given.
        check: Serve it with vLLM, if this python has it or ``FASP_VLLM_PYTHON`` names one that does, and compare its
            answer, in the stored dtype on both sides.
        overwrite: Replace a folder that was written by this package.
        dtype: Dtype of the stored weights, as for :func:`~fasp_lightning.save_pruned`.

    Returns:
        What was written, and what vLLM makes of it.

    Raises:
        FaspError: If the model has adapters or cannot be saved; or if vLLM does not serve what was written.
        FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or it was not written by this package.
        FaspOSError: If the disk has too little room, or the place is not writable.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, export_vllm

        FASPPruner(PruningConfig(sparsity=0.2, allocation="adaptive")).prune(model, batches)
        exported = export_vllm(model, folder, tokenizer, check=False)
        print(exported.architecture, exported.bytes)
    """
    path = Path(path)
    python = require_vllm(model, tokenizer, check)
    check_output(path, overwrite)
    adopt_plan(model)  # a zero-filled one, loaded by stock code, is no wider than its plan
    stored, plan = stored_in(model, dtype), plan_of(model)
    decilm = plan is not None and is_decilm(model.config, plan)
    if not decilm:
        log.info("%s is served as it is: a stock folder", type(model).__name__)
    form, tensors = _form_of(model, decilm)
    require_space(path, bytes_of((*model.parameters(), *tensors.values()), stored))
    write = partial(write_whole, replaced=tensors)
    with staged(path) as stage:
        if form:
            write_pruned(model, stage, form, stored, tokenizer, write)
        else:
            with savable(model), in_form(model, "zero_filled") if decilm else nullcontext():
                write_folder(model, stage, stored, tokenizer, write)
            write_json(stage / REPORT_FILE, record_of(model, stored))
        if decilm:
            describe_blocks(stage, require_plan(model))
        found = None if python is None else _checked(model, stage, tokenizer, python, stored, decilm)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Exported(path, "vllm", ARCHITECTURE if decilm else type(model).__name__, size, found)


def require_vllm(model: PreTrainedModel, tokenizer: Any = None, check: bool = True) -> str | None:
    """Refuse what could not be written, before anything is spent.

    Args:
        model: The model, with its plan; its weights may be on ``meta``.
        tokenizer: As :func:`export_vllm`.
        check: As there.

    Returns:
        The python to try it with, ``None`` if it is not tried.

    Raises:
        FaspError: As :func:`export_vllm`.
    """
    if has_adapters(model):
        raise FaspError("model must have its LoRA merged before it is exported, or its keys would not be stock ones")
    require_savable(model, tokenizer)
    python = python_with_vllm() if check else None
    if check and python is None:
        log.info("what is written is not tried: vLLM is not installed here, and %s names no python that has it", PYTHON)
    return python


def _form_of(model: PreTrainedModel, decilm: bool) -> tuple[str, dict[str, Tensor]]:
    """The form to write, none of ours for DeciLM and dense models, and the tensors that are zero-filled for it."""
    plan = plan_of(model)
    if plan is None or not any(plan.blocks):
        return "", {}
    if decilm:
        return "", zero_filled(model, decilm_part(plan, spec_for(model)))
    spec = spec_for(model)
    form = choose_form("auto", spec, cuts_in(spec, plan))
    return form, zero_filled(model, stock_part(plan, spec)) if form == "zero_filled" else {}


def _checked(
    model: PreTrainedModel, folder: Path, tokenizer: Any, python: str, stored: torch.dtype, trusted: bool
) -> LoaderCheck:
    """vLLM's answer beside that of the model with the weights that were written."""
    other: Any = copy.deepcopy(model) if model.dtype != stored else model
    same = other.to(stored)
    return answer(folder, expected_of(same, tokenizer), python, stored, trusted or runs_remote_code(model))
