"""Which models can be pruned: told of a checkpoint from its config alone, of a model in memory from its weights."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.causal_lm import is_dense
from fasp_lightning.structure.configs.text_part import text_config, text_family, whole_class
from fasp_lightning.structure.registry import known_architectures

DEQUANTIZED = ("hf_quantizer", "is_quantized", "quantization_method")
"""Attributes for which transformers takes a model that it has read from packed weights for a quantised one."""


UNPACKED = ("fp8", "mxfp4")
"""Quantisations that transformers undoes while it reads, with no package that is not there anyway but accelerate."""


def require_prunable(config: Any, name: str) -> None:
    """Refuse a config that is not of a causal LM, or of a model with one's decoder, that is read in full precision.

    Args:
        config: A transformers config.
        name: The model's name, for the message.

    Raises:
        FaspError: Naming the ``model_type`` or the quantisation, and what to do instead.
    """
    problem = _not_causal(config)
    if problem:
        raise FaspError(
            f"model {name!r} must be a decoder-only causal LM, got model_type {config.model_type!r} "
            f"({problem}); supported are {', '.join(known_architectures())}, and what is registered"
        )
    method = quantization_method(config)
    if method in UNPACKED and importlib.util.find_spec("accelerate") is None:
        raise FaspError(
            f"model {name!r} is quantised ({method}), which accelerate undoes; run `pip install accelerate`"
        )
    if method is not None and method not in UNPACKED:
        raise FaspError(
            f"model {name!r} is quantised ({method}); pruning needs its full-precision weights, which are made of "
            f"{' and '.join(UNPACKED)} alone: name the checkpoint it was made from, and quantise the pruned model "
            "afterwards"
        )


def quantization_method(config: Any) -> str | None:
    """Name of a checkpoint's quantisation, or ``None``; the leftover of a GGUF file does not count."""
    for part in (config, text_config(config)):
        settings = getattr(part, "quantization_config", None)
        if settings is None:
            continue
        fields = settings if isinstance(settings, dict) else vars(settings)
        method = fields.get("quant_method", "unknown method")
        method = str(getattr(method, "value", method))
        if method != "gguf":
            return method
    return None


def require_dense(model: Any) -> None:
    """Refuse a model whose weights are packed; one that was made dense when it was read may still be marked.

    Raises:
        FaspError: Naming the parameter and the quantisation.
    """
    marked = quantization_method(model.config) is not None
    for name, weight in model.named_parameters():
        if not is_dense(weight) or (
            marked and type(weight.data) is not torch.Tensor
        ):  # torchao packs in a tensor of its own kind
            kind = quantization_method(model.config) or weight.dtype
            raise FaspError(
                f"model must have its weights in full precision, got {name} quantised ({kind}); load the checkpoint "
                "that it was made from, and quantise the pruned model afterwards"
            )


def require_unpacked(config: Any, name: str) -> None:
    """Refuse to stream a quantised checkpoint, which transformers makes full precision of as a whole.

    Args:
        config: Its config.
        name: Its name, for the message.

    Raises:
        FaspError: If it is one.
    """
    if (method := quantization_method(config)) is not None:
        raise FaspError(
            f"model {name!r} must be in full precision to be streamed, got it quantised ({method}); prune it in memory "
            "(stream=false), or save it in full precision first (load_model, save_pretrained)"
        )


def unpacking(config: Any) -> Any:
    """A copy of a quantised checkpoint's config that has transformers read it in full precision."""
    copied = copy.deepcopy(config)
    parts = (copied, text_config(copied))
    settings = next(found for part in parts if (found := getattr(part, "quantization_config", None)) is not None)
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    drop_quantization(copied)
    copied.quantization_config = {**fields, "dequantize": True}
    return copied


def drop_quantization(config: Any) -> None:
    """Take the quantisation off the config of a dense model."""
    for part in (config, text_config(config)):
        vars(part).pop("quantization_config", None)
        vars(part).pop("_is_quantized", None)


def _not_causal(config: Any) -> str | None:
    """Why a config is not that of a decoder-only causal LM, or ``None`` if it is one."""
    from transformers.models.auto import modeling_auto as auto

    model_type, whole = text_family(config), whole_class(config)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text_config(config))):
        return "an encoder-decoder"
    if not whole and any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        return "a multimodal model"
    # encoders such as BERT are listed as causal LMs too, for their use as decoders
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "an encoder"
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not whole and model_type not in (*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *known_architectures()) and not custom:
        return "not a causal LM"
    heads = [name for name in getattr(config, "architectures", None) or () if "For" in str(name)]
    if heads and not any(name.endswith(whole or "ForCausalLM") for name in heads):
        return f"saved as {heads[0]}"
    return None
