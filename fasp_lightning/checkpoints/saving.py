"""Saved models: written beside and renamed, checked by reloading."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fasp_lightning.checkpoints.dry_save import require_savable, runs_remote_code, savable, save_tokenizer
from fasp_lightning.checkpoints.facts import facts_of
from fasp_lightning.checkpoints.forms import LoaderSupport, choose_form, loaders_for, stock_part
from fasp_lightning.checkpoints.older_readers import dress
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.checkpoints.pruned_folder import REPORT_FILE
from fasp_lightning.checkpoints.publishing.card import write_card
from fasp_lightning.checkpoints.publishing.hub import check_hub, upload
from fasp_lightning.checkpoints.publishing.record import record_of
from fasp_lightning.checkpoints.source import copy_processor
from fasp_lightning.checkpoints.verifying import verify_saved
from fasp_lightning.checkpoints.writing import Held, Write, bytes_of, stored_in, write_whole, zero_filled
from fasp_lightning.errors import FaspError
from fasp_lightning.staging import require_space, staged, write_json
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.configs.stock_fields import cuts_in
from fasp_lightning.structure.configs.text_part import text_config
from fasp_lightning.structure.modes import own_modes, undone
from fasp_lightning.structure.plan import adopt_plan, config_fields, plan_of
from fasp_lightning.structure.pruning_plan import PruningPlan
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedModel:
    """What :func:`save_pruned` wrote.

    Attributes:
        path: The folder.
        form: ``"stock"``, ``"compact"`` or ``"zero_filled"``.
        dtype: Dtype of the stored weights.
        bytes: Size of the folder's files.
        loaders: Which loaders take it, and why.
        logit_difference: Largest difference of the reloaded model's logits, ``None`` if not verified; from those with
            weights rounded to ``dtype``, if that is narrower than the model's.
        url: Address of the repository that it was uploaded to, if it was.
    """

    path: Path
    form: str
    dtype: torch.dtype
    bytes: int
    loaders: list[LoaderSupport]
    logit_difference: float | None
    url: str | None = None


@own_modes()
def save_pruned(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any = None,
    form: str = "auto",
    verify: bool = True,
    overwrite: bool = False,
    dtype: str | torch.dtype = "auto",
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> SavedModel:
    """Write a pruned model as safetensors, config with its plan, report and model card; all or nothing.

    Everything is written to a folder beside ``path``, reloaded and compared, and then renamed. A crash, a full disk
    or a kill leaves what was at ``path``.

    Args:
        model: A causal LM that carries a plan.
        path: Folder to write.
        tokenizer: Saved along if given.
        form: ``"auto"`` (what stock ``transformers`` can load), ``"stock"``, ``"compact"`` or ``"zero_filled"``; see
            :func:`fasp_lightning.checkpoints.forms.choose_form`.
        verify: Load the result again (a second copy of the model in memory) and compare the logits.
        overwrite: Replace a folder that holds a pruned model.
        dtype: Dtype of the stored weights; ``"auto"`` is that of the checkpoint which :func:`load_model` read them
            from, or the model's own if that is narrower, or the model came another way.
        push_to_hub: Id of a repository on the hub, such as ``"me/model"``, to upload the folder to, as one commit; it
            is made if there is none, and its model card is replaced. Needs a token: ``hf auth login``, or ``HF_TOKEN``.
        private: Whether a repository that is made is private; ``None`` is the user's default on the hub.

    Returns:
        What was written, and who can load it.

    Raises:
        FaspError: If the model carries no plan, ``form`` cannot hold it, or it cannot be saved, see
            :func:`~fasp_lightning.checkpoints.dry_save.require_savable`.
        FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or is no pruned model.
        FaspOSError: If the disk has too little room, or the place is not writable; if the hub does not take the token,
            or the upload fails, which leaves the folder and names the command that goes on.
        RuntimeError: If the reloaded model's logits differ.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, save_pruned

        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        saved = save_pruned(model, folder, tokenizer)
        print(saved.form, saved.bytes, [loader.name for loader in saved.loaders if loader.ok])
    """
    return save_held(Whole, model, path, tokenizer, form, verify, overwrite, dtype, push_to_hub, private)


class Whole:
    """The weights of a model that is in memory.

    Args:
        model: The model.
        shapes: Keeps more units than the model, zeros in their place; ``None`` for the shapes that it has.
    """

    def __init__(self, model: PreTrainedModel, shapes: PruningPlan | None) -> None:
        self._model = model
        self._wider = {} if shapes is None else zero_filled(model, shapes)

    def size(self, dtype: torch.dtype) -> int:
        """Bytes that they will take."""
        return bytes_of((*self._model.parameters(), *self._wider.values()), dtype)

    def write(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> torch.dtype:
        """Write them."""
        return write_whole(model, folder, dtype, self._wider)

    def verify(self, folder: Path, form: str, dtype: torch.dtype) -> float:
        """Load what was written as its users do, and compare."""
        return verify_saved(self._model, folder, form, dtype)


def save_held(
    hold: Callable[[PreTrainedModel, PruningPlan | None], Held],
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Any,
    form: str,
    verify: bool,
    overwrite: bool,
    dtype: str | torch.dtype,
    push_to_hub: str | None,
    private: bool | None,
) -> SavedModel:
    """Save a pruned model wherever its weights are; see :func:`save_pruned`.

    Args:
        hold: Makes of a model, and of the plan whose shapes it is written in, what writes its weights.
        model: As there, as the other arguments.
        path: As there.
        tokenizer: As there.
        form: As there.
        verify: As there.
        overwrite: As there.
        dtype: As there.
        push_to_hub: As there.
        private: As there.
    """
    path = Path(path)
    check_hub(push_to_hub, private)
    require_savable(model, tokenizer)
    if has_adapters(model):
        raise FaspError("model must have its LoRA merged before it is saved, or its keys would not be stock ones")
    plan, spec = require_plan(model), spec_for(model)
    form, stored = choose_form(form, spec, cuts_in(spec, plan)), stored_in(model, dtype)
    check_output(path, overwrite)
    adopt_plan(model)  # a zero-filled one, loaded by stock code, is no wider than its plan
    weights = hold(model, stock_part(plan, spec) if form == "zero_filled" else None)
    require_space(path, weights.size(stored))
    with staged(path) as stage:
        stored, loaders = write_pruned(model, stage, form, stored, tokenizer, weights.write, push_to_hub)
        difference = weights.verify(stage, form, stored) if verify else None
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    url = upload(path, push_to_hub, private) if push_to_hub else None
    return SavedModel(path, form, stored, size, loaders, difference, url)


def write_pruned(
    model: PreTrainedModel,
    folder: Path,
    form: str,
    dtype: torch.dtype,
    tokenizer: Any,
    write: Write = write_whole,
    hub_id: str | None = None,
) -> tuple[torch.dtype, list[LoaderSupport]]:
    """Write everything that a saved pruned model is.

    Args:
        model: The model.
        folder: Where to.
        form: One that holds its plan.
        dtype: See :func:`write_folder`.
        tokenizer: As there.
        write: As there.
        hub_id: The repository that it goes to, if it does.

    Returns:
        The dtype of the weights, and who can load them.
    """
    plan = require_plan(model)
    with savable(model), in_form(model, form):
        dtype = write_folder(model, folder, dtype, tokenizer, write)
    report, loaders = record_of(model, dtype), loaders_for(form, model.config, cuts_in(spec_for(model), plan))
    write_json(folder / REPORT_FILE, report)
    write_card(folder, facts_of(report, plan, form), loaders, hub_id, runs_remote_code(model))
    for file in folder.glob("*.safetensors"):  # safetensors writes them for their owner alone
        shutil.copymode(folder / REPORT_FILE, file)
    return dtype, loaders


def write_folder(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Any = None,
    write: Write = write_whole,
) -> torch.dtype:
    """Write a model's weights in a dtype, its configs, tokenizer and processor, for older loaders too.

    Args:
        model: The model, as :func:`~fasp_lightning.checkpoints.dry_save.savable` has it.
        folder: Where to.
        dtype: See :func:`~fasp_lightning.checkpoints.writing.write_whole`.
        tokenizer: Saved along if given.
        write: Writes weights and config.

    Returns:
        The dtype that they were written in.
    """
    dtype = write(model, folder, dtype)
    if dtype != model.dtype:  # which PreTrainedModel.save_pretrained writes into the config
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    copy_processor(model, folder)
    dress(folder, type(model.config), tokenizer)
    return dtype


def require_plan(model: PreTrainedModel) -> PruningPlan:
    """The plan that a model carries.

    Raises:
        FaspError: If it carries none.
    """
    plan = plan_of(model)
    if plan is None:
        raise FaspError("model must carry a plan; prune it with FASPPruner or give it one with apply_plan first")
    return plan


@contextmanager
def in_form(model: PreTrainedModel, form: str) -> Iterator[None]:
    """The model's config as the form wants it: a compact one keeps the original widths, so that stock code refuses."""
    config, spec, plan = cast(Any, model.config), spec_for(model), require_plan(model)
    widths = stock_part(plan, spec).widths
    if form == "compact":
        widths = {key: {0: key[1].width} for key in plan.widths}
    part, fasp = text_config(config), {**config.fasp, "form": form}
    wanted = [(config, "fasp", fasp), *((part, *field) for field in config_fields(spec, widths).items())]
    with undone(*(partial(setattr, owner, name, getattr(owner, name)) for owner, name, _ in wanted)):
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield


def save_dense(model: PreTrainedModel, path: Path, tokenizer: Any, dtype: str | torch.dtype) -> None:
    """Write a model that was never pruned as a stock folder; all or nothing.

    Args:
        model: The model.
        path: Folder to write.
        tokenizer: Saved along if given.
        dtype: See :func:`save_pruned`.

    Raises:
        FaspError: If it cannot be saved.
        FaspOSError: If the disk has too little room.
    """
    require_savable(model, tokenizer)
    stored = stored_in(model, dtype)
    require_space(path, bytes_of(model.parameters(), stored))
    with staged(path) as stage, savable(model):
        write_folder(model, stage, stored, tokenizer)
