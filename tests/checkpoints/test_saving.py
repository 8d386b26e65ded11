"""Saved models load where they should, fail loudly where they should not, and survive a crash."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from processes import run_forked
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import basic
from transformers import AutoModelForCausalLM

from fasp_lightning import FaspError, FASPPruner, load_pruned, save_pruned, staging
from fasp_lightning.checkpoints import saving
from fasp_lightning.structure.plan import resolve_pruned

TOKENS = random_tokens(2, 12, seed=3)


def pruned(name: str = "llama", attention: str = "value_dims", **options: object) -> torch.nn.Module:
    model = tiny_model(name, **options)
    config = basic(sparsity=0.2, attention=attention)
    with pytest.warns(UserWarning, match="calibration tokens"):
        FASPPruner(config).prune(model, [random_tokens(2, 12)])
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.sampled
@pytest.mark.parametrize("form", ["compact", "zero_filled"])
def test_saved_model_has_the_same_logits(family: str, form: str, tmp_path: Path) -> None:
    model = pruned(family)
    save_pruned(model, tmp_path / "p", form=form, verify=False)
    loaded = load_pruned(tmp_path / "p", attn_implementation=model.config._attn_implementation)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    assert loaded.fasp_plan == model.fasp_plan
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    if form == "zero_filled":
        stock = AutoModelForCausalLM.from_pretrained(
            tmp_path / "p", attn_implementation=model.config._attn_implementation
        )
        torch.testing.assert_close(logits(stock), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in TINY if name != "bloom"])
def test_ffn_only_loads_in_stock_transformers(name: str, tmp_path: Path) -> None:
    model = pruned(name, attention="none")
    saved = save_pruned(model, tmp_path / "p")
    assert saved.form == "stock"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "p", attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(stock), logits(model))
    assert load_pruned(tmp_path / "p").fasp_plan == model.fasp_plan


def test_weights_are_readable_to_whom_the_rest_is(tmp_path: Path) -> None:
    save_pruned(pruned(attention="none"), tmp_path / "p")
    modes = {file.stat().st_mode for file in (tmp_path / "p").iterdir()}
    assert len(modes) == 1


def test_plain_save_pretrained_of_an_ffn_pruned_model_loads(tmp_path: Path) -> None:
    model = pruned("opt", attention="none")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "bloom"])
def test_stock_loading_of_a_compact_model_fails_loudly(name: str, tmp_path: Path) -> None:
    save_pruned(pruned(name), tmp_path / "p", form="compact")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert json.loads((tmp_path / "p" / "config.json").read_text())["fasp"]["form"] == "compact"


def test_a_config_is_left_as_it_was_by_saving(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path / "plain")  # sets the architecture, and in some versions the dtype
    before = model.config.to_dict()
    for form in ("compact", "zero_filled"):
        save_pruned(model, tmp_path / form, form=form)
        assert model.config.to_dict() == before


def test_auto_is_the_form_that_stock_loads(tmp_path: Path) -> None:
    assert save_pruned(pruned("llama"), tmp_path / "value").form == "zero_filled"
    assert save_pruned(pruned("llama", "none"), tmp_path / "ffn").form == "stock"
    assert save_pruned(pruned("bloom", "none"), tmp_path / "bloom").form == "zero_filled"


def test_stock_form_of_value_dims_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'stock' cannot hold.*one head size"):
        save_pruned(pruned(), tmp_path / "p", form="stock")
    with pytest.raises(ValueError, match=r"form must be 'auto'.*'onnx'"):
        save_pruned(pruned(), tmp_path / "p", form="onnx")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must carry a plan"):
        save_pruned(tiny_model("llama"), tmp_path / "p")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    model = pruned()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="must be empty"):
        save_pruned(model, tmp_path / "p")
    with pytest.raises(FileExistsError, match="holds no pruned model"):
        save_pruned(model, tmp_path / "p", overwrite=True)
    assert (tmp_path / "p" / "thesis.tex").read_text() == "years of work"


def test_overwrite_replaces_a_pruned_model_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_pruned(pruned("opt"), tmp_path / "p")
    save_pruned(pruned("llama"), tmp_path / "p", overwrite=True)
    assert load_pruned(tmp_path / "p").config.model_type == "llama"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_failing_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pruned(pruned("opt"), tmp_path / "p")
    before = {file.name: file.read_bytes() for file in (tmp_path / "p").iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pruned(pruned("llama"), tmp_path / "p", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "p").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "old").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), staging.staged(tmp_path / "p"):
        pass
    assert [file.name for file in (tmp_path / "p").iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_too_little_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs [\d.]+ MB, but only 0\.0 MB are free"):
        save_pruned(pruned(), tmp_path / "p")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal
from tiny_pruning import pruned
from fasp_lightning import save_pruned
from fasp_lightning.checkpoints import saving
saving.verify_saved = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_pruned(pruned("llama"), {path!r}, overwrite=True)
"""


