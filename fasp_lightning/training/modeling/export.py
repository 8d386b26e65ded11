"""Writing the model that is being trained as a plain checkpoint, while training goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasp_lightning.checkpoints.devices import require_dtype
from fasp_lightning.checkpoints.dry_save import require_savable
from fasp_lightning.checkpoints.forms import choose_form, require_form
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.checkpoints.saving import save_dense, save_pruned
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import require_space
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.plan import plan_of
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.training.modeling.lora import merge_lora
from fasp_lightning.training.sharding.shard import EXPORT_LATER, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_model(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any = None,
    form: str = "auto",
    overwrite: bool = False,
    dtype: str = "auto",
) -> Path:
    """Write a causal LM, LoRA merged, as safetensors and config; all or nothing. The model itself stays as it is.

    With adapters a copy of the model is merged, which takes its memory once more.

    Args:
        model: A causal LM, with adapters or without. One that carries a plan is written by
            :func:`~fasp_lightning.save_pruned`, and loads accordingly.
        path: Folder to write.
        tokenizer: Saved along if given.
        form: See :func:`~fasp_lightning.save_pruned`; for a model that was never pruned ``"auto"`` or ``"stock"``.
        overwrite: Replace a folder that holds a pruned model.
        dtype: See :func:`~fasp_lightning.save_pruned`.

    Returns:
        The folder.

    Raises:
        FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or is no pruned model.
        FaspError: If ``form`` cannot hold the model, or the model is sharded or cannot be saved.
    """
    path = Path(path)
    check_output(path, overwrite)
    require_form(form)
    require_dtype(dtype)
    if is_sharded(model):
        raise FaspError(f"model must be whole to be exported, got one that is sharded over processes; {EXPORT_LATER}")
    if has_adapters(model):
        model = copy.deepcopy(model)
        merge_lora(model)
    plan = plan_of(model)
    if plan is not None and any(plan.blocks):
        return save_pruned(model, path, tokenizer, form=form, overwrite=overwrite, dtype=dtype).path
    return _save_dense(model, path, tokenizer, form, dtype)


def data_tokenizer(trainer: Any) -> Any:
    """The tokenizer of a trainer's datamodule, if it has one that can be saved."""
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)
    return tokenizer if hasattr(tokenizer, "save_pretrained") else None


def check_export(
    model: PreTrainedModel, path: str | Path, form: str, overwrite: bool, cuts: Cuts, tokenizer: Any = None
) -> None:
    """Refuse, before a run, what could not be exported after it.

    Args:
        model: The model.
        path: As in :func:`export_model`.
        form: As there.
        overwrite: As there.
        cuts: What will have been cut when the model is exported.
        tokenizer: As there.

    Raises:
        FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or is no pruned model.
        FaspPermissionError: If the place is not writable.
        FaspError: If ``form`` cannot hold the model, it or the tokenizer cannot be saved, or a whole module was put
            aside to be trained beside adapters (``modules_to_save`` of peft).
    """
    check_output(Path(path), overwrite)
    require_space(Path(path), 0)
    choose_form(form, spec_for(model), cuts)
    kept = [name for name, module in model.named_modules() if hasattr(module, "modules_to_save")]
    if kept:
        raise FaspError(f"model must have no modules_to_save to be exported, got {kept[0]}; drop one of the two")
    require_savable(model, tokenizer)


def _save_dense(model: PreTrainedModel, path: Path, tokenizer: Any, form: str, dtype: str) -> Path:
    if form not in ("auto", "stock"):
        raise FaspError(f"form must be 'auto' or 'stock' for a model that was never pruned, got {form!r}")
    save_dense(model, path, tokenizer, dtype)
    return path
