"""The benchmark of serving, on tiny models and texts."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_gguf import byte_level_tokenizer
from tiny_text import words
from torch.utils.flop_counter import FlopCounterMode

from fasp_lightning import FASPPruner, PruningConfig, export_gguf, load_model, load_tokenizer, perplexity

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch, seeded: None) -> None:
    """The scripts find the modules beside them, as they do when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def serve_speed(
    tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict]:
    """``serve_speed(…)`` runs the script, later options winning, and returns its JSON."""
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(words(60, seed)))
    folder = tiny_folder("llama-gqa")

    def run(*argv: object) -> dict[str, Any]:
        texts = ["--calibration", tmp_path / "calibration.txt", "--evaluation", tmp_path / "evaluation.txt"]
        sizes = ["--seq-len", 16, "--sequences", 4, "--evaluation-sequences", 1, "--prompt", 12, "--tokens", 3]
        few = ["--sparsities", 0.2, "--other-multiples", 16, "--repeats", 2, "--threads", 1]
        places = ["--output-dir", tmp_path / "models", "--results-dir", tmp_path]
        options = ["--model", folder, *texts, *sizes, *few, *places, *argv]
        monkeypatch.setattr(sys, "argv", ["serve_speed.py", *map(str, options)])
        runpy.run_path(str(BENCHMARKS / "serve_speed.py"), run_name="__main__")
        return json.loads((tmp_path / "serve_speed.json").read_text())

    return run


