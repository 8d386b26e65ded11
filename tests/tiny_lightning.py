"""Short Lightning runs on tiny models: what the tests of the Lightning part share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny import FFN, HIDDEN, VOCAB, random_tokens
from torch import nn
from torch.utils.data import DataLoader

from fasp_lightning.structure.adapters import is_adapter_parameter
from fasp_lightning.training.module import CausalLMModule

SCRATCH = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
Folder = Callable[..., Path]


def loader(sequences: int = 16, seed: int = 0, batch_size: int = 4) -> DataLoader[Any]:
    """Random tokens, as dict batches; one label of each sequence is ignored."""
    ids = random_tokens(sequences, seed=seed)
    labels = ids.clone()
    labels[:, 3] = -100
    return DataLoader([{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)], batch_size=batch_size)


def silent(folder: Path, **options: Any) -> L.Trainer:
    """A Trainer on the CPU that shows and writes nothing but what the options ask for."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1} | quiet | options)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return silent(folder, **{"max_epochs": 1} | options)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's adapters."""
    return [parameter for name, parameter in model.named_parameters() if is_adapter_parameter(name)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def logits(module: CausalLMModule) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(random_tokens())


def steps(module: CausalLMModule, count: int = 3) -> list[float]:
    """Losses of a few optimizer steps by hand."""
    optimizer, losses = sgd([p for p in module.parameters() if p.requires_grad]), []
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    for index in range(count):
        loss = module.training_step(random_tokens(seed=index), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_names(module: CausalLMModule) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
