"""The model a LightningModule trains: loaded, or built from a config and initialised from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from fasp_lightning.checkpoints.devices import choose_dtype
from fasp_lightning.checkpoints.loading import load_config, load_model
from fasp_lightning.checkpoints.refused_models import require_prunable
from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.structure.registry import known_architectures, spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(
    name_or_path: str,
    dtype: str,
    *,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM of a registered family onto the CPU; a pruned folder comes with its plan.

    Raises:
        FaspError: If its family is not registered; before the weights are read.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name_or_path, **options)
    spec_for(config)
    options |= {"attn_implementation": attn_implementation, "config": config}
    return cast("PreTrainedModel", load_model(name_or_path, dtype, "cpu", **options))


def new_model(
    config: Mapping[str, Any], dtype: str, *, attn_implementation: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Build a causal LM from its config; the global random state is neither read nor changed.

    Args:
        config: ``model_type``, and the fields that differ from that family's defaults.
        dtype: Data type of the parameters; ``"auto"`` is float32.
        attn_implementation: As in ``from_pretrained``.
        seed: Seed of the weights.

    Raises:
        FaspError: If ``model_type`` is missing or unknown, a field is not one of that family, or the fields make no
            model.
    """
    from transformers import AutoModelForCausalLM

    settings = _config(config)
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, torch.float32, torch.device("cpu"))}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    with seeded(seed), as_refusal(lambda error: _no_model(f"{settings.model_type} model", error)):
        model = AutoModelForCausalLM.from_config(settings, **options)
    return cast("PreTrainedModel", model)


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch on gradient checkpointing, in its non-reentrant kind, which also works behind frozen embeddings."""
    new = hasattr(model, "activation_checkpointing_enable")  # what transformers 5.23 calls it
    enable: Any = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if hasattr(model, "_require_grads_hook"):  # only the reentrant kind needs it, and it cannot be pickled
        model.disable_input_require_grads()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from ``seed``; afterwards the global random state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def _config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type not in known_architectures():
        raise FaspError(
            f"config must name a model_type, one of {', '.join(known_architectures())}, got {model_type!r}; "
            "add another family with register_architecture"
        )
    default = AutoConfig.for_model(model_type)
    unknown = [name for name in fields if not hasattr(default, name)]
    if unknown:  # transformers would keep an unknown field without effect
        raise FaspError(f"config must hold fields of a {model_type} model, got {', '.join(unknown)}")
    with as_refusal(lambda error: _no_model(f"{model_type} config", error)):
        settings = AutoConfig.for_model(model_type, **fields)
    require_prunable(settings, f"a new {model_type}")
    return settings


def _no_model(what: str, error: Exception) -> FaspError:
    return FaspError(f"config makes no {what}: {one_line(error)}")
