"""``fasp prune`` on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasp_lightning import load_pruned
from fasp_lightning.cli import measured
from fasp_lightning.cli.console import PruningProgress
from fasp_lightning.pruning.perplexity import PerplexityResult, perplexity
from fasp_lightning.pruning.progress import ProgressEvent
from fasp_lightning.structure.plan import apply_plan
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokens import token_batches


def report_of(folder: Path) -> dict:
    return json.loads((folder / "fasp_report.json").read_text())


def test_result_is_an_ordinary_smaller_model(prune, tiny_folder, tmp_path: Path) -> None:
    assert prune(tiny_folder("llama-gqa")).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert 0 < model.config.intermediate_size < 48
    assert model.num_parameters() == report_of(tmp_path / "pruned")["parameters_after"]
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").decode([5, 6]) != ""


def test_table_holds_the_figures(prune, tiny_folder, tmp_path: Path) -> None:
    out = prune(tiny_folder("llama-gqa")).out
    report = report_of(tmp_path / "pruned")
    for name in ("parameters_before", "parameters_after"):
        assert f"{report[name]:,}" in out
    for name in ("sparsity", "sparsity_total"):
        assert f"{100 * report[name]:.2f} %" in out
    assert re.search(r"sparsity of the blocks, 20\.00 % asked", out)
    (text,) = report["evaluation"]
    for when in ("before", "after"):
        assert f"{text[when]['perplexity']:.3f}" in out
    assert re.search(r"topics \(test\)[\s\S]*predicted tokens .* 60 [\s\S]*seq_len .* 16 ", out)
    assert re.search(r"seconds to prune .* \d+\.\d", out)
    assert re.search(r"peak memory, process .* \d+\.\d\d GiB", out)


@pytest.mark.usefixtures("drawn")
def test_the_model_card_has_the_figures(prune, tiny_folder, tmp_path: Path) -> None:
    prune(folder := tiny_folder("llama-gqa"))
    card, report = ModelCard.load(tmp_path / "pruned" / "README.md"), report_of(tmp_path / "pruned")
    (result,), (text,) = card.data.eval_results, report["evaluation"]
    assert result.metric_value == pytest.approx(text["after"]["perplexity"], abs=1e-4)
    assert result.dataset_args == {"seq_len": 16, "predicted_tokens": 60}
    assert "Computed in float32 on cpu" in card.text
    assert (tmp_path / "pruned" / "pruning.png").is_file()
    told = card.content + json.dumps(report)
    assert str(folder.parent) not in told


def test_reported_perplexities_are_those_of_the_models(prune, tiny_folder, tmp_path, tiny_tokenizer) -> None:
    folder = tiny_folder("opt")
    prune(folder)
    text = TextConfig(split="test", seq_len=16, sequences=4, batch_size=2)
    batches = token_batches(text, tiny_tokenizer)
    (found,) = report_of(tmp_path / "pruned")["evaluation"]
    assert found["before"]["perplexity"] == pytest.approx(perplexity(tiny_model("opt"), batches))
    assert found["after"]["perplexity"] == pytest.approx(perplexity(load_pruned(tmp_path / "pruned"), batches))
    assert found["after"]["tokens"] == 4 * 15


def test_texts_stand_side_by_side_with_their_domains(prune, tiny_folder, tmp_path: Path) -> None:
    out = prune(tiny_folder("opt"), "--other_text", "builtin:docstrings").out
    assert re.search(r"topics \(test\) .* docstrings \(test\)", out)
    assert re.search(r"source .* as calibrated .* another", out)
    found = report_of(tmp_path / "pruned")["evaluation"]
    assert [(text["name"], text["domain"]) for text in found] == [
        ("topics (test)", "calibrated"),
        ("docstrings (test)", "other"),
    ]


def test_text_named_as_other_is_of_another_domain_wherever_it_lies(prune, tiny_folder, tmp_path, text) -> None:
    beside = tmp_path / "beside.txt"
    beside.write_text(text.read_text()[::-1])
    source = ["--calibration.source", text, "--evaluation", f"[{{source: {beside}, seq_len: 16, sequences: 4}}]"]
    prune(tiny_folder("opt"), *source, "--other_text", beside)
    domains = [found["domain"] for found in report_of(tmp_path / "pruned")["evaluation"]]
    assert domains == ["calibrated", "other"]


@pytest.mark.parametrize(
    ("option", "told"), [("builtin:topics", "--other_text"), ("builtin:docstrings", "--evaluation")]
)
def test_figures_of_one_domain_alone_are_told(prune, tiny_folder, option: str, told: str) -> None:
    outcome = prune(tiny_folder("opt"), "--calibration.source", option, "--compare_unrestored", "false")
    assert outcome.code == 0
    assert told in outcome.err
    assert "the source of the calibration text" in " ".join(outcome.err.split())


def test_unrestored_figure_is_that_of_the_same_columns_with_the_old_weights(
    prune, tiny_folder, tmp_path: Path, tiny_tokenizer
) -> None:
    folder = tiny_folder("llama")
    out = prune(folder).out
    model = apply_plan(tiny_model("llama"), load_pruned(tmp_path / "pruned").fasp_plan)
    batches = token_batches(TextConfig(split="test", seq_len=16, sequences=4, batch_size=2), tiny_tokenizer)
    (found,) = report_of(tmp_path / "pruned")["evaluation"]
    assert found["unrestored"]["perplexity"] == pytest.approx(perplexity(model, batches))
    assert found["unrestored"]["perplexity"] != pytest.approx(found["after"]["perplexity"], rel=1e-4)
    assert f"{found['unrestored']['perplexity']:.3f}" in out


@pytest.mark.parametrize(
    "options", [["--compare_unrestored", "false"], ["--pruning.restoration", "none"]], ids=lambda options: options[0]
)
def test_nothing_is_compared_without_need(prune, tiny_folder, tmp_path: Path, options: list[str]) -> None:
    assert "nothing restored" not in prune(tiny_folder("opt"), *options).out
    (found,) = report_of(tmp_path / "pruned")["evaluation"]
    assert found["unrestored"] is None


def test_restoration_that_does_harm_is_warned_of(prune, tiny_folder, tmp_path: Path, monkeypatch) -> None:
    harmless = PerplexityResult(1.0, 0.0, 60, 4, 16, 1.0, 60.0)
    monkeypatch.setattr(measured, "_unrestored", lambda pruned, model, texts: [harmless for _ in texts])
    outcome = prune(tiny_folder("llama"))
    assert "warning: restoration raised the perplexity of topics (test)" in " ".join(outcome.err.split())
    assert any(message.startswith("restoration raised") for message in report_of(tmp_path / "pruned")["warnings"])


def test_loaders_and_reload_are_told(prune, tiny_folder) -> None:
    out = prune(tiny_folder("llama-gqa")).out
    assert "form stock" in out
    assert "reloaded with stock AutoModelForCausalLM: the logits are the same" in out
    assert re.search(r"transformers AutoModelForCausalLM .* yes", out)


def test_compact_form_is_checked_with_its_own_loader(prune, tiny_folder, tmp_path: Path) -> None:
    out = prune(tiny_folder("llama"), "--form", "compact").out
    assert "reloaded with fasp_lightning.load_pruned: the logits are the same" in out
    assert re.search(r"transformers AutoModelForCausalLM .* no ", out)
    assert load_pruned(tmp_path / "pruned").fasp_plan.blocks


def test_zero_filled_form_loads_anywhere(prune, tiny_folder, tmp_path: Path) -> None:
    assert "form zero_filled" in prune(tiny_folder("llama"), "--pruning.attention", "value_dims").out
    stock, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), load_pruned(tmp_path / "pruned")
    torch.testing.assert_close(stock(random_tokens()).logits, ours(random_tokens()).logits)


def test_without_verification_nothing_is_claimed(prune, tiny_folder) -> None:
    assert "reloaded" not in prune(tiny_folder("opt"), "--verify", "false").out


def test_prompt_is_continued_before_and_after(prune, tiny_folder) -> None:
    out = prune(tiny_folder("opt"), "--prompt", "Hello [bold]you", "--new_tokens", 4).out
    assert re.search(r"prompt:  Hello \[bold\]you\nbefore: .*\nafter: ", out)


def test_progress_tells_block_phase_and_time_left(prune, tiny_folder) -> None:
    assert re.search(r"pruning: block \d/2, \w+, about \d+:\d\d left", prune(tiny_folder("opt")).err)


def test_time_left_does_not_count_what_came_before(capsys, monkeypatch) -> None:
    """Own text took 100 s, each unit takes one."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with PruningProgress() as progress:
        now[0] = 100.0
        for done in range(1, 102):
            progress(ProgressEvent(0, 2, "apply", done, 101))
            now[0] += 1
    assert re.findall(r"about (\S+) left", capsys.readouterr().err)[:2] == ["1:30", "1:20"]


