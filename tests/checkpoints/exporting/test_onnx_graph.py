"""An ONNX graph answers as the model does, whatever was cut; both sizes of its inputs are free."""

import importlib.util

import onnxruntime
import pytest
import torch
from tiny import TINY, random_tokens, tiny_model
from tiny_pruning import BOTH, INGREDIENTS, pruned

from fasp_lightning import FaspError, LoRAConfig, export_onnx
from fasp_lightning.checkpoints.exporting import onnx_graph
from fasp_lightning.errors import FaspFileExistsError
from fasp_lightning.structure.modes import evaluating


def answers_as(model, folder, batch, seq, padding=0):
    """The largest difference of logits at tokens."""
    ids = random_tokens(batch, seq, seed=batch)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with evaluating(model):
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return ((torch.from_numpy(found) - expected).abs() * mask[..., None]).max().item()


@pytest.mark.laws
@pytest.mark.parametrize("name", TINY)
def test_each_family_with_both_pairs_cut(name, tmp_path):
    model = pruned(name, BOTH)
    exported = export_onnx(model, tmp_path / "graph")
    assert exported.check.same == exported.check.tokens
    assert answers_as(model, tmp_path / "graph", 3, 20, padding=5) < 1e-3


def test_widths_of_single_blocks_and_free_sizes(tmp_path):
    model = pruned("llama-gqa", INGREDIENTS["adaptive"])
    exported = export_onnx(model, tmp_path / "graph")
    assert (exported.target, exported.architecture) == ("onnx", "LlamaForCausalLM")
    assert exported.check.same == exported.check.tokens
    assert exported.check.logit_difference < 1e-4
    for sizes in ((1, 1, 0), (3, 20, 5), (1, 60, 0)):
        assert answers_as(model, tmp_path / "graph", *sizes) < 1e-4
    assert {file.name for file in (tmp_path / "graph").iterdir()} >= {"model.onnx", "config.json"}
    with pytest.raises(FaspFileExistsError, match="must be empty"):
        export_onnx(model, tmp_path / "graph")


def test_a_model_that_is_loaded_in_16_bits_stays_so(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(onnx_graph, "_write_graph", lambda model, file: (written.append(model.dtype), file.touch()))
    model = tiny_model("llama").bfloat16()
    export_onnx(model, tmp_path / "graph", check=False)
    assert (written, model.dtype) == ([torch.float32], torch.bfloat16)


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_missing_package_is_named_with_the_line_that_installs_it(name, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(onnx_graph, "find_spec", lambda one: None if one == name else there(one))
    with pytest.raises(FaspError, match=rf"{name} cannot be found; run pip install 'fasp-lightning\[serve\]'"):
        export_onnx(tiny_model("llama"), tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_there_is_no_answer(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(onnx_graph, "find_spec", lambda one: None if one == "onnxruntime" else there(one))
    monkeypatch.setattr(onnx_graph, "_write_graph", lambda model, file: file.touch())
    assert export_onnx(tiny_model("llama"), tmp_path / "graph").check is None


def test_what_cannot_be_traced_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama")

    def branches(input_ids, attention_mask, use_cache):
        raise ValueError("no such operator")

    monkeypatch.setattr(model, "forward", branches)
    with pytest.raises(FaspError, match=r"must be exportable by torch\.onnx"):
        export_onnx(model, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FaspFileExistsError, match=r"holds no graph \(model\.onnx\)"):
        export_onnx(tiny_model("llama"), tmp_path, overwrite=True)


def test_adapters_are_refused(tmp_path):
    from fasp_lightning.training.modeling.lora import attach_lora

    model = tiny_model("llama")
    attach_lora(model, LoRAConfig(rank=2))
    with pytest.raises(FaspError, match="LoRA merged"):
        export_onnx(model, tmp_path / "graph")
