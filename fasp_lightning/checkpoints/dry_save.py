"""What stands beside the weights, saved and read back before anything is computed, and mended where it can be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from fasp_lightning.checkpoints.refused_models import (
    DEQUANTIZED,
    drop_quantization,
    require_dense,
    require_prunable,
)
from fasp_lightning.errors import FaspError, FaspTypeError, as_refusal, of_library, one_line
from fasp_lightning.structure.adapters import base_of, has_adapters
from fasp_lightning.structure.causal_lm import require_causal_lm
from fasp_lightning.structure.configs.text_part import auto_class
from fasp_lightning.structure.modes import undone
from fasp_lightning.structure.ownership import require_stored
from fasp_lightning.structure.plan import adopt_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
MARKS = (*DEQUANTIZED, "_hf_peft_config_loaded")
"""Attributes for which transformers saves packed weights, or adapters alone; a model that is saved here has neither."""


def require_savable(model: PreTrainedModel, tokenizer: Any = None) -> None:
    """Refuse a model that could not be saved, or not be read back; takes a second, and writes no weights.

    Args:
        model: A causal LM, pruned or not, on any device, ``meta`` included.
        tokenizer: What is saved along.

    Raises:
        FaspTypeError: If the tokenizer is none.
        FaspError: If something else than a causal LM of transformers is given, it is quantised, or its config, its
            code or the tokenizer cannot be saved or read; the message says what to do.
    """
    require_causal_lm(model)
    require_dense(model)
    require_stored(model)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return  # PreTrainedModel.save_pretrained writes in the first process alone, which finds out for all
    with TemporaryDirectory() as folder, savable(model, logging.WARNING), no_progress_bar():
        with as_refusal(lambda error: FaspError(f"model cannot be saved by transformers: {one_line(error)}")):
            model.save_pretrained(folder, state_dict={})
        _require_readable(model, folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, Path(folder))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer into a folder.

    Raises:
        FaspTypeError: If it is none of transformers.
        FaspError: If it refuses.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        kind = type(tokenizer).__name__
        raise FaspTypeError(f"tokenizer must be one of transformers, got {kind}; PreTrainedTokenizerFast wraps others")
    with as_refusal(lambda error: FaspError(f"tokenizer cannot be saved: {one_line(error)}; leave it out")):
        tokenizer.save_pretrained(folder)


def runs_remote_code(model: PreTrainedModel) -> bool:
    """Whether a model's class came with its files, which are then saved along; who loads it must trust them too."""
    return getattr(type(model), "_auto_class", None) is not None


@contextmanager
def savable(model: PreTrainedModel, level: int = logging.DEBUG) -> Iterator[None]:
    """Give a model, for as long as it is saved, copies of its configs that are saved and read back.

    Args:
        model: The model.
        level: At which level to log what is mended on them.
    """
    held: Any = model
    names = [name for name in ("config", "generation_config", *MARKS) if name in vars(model)]
    with undone(*(partial(setattr, held, name, getattr(held, name)) for name in names)):
        for mark in MARKS:
            vars(model).pop(mark, None)
        held.config = _savable_config(model, level)
        if model.can_generate():
            held.generation_config = _savable_generation(held.generation_config, held.config, level)
        yield


def _require_readable(model: PreTrainedModel, folder: str) -> None:
    """Refuse a model whose saved config makes another one."""
    from transformers import AutoConfig

    trust = runs_remote_code(model)
    with as_refusal(lambda error: FaspError(f"model would not be read back once saved: {one_line(error)}")):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        require_prunable(config, type(model).__name__)
        with torch.device("meta"):
            read = auto_class(config).from_config(config, trust_remote_code=trust)
    if has_adapters(model):
        return  # which are merged before it is saved
    tied = set(getattr(read, "all_tied_weights_keys", ()))
    found, built = _shapes(model), _shapes(read)
    changed = sorted((found.keys() ^ built.keys()) - tied)
    if changed:
        raise FaspError(
            f"model must have the parameters of the {type(read).__name__} that its saved config makes, got another one "
            f"of {changed[0]} ({len(changed)} in all); register its class with {auto_class(config).__name__}"
        )
    planned = _shapes(adopt_plan(read))  # a zero-filled one that stock code loaded is as wide as it is built
    for name, shape in found.items():
        if name in built and shape not in (built[name], planned[name]):
            raise FaspError(
                f"model must have the shapes that its saved config makes, got {name} of {tuple(shape)} instead of "
                f"{tuple(planned[name])}; correct the config, such as its vocab_size"
            )


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _savable_config(model: PreTrainedModel, level: int) -> Any:
    """A copy without leftovers of a GGUF file or of generation, which says of the head what is in memory."""
    held: Any = model
    config: Any = copy.deepcopy(model.config)
    drop_quantization(config)
    head, embeddings = _weight(held.get_output_embeddings()), _weight(held.get_input_embeddings())
    tied = head is embeddings or (not head.is_meta and head.data_ptr() == embeddings.data_ptr())
    if getattr(config, "tie_word_embeddings", tied) is not tied:
        log.log(level, "saved with tie_word_embeddings=%s, as the model's head is, and not as its config says", tied)
        config.tie_word_embeddings = tied
    return config


def _weight(layer: Any) -> Any:
    weight: Any = base_of(layer).weight
    return weight


def _savable_generation(given: Any, config: Any, level: int) -> Any:
    """A copy that is saved though newer versions of transformers would refuse to, with what was set on the config.

    Their own checks are stricter in saving than in reading: of flags that have no effect together, such as a
    temperature without sampling, published models are full. Where it would not be read either, defaults are saved.
    """
    from transformers import GenerationConfig

    if not isinstance(given, GenerationConfig):
        if given is not None:
            log.log(level, "generation config saved as by default, since it is a %s", type(given).__name__)
        return GenerationConfig.from_model_config(config)
    copied = copy.deepcopy(given)
    # PreTrainedConfig.save_pretrained refuses a config that this finds something in
    for name, value in getattr(config, "_get_generation_parameters", dict)().items():
        setattr(copied, name, value)
        delattr(config, name)
    with TemporaryDirectory() as folder:
        try:
            copied.save_pretrained(folder)
        except Exception as error:  # its checks call what the user has put there
            if not of_library(error):
                raise
            copied = _as_it_is(copied)
        try:
            copied.save_pretrained(folder)
            GenerationConfig.from_pretrained(folder)
        except Exception as error:
            log.log(level, "generation config saved as by default, since its own is not read: %s", one_line(error))
            return GenerationConfig.from_model_config(config)
    return copied


def _as_it_is(given: Any) -> Any:
    """Have a generation config save itself without a check."""

    class AsItIs(type(given)):  # type: ignore[misc]
        def save_pretrained(self, save_directory: Any, **_: Any) -> None:
            self.to_json_file(Path(save_directory) / GENERATION_FILE, use_diff=True, keys_to_pop=["compile_config"])

    given.__class__ = AsItIs
    return given


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Writing nothing needs no progress bar."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
