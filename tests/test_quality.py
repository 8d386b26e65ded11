"""The benchmark of quality, on tiny models and texts."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_tokens, tiny_model
from tiny_text import words

from fasp_lightning import FASPPruner, PruningConfig, perplexity
from fasp_lightning.checkpoints.loading import load_model
from fasp_lightning.checkpoints.tasks.answers import differences, from_dict
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.resolve import linear_parameters, parameter_count
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokens import token_batches

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
BATCHES = [random_tokens(4, 40, seed=seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch, seeded: None) -> None:
    """The script finds the modules beside it, as it does when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.set_num_threads(1)


@pytest.fixture
def quality(tmp_path: Path, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """``quality(…)`` runs the script, later options winning, and returns its JSON."""
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(words(60, seed)))
    folder = tiny_folder("llama-gqa")

    def run(*argv: object) -> dict[str, Any]:
        texts = ["--calibration", tmp_path / "calibration.txt", "--evaluation", tmp_path / "evaluation.txt"]
        sizes = ["--seq-len", 16, "--sequences", 8, "--evaluation-sequences", 4, "--seeds", 0, "--sparsities", 0.2]
        options = ["--model", folder, *texts, *sizes, "--device", "cpu", "--output-dir", tmp_path / "out", *argv]
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, options)])
        runpy.run_path(str(BENCHMARKS / "quality.py"), run_name="__main__")
        return json.loads((tmp_path / "out" / "quality.json").read_text())

    return run


def result_of(content: dict[str, Any], method: str) -> dict[str, Any]:
    """The one result of a method."""
    (found,) = (cell["result"] for cell in content["cells"].values() if cell["settings"]["method"] == method)
    return found


def test_every_method_sparsity_and_seed_has_a_cell_and_the_table_their_means(quality, tmp_path: Path) -> None:
    methods = ("magnitude", "flap", "flap-uniform", "paper", "wanda")
    content = quality("--methods", *methods, "--sparsities", 0.1, 0.3, "--seeds", 0, 1)
    assert len(content["cells"]) == 1 + 5 * 2 * 2
    (row,) = (row for row in content["rows"] if (row["method"], row["sparsity"]) == ("flap", 0.3))
    cells = [cell for cell in content["cells"].values() if cell["settings"].get("sparsity") == 0.3]
    found = {name: [c["result"] for c in cells if c["settings"]["method"] == name] for name in ("flap", "paper")}
    dense = result_of(content, "dense")["perplexity"]["evaluation.txt"]
    damage = {name: [c["perplexity"]["evaluation.txt"] - dense for c in results] for name, results in found.items()}
    figures = row["texts"]["evaluation.txt"]
    assert figures["damage"][0] == pytest.approx(sum(damage["flap"]) / 2)
    assert figures["ratio"][0] == pytest.approx(sum(f / p for f, p in zip(*damage.values(), strict=True)) / 2)
    table = (tmp_path / "out" / "quality.md").read_text()
    assert all(table.count(f"\n| {name} |") == 2 for name in methods)
    assert (tmp_path / "out" / "quality.png").stat().st_size > 0


def test_table_says_how_it_was_made_without_paths(quality, tmp_path: Path) -> None:
    quality("--methods", "paper")
    table = (tmp_path / "out" / "quality.md").read_text()
    assert table.startswith(
        "```sh\npython examples/benchmarks/quality.py --model tiny-llama-gqa --calibration calibration.txt"
    )
    assert str(tmp_path) not in table
    assert re.search(r"\d+ CPU cores; float32 on cpu", table)


def test_figures_are_those_of_the_package(quality, tmp_path: Path, tiny_tokenizer) -> None:
    content = quality("--methods", "paper", "--seeds", 7)
    model = load_model(tmp_path / "tiny-llama-gqa", device="cpu")
    size = {"seq_len": 16, "batch_size": 4}
    calibration = TextConfig(str(tmp_path / "calibration.txt"), sequences=8, seed=7, **size)
    report = FASPPruner(PruningConfig.paper(0.2)).prune(model, token_batches(calibration, tiny_tokenizer))
    evaluation = token_batches(TextConfig(str(tmp_path / "evaluation.txt"), sequences=4, **size), tiny_tokenizer)
    found = result_of(content, "paper")
    assert found["perplexity"]["evaluation.txt"] == pytest.approx(perplexity(model, evaluation))
    assert (found["removed_blocks"], found["removed_all"]) == (report.sparsity, report.sparsity_total)
    assert found["calibration_tokens"] == 8 * 16


def test_finished_cells_are_not_computed_again(quality, tmp_path: Path) -> None:
    content = quality("--methods", "paper")
    result_of(content, "paper")["seconds"] = 12345.0
    (tmp_path / "out" / "quality.json").write_text(json.dumps(content))
    again = quality("--methods", "magnitude", "paper")
    assert result_of(again, "paper")["seconds"] == 12345.0
    assert result_of(again, "magnitude")["seconds"] < 12345.0
    assert result_of(quality("--methods", "paper", "--fresh"), "paper")["seconds"] < 12345.0


