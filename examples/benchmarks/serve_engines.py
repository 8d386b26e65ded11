"""What :mod:`serve_speed` times: one model in one engine and format, its prompts and its single tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from llama_library import LlamaLibrary
from torch import nn

from fasp_lightning import spec_for
from fasp_lightning.structure.resolve import linear_parameters


class Shape(NamedTuple):
    """What the arithmetic of a model depends on.

    Attributes:
        linear: Parameters of the blocks' linear layers.
        head: Parameters of the output matrix.
        queries: Query dimensions (heads × head size), summed over blocks.
    """

    linear: int
    head: int
    queries: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """That of a model whose heads are all there."""
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries = config.num_hidden_layers * config.num_attention_heads * size
        return cls(linear_parameters(model, spec_for(model)), model.get_output_embeddings().weight.numel(), queries)

    def prompt_flops(self, tokens: int, logits: int) -> int:
        """FLOPs of a prompt: linear layers, attention over the tokens that each may see, logits of so many tokens."""
        attention = 4 * self.queries * tokens * (tokens + 1) // 2
        return 2 * self.linear * tokens + attention + 2 * self.head * logits


class Runner(Protocol):
    """A model in an engine.

    Attributes:
        bytes_per_token: Bytes of weights that a single token reads.
        logits: Tokens of a prompt of 512 whose logits the engine computes.
        decodes: Whether it keeps a cache of what came before, so that single tokens can be timed.
    """

    bytes_per_token: int
    logits: int
    decodes: bool

    def prompt(self, ids: list[int]) -> None:
        """Compute a prompt from an empty cache."""

    def tokens(self, ids: list[int]) -> None:
        """Compute tokens one by one, from an empty cache."""

    def close(self) -> None:
        """Free the memory."""


class TorchRunner:
    """A model of transformers."""

    decodes, logits = True, 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        table = 0 if tied else model.get_input_embeddings().weight.nbytes  # one row is read of it
        self.bytes_per_token = sum(parameter.nbytes for parameter in model.parameters()) - table

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> None:
        """Compute a prompt from an empty cache, and the logits of its last token, as ``generate`` does."""
        self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def tokens(self, ids: list[int]) -> None:
        """Compute tokens one by one, from an empty cache."""
        past = None
        for token in ids:
            past = self.model(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True).past_key_values

    def close(self) -> None:
        """Free the memory."""
        del self.model


class LlamaRunner:
    """A GGUF file in llama.cpp."""

    decodes, logits = True, 1

    def __init__(self, library: LlamaLibrary, path: Path, threads: int) -> None:
        self.model, self.file = library.load(path, threads), path.stat().st_size
        self.bytes_per_token = bytes_per_token(path)

    def prompt(self, ids: list[int]) -> None:
        """Compute a prompt from an empty cache, and the logits of its last token."""
        self.model.forget()
        self.model.forward(ids)

    def tokens(self, ids: list[int]) -> None:
        """Compute tokens one by one, from an empty cache."""
        self.model.forget()
        for token in ids:
            self.model.forward([token])

    def close(self) -> None:
        """Free the memory."""
        self.model.close()


class OnnxRunner:
    """A graph in ONNX Runtime; without a cache, so that it computes prompts alone."""

    decodes, bytes_per_token = False, 0

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # two sessions wait for each other
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.logits = 0

    def prompt(self, ids: list[int]) -> None:
        """Compute a prompt."""
        import numpy

        row = numpy.array([ids], dtype=numpy.int64)
        given = {"input_ids": row, "attention_mask": row * 0 + 1, "position_ids": numpy.arange(len(ids))[None]}
        wanted = {entry.name for entry in self.session.get_inputs()}
        logits = self.session.run(None, {name: value for name, value in given.items() if name in wanted})[0]
        self.logits = logits.shape[1]

    def tokens(self, ids: list[int]) -> None:
        """There is no cache."""
        raise NotImplementedError("the graph has no cache")

    def close(self) -> None:
        """Free the memory."""
        del self.session


def bytes_per_token(path: Path) -> int:
    """Bytes of the tensors in a GGUF file, but for an embedding table that is not the output matrix too."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def in_turn(runners: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of calls that take turns: the first one's, the second one's, the first one's …; once more for warmth.

    Returns:
        A list a repeat, an entry a call.
    """
    seconds = [[_seconds(call) for call in runners] for _ in range(repeats + 1)]
    return seconds[1:]


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(dense: Runner, pruned: Runner, prompt: list[int], tokens: list[int], repeats: int) -> dict[str, Any]:
    """Time two models in turn.

    Returns:
        ``prefill`` and, where there is a cache, ``decode``: seconds of dense and pruned in each repeat.
    """
    runners = [dense, pruned]
    found = {"prefill": in_turn([lambda runner=runner: runner.prompt(prompt) for runner in runners], repeats)}
    if dense.decodes:
        found["decode"] = in_turn([lambda runner=runner: runner.tokens(tokens) for runner in runners], repeats)
    return found


class Ratio(NamedTuple):
    """How many times as fast as dense: the median and the range of ratios of runs side by side."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[list[float]]) -> Ratio:
        """Of (dense, pruned) seconds."""
        ratios = [dense / pruned for dense, pruned in seconds]
        return cls(statistics.median(ratios), min(ratios), max(ratios))
