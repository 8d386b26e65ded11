"""A saved model is loaded as its users load it, and must answer as the one that was saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fasp_lightning.checkpoints.dry_save import runs_remote_code
from fasp_lightning.checkpoints.pruned_folder import load_pruned
from fasp_lightning.structure.causal_lm import input_device
from fasp_lightning.structure.configs.text_part import auto_class
from fasp_lightning.structure.modes import evaluating, undone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 3e-2
"""Largest difference of reloaded logits, relative to the largest logit; zero-filled sums round differently."""


def verify_saved(model: PreTrainedModel, folder: Path, form: str, stored: torch.dtype) -> float:
    """Largest difference between the model's logits and those of what was written, as its users load it.

    Both are computed in the model's dtype, with weights as the stored one rounds them.

    Args:
        model: The model.
        folder: What was written.
        form: The form.
        stored: Dtype of the stored weights.

    Raises:
        RuntimeError: If it is larger than rounding explains.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": attention}
    options["trust_remote_code"] = runs_remote_code(model)
    load: Any = load_pruned if form == "compact" else auto_class(model.config).from_pretrained
    with _rounded(model, stored):
        expected = logits_of(model)
    reloaded = load(folder, **options).to(input_device(model))
    return compared(logits_of(reloaded), expected, model.dtype)


def logits_of(model: PreTrainedModel) -> Tensor:
    """A model's logits of a few tokens, in fp32."""
    device, vocabulary = input_device(model), cast(Any, model.get_input_embeddings()).num_embeddings
    ids = (torch.arange(16, device=device) * 37 % vocabulary).unsqueeze(0)
    with evaluating(model):
        logits: Tensor = cast(Any, model)(input_ids=ids, use_cache=False).logits
    return logits.float()


def compared(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Largest difference between the logits of a saved model and those of the model.

    Args:
        found: Of the saved one.
        expected: Of the model.
        dtype: In which both were computed.

    Raises:
        RuntimeError: If it is larger than rounding explains.
    """
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE.get(dtype, HALF_TOLERANCE) * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise RuntimeError(
            f"logits of the saved model must equal the model's within {allowed:.1e}, got {difference:.1e}"
        )
    return difference


@contextmanager
def _rounded(model: PreTrainedModel, stored: torch.dtype) -> Iterator[None]:
    """Let the model compute with its weights as a narrower dtype has them; no more memory than another copy of it."""
    held = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    kept = [(tensor, tensor.data) for tensor in held.values() if tensor.dtype == model.dtype]
    with undone(*(partial(setattr, tensor, "data", data) for tensor, data in kept)):
        for tensor, data in kept if stored != model.dtype else ():
            tensor.data = data.to(stored).to(data.dtype)
        yield
