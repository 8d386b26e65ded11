"""``fasp plan``: from the config alone, and what it says comes true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fasp_lightning.cli.jobs import ModelConfig, PruneJob
from fasp_lightning.cli.model_setup import set_up
from fasp_lightning.pruning.config import PruningConfig

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
HEAVY = ("lightning", "pytorch_lightning", "peft", "datasets")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with the config of a 70B model, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def test_70b_config_needs_no_weights(fasp, large: Path) -> None:
    outcome = fasp("plan", "--model.name_or_path", large, "--device", "cpu", "--dtype", "bf16")
    assert outcome.code == 0
    assert "68,976,648,192" in outcome.out  # parameters of Llama-2-70B
    assert re.search(r"size in bfloat16 .* 137,953\.3 MB", outcome.out)
    assert re.search(r"KV cache per token in bfloat16 .* 327\.7 kB", outcome.out)  # 2 · 80 · 8 · 128 · 2 bytes
    assert re.search(r"sparsity of the blocks, 20\.00 % asked .* 19\.85 %", outcome.out)
    assert re.search(r"down_proj .* 80 .* 28672 .* 21760", outcome.out)
    assert re.search(r"transformers AutoModelForCausalLM .* yes", outcome.out)
    assert re.search(r"hidden states and consumer inputs .* 3\.44 GiB", outcome.out)  # 40960 · (2 · 8192 + 28672) · 2
    assert "on 40,960 tokens of topics (calibration), own text" in outcome.out  # 64 · 512 and 8192


def test_experts_are_told_apart_from_what_a_token_meets(fasp, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_key_value_heads=4, head_dim=128
    )
    config.save_pretrained(tmp_path)
    outcome = fasp("plan", "--model.name_or_path", tmp_path, "--device", "cpu", "--pruning.sparsity", 0.25)
    assert outcome.code == 0
    assert re.search(r"parameters .* 30,532,122,624", outcome.out)  # of Qwen3-30B-A3B
    assert re.search(r"active parameters.* 3,353,032,704", outcome.out)
    assert re.search(r"down_proj .* experts .* 48 .* 128 x 768 .* 128 x 576", outcome.out)


def test_kernels_that_take_the_width(fasp, large: Path) -> None:
    outcome = fasp("plan", "--model.name_or_path", large, "--device", "cpu", "--dtype", "bf16", "--tensor_parallel", 5)
    assert "FFN width 21,760: does it divide?" in outcome.out
    assert re.search(r"llama\.cpp K-quants .* 256 .* yes", outcome.out)
    assert re.search(r"Marlin .*5 ranks .* 640 .* yes", outcome.out)
    outcome = fasp("plan", "--model.name_or_path", large, "--device", "cpu", "--dtype", "bf16", "--tensor_parallel", 8)
    assert re.search(r"Marlin .*8 ranks .* 1024 .* no", outcome.out)
    assert re.search(r"tensor parallel, 8 ranks .* 8 .* yes", outcome.out)


def test_learned_columns_show_what_they_cost(fasp, large: Path) -> None:
    outcome = fasp("plan", "--model.name_or_path", large, "--device", "cpu", "--pruning.score", "learned",
                   "--pruning.learning.steps", 50)  # fmt: skip
    assert "columns are learned in 50 steps of 1,024 tokens" in outcome.out
    assert "the time of 182,272 tokens forward" in outcome.out  # 3 · 50 · 1024, and 7 looks at 4096


def test_fewer_kv_groups_show_in_widths_and_cache(fasp, large: Path) -> None:
    groups = ("--pruning.attention", "kv_groups", "--pruning.sparsity", 0.3)
    outcome = fasp("plan", "--model.name_or_path", large, "--device", "cpu", "--dtype", "bf16", *groups)
    assert outcome.code == 0
    assert re.search(r"KV cache per token in bfloat16 .* 327\.7 kB .* 163\.8 kB", outcome.out)
    assert re.search(r"sparsity of the blocks, 30\.00 % asked .* 30\.15 %", outcome.out)
    assert re.search(r"o_proj .* groups .* 80 .* 8 .* 4 ", outcome.out)  # 6 · 8 query heads do not divide 8192
    assert re.search(r"transformers AutoModelForCausalLM .* yes .* head counts and head size", outcome.out)


def test_plan_loads_no_heavy_library(large: Path) -> None:
    code = (
        "import sys; from fasp_lightning.cli.main import main; "
        f"code = main(['plan', '--model.name_or_path', {str(large)!r}, '--dtype', 'fp32']); "
        f"sys.exit(code or ' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


VALUE_DIMS = [(name, "value_dims") for name in ("opt", "llama-gqa", "phi3", "gpt2", "bloom")]


@pytest.mark.parametrize(("name", "attention"), [*VALUE_DIMS, ("phi3", "kv_groups")])
def test_plan_agrees_with_the_pruning(prune, tiny_folder, tmp_path: Path, name: str, attention: str) -> None:
    folder = tiny_folder(name)
    job = PruneJob(ModelConfig(str(folder)), PruningConfig(0.35, attention=attention), device="cpu")
    planned = set_up(job).budget
    prune(folder, "--pruning.sparsity", 0.35, "--pruning.attention", attention, "--evaluation", "[]")
    report = json.loads((tmp_path / "pruned" / "fasp_report.json").read_text())
    assert planned.parameters_after == report["parameters_after"]
    assert planned.sparsity == report["sparsity"]
    cut = [pair.after for block in planned.pairs for pair in block if pair.after < pair.before]
    assert cut == [pair["width_after"] for pair in report["pairs"]]


@pytest.mark.parametrize("form", ["stock", "compact", "zero_filled"])
def test_plan_of_a_pruned_folder_starts_from_what_is_left(prune, fasp, tiny_folder, tmp_path, form: str) -> None:
    attention = "none" if form == "stock" else "value_dims"
    prune(tiny_folder("llama"), "--form", form, "--pruning.attention", attention, "--pruning.sparsity", 0.2)
    report = json.loads((tmp_path / "pruned" / "fasp_report.json").read_text())
    outcome = fasp("plan", "--model.name_or_path", tmp_path / "pruned", "--pruning.sparsity", 0.4)
    assert outcome.code == 0
    assert "already pruned" in outcome.err
    assert re.search(rf"parameters .* {report['parameters_after']:,} ", outcome.out)


def test_plan_of_a_folder_that_stock_code_saved_again_is_that_of_the_folder(prune, fasp, tiny_folder, tmp_path) -> None:
    prune(tiny_folder("llama"), "--pruning.sparsity", 0.2)
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").save_pretrained(tmp_path / "others")
    folders = (tmp_path / "pruned", tmp_path / "others")
    ours, theirs = (fasp("plan", "--model.name_or_path", folder, "--pruning.sparsity", 0.4) for folder in folders)
    assert "already pruned" in theirs.err
    assert theirs.out.replace("others", "pruned") == ours.out


def test_size_of_different_ffn_widths_is_at_most_that_of_the_original_ones(tiny_folder) -> None:
    model = ModelConfig(str(tiny_folder("llama")))
    pruning = PruningConfig(0.2, attention="none", allocation="adaptive")
    setups = {form: set_up(PruneJob(model, pruning, form=form, device="cpu")) for form in ("auto", "compact")}
    assert setups["auto"].form == "zero_filled"
    assert setups["auto"].stored_bytes == 4 * setups["auto"].budget.parameters_before
    assert setups["compact"].stored_bytes == 4 * setups["compact"].budget.parameters_after


@pytest.mark.parametrize("form", ["compact", "zero_filled"])
@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_size_on_disk_is_that_of_the_saved_weights(prune, tiny_folder, tmp_path, name: str, form: str) -> None:
    folder = tiny_folder(name)
    prune(folder, "--form", form, "--pruning.attention", "value_dims", "--evaluation", "[]")
    content = (tmp_path / "pruned" / "model.safetensors").read_bytes()
    weights = len(content) - 8 - int.from_bytes(content[:8], "little")  # behind the header and its length
    pruning = PruningConfig(attention="value_dims")
    setup = set_up(PruneJob(ModelConfig(str(folder)), pruning, form=form, device="cpu"))
    assert setup.stored_bytes == weights


def test_plan_says_which_loaders_will_refuse(fasp, tiny_folder) -> None:
    folder = tiny_folder("llama")
    out = fasp("plan", "--model.name_or_path", folder, "--form", "compact").out
    assert re.search(r"transformers AutoModelForCausalLM .* no ", out)


def test_plan_takes_the_options_of_prune(fasp, tiny_folder) -> None:
    outcome = fasp("plan", "-c", "demo", "--model.name_or_path", tiny_folder("llama"))
    assert outcome.code == 0


def test_unreachable_sparsity_is_refused(fasp, large: Path) -> None:
    outcome = fasp("plan", "--model.name_or_path", large, "--pruning.sparsity", 0.9)
    assert outcome.code == 2
    assert re.fullmatch(r"fasp: sparsity must be at most 0\.8\d+ with the attention kept, got 0\.9\n", outcome.err)