def test_kill_during_saving_leaves_the_old_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    old = pruned("opt")
    save_pruned(old, tmp_path / "p")
    code = KILLED.format(path=str(tmp_path / "p"))
    ((status, errors),) = run_forked(exec, tmp_path_factory.mktemp("killed"), (code, {}))
    assert status == -signal.SIGKILL, errors
    assert torch.equal(logits(load_pruned(tmp_path / "p")), logits(old.float()))
    save_pruned(old, tmp_path / "p", overwrite=True)  # the next save clears what the killed one left
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


KILLED_BETWEEN = """
import os, signal
from tiny_pruning import pruned
from fasp_lightning import save_pruned, staging
def first_rename_alone(new, path, old):
    path.rename(old)
    os.kill(os.getpid(), signal.SIGKILL)
staging._replace = first_rename_alone
save_pruned(pruned("llama"), {path!r}, overwrite=True)
"""


def test_kill_between_the_renames_takes_no_model_away(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    old = pruned("opt")
    save_pruned(old, tmp_path / "p")
    code = KILLED_BETWEEN.format(path=str(tmp_path / "p"))
    ((status, errors),) = run_forked(exec, tmp_path_factory.mktemp("killed"), (code, {}))
    assert status == -signal.SIGKILL, errors
    assert not (tmp_path / "p").exists()
    assert torch.equal(logits(load_pruned(tmp_path / "p")), logits(old.float()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_wrong_logits_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "zero_filled", lambda model, plan: _doubled(model))
    with pytest.raises(RuntimeError, match="logits of the saved model must equal"):
        save_pruned(pruned(), tmp_path / "p", form="zero_filled")
    assert not list(tmp_path.iterdir())


def _doubled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    pairs = [pair for block in resolve_pruned(model) for pair in block if pair.spec.kind != "ffn"]
    filled = [(pair, pair.zero_filled(torch.arange(pair.layout.width))) for pair in pairs]
    return {f"{pair.name}.{key}": 2 * tensor for pair, tensors in filled for key, tensor in tensors.items()}


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = pruned("llama", dtype=torch.bfloat16)
    save_pruned(model, tmp_path / "p", form="compact")
    loaded = load_pruned(tmp_path / "p")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


def test_missing_weights_are_not_initialised(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for form in ("compact", "zero_filled"):
        save_pruned(pruned(), tmp_path / form, form=form)
        file = tmp_path / form / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(OSError, match=r"must hold all weights.*layers\.1\.self_attn\.q_proj"):
            load_pruned(tmp_path / form)


def test_damaged_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no readable config"):
        load_pruned(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries no plan; load a model that is not pruned with transformers"):
        load_pruned(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    sound = pruned().config.fasp
    for fasp, message in [
        ([], "with version 1"),
        ({"form": "stock"}, "with version 1"),
        ({**sound, "kept": "x"}, "config.fasp is damaged: a plan must hold"),
        ({**sound, "form": "gguf"}, "must name a form.*got 'gguf'"),
        ({**sound, "model_type": "opt"}, "must be the plan of a llama model, got one of 'opt'"),
    ]:
        file.write_text(json.dumps({**config, "fasp": fasp}))
        with pytest.raises(FaspError, match=message):
            load_pruned(tmp_path)


def test_a_loaded_model_prunes_further_from_the_original(tmp_path: Path) -> None:
    for form in ("compact", "zero_filled"):
        save_pruned(pruned("phi3"), tmp_path / form, form=form)
        model = load_pruned(tmp_path / form)
        config = basic(sparsity=0.4, attention="value_dims")
        with pytest.warns(UserWarning, match="calibration tokens"):
            report = FASPPruner(config).prune(model, [random_tokens(2, 12)])
        assert report.sparsity == pytest.approx(0.4, abs=0.02)
        save_pruned(model, tmp_path / form, form=form, overwrite=True)
        assert load_pruned(tmp_path / form).fasp_plan == model.fasp_plan
