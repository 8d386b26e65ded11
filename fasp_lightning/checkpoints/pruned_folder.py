"""Reading back a folder that ``save_pruned`` wrote, in any form, with its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.checkpoints.devices import dtype_in
from fasp_lightning.checkpoints.forms import FORMS, stock_part
from fasp_lightning.checkpoints.source import PLAN_FILE, local_folder, require_no_adapters, why_unread
from fasp_lightning.errors import FaspError, FaspFileNotFoundError, FaspOSError, as_refusal
from fasp_lightning.staging import clear_left, read_json
from fasp_lightning.structure.plan import PruningPlan, apply_plan, resolve_pruned
from fasp_lightning.structure.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_FILE = "fasp_report.json"


def load_pruned(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a folder that :func:`save_pruned` wrote, in any form, with its plan; a zero-filled one comes back compact.

    Args:
        path: The folder, or the id of a repository on the hub that holds it.
        dtype: ``"auto"`` for the one it was saved in, or another.
        device_map: As in ``from_pretrained``, which needs accelerate for it: a device, or which module goes where.
        attn_implementation: As in ``from_pretrained``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let code run that was saved along.

    Returns:
        The model in evaluation mode; on the CPU without a ``device_map``.

    Raises:
        FaspFileNotFoundError: If there is no such folder, or it holds no plan.
        FaspError: If its plan is damaged, or it holds adapters too.
        FaspOSError: If its config or its weights are, or the hub cannot be reached.

    Example::

        import torch
        from fasp_lightning import FASPPruner, PruningConfig, load_pruned, save_pruned

        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        save_pruned(model, folder, form="compact")
        loaded = load_pruned(folder)
        assert torch.allclose(loaded(batches[0]).logits, model(batches[0]).logits, atol=1e-4)
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = local_folder(path, revision)
    clear_left(path)  # a kill while it was overwritten may have left it beside its place
    form, plan = read_plan(path)
    require_no_adapters(path, str(path))
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= {} if device_map is None else {"device_map": device_map}
    with as_refusal(lambda error: FaspOSError(f"no readable config of '{path}': {why_unread(error)}")):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    stored = dtype_in(config)
    if form == "compact":
        model = _load_compact(config, path, plan, options)
    else:
        model = attach_plan(_from_pretrained(AutoModelForCausalLM, path, **options), form, plan)
    model.fasp_stored_dtype = stored  # type: ignore[assignment]
    report = path / REPORT_FILE
    model.fasp_report = read_json(report) if report.exists() else {}  # type: ignore[assignment]
    return model.eval()


def read_plan(path: str | Path) -> tuple[str, PruningPlan]:
    """Form and plan of a saved folder.

    Raises:
        FaspFileNotFoundError: If the folder holds no plan.
        FaspError: If the plan is damaged.
    """
    file = Path(path) / PLAN_FILE
    if not file.is_file():
        raise FaspFileNotFoundError(f"{path} holds no {PLAN_FILE}; load a model that is not pruned with transformers")
    data = read_json(file)
    if data.get("form") not in FORMS:
        raise FaspError(f"form in {file} must be one of {', '.join(map(repr, FORMS))}, got {data.get('form')!r}")
    return data["form"], PruningPlan.from_dict(data)


def attach_plan(model: PreTrainedModel, form: str, plan: PruningPlan) -> PreTrainedModel:
    """Give a model that was built from the config of a saved folder the shapes of its plan, in place.

    Args:
        model: The model, on any device, ``meta`` included.
        form: The form it was saved in.
        plan: Its plan.

    Returns:
        The same model.

    Raises:
        FaspError: If the plan does not fit the model.
    """
    if form != "compact":  # the config's widths have cut it so far already
        model.fasp_plan = stock_part(plan, spec_for(model))  # type: ignore[assignment]
    return apply_plan(model, plan)


def unreadable_weights(name: str, error: Exception) -> FaspOSError:
    """The refusal of weights that ``transformers`` does not load.

    Args:
        name: The model's name.
        error: What it raised.
    """
    reason = why_unread(error)
    if "ignore_mismatched_sizes" in reason:  # which is no advice: the weights would be drawn at random
        reason = "their shapes are not those that its config says; fetch or save it again"
    return FaspOSError(f"no readable weights of {name!r}: {reason}")


def _load_compact(config: Any, path: Path, plan: PruningPlan, options: dict[str, Any]) -> PreTrainedModel:
    """Let ``from_pretrained`` fill a model whose constructor gives it the plan's shapes.

    So dtype, shards, tied weights and buffers are read as for any model. The run-time modules come afterwards,
    since the loader addresses parameters by their stock paths.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # a family's own class, or one that was saved along
        stock: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=options.pop("trust_remote_code")))

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        with torch.device("cpu"):  # from_pretrained builds on meta, where indices would have no values
            apply_plan(self, plan, wrap=False)

    # transformers decides by name and module how a family's stored keys are read
    planned = type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})
    model = _from_pretrained(planned, path, config=config, **options)
    model.__class__ = stock
    for pair in (pair for block in resolve_pruned(model) for pair in block):
        if pair.kept.numel() < pair.layout.width:
            pair.wrap()
    return model


def _from_pretrained(model_class: Any, path: Path, **options: Any) -> PreTrainedModel:
    """``from_pretrained`` that does not initialise what it misses."""
    with as_refusal(lambda error: unreadable_weights(str(path), error)):
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        names = f"{', '.join(missing[:3])} ({len(missing)} in all)"
        raise FaspOSError(f"{path} must hold all weights, got none for {names}")
    require_in_memory(model)
    loaded: PreTrainedModel = model
    return loaded


def require_in_memory(model: Any) -> None:
    """Refuse a model that a ``device_map`` has left a part of on the disk, where nothing can be cut.

    Raises:
        FaspError: If a weight is not in memory.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        places = getattr(model, "hf_device_map", None)
        raise FaspError(f"device_map must leave every weight in memory, got {places}, which offloads some")