def test_a_table_of_what_is_there_computes_nothing(quality, tmp_path: Path) -> None:
    quality("--methods", "paper", "--seeds", 0, 1)
    before = quality("--methods", "magnitude")["cells"]
    content = quality("--methods", "magnitude", "paper", "--seeds", 0, 1, 2, "--table")
    assert content["cells"] == before
    assert [(row["method"], row["seeds"]) for row in content["rows"]] == [("magnitude", [0]), ("paper", [0, 1])]
    assert re.search(r"\| paper \| .* \| 0, 1 \|", (tmp_path / "out" / "quality.md").read_text())
    with pytest.raises(SystemExit, match=r"quality\.json must hold a cell of these settings, got none; leave --table"):
        quality("--methods", "wanda", "--table")


def test_tasks_stand_beside_perplexity_for_methods_and_saved_models(quality, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = tmp_path / "questions"
    asked.mkdir()
    for name in ("piqa", "winogrande", "arc_easy"):
        lines = [{"context": f"{c}{name[0]} is", "choices": [" a", " bcde", " cd"], "label": 1} for c in "stuvwxyz"]
        (asked / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = tmp_path / "saved"
    tiny_model("llama-gqa", seed=1).save_pretrained(saved)
    more = ["--tasks", asked, "--methods", "paper", "paper-no-restoration", "--models", f"other={saved}"]
    content = quality(*more)
    answers = {name: from_dict(result_of(content, name)["answers"]) for name in ("dense", "paper", "saved")}
    table = (tmp_path / "out" / "quality.md").read_text()
    for method, row in (("paper", r"paper \| 0\.2"), ("saved", r"other \| ")):
        apart = differences(answers[method], answers["dense"])
        mean, rest = apart["mean"].signed(), apart["mean without winogrande"].signed()
        assert re.search(rf"\n\| {row} .*\| {re.escape(mean)} \|.*\| {re.escape(rest)} \|", table)
    assert "least squares of paper at 0.2 (seed 0), against the same without: mean" in table
    again = quality(*more)
    assert again["cells"] == content["cells"]


@pytest.mark.parametrize(
    "change",
    [
        ["--sequences", 6],
        ["--seeds", 1],
        ["--evaluation-sequences", 5],
        ["--evaluation-sequences", 0],
        ["--dtype", "bfloat16"],
        ["--seq-len", 14],
    ],
    ids=lambda change: " ".join(map(str, change)),
)
def test_a_changed_setting_takes_no_old_cell(quality, change: list[object]) -> None:
    before = set(quality("--methods", "paper")["cells"])
    after = quality("--methods", "paper", *change)["cells"]
    assert before < set(after)
    assert sum(cell["settings"]["method"] == "paper" for cell in after.values()) == 2


def test_another_model_takes_no_old_cell(quality, tmp_path: Path) -> None:
    before = quality("--methods", "paper")
    tiny_model("llama-gqa", seed=1).save_pretrained(tmp_path / "tiny-llama-gqa")  # of the same name
    assert len(quality("--methods", "paper")["cells"]) == 2 * len(before["cells"])


def test_text_that_calibrates_is_not_evaluated(quality, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"must not share text .* got calibration\.txt"):
        quality("--evaluation", tmp_path / "calibration.txt")


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt2"])
def test_flap_keeps_the_mean_of_what_a_consumer_gives(family: str) -> None:
    from flap import flap

    dense, pruned = tiny_model(family), tiny_model(family)
    flap(pruned, BATCHES, 0.2, adaptive=False)  # the first FFN's inputs are as before
    before, after = first_ffn_output(dense), first_ffn_output(pruned)
    torch.testing.assert_close(after.mean(0), before.mean(0), atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 1e-2


def first_ffn_output(model: torch.nn.Module) -> torch.Tensor:
    """(tokens, hidden) output of the first block's FFN consumer."""
    spec, found = spec_for(model), []
    path = next(pair.consumer for pair in spec.pairs if pair.kind == "ffn")
    consumer = model.get_submodule(spec.layers)[0].get_submodule(path)
    hook = consumer.register_forward_hook(lambda module, inputs, output: found.append(output.detach().flatten(0, -2)))
    for batch in BATCHES:
        model(batch)
    hook.remove()
    return torch.cat(found)


def test_flap_scores_by_variance_times_squared_weights() -> None:
    from flap import consumers_of, observe

    model = tiny_model("llama-gqa")
    consumer = consumers_of(model, heads=False)[0]
    inputs = []
    consumer.pair.consumer.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach().flatten(0, -2))
    )
    observe(model, [consumer], BATCHES)
    variance = torch.cat(inputs).double().var(0, correction=0)
    torch.testing.assert_close(consumer.metric(), variance * consumer.pair.weight.double().norm(dim=0) ** 2)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_adaptive_flap_comes_near_the_sparsity_and_says_what_is_gone(family: str) -> None:
    from flap import flap

    model = tiny_model(family)
    linear, total = linear_parameters(model, spec_for(model)), parameter_count(model)
    half = 32 * 32 / linear  # of the dearest unit, one of two KV heads
    blocks, everything = flap(model, BATCHES, 0.3)
    assert blocks == pytest.approx(0.3, abs=half)
    assert everything == pytest.approx(blocks * linear / total)
    zeros = sum(int((weight == 0).sum()) for name, weight in model.named_parameters() if weight.ndim == 2)
    assert zeros > 0.05 * linear  # the consumers' columns
