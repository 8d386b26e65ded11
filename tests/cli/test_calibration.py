"""What ``fasp prune`` calibrates on: one text, a mix of several, the model's own, or that alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_pruning import basic

from fasp_lightning import FASPPruner, PruningConfig, load_pruned
from fasp_lightning.cli.checks import texts_of
from fasp_lightning.cli.jobs import ModelConfig, PruneJob
from fasp_lightning.cli.texts import Calibration, Text, calibration_name, single_source
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.text.config import TextConfig
from fasp_lightning.text.tokens import calibration_batches

TEXT = TextConfig(split="calibration", seq_len=16, sequences=8)
OTHER = TextConfig("builtin:docstrings", split="calibration", seq_len=16, sequences=6, batch_size=2, token_weight=0.5)
HALF = "{source: builtin:docstrings, seq_len: 16, sequences: 6, batch_size: 2, token_weight: 0.5}"
MIX = ("--calibration_mix", f"[{HALF}]")
OWN = ("--pruning.own_text.tokens", 64, "--pruning.own_text.seq_len", 16)
AGAIN = ("--calibration_mix", "[{seed: 1, seq_len: 16, sequences: 8}]")
QUICK = ("--evaluation", "[]", "--verify", "false")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fasp_report.json").read_text())


def in_python(batches: list[Any], config: PruningConfig) -> Any:
    model = tiny_model("opt")
    FASPPruner(config).prune(model, batches)
    return model


def assert_equal(folder: Path, model: Any) -> None:
    found = load_pruned(folder)
    assert found.fasp_plan == model.fasp_plan
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=1e-6)


def test_texts_are_mixed_in_with_their_weight(prune, tiny_folder, tmp_path, tiny_tokenizer) -> None:
    assert prune(tiny_folder("opt"), *MIX, *QUICK).code == 0
    expected = in_python(calibration_batches([TEXT, OTHER], tiny_tokenizer), basic())
    assert_equal(tmp_path / "pruned", expected)


def test_the_mix_is_told(prune, tiny_folder, tmp_path: Path) -> None:
    outcome = prune(tiny_folder("opt"), *MIX, *QUICK)
    for stream in (outcome.out, outcome.err):
        assert "topics (calibration), 0.5 x docstrings (calibration)" in " ".join(stream.replace("│", " ").split())
    assert "on 224 tokens of" in " ".join(outcome.err.split())
    told = report_of(tmp_path / "pruned")["calibration"]
    assert (told["source"], told["mix"][0]["source"]) == ("builtin:topics", "builtin:docstrings")
    assert told["mix"][0]["token_weight"] == 0.5


def test_one_text_is_told_as_before(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("opt"), *QUICK)
    told = report_of(tmp_path / "pruned")["calibration"]
    assert told["name"] == "topics (calibration)"
    filled = replace(TEXT, **TEXT.extent()._asdict())
    assert TextConfig(**{name: value for name, value in told.items() if name != "name"}) == filled


def test_chats_are_told_with_their_files(prune, tiny_folder, tmp_path: Path, caplog) -> None:
    folder, template = tiny_folder("opt"), "{% for one in messages %}{{ one.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": f"number {n} " * 9}]} for n in range(20)]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "LICENSE.txt").write_text("licence " * 900)
    (tmp_path / "chats" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = prune(folder, "--calibration.source", tmp_path / "chats", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "chats: 1 file: a.jsonl" in caplog.text
    assert "chat template makes text of the chats in messages" in caplog.text
    read = report_of(tmp_path / "pruned")["calibration"]["read"]
    assert read == {"documents": 20, "chats": 20, "files": "1 file: a.jsonl"}


def test_own_text_alone_needs_no_other(prune, tiny_folder, tmp_path: Path) -> None:
    alone = ("--calibration.source", "missing.txt", *OWN, "--pruning.own_text.share", 1)
    outcome = prune(tiny_folder("opt"), *alone, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "on 64 tokens of own text" in " ".join(outcome.err.split())
    report = report_of(tmp_path / "pruned")
    assert report["calibration"] == {"name": "own text"}
    assert report["tokens"] == 64
    own = OwnTextConfig(tokens=64, seq_len=16, share=1)
    assert_equal(tmp_path / "pruned", in_python([], basic(own_text=own)))


@pytest.mark.usefixtures("no_weights")
def test_mixed_in_text_that_would_not_be_read_is_refused(prune, tiny_folder) -> None:
    outcome = prune(tiny_folder("opt"), *MIX, *OWN, "--pruning.own_text.share", 1)
    assert outcome.code == 2
    assert "calibration_mix must be empty where pruning.own_text.share is 1, got 1 texts" in outcome.err


def test_own_text_is_kept_in_the_users_cache(prune, tiny_folder, tmp_path: Path, user_cache: Path) -> None:
    folder = tiny_folder("opt")
    for _ in range(2):
        assert prune(folder, *OWN, *QUICK, "--overwrite").code == 0
    (kept,) = (user_cache / "fasp_lightning" / "own_text").iterdir()
    assert kept.stat().st_size == 32 + 64 * 4
    other = ("--overwrite", "--pruning.own_text.seed", 1, "--pruning.own_text.cache_dir", "null")
    assert prune(folder, *OWN, *QUICK, *other).code == 0
    assert list((user_cache / "fasp_lightning" / "own_text").iterdir()) == [kept]


@pytest.mark.parametrize(
    ("options", "warned"),
    [((), True), (MIX, False), (OWN, False), (AGAIN, True)],
    ids=["one text", "mix", "own text", "the same source twice"],
)
def test_one_source_is_warned_of_once(prune, tiny_folder, tmp_path: Path, options, warned: bool) -> None:
    outcome = prune(tiny_folder("opt"), *options, *QUICK)
    assert outcome.code == 0
    assert " ".join(outcome.err.split()).count("warning: all calibration text is of one source, topics") == warned
    warnings = [text for text in report_of(tmp_path / "pruned")["warnings"] if "one source" in text]
    assert len(warnings) == warned
    assert all("--calibration_mix" in text and "--pruning.own_text" in text for text in warnings)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (
            ("--calibration_mix", "[{source: builtin:topics, split: test}]"),
            ("calibration and evaluation must not share text", "topics (test)"),
        ),
        (("--calibration_mix", "[{source: missing.txt, seq_len: 16}]"), ("missing.txt",)),
        (("--calibration.token_weight", "0"), ("token_weight must be positive and finite, got 0",)),
        (("--evaluation", "[{token_weight: 2}]"), ("token_weight must be 1 for all but calibration text, got 2",)),
        (("--pruning.own_text.share", "1.5"), ("fasp: own_text.share must be in (0, 1], got 1.5",)),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("-") else "",
)
def test_option_is_refused(prune, tiny_folder, tmp_path: Path, options, fragments) -> None:
    outcome = prune(tiny_folder("llama"), *options)
    assert outcome.code == 2, outcome
    assert all(fragment in outcome.err for fragment in fragments), outcome.err
    assert not (tmp_path / "pruned").exists()


def test_evaluate_refuses_a_weight(fasp, tiny_folder) -> None:
    outcome = fasp("evaluate", "--model.name_or_path", tiny_folder("opt"), "--evaluation", "[{token_weight: 0.5}]")
    assert outcome.code == 2
    assert "token_weight must be 1 for all but calibration text, got 0.5" in outcome.err


@pytest.mark.parametrize(("seeds", "same"), [((1, 1), True), ((1, 2), False)])
def test_seed_decides_on_mixed_in_texts_too(seeds, same: bool, tiny_tokenizer) -> None:
    found = []
    for seed in seeds:
        texts, _ = texts_of(PruneJob(ModelConfig("x"), seed=seed, calibration_mix=[OTHER]))
        found.append(calibration_batches(texts[1:], tiny_tokenizer)[0]["input_ids"].tolist())
    assert (found[0] == found[1]) is same


def test_plan_counts_all_calibration_text(fasp, tiny_folder) -> None:
    small = ("--calibration.seq_len", 16, "--calibration.sequences", 8)
    outcome = fasp("plan", "--model.name_or_path", tiny_folder("opt"), *small, *MIX, *OWN)
    assert outcome.code == 0
    assert "on 288 tokens of topics (calibration), 0.5 x docstrings (calibration), own text" in " ".join(
        outcome.out.split()
    )


def test_name_tells_weights() -> None:
    assert calibration_name([TEXT, OTHER], None) == "topics (calibration), 0.5 x docstrings (calibration)"
    assert calibration_name([], OwnTextConfig()) == "own text"
    assert Calibration([Text("x", [torch.ones(2, 3).long()], TEXT)], OwnTextConfig()).tokens == 6 + 8192


def test_local_files_of_one_folder_are_one_source(tmp_path: Path) -> None:
    texts = []
    for name in ("a/1.txt", "a/2.txt", "b/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some words")
        texts.append(TextConfig(str(tmp_path / name)))
    assert single_source(texts[:2], own=False)
    assert single_source(texts, own=False) is None
