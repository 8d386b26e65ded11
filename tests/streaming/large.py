"""A model of many blocks, pruned in a process that has not the memory for it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_model
from tiny_pruning import basic, calibration
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning import FASPPruner, staging

BLOCKS = 30
HIDDEN, FFN, VOCABULARY = 768, 512, 1000


def write_model(folder: str) -> tuple[int, int]:
    """Write random weights, a file a block, without ever holding them; returns bytes of all, and of a block."""
    shapes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": BLOCKS}
    config = AutoConfig.for_model("llama", **shapes, num_attention_heads=12, num_key_value_heads=12, dtype="float32")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(folder)
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        part = name.split(".")[2] if ".layers." in name else "around"
        groups.setdefault(part, {})[name] = tensor
    weight_map = {}
    for part, tensors in groups.items():
        file = f"model-{part}.safetensors"
        save_file(
            {name: 0.02 * torch.randn(t.shape) for name, t in tensors.items()}, Path(folder) / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    block = sum(tensor.numel() * 4 for tensor in groups["0"].values())
    return sum(tensor.numel() * 4 for tensor in state.values()), block


def warm_up(folder: Path) -> None:
    """Prune a small model, so that libraries are loaded, and their threads started, before it counts."""
    tiny_model("llama").save_pretrained(folder)
    FASPPruner(basic()).prune_folder(folder, folder.with_name("smaller"), calibration())


def prune_within(source: str, output: str, more: int, measured: str) -> None:
    """Prune in a process whose memory may grow by so many bytes from here on.

    Args:
        source: Folder of the model.
        output: Folder to write.
        more: Bytes.
        measured: File for the growth of the highest resident size, in bytes.
    """
    staging._flush = lambda path: None
    torch.set_num_threads(1)
    batches = [torch.randint(0, VOCABULARY, (4, 64)) for _ in range(3)]
    warm_up(Path(measured).with_name("small"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    FASPPruner(basic()).prune_folder(source, output, batches)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(measured).write_text(str(1024 * (after - before)))
