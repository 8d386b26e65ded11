"""The text part of a model that takes images or sound too: its config, and where its blocks are.

Such a model holds the decoder of a family of language models, and its config holds that family's. What is pruned is the
decoder, on text alone; everything else stays as it is, and is saved along.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fasp_lightning.structure.spec import ArchitectureSpec


def text_config(config: Any) -> Any:
    """The config of the decoder: the one inside that of a model that takes more than text, else the config itself."""
    part = getattr(config, "text_config", None)
    return config if getattr(part, "model_type", None) is None else part


def text_family(config: Any) -> str:
    """The ``model_type`` of the decoder, by which its row is found."""
    return str(getattr(text_config(config), "model_type", None))


def with_fields(config: Any, fields: dict[str, Any]) -> Any:
    """A config like another with other values of the decoder; what its class raises is raised."""
    given = config.to_dict()
    (given if text_config(config) is config else given["text_config"]).update(fields)
    return type(config).from_dict(given)


def whole_class(config: Any) -> str | None:
    """Name of the class of a model that takes more than text and has a decoder inside; ``None`` of a causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    inside = text_config(config) is not config
    return MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type) if inside else None


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the whole model of a config, or loads it.

    AutoModelForCausalLM would make the decoder alone of some configs that have one inside.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if whole_class(config) else AutoModelForCausalLM


def placed(spec: ArchitectureSpec, model: Any) -> ArchitectureSpec:
    """A family's row with the path that its blocks have in a model that holds its decoder.

    Args:
        spec: The row, whose path is that from a causal LM of the family, or from this model.
        model: The model.
    """
    family = text_family(model.config)
    if text_config(model.config) is model.config or _blocks_at(model, spec.layers):
        return spec
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "model_type", None) == family:
            for path in (spec.layers, spec.layers.partition(".")[2]):  # a causal LM, or the decoder without a head
                if _blocks_at(module, path):
                    return replace(spec, layers=f"{name}.{path}")
    return spec


def _blocks_at(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False
