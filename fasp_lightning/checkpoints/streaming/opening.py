"""Open a checkpoint for streaming: its model on ``meta``, and the files that its parts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasp_lightning.checkpoints.loading import checkpoint_dtype
from fasp_lightning.checkpoints.pruned_folder import form_in
from fasp_lightning.checkpoints.refused_models import require_unpacked
from fasp_lightning.checkpoints.source import ModelSource, local_folder
from fasp_lightning.checkpoints.streaming.files import stored_weights
from fasp_lightning.checkpoints.streaming.model import StreamedModel
from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.structure.configs.text_part import auto_class
from fasp_lightning.structure.plan import adopt_plan, plan_in


def open_streamed(
    source: ModelSource,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> StreamedModel:
    """A model whose weights stay in its files; no weight is read.

    Args:
        source: The resolved model.
        config: Its config, see :func:`~fasp_lightning.checkpoints.loading.load_config`.
        dtype: Dtype to compute in.
        device: Device to compute on.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let the repository's own code run.
        attn_implementation: As for :func:`~fasp_lightning.load_model`.

    Raises:
        FaspError: If its weights cannot be read in parts; the message says what to do.
        FaspOSError: If a file is damaged or missing.
    """
    require_unpacked(config, source.name)
    folder = Path(source.location) if source.local else local_folder(source.location, revision)
    files = stored_weights(source, folder)
    if plan_in(config) is not None and form_in(config, folder) == "zero_filled":
        raise FaspError(
            f"model {source.name!r} must be saved in the form 'stock' or 'compact' to be streamed, got 'zero_filled'; "
            "save it so (load_pruned, save_pruned), or prune it in memory"
        )
    model = built(source, config, dtype, trust_remote_code, attn_implementation)
    model.fasp_stored_dtype, model.fasp_source = checkpoint_dtype(source, config), source.name
    return StreamedModel(adopt_plan(model), files, device, source.name)


def built(
    source: ModelSource, config: Any, dtype: torch.dtype, trust_remote_code: bool, attn_implementation: str | None
) -> Any:
    """The model that stock code makes of a config, on ``meta``, in evaluation mode."""
    options = {"trust_remote_code": trust_remote_code, "dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    def refusal(error: Exception) -> FaspError:
        return FaspError(f"the config of {source.name!r} makes no {config.model_type} model: {one_line(error)}")

    with as_refusal(refusal), torch.device("meta"):
        model: Any = auto_class(config).from_config(config, **options)
    return model.eval()
