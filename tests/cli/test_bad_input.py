"""Mistakes of the user: exit code 2, one line that holds the offending value, nothing spent or written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models
from transformers import BertConfig, PreTrainedTokenizerFast

from fasp_lightning import writers


def assert_refused(outcome, *fragments: str) -> None:
    """One line on stderr with all fragments."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("fasp: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--pruning.sparsity", "1.3"), ("sparsity must be in [0, 1), got 1.3",)),
        (("--pruning.sparsity=-0.1",), ("sparsity must be in [0, 1), got -0.1",)),
        (("--pruning.sparsity", "much"), ('"pruning.sparsity"', "float", "got much")),
        (("--pruning.sparsity", "0.95"), ("sparsity must be at most 0.7242 with queries and keys kept", "got 0.95")),
        (("--pruning.score", "taylor"), ("pruning.score", "'wanda', 'fisher', 'learned', 'magnitude'", "got taylor")),
        (("--pruning.multiple_of", "49"), ("multiple_of must be at most the FFN width 48, got 49",)),
        (("--pruning.damping=-1",), ("damping must be", "got -1")),
        (("--calibration.source", "builtin:novels"), ("source must be one of", "'builtin:novels'")),
        (("--calibration.source", "missing.txt"), ("missing.txt",)),
        (
            ("--calibration.split", "test"),
            ("calibration and evaluation must not share text", "topics (test)"),
        ),
        (("--evaluation.source", "missing.jsonl"), ("missing.jsonl",)),
        (("--form", "onnx"), ("form must be 'auto' or one of 'stock'", "got 'onnx'")),
        (("--form", "stock", "--pruning.attention", "value_dims"), ("form 'stock' cannot hold this model",)),
        (("--dtype", "int4"), ("dtype must be 'auto' or one of", "got 'int4'")),
        (("--save_dtype", "int4"), ("save_dtype must be 'auto' or one of", "got 'int4'")),
        (("--device", "toaster"), ("device must be", "'toaster'")),
        (("--new_tokens", "0"), ("new_tokens must be at least 1, got 0",)),
        (("--model.tokenizer", "./missing"), ("no model at './missing'",)),
        (("--sparsity", "0.2"), ("--sparsity",)),
        (("--overwrite", "perhaps"), ("perhaps",)),
        (("-c", "nothing"), ("shipped", "demo", "got 'nothing'")),
        (("-c", "nothing.yaml"), ("got 'nothing.yaml'",)),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("-") else "",
)
def test_option_is_refused(prune, tiny_folder, tmp_path: Path, options, fragments) -> None:
    assert_refused(prune(tiny_folder("llama"), *options), *fragments)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("role", "option"),
    [
        ("calibration", ("--calibration.seq_len", "65")),
        ("evaluation", ("--evaluation.seq_len", "65")),
        ("calibration_mix", ("--calibration_mix", "[{seq_len: 65}]")),
        ("the prompt and its new_tokens", ("--prompt", "four", "--new_tokens", "62")),
    ],
)
def test_sequences_beyond_learned_positions_are_refused(prune, tiny_folder, tmp_path: Path, role, option) -> None:
    fragment = f"sequences of {role} must have at most 64 tokens, the positions that OPTForCausalLM has learned, got 65"
    assert_refused(prune(tiny_folder("opt"), *option), fragment)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_a_prompt_without_tokens_is_refused(fasp, tiny_folder, tmp_path: Path, command) -> None:
    more = ("--sparsities", "[0.1]") if command == "sweep" else ()
    options = ("--model.name_or_path", tiny_folder("llama"), "--output_dir", tmp_path / "out", "--prompt", "", *more)
    assert_refused(fasp(command, *options), "prompt must hold at least one token, got ''")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("pruning: {sparsity: 0.3", "is not valid YAML"),
        ("- pruning", "must be a YAML mapping of options, got list"),
        ("pruning: {sparsty: 0.3}", "sparsty"),
        ("prunning: {sparsity: 0.3}", "prunning"),
        ("pruning: {sparsity: 2}", "sparsity must be in [0, 1), got 2"),
        ("pruning: {sparsity: much}", "got much"),
    ],
)
def test_bad_yaml_is_refused(prune, tiny_folder, tmp_path: Path, text: str, fragment: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert_refused(prune(tiny_folder("llama"), "-c", file), fragment)


def test_model_must_be_named(fasp) -> None:
    assert_refused(fasp("prune"), "model.name_or_path")


@pytest.mark.parametrize("name", ["./missing", "nobody/no-such-model"])
def test_missing_model_is_refused(prune, name: str) -> None:
    assert_refused(prune(name), name)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ("'mamba'", "register")),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            ("'bert'", "an encoder", "supported are", "llama"),
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ("quantised (gptq)", "full-precision"),
        ),
        ({"num_attention_heads": 5}, ("no readable config", "(5)")),
    ],
    ids=["unknown family", "encoder", "quantised", "contradictory"],
)
def test_model_that_cannot_be_pruned_is_refused(prune, tiny_folder, change, fragments) -> None:
    folder = tiny_folder("llama")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if change.get("model_type") == "bert":
        config = BertConfig().to_dict()
    file.write_text(json.dumps(config | change))
    assert_refused(prune(folder), *fragments)


def test_corrupt_weights_are_named(prune, tiny_folder) -> None:
    file = tiny_folder("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    outcome = prune(file.parent)
    assert outcome.code == 2
    assert f"'{file}' is not a readable safetensors file" in outcome.err.splitlines()[-1]


def test_corrupt_plan_is_named(prune, tiny_folder, tmp_path: Path) -> None:
    prune(tiny_folder("llama"), "--output_dir", tmp_path / "first")
    file = tmp_path / "first" / "config.json"
    file.write_text(file.read_text().replace('"units"', '"unites"'))
    assert_refused(prune(tmp_path / "first"), "config.fasp is damaged", "units")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("text", "found"), [("", "0 tokens"), ("a few words", "it has 12 tokens")])
