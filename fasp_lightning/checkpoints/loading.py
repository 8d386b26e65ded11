"""Load models, tokenizers and configs of any source; refusals come before the weights are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from fasp_lightning.checkpoints.devices import choose_device, choose_dtype, dtype_in, require_dtype
from fasp_lightning.checkpoints.pruned_folder import (
    load_pruned,
    require_in_memory,
    unreadable_weights,
)
from fasp_lightning.checkpoints.refused_models import (
    DEQUANTIZED,
    drop_quantization,
    quantization_method,
    require_dense,
    require_prunable,
    unpacking,
)
from fasp_lightning.checkpoints.source import (
    ModelSource,
    check_files,
    require_no_adapters,
    resolve_source,
    weight_files,
    why_unread,
    with_adapters,
)
from fasp_lightning.errors import FaspError, FaspFileNotFoundError, FaspOSError, as_refusal, one_line
from fasp_lightning.structure.causal_lm import is_dense
from fasp_lightning.structure.configs.text_part import auto_class
from fasp_lightning.structure.plan import adopt_plan, plan_in

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""What accelerate takes in a ``device_map`` beside devices."""


def load_config(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Config of a model, without its weights.

    Args:
        name_or_path: Hub id, folder, ``.gguf`` file, or ``package:NAME``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let the repository's own code run.

    Raises:
        FaspFileNotFoundError: If there is no such model.
        FaspOSError: If the config is damaged, or the hub cannot be reached.
        FaspError: If the model is no causal LM, or is quantised.
    """
    source = resolve_source(name_or_path)
    config = _read_config(source, revision, trust_remote_code)
    require_prunable(config, source.name)
    return config


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a model.

    Args:
        name_or_path: Hub id, folder, ``.gguf`` file, or ``package:NAME``.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let the repository's own code run.

    Raises:
        FaspFileNotFoundError: If there is no such model.
        FaspOSError: If it has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    source = resolve_source(name_or_path)
    hub = {"revision": revision} if revision else {}

    def refusal(error: Exception) -> FaspOSError:
        return FaspOSError(f"no readable tokenizer in {source.name!r}: {why_unread(error)}; name another one to load")

    with as_refusal(refusal):
        return AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **hub, **source.arguments()
        )


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: Any = None,
    config: Any = None,
) -> torch.nn.Module:
    """A causal LM in evaluation mode; one that was pruned before comes back with its plan.

    Args:
        name_or_path: Hub id, folder, ``.gguf`` file, or ``package:NAME``.
        dtype: ``"auto"`` (see :func:`choose_dtype`) or a dtype.
        device: ``"auto"`` or a torch device.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let the repository's own code run.
        attn_implementation: ``"eager"``, ``"sdpa"``, …; ``None`` for the default of transformers.
        device_map: As for :func:`~fasp_lightning.load_pruned`, instead of ``device``.
        config: The config that :func:`load_config` gave before; to read it out of a GGUF file takes seconds.

    Raises:
        FaspFileNotFoundError: If there is no such model.
        FaspOSError: If a file of it is damaged.
        FaspError: If the model is no causal LM, is quantised, has adapters, or dtype or device are unknown.
    """
    source, place = resolve_source(name_or_path), _place(device if device_map is None else device_map)
    require_dtype(dtype)  # a misspelt name is refused before anything is read
    if config is None:
        config = load_config(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    check_files(source)
    stored = checkpoint_dtype(source, config)
    chosen = choose_dtype(dtype, stored, place)
    given = {"revision": revision, "attn_implementation": attn_implementation, "device_map": device_map}
    options = {name: value for name, value in given.items() if value is not None}
    options["trust_remote_code"] = trust_remote_code
    model: Any
    if plan_in(config) is not None:
        model = load_pruned(source.location, dtype=chosen, **options)
    else:
        model = _load_dense(source, config, chosen, **options)
    model.fasp_stored_dtype, model.fasp_source = stored, source.name
    return (model if device_map is not None else model.to(place)).eval()


def _place(device_map: Any) -> torch.device:
    """The device that a device or a ``device_map`` begins with, as far as it names one."""
    first = next(iter(device_map.values()), "auto") if isinstance(device_map, dict) else device_map
    named = isinstance(first, (str, torch.device)) and first not in SPREADS
    return choose_device(first if named else "auto")


def checkpoint_dtype(source: ModelSource, config: Any) -> torch.dtype | None:
    """Dtype of the stored weights as the config, or else a local file's header, tells it; ``None`` for GGUF.

    Args:
        source: The resolved model.
        config: Its config.

    Returns:
        A floating dtype; fp32 where nothing says otherwise (checkpoints older than the config field).
    """
    if source.gguf_file is not None:
        return None
    return dtype_in(config) or (_header_dtype(Path(source.location)) if source.local else None) or torch.float32


def _header_dtype(folder: Path) -> torch.dtype | None:
    """Dtype of the first floating tensor of 16 bits or more of a folder's safetensors files."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # the file is no mapping
                piece = file.get_slice(key)
                empty = piece[:0] if piece.get_shape() else file.get_tensor(key)
                if is_dense(empty):
                    return empty.dtype
    return None


def _read_config(source: ModelSource, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    hub = {"revision": revision} if revision else {}
    if source.local and source.gguf_file is None:
        require_no_adapters(Path(source.location), source.name)
    if source.local and source.gguf_file is None and not (Path(source.location) / "config.json").is_file():
        raise FaspFileNotFoundError(f"no model at {source.name!r}: the folder has no config.json")
    kind = "config of" if source.local else "folder or reachable hub model"
    with as_refusal(lambda error: FaspOSError(f"no readable {kind} {source.name!r}: {why_unread(error)}")):
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **hub, **source.arguments()
        )
    if source.gguf_file is not None or quantization_method(config) is None:
        drop_quantization(config)
    return config


def _load_dense(source: ModelSource, config: Any, dtype: torch.dtype, **arguments: Any) -> Any:
    method = quantization_method(config)
    if source.gguf_file is not None:
        arguments |= source.arguments() | _dequantize()
    elif method is not None:
        config = unpacking(config)
    with as_refusal(lambda error: unreadable_weights(source.name, error)):
        model: Any = auto_class(config).from_pretrained(source.location, config=config, dtype=dtype, **arguments)
    require_in_memory(model)
    if getattr(model, "_hf_peft_config_loaded", False):  # from a hub's repository that holds both
        raise FaspError(with_adapters(source.name))
    # revert_weight_conversion (transformers, core_model_loading.py) would quantise what it saves as it was read
    for mark in (*DEQUANTIZED, *(("_weight_conversions",) if method else ())):
        vars(model).pop(mark, None)
    drop_quantization(model.config)
    require_dense(model)
    model.fasp_dequantized = method
    return model


def _dequantize() -> dict[str, Any]:
    """Newer transformers may keep GGUF weights packed on an accelerator; a packed weight cannot be cut."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def model_shapes(source: ModelSource, config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model on the ``meta`` device; one that was pruned before carries its plan.

    Args:
        source: The resolved model.
        config: Its config.
        trust_remote_code: Let the repository's own code run.

    Raises:
        FaspError: If the config does not fit its model class, or a plan is damaged.
    """
    config = copy.deepcopy(config)
    drop_quantization(config)  # shapes are those of the weights that it is read in
    with as_refusal(lambda error: _no_model(source, config, error)), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return adopt_plan(model)


def _no_model(source: ModelSource, config: Any, error: Exception) -> FaspError:
    return FaspError(f"the config of {source.name!r} makes no {config.model_type} model: {one_line(error)}")