def test_pruned_folder_is_pruned_further(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--output_dir", tmp_path / "first")
    outcome = prune(tmp_path / "first", "--pruning.sparsity", 0.4)
    assert outcome.code == 0
    once, twice = report_of(tmp_path / "first"), report_of(tmp_path / "pruned")
    told = f"already pruned by {100 * once['sparsity']:.2f} % of its blocks' linear parameters"
    assert told in " ".join(outcome.err.split())
    assert twice["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert twice["parameters_before"] == once["parameters_after"]
    again = load_pruned(tmp_path / "pruned")
    assert again.num_parameters() == twice["parameters_after"]


def test_pruned_folder_cannot_grow_back(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--pruning.sparsity", 0.3, "--output_dir", tmp_path / "first")
    outcome = prune(tmp_path / "first", "--pruning.sparsity", 0.1)
    assert outcome.code == 2
    assert "pruned already, got 0.1" in outcome.err


def test_null_output_saves_nothing(prune, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("opt")
    outcome = prune(folder, "--output_dir", "null")
    assert outcome.code == 0
    assert "will not be saved" in outcome.err
    assert list(tmp_path.iterdir()) == [folder]


def test_overwrite_replaces_a_pruned_model(prune, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("opt")
    prune(folder)
    assert prune(folder, "--overwrite", "--pruning.sparsity", 0.3).code == 0
    assert report_of(tmp_path / "pruned")["sparsity"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("seeds", "same"), [((1, 1), True), ((1, 2), False)])
def test_seed_decides_the_calibration_sample(prune, tiny_folder, tmp_path: Path, seeds, same: bool) -> None:
    folder = tiny_folder("opt")
    plans = []
    for seed in seeds:
        prune(folder, "--seed", seed, "--overwrite")
        plans.append(load_pruned(tmp_path / "pruned").fasp_plan)
    assert (plans[0] == plans[1]) is same


def test_requested_dtype_is_saved(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--dtype", "bf16")
    assert load_pruned(tmp_path / "pruned").dtype == torch.bfloat16


def test_few_tokens_are_warned_of_with_both_numbers(prune, tiny_folder) -> None:
    outcome = prune(tiny_folder("opt"), "--calibration.sequences", 2)
    assert outcome.code == 0
    assert "warning: 32 calibration tokens are fewer than the 48 columns" in " ".join(outcome.err.split())


def test_without_evaluation_no_perplexity_is_printed(prune, tiny_folder) -> None:
    outcome = prune(tiny_folder("opt"), "--evaluation", "[]")
    assert outcome.code == 0
    assert "perplexity" not in outcome.out


def test_table_compares_the_files(prune, tiny_folder, tmp_path: Path) -> None:
    folder = tiny_folder("llama-gqa", dtype=torch.bfloat16)
    run = prune(folder, "--dtype", "float32")
    before, after = ((where / "model.safetensors").stat().st_size for where in (folder, tmp_path / "pruned"))
    assert after < before
    change = f"{100 * (after / before - 1):+.2f} %"
    assert re.search(rf"size on disk, bfloat16 .* 0\.\d MB .* 0\.\d MB .* {re.escape(change)}", run.out)
    assert "in float32 on cpu" in run.err
    assert "saved in bfloat16" in run.err
    assert "the logits are the same but for the rounding to bfloat16" in run.out


def test_requested_dtype_of_the_files_is_saved(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--save_dtype", "float16")
    assert load_pruned(tmp_path / "pruned").dtype == torch.float16
