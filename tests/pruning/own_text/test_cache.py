"""Own text is read again only if the same model would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_pruning import BOTH, calibration
from torch import Tensor

from fasp_lightning import FASPPruner
from fasp_lightning.pruning.config import OwnTextConfig
from fasp_lightning.pruning.own_text import writing as module
from fasp_lightning.pruning.own_text.cache import weights_digest
from fasp_lightning.pruning.own_text.writing import own_text
from fasp_lightning.structure.compact import width_hooks
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora

Counted = Callable[[Any, OwnTextConfig], tuple[Tensor, int]]


@pytest.fixture
def config(tmp_path: Path) -> OwnTextConfig:
    return OwnTextConfig(tokens=60, seq_len=20, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The text, and how often it was sampled for that."""
    calls: list[int] = []
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda *args: (calls.append(1), sample(*args))[1])

    def write(model: Any, config: OwnTextConfig) -> tuple[Tensor, int]:
        calls.clear()
        return torch.cat(own_text(model, config)), len(calls)

    return write


def files(config: OwnTextConfig) -> list[Path]:
    return sorted(Path(str(config.cache_dir)).iterdir())


def test_the_same_model_samples_once(counted: Counted, config: OwnTextConfig) -> None:
    first, times = counted(tiny_model("opt"), config)
    assert times == 1
    again, times = counted(tiny_model("opt"), replace(config, share=1.0))
    assert times == 0
    assert torch.equal(again, first)
    assert again.dtype == first.dtype
    assert len(files(config)) == 1


@pytest.mark.parametrize("options", [{"seed": 1}, {"tokens": 80}, {"temperature": 0.9}, {"seq_len": 30}])
def test_other_settings_sample_anew(counted: Counted, config: OwnTextConfig, options: dict[str, Any]) -> None:
    counted(tiny_model("opt"), config)
    other = replace(config, **options)
    found, times = counted(tiny_model("opt"), other)
    assert times == 1
    assert torch.equal(found, counted(tiny_model("opt"), replace(other, cache_dir=None))[0])
    assert len(files(config)) == 2


@torch.no_grad()
def test_a_weight_of_another_last_digit_samples_anew(counted: Counted, config: OwnTextConfig) -> None:
    model = tiny_model("opt")
    counted(model, config)
    weight = model.model.decoder.layers[1].fc1.weight
    weight[7, 7] = weight[7, 7].nextafter(torch.tensor(9.0))
    assert counted(model, config)[1] == 1


def pruned(model: Any) -> None:
    FASPPruner(BOTH).prune(model, calibration())


def positions(model: Any) -> None:
    pruned(model)
    (_, hook), *_ = width_hooks(model)
    hook.positions += 1


def other_epsilon(model: Any) -> None:
    model.config.rms_norm_eps = 0.1


def begins_otherwise(model: Any) -> None:
    model.generation_config.bos_token_id = 9


def adapted(model: Any) -> None:
    attach_lora(model, LoRAConfig(rank=3))


def scaled(model: Any) -> None:
    adapted(model)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 2


def switched_off(model: Any) -> None:
    adapted(model)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)


def test_whatever_changes_the_logits_changes_the_fingerprint() -> None:
    changes = (lambda model: None, pruned, positions, other_epsilon, begins_otherwise, adapted, scaled, switched_off)
    found = set()
    for change in changes:
        torch.manual_seed(0)  # of the adapters' initial values
        model = tiny_model("llama")
        change(model)
        found.add(weights_digest(model))
    assert len(found) == len(changes)


def test_path_and_modes_do_not_change_the_fingerprint() -> None:
    first, second = tiny_model("llama"), tiny_model("llama").train()
    second.config._name_or_path = "elsewhere"
    second.config.use_cache = False
    assert weights_digest(first) == weights_digest(second)
    assert weights_digest(first) != weights_digest(tiny_model("llama", dtype=torch.bfloat16))


def shorten(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [shorten, flip, lambda content: b"", lambda content: content + b"\0\0\0\0"])
def test_a_damaged_file_is_made_anew(damage: Any, counted: Counted, config: OwnTextConfig, caplog: Any) -> None:
    model = tiny_model("opt")
    expected, _ = counted(model, config)
    (file,) = files(config)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    found, times = counted(model, config)
    assert times == 1
    assert torch.equal(found, expected)
    assert "is damaged: own text is sampled anew" in caplog.text
    assert file.read_bytes() == whole


def test_a_kill_while_writing_leaves_no_half_file(
    counted: Counted, config: OwnTextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            counted(tiny_model("opt"), config)
    assert files(config) == []
    assert counted(tiny_model("opt"), config)[1] == 1
    assert counted(tiny_model("opt"), config)[1] == 0


def test_a_cache_that_cannot_be_written_is_no_error(counted: Counted, config: OwnTextConfig, caplog: Any) -> None:
    Path(str(config.cache_dir)).write_text("a file where the folder should be")
    found, _ = counted(tiny_model("opt"), config)
    assert torch.equal(found, counted(tiny_model("opt"), replace(config, cache_dir=None))[0])
    assert "own text cannot be kept" in caplog.text


@pytest.mark.parametrize("cache_dir", ["auto", None])
def test_python_keeps_nothing_unless_asked(
    cache_dir: str | None, tmp_path: Path, counted: Counted, config: OwnTextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert OwnTextConfig().cache_dir == "auto"
    for _ in range(2):
        assert counted(tiny_model("opt"), replace(config, cache_dir=cache_dir))[1] == 1
    assert list(tmp_path.iterdir()) == []