def test_every_model_is_timed_beside_dense_once(serve_speed, tmp_path: Path) -> None:
    content = serve_speed("--formats", "torch-float32")
    results = {tuple(cell["settings"]["variant"]): cell["result"] for cell in content["cells"].values()}
    assert set(results) == {
        ("dense", 0.0, "auto"),
        *((kind, 0.2, multiple) for kind in ("stock", "adaptive") for multiple in ("auto", 16)),
    }
    assert results["stock", 0.2, 16]["widths"] == [32, 32]
    assert all(len(result[phase]) == 2 for result in results.values() for phase in ("prefill", "decode"))
    assert results["dense", 0.0, "auto"]["bytes"][0] == results["dense", 0.0, "auto"]["bytes"][1]
    table = (tmp_path / "serve_speed.md").read_text()
    assert str(tmp_path) not in table
    assert serve_speed("--formats", "torch-float32", "--table")["cells"] == content["cells"]
    assert (tmp_path / "serve_speed.md").read_text() == table


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer that llama.cpp takes."""
    tiny_model("llama-gqa").save_pretrained(tmp_path / "tiny")
    byte_level_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_llama_cpp_computes_what_the_package_does(tmp_path: Path, served: Path) -> None:
    pytest.importorskip("xllamacpp")
    from llama_library import LlamaLibrary
    from serve_engines import LlamaRunner

    model = load_model(served, device="cpu")
    export_gguf(model, tmp_path / "tiny.gguf", load_tokenizer(served), outtype="f32", check=False)
    runner = LlamaRunner(LlamaLibrary(), tmp_path / "tiny.gguf", threads=1)
    ids = random_tokens(2, 24)
    assert runner.model.perplexity(ids.tolist()) == pytest.approx(perplexity(model, ids), rel=1e-3)
    runner.prompt(ids[0].tolist())
    together = runner.model.forward([5]).copy()
    runner.tokens([*ids[0].tolist(), 5])
    runner.model.forget()
    runner.prompt(ids[0].tolist())
    assert runner.model.forward([5]) == pytest.approx(together, abs=1e-5)  # a cache that is emptied, and goes on
    runner.close()


def test_the_chain_is_walked_once(tmp_path: Path, served: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.delenv("FASP_VLLM_PYTHON", raising=False)
    sizes = ["--seq-len", 16, "--sequences", 4, "--prompt", 12, "--tokens", 3, "--repeats", 1, "--threads", 1]
    options = ["--model", served, *sizes, "--types", "f16", "--text", "the", "--output-dir", tmp_path / "serve"]
    monkeypatch.setattr(sys, "argv", ["serve_chain.py", *map(str, options)])
    outputs = []
    for _ in range(2):
        runpy.run_path(str(BENCHMARKS / "serve_chain.py"), run_name="__main__")
        outputs.append(capsys.readouterr().out.splitlines())
    table = [line for line in outputs[0] if line.startswith("| llama.cpp")]
    assert [line.split(" | ")[2:4] for line in table] == [
        ["dense", "llama"],
        ["stock-20-auto", "llama"],
        ["adaptive-20-auto", "deci"],
    ]
    assert all(" | 40 of 40 | " in line for line in table)
    assert [line for line in outputs[1] if line.startswith("| llama.cpp")] == table
    assert "for llama.cpp" not in "".join(outputs[1])


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_flops_of_a_prompt_are_those_that_torch_counts(sparsity: float) -> None:
    from serve_engines import Shape

    model = tiny_model("llama-gqa", attn_implementation="eager")
    config = PruningConfig.paper(sparsity, attention="none", restoration="none")
    FASPPruner(config).prune(model, [random_tokens(4, 16)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=random_tokens(1, 24), logits_to_keep=1)
    shape = Shape.of(model)
    unseen = 4 * shape.queries * 24 * 23 // 2  # eager attention computes what the mask hides, too
    assert counter.get_total_flops() == shape.prompt_flops(24, 1) + unseen


def test_a_token_reads_all_weights_but_an_embedding_of_its_own(tmp_path: Path) -> None:
    from gguf import GGUFWriter
    from serve_engines import TorchRunner, bytes_per_token

    for tied, expected in ((True, 60), (False, 96)):
        writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
        for name, rows in ({"token_embd": 3, "blk.0.ffn_up": 2} | ({} if tied else {"output": 6})).items():
            writer.add_tensor(f"{name}.weight", numpy.zeros((rows, 3), dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert bytes_per_token(tmp_path / "tiny.gguf") == expected
    model = tiny_model("llama-gqa")
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    assert TorchRunner(model).bytes_per_token == sum(p.nbytes for p in model.parameters()) - table


def test_a_row_of_the_default_that_falls_short_is_marked() -> None:
    from serve_tables import speed_table

    row = {"name": "stock-20-auto", "kind": "stock", "multiple": "auto", "widths": [8, 16], "format": "f"}
    row |= {"flops": [5, 4], "bytes": [6, 5]}
    runs = {"prefill": [[3.0, 3.0], [5.0, 4.0], [6.0, 4.0]], "decode": [[1.0, 1.0]]}
    cells = speed_table([row | runs]).splitlines()[-1].split(" | ")
    assert cells[1:6] == ["8 … 16", "f", "1.25 (1.00 … 1.50)", "1.25", "1.00"]
    assert cells[6:] == ["1.00 (1.00 … 1.00)", "1.20", "**0.83** |"]
    assert "**" not in speed_table([row | runs | {"multiple": 1}])


def test_the_front_holds_what_no_smaller_file_is_as_good_as() -> None:
    from serve_tables import on_front, size_table

    rows = [{"file": size, "perplexity": value} for size, value in ((100, 12.0), (90, 11.0), (80, 15.0), (80, 16.0))]
    assert [on_front(row, rows) for row in rows] == [False, True, True, False]
    table = size_table([row | {"name": "stock", "format": "f"} for row in rows]).splitlines()
    assert [line.endswith("| yes |") for line in table[2:]] == [True, False, True, False]  # the smallest file first


def test_runs_take_turns() -> None:
    from serve_engines import in_turn

    calls: list[str] = []
    seconds = in_turn([lambda: calls.append("dense"), lambda: calls.append("pruned")], 2)
    assert calls == ["dense", "pruned"] * 3  # the first pair is for warmth
    assert [len(pair) for pair in seconds] == [2, 2]


def test_what_time_goes_with_is_read_off_models_of_several_widths() -> None:
    from serve_tables import proportional

    works = (0.9, 0.8, 0.7)  # of dense; three quarters of the time shrink with them
    rows = [
        {"kind": "stock", "multiple": "auto", "flops": [1, work], "prefill": [[1.0, 0.25 + 0.75 * work]]}
        for work in works
    ]
    assert proportional(rows, "prefill") == pytest.approx(0.75)
    assert proportional([rows[0] | {"kind": "dense"}], "prefill") is None
