"""fasp schedule writes what can be edited and run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import FFN, HIDDEN, tiny_model

from fasp_lightning import PruningConfig, PruningSchedule, load_pruned
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.structure.plan import plan_of

EVENTS = [{"step": 0, "sparsity": 0.1}, {"step": 1, "sparsity": 0.2}, {"epoch": 1, "sparsity": 0.3}]


@pytest.fixture
def config(tmp_path: Path, tiny_folder) -> Any:
    """``config(schedule)`` writes a config whose last callback prunes by it."""

    def write(schedule: Any = EVENTS, model: str = "opt", **options: Any) -> Path:
        callback = {"class_path": "FASPPruning", "init_args": {"schedule": schedule, **options}}
        callbacks = [{"class_path": "LearningRateMonitor"}, callback]
        path = tmp_path / "mine.yaml"
        content = {"model": {"name_or_path": str(tiny_folder(model))}, "trainer": {"callbacks": callbacks}}
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_dump_is_the_schedule(fasp, config) -> None:
    rule = {"kind": "cubic", "final_sparsity": 0.3, "every_n_steps": 10, "rounds": 3, "start_step": 5}
    outcome = fasp("schedule", "-c", config(rule))
    assert outcome.code == 0, outcome.err
    assert PruningSchedule.parse(yaml.safe_load(outcome.out)) == PruningSchedule.parse(rule)


def test_dump_of_a_file_is_the_same_file(fasp, config, tmp_path: Path) -> None:
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(EVENTS))
    outcome = fasp("schedule", "-c", config(str(tmp_path / "events.yaml")))
    assert yaml.safe_load(outcome.out) == EVENTS


@pytest.mark.parametrize("model", ["opt", "llama-gqa"])
def test_comments_say_what_is_left(fasp, config, model: str) -> None:
    out = fasp("schedule", "-c", config(model=model, pruning={"attention": "value_dims"})).out
    left = [int(found.replace(",", "")) for found in re.findall(r"event \d: ([\d,]+) of", out)]
    plans = [
        decide_budget(tiny_model(model), PruningConfig(event["sparsity"], attention="value_dims")) for event in EVENTS
    ]
    assert left == [plan.parameters_after for plan in plans]
    widths = [int(found) for found in re.findall(r"ffn width \(\w+\): (\d+) in each block, of 48", out)]
    assert widths == [plan.pairs[0][1].after for plan in plans]
    assert len(re.findall(r"value width \(\w+\): \d+ in each block", out)) == len(EVENTS)


@pytest.mark.parametrize("balance", ["even", "free"])
def test_comments_say_where_sensitivity_decides(fasp, config, balance: str) -> None:
    settings = {"attention": "value_dims", "head_balance": balance, "allocation": "adaptive"}
    outcome = fasp("schedule", "-c", config(model="opt", pruning=settings))
    assert outcome.code == 0, outcome.err
    left = [int(found.replace(",", "")) for found in re.findall(r"event \d: ([\d,]+) of", outcome.out)]
    linear = decide_budget(tiny_model("opt"), PruningConfig(0.1)).linear_parameters
    total = sum(parameter.numel() for parameter in tiny_model("opt").parameters())
    assert left == [pytest.approx(total - event["sparsity"] * linear, abs=0.5) for event in EVENTS]
    assert outcome.out.count(", more or less as calibration decides, of ") == 2 * len(EVENTS)


def test_model_from_scratch_needs_no_name(fasp, config) -> None:
    model = {"model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}
    small = {**model, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    outcome = fasp("schedule", "-c", config(), "--model.name_or_path", "null", "--model.config", str(small))
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out) == EVENTS
    assert "a new opt model" in outcome.out


def test_no_weight_is_read(fasp, config, no_weights) -> None:
    assert fasp("schedule", "-c", config()).code == 0


def test_edited_file_is_run(fasp, config, tmp_path: Path, text: Path) -> None:
    dumped, exported = tmp_path / "dumped.yaml", tmp_path / "exported"
    written = config(EVENTS[:2], calibration_sequences=4, export_to=str(exported))
    outcome = fasp("schedule", "-c", written, "--output", dumped)
    assert (outcome.code, outcome.out) == (0, "")
    dumped.write_text(dumped.read_text().replace("sparsity: 0.2", "sparsity: 0.4"))
    options = {
        "data.source": text,
        "data.seq_len": 16,
        "data.batch_size": 2,
        "data.cache_dir": tmp_path / "cache",
        "trainer.callbacks.schedule": dumped,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
    }
    outcome = fasp("fit", "-c", written, *(f"--{name}={value}" for name, value in options.items()))
    assert outcome.code == 0, outcome.err
    pruned = load_pruned(exported)
    kept = plan_of(pruned).blocks[0]["fc2"].kept
    assert len(kept) == decide_budget(tiny_model("opt"), PruningConfig(0.4)).pairs[0][1].after


BAD = {
    "no FASPPruning": (("--trainer.callbacks", "null"), "must hold one FASPPruning with a schedule, got 0"),
    "two of them": (
        ("--trainer.callbacks+=FASPPruning", "--trainer.callbacks.schedule={kind: one_shot, sparsity: 0.1}"),
        "must hold one FASPPruning with a schedule, got 2",
    ),
    "sparsity out of reach": (
        ("--trainer.callbacks.schedule=[{step: 0, sparsity: 0.2}, {step: 1, sparsity: 0.95}]",),
        "schedule entry 1, {'step': 1, 'sparsity': 0.95}: sparsity must be at most",
    ),
    "sparsity that falls": (
        ("--trainer.callbacks.schedule=[{step: 0, sparsity: 0.2}, {step: 1, sparsity: 0.1}]",),
        "schedule entry 1, {'step': 1, 'sparsity': 0.1}: sparsity must exceed the 0.2",
    ),
    "no such option": (("--nonsense", "1"), "see fasp schedule --help"),
}


def test_event_that_changes_no_width_is_said(fasp, config) -> None:
    events = "--trainer.callbacks.schedule=[{step: 0, sparsity: 0.2}, {step: 1, sparsity: 0.2001}]"
    outcome = fasp("schedule", "-c", config(), events)
    assert outcome.code == 0
    assert "schedule entries that change no width are passed over: 1 (0.2001);" in outcome.err
    assert "as before it: passed over" in outcome.out


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_mistake_is_one_line(fasp, config, argv: tuple[str, ...], words: str) -> None:
    outcome = fasp("schedule", "-c", config(), *argv)
    assert outcome.code == 2
    assert words in outcome.err.strip().splitlines()[-1]
