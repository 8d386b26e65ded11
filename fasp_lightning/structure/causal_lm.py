"""Whether an object is a causal LM of transformers itself, and else what to pass instead of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.errors import FaspError, FaspTypeError

_LOAD = "load it with AutoModelForCausalLM, or load_model"


def require_language_model(model: Any) -> None:
    """Refuse what gives no logits over a vocabulary by its own name: wrapped, headless, or with another head.

    What hands every attribute on to the model in it passes, such as a compiled one, or a model of peft.

    Args:
        model: What was given as a model.

    Raises:
        FaspTypeError: If it is no module.
        FaspError: If it is no causal LM; the message says what to pass.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise FaspTypeError(f"model must be a Hugging Face causal LM, got {kind}; {_LOAD}")
    if not hasattr(model, "get_output_embeddings"):
        raise FaspError(f"model must be a Hugging Face causal LM, got {kind}; {_inside(model)}")
    if _head(model) is None:
        raise FaspError(
            f"model must have the head of a causal LM, got {kind}, which gives no logits over the vocabulary; {_LOAD}, "
            "and train another head on the pruned model"
        )


def require_causal_lm(model: Any) -> None:
    """Refuse what is no causal LM of transformers itself, where its modules are to be found by their paths.

    Args:
        model: What was given as a model.

    Raises:
        FaspTypeError: If it is no module.
        FaspError: If it is no causal LM, or one in something else; the message says what to pass.
    """
    require_language_model(model)
    kind = type(model).__name__
    if hasattr(type(model), "get_output_embeddings"):  # and not handed on by a wrapper's __getattr__
        return
    advice = _inside(model)
    if hasattr(model, "merge_and_unload"):  # of peft: its model alone can be pruned along with its adapters
        advice = "pass model.merge_and_unload(), or model.get_base_model() to prune it along with its adapters"
    raise FaspError(f"model must be the causal LM itself, got it in {kind}; {advice}")


def input_device(model: Any) -> torch.device:
    """Where a causal LM takes its token ids.

    Weights that are read when they are computed with stand on ``meta`` between; ``computes_on`` of the embeddings says
    where they go.
    """
    embeddings = model.get_input_embeddings()
    device: torch.device = getattr(embeddings, "computes_on", embeddings.weight.device)
    return device


def is_dense(weight: Tensor) -> bool:
    """Whether a weight is in full precision; one of 8 bits has a scale somewhere, which pruning does not know."""
    return weight.is_floating_point() and weight.element_size() > 1


def _head(module: Any) -> Any:
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def _inside(model: nn.Module) -> str:
    """What to pass instead of a module that may hold a causal LM somewhere."""
    for path, module in model.named_modules():
        if hasattr(type(module), "get_output_embeddings") and _head(module) is not None:
            return f"pass the one that it holds, model.{path}"
    return _LOAD
