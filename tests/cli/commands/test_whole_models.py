"""``fasp`` on models that take images, and on quantised ones: what it says of them, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_multimodal import tiny_multimodal
from transformers import AutoModelForImageTextToText

from fasp_lightning.cli.commands import prune_streamed as streamed

PROCESSOR = "preprocessor_config.json"


@pytest.fixture
def llava(tmp_path: Path, tiny_tokenizer) -> Path:
    """The folder of one, with a processor's config beside it."""
    folder = tmp_path / "llava"
    tiny_multimodal("llava").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / PROCESSOR).write_text('{"size": 8}')
    return folder


def weights(folder: Path) -> dict[str, object]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_decoder_is_pruned_in_memory_and_streamed_alike_and_that_is_said(prune, llava: Path, tmp_path: Path) -> None:
    outcome = prune(llava, "--compare_unrestored", "false")
    assert outcome.code == 0
    assert "its llama decoder is pruned, on text alone" in " ".join(outcome.err.split())
    (tmp_path / "pruned").rename(tmp_path / "whole")
    assert prune(llava, "--stream", "true").code == 0
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "pruned")
    assert first.keys() == second.keys()
    assert all(value.equal(second[name]) for name, value in first.items())
    for name in ("whole", "pruned"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert model.config.text_config.intermediate_size < 48
        assert json.loads((tmp_path / name / PROCESSOR).read_text()) == {"size": 8}


def test_quantised_one_is_not_streamed_unasked_and_that_is_said(prune, tiny_folder, monkeypatch) -> None:
    folder = tiny_folder()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}  # its weights are not packed, and read as they are
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(streamed, "free_memory", lambda: 100_000)
    outcome = prune(folder, "--evaluation", "[]")
    told = " ".join(outcome.err.split())
    assert "is quantised (fp8): it is read, pruned and saved in full precision" in told
    assert "the model is not streamed" in told
    assert "must be in full precision to be streamed" in told
    assert outcome.code == 0
