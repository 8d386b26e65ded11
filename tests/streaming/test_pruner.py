"""Pruning from folder to folder: what comes of it is what comes of pruning in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY
from tiny_multimodal import tiny_multimodal
from tiny_pruning import BOTH, FFN, OWN, basic, calibration
from tiny_streaming import SHARD, assert_same_folder, saved

from fasp_lightning import FaspError, FASPPruner, PruningConfig, load_model, load_pruned, save_pruned
from fasp_lightning.staging import read_json

FAMILIES = ("opt-350m", "llama-gqa", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "falcon-alibi")
"""Tied and untied, fused and not, with learned, rotary and no positions, windows, and buffers that are not stored."""

SETTINGS = {
    "ffn": (FFN, {}),
    "compact": (BOTH, {"form": "compact"}),
    "zero-filled": (BOTH, {"form": "zero_filled"}),
    "uneven": (basic(attention="value_dims", allocation="adaptive"), {"form": "zero_filled"}),
    "rounds": (basic(rounds=2, score="fisher"), {}),
    "damping": (basic(attention="value_dims", damping="auto", value_basis="principal"), {}),
    "on-disk": (basic(offload="disk", micro_batch_size=1), {}),
    "narrower": (FFN, {"dtype": "bfloat16"}),
}


def in_memory(folder: Path, output: Path, config: PruningConfig, **options: Any) -> Any:
    """Prune as models that fit are pruned."""
    model = load_model(folder, dtype="float32")
    FASPPruner(config).prune(model, calibration())
    save_pruned(model, output, **options)
    return model


@pytest.mark.sampled
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_outcome_is_that_of_pruning_in_memory(name: str, settings: str, tmp_path: Path) -> None:
    assert_same_outcome(name, settings, tmp_path)


@pytest.mark.laws
@pytest.mark.parametrize("name", TINY.keys() - set(FAMILIES))
def test_outcome_of_every_family_is_that_of_pruning_in_memory(name: str, tmp_path: Path) -> None:
    assert_same_outcome(name, "zero-filled", tmp_path)


def assert_same_outcome(name: str, settings: str, tmp_path: Path) -> None:
    """Prune both ways, and compare the folders and the reports."""
    config, options = SETTINGS[settings]
    folder = saved(tmp_path, name)
    in_memory(folder, tmp_path / "whole", config, **options)
    streaming = {"save_dtype" if key == "dtype" else key: value for key, value in options.items()}
    report = FASPPruner(config).prune_folder(folder, tmp_path / "streamed", calibration(), **streaming)
    assert_same_folder(tmp_path / "streamed", tmp_path / "whole")
    whole = load_pruned(tmp_path / "whole").fasp_report
    drop = {"seconds"}
    expected = [{k: v for k, v in pair.items() if k not in drop} for pair in whole["pairs"]]
    assert [{k: v for k, v in vars(pair).items() if k not in drop} for pair in report.pairs] == expected
    assert report.tokens == whole["tokens"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_pruned_model_is_pruned_further(tmp_path: Path) -> None:
    in_memory(saved(tmp_path), tmp_path / "once", basic(0.1, attention="value_dims"), form="compact")
    in_memory(tmp_path / "once", tmp_path / "whole", BOTH, form="compact")
    FASPPruner(BOTH).prune_folder(tmp_path / "once", tmp_path / "streamed", calibration(), form="compact")
    assert_same_folder(tmp_path / "streamed", tmp_path / "whole")


def test_the_decoder_of_a_model_that_takes_images_is_pruned_as_in_memory(tmp_path: Path) -> None:
    tiny_multimodal("llava").save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
    in_memory(tmp_path / "dense", tmp_path / "whole", FFN)
    FASPPruner(FFN).prune_folder(tmp_path / "dense", tmp_path / "streamed", calibration())
    assert_same_folder(tmp_path / "streamed", tmp_path / "whole")


def test_own_text_comes_from_its_cache(tmp_path: Path) -> None:
    config = basic(own_text=replace(OWN, cache_dir=str(tmp_path / "cache")))
    folder = saved(tmp_path)
    with pytest.raises(FaspError, match="own_text must be in its cache"):
        FASPPruner(config).prune_folder(folder, tmp_path / "streamed", calibration())
    in_memory(folder, tmp_path / "whole", config)
    FASPPruner(config).prune_folder(folder, tmp_path / "streamed", calibration())
    assert_same_folder(tmp_path / "streamed", tmp_path / "whole")


def test_every_file_holds_a_block_or_less_than_the_largest(tmp_path: Path) -> None:
    FASPPruner(FFN).prune_folder(saved(tmp_path), tmp_path / "streamed", calibration())
    index = read_json(tmp_path / "streamed" / "model.safetensors.index.json")
    blocks = {name.split(".")[2]: file for name, file in index["weight_map"].items() if ".layers." in name}
    assert len(set(blocks.values())) == len(blocks) == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": "learned"}, "got 'learned'"),
        ({"sparsity": 0.99}, "sparsity must be"),
    ],
)
def test_what_cannot_be_streamed_is_refused_and_nothing_is_left(change: Any, match: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(FaspError, match=match):
        FASPPruner(basic(**change)).prune_folder(folder, tmp_path / "streamed", calibration())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    config = read_json(saved(tmp_path) / "config.json") | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FaspError, match=r"must be in full precision to be streamed, got it quantised \(fp8\)"):
        FASPPruner(FFN).prune_folder(tmp_path / "dense", tmp_path / "streamed", calibration())


def test_a_zero_filled_model_is_refused(tmp_path: Path) -> None:
    in_memory(saved(tmp_path), tmp_path / "once", basic(0.1, attention="value_dims"))
    with pytest.raises(FaspError, match="'stock' or 'compact' to be streamed"):
        FASPPruner(BOTH).prune_folder(tmp_path / "once", tmp_path / "streamed", calibration())


def test_what_was_not_written_as_computed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasp_lightning.checkpoints.streaming import writing

    whole = writing.write_shard

    def spoilt(state: dict[str, torch.Tensor], file: Path) -> None:
        whole({name: -tensor if "lm_head" in name else tensor for name, tensor in state.items()}, file)

    monkeypatch.setattr(writing, "write_shard", spoilt)
    with pytest.raises(RuntimeError, match="logits of the saved model"):
        FASPPruner(FFN).prune_folder(saved(tmp_path), tmp_path / "streamed", calibration())
    assert not (tmp_path / "streamed").exists()
