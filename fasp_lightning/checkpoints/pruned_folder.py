"""Reading back a pruned model, in any form, with its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.checkpoints.devices import dtype_in, parse_dtype
from fasp_lightning.checkpoints.forms import FORMS
from fasp_lightning.checkpoints.source import local_folder, require_no_adapters, why_unread
from fasp_lightning.errors import FaspError, FaspOSError, as_refusal
from fasp_lightning.staging import clear_left, read_json
from fasp_lightning.structure.configs.text_part import auto_class
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.plan import adopt_plan, plan_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_FILE = "fasp_report.json"


@own_modes(placing=True)
def load_pruned(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a pruned model, in any form, with its plan; a zero-filled one comes back compact.

    The plan stands in ``config.json``, where every way of saving puts it: :func:`save_pruned`, ``save_pretrained``,
    the checkpoints of a ``transformers.Trainer``.

    Args:
        path: The folder, or the id of a repository on the hub that holds it.
        dtype: ``"auto"`` for the one it was saved in, or another, also by its name.
        device_map: As in ``from_pretrained``, which needs accelerate for it: a device, or which module goes where.
        attn_implementation: As in ``from_pretrained``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let code run that was saved along.

    Returns:
        The model in evaluation mode; on the CPU without a ``device_map``.

    Raises:
        FaspFileNotFoundError: If there is no such folder, and the hub has no such repository.
        FaspError: If its config carries no plan, or one that is damaged or does not fit the weights; if it holds
            adapters too.
        FaspOSError: If its config or its weights cannot be read, or the hub cannot be reached.

    Example::

        import torch
        from fasp_lightning import FASPPruner, PruningConfig, load_pruned, save_pruned

        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        save_pruned(model, folder, form="compact")
        loaded = load_pruned(folder)
        assert torch.allclose(loaded(batches[0]).logits, model(batches[0]).logits, atol=1e-4)
    """
    from transformers import AutoConfig

    dtype = "auto" if dtype in (None, "auto") else parse_dtype(dtype)
    clear_left(Path(path).expanduser())  # a kill while it was overwritten may have left it beside its place
    path = local_folder(path, revision)
    require_no_adapters(path, str(path))
    with as_refusal(lambda error: FaspOSError(f"no readable config of '{path}': {why_unread(error)}")):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    options |= {} if device_map is None else {"device_map": device_map}
    stored = dtype_in(config)
    if form_in(config, path) == "compact":
        model = _load_compact(config, path, options)
    else:
        model = adopt_plan(_from_pretrained(auto_class(config), path, **options))
    model.fasp_stored_dtype = stored  # type: ignore[assignment]
    report = path / REPORT_FILE
    model.fasp_report = read_json(report) if report.exists() else {}  # type: ignore[assignment]
    return model.eval()


def form_in(config: Any, path: str | Path) -> str:
    """The form in which a model was saved, as its config says it.

    Args:
        config: The saved config.
        path: Its folder, for messages.

    Raises:
        FaspError: If the config carries no plan, or a damaged one.
    """
    if plan_in(config) is None:
        raise FaspError(f"config of '{path}' carries no plan; load a model that is not pruned with transformers")
    if config.fasp.get("form") not in FORMS:
        forms = ", ".join(map(repr, FORMS))
        raise FaspError(f"config.fasp of '{path}' must name a form, {forms}, got {config.fasp.get('form')!r}")
    form: str = config.fasp["form"]
    return form


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


def _load_compact(config: Any, path: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Let ``from_pretrained`` fill a model whose constructor gives it the plan's shapes.

    So dtype, shards, tied weights and buffers are read as for any model.
    """
    with torch.device("meta"):  # a family's own class, or one that was saved along
        stock: Any = type(auto_class(config).from_config(config, trust_remote_code=options.pop("trust_remote_code")))

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with as_refusal(lambda error: unreadable_weights(str(path), error)):  # such as an unknown attention
            stock.__init__(self, *args, **kwargs)
        with torch.device("cpu"):  # from_pretrained builds on meta, where indices would have no values
            adopt_plan(self)

    # transformers decides by name and module how a family's stored keys are read
    planned = type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})
    model = _from_pretrained(planned, path, config=config, **options)
    model.__class__ = stock
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