def test_short_text_is_refused(prune, tiny_folder, tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text)
    outcome = prune(tiny_folder("llama"), "--calibration.source", file)
    assert_refused(outcome, str(file), found, "need 128")


@pytest.mark.usefixtures("no_weights")
def test_a_folder_of_several_kinds_is_refused(prune, tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.csv", "LICENSE.txt", "notes.md"):
        (tmp_path / "data" / name).write_text("text\n")
    outcome = prune(tiny_folder("llama"), "--calibration.source", tmp_path / "data")
    assert_refused(outcome, ".csv, 1 file: a.csv; .md, 1 file: notes.md", "/data/**/*.csv")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("calibration", "evaluation", "shared"),
    [
        ("a.txt", "a.txt", True),
        ("*.txt", "a.txt", True),
        (".", "b.txt", True),
        ("a.txt", "b.txt", False),
    ],
)
def test_local_texts_must_not_overlap(
    prune, tiny_folder, tmp_path: Path, calibration: str, evaluation: str, shared: bool
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 9)  # too short, which is found later
    sources = [
        f"--calibration.source={tmp_path}/{calibration}",
        f"--evaluation.source={tmp_path}/{evaluation}",
    ]
    outcome = prune(tiny_folder("llama"), *sources, "--evaluation.split", "null")
    assert_refused(outcome, "must not share text" if shared else "is too short")


@pytest.mark.usefixtures("no_weights")
def test_token_without_embedding_is_refused(prune, tiny_folder, tmp_path: Path) -> None:
    vocab = {"<unk>": 97}  # every character is unknown
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "other")
    outcome = prune(tiny_folder("llama"), "--model.tokenizer", tmp_path / "other")
    assert_refused(outcome, "input_ids must be in [0, 97)", "got 97")


@pytest.mark.usefixtures("no_weights")
def test_full_output_is_refused(prune, tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "thesis.txt").write_text("unsaved")
    assert_refused(prune(tiny_folder("llama")), str(tmp_path / "pruned"), "must be empty")
    assert_refused(prune(tiny_folder("llama"), "--overwrite"), "holds no pruned model")
    assert (tmp_path / "pruned" / "thesis.txt").read_text() == "unsaved"


@pytest.mark.usefixtures("no_weights")
def test_output_that_is_a_file_is_refused(prune, tiny_folder, tmp_path: Path) -> None:
    (tmp_path / "pruned").write_text("a file")
    assert_refused(prune(tiny_folder("llama")), "output_dir must be a folder", str(tmp_path / "pruned"))


@pytest.mark.usefixtures("no_weights")
def test_model_is_not_overwritten_by_its_own_pruning(prune, tiny_folder) -> None:
    folder = tiny_folder("llama")
    assert_refused(prune(folder, "--output_dir", folder, "--overwrite"), "must not be the folder of the model")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--push_to_hub", "a/b/c"), "push_to_hub must be the id of a repository"),
        (("--push_to_hub", "me/model"), "HF_HUB_OFFLINE"),
        (("--push_to_hub", "me/model", "--output_dir", "null"), "output_dir must be a folder for push_to_hub"),
        (("--private", "true"), "private is for push_to_hub alone"),
    ],
)
def test_upload_that_cannot_work_is_refused(prune, tiny_folder, options: tuple[str, ...], message: str) -> None:
    assert_refused(prune(tiny_folder("llama"), *options), message)


def test_a_sweep_is_not_uploaded(fasp, tiny_folder) -> None:
    refused = fasp("sweep", "--model.name_or_path", tiny_folder("llama"), "--push_to_hub", "me/model")
    assert_refused(refused, "push_to_hub must be null for a sweep")


@pytest.mark.usefixtures("no_weights")
def test_full_disk_is_found_before_anything_is_spent(prune, tiny_folder, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    assert_refused(prune(tiny_folder("llama")), str(tmp_path / "pruned"), "but only 0.0 MB are free")


def test_full_disk_leaves_the_old_output(prune, tiny_folder, tmp_path: Path, monkeypatch) -> None:
    folder = tiny_folder("llama")
    prune(folder)
    before = {file.name: file.read_bytes() for file in (tmp_path / "pruned").iterdir()}
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, 10])  # it fills up while the model is pruned
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    outcome = prune(folder, "--overwrite", "--pruning.sparsity", 0.3)
    assert outcome.code == 2
    assert "free" in outcome.err.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "pruned").iterdir()} == before


def test_weights_that_are_not_finite_are_named(prune, tiny_folder, tiny_tokenizer, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer.save_pretrained(tmp_path / "nan")
    outcome = prune(tmp_path / "nan", "--evaluation", "[]")
    assert outcome.code == 2
    assert "model.layers.1.mlp.down_proj" in " ".join(outcome.err.split())
    assert not (tmp_path / "pruned").exists()


def test_tokenizer_that_cannot_be_saved_is_found_before_anything_is_spent(
    prune, tiny_folder, no_weights, monkeypatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no vocabulary")

    folder = tiny_folder("llama")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    assert_refused(prune(folder), "tokenizer cannot be saved: no vocabulary")


def test_output_that_another_job_will_write_is_refused(prune, tiny_folder, no_weights, tmp_path: Path) -> None:
    other = writers.Writer(writers.host(), str(os.getppid()), "0123abcd")
    claim = tmp_path / ".pruned.{}.{}.{}.claim".format(*other)
    claim.touch()
    with writers.locked(claim):
        run = prune(tiny_folder("llama"))
    assert_refused(run, "written by one job at a time", str(claim))
