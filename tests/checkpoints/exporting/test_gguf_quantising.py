"""Quantised copies of a GGUF file hold what llama.cpp's own would."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_gguf import byte_level_tokenizer

from fasp_lightning import FaspError, export_gguf
from fasp_lightning.checkpoints.exporting.gguf.quantising import quantized, type_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("xllamacpp")
    return export_gguf(tiny_model("llama"), tmp_path / "model.gguf", byte_level_tokenizer(), "f32", check=False).path


def test_a_copy_keeps_all_keys_and_rounds_as_gguf_does(file: Path, tmp_path: Path) -> None:
    import gguf

    whole, copy = (gguf.GGUFReader(path) for path in (file, quantized(file, tmp_path / "q.gguf", "Q4_0")))
    assert whole.fields.keys() == copy.fields.keys()
    assert copy.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "llama.feed_forward_length"):
        assert whole.fields[name].contents() == copy.fields[name].contents()
    (before,), (after,) = ([x for x in r.tensors if x.name == "blk.1.attn_q.weight"] for r in (whole, copy))
    assert after.tensor_type.name == "Q4_0"
    assert (after.data == gguf.quants.quantize(before.data, after.tensor_type)).all()


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q4_k_m"])
def test_an_export_is_what_a_copy_of_the_whole_file_is(outtype: str, tmp_path: Path) -> None:
    import gguf

    pytest.importorskip("xllamacpp")
    export_gguf(tiny_model("llama"), tmp_path / "e.gguf", byte_level_tokenizer(), outtype, pad=True, check=False)
    whole = export_gguf(tiny_model("llama"), tmp_path / "w.gguf", byte_level_tokenizer(), "f32", pad=True, check=False)
    copy = quantized(whole.path, tmp_path / "q.gguf", outtype.upper())
    found, expected = (gguf.GGUFReader(path) for path in (tmp_path / "e.gguf", copy))
    assert found.fields["general.file_type"].contents() == expected.fields["general.file_type"].contents()
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert tensors.keys() == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert (tensors[tensor.name].data == tensor.data).all()


@pytest.mark.parametrize(
    ("name", "shape", "kind", "expected"),
    [
        ("blk.0.attn_norm.weight", (512,), "Q4_0", "F32"),
        ("blk.0.ffn_up.weight", (512, 64), "Q4_0", "Q4_0"),
        ("blk.0.ffn_down.weight", (1126, 64), "Q4_0", "F16"),
        ("blk.0.ffn_down.weight", (1120, 64), "Q4_K_M", "Q8_0"),
        ("blk.4.ffn_down.weight", (1024, 64), "Q4_K_M", "Q4_K"),
        ("blk.0.attn_v.weight", (1024, 64), "Q4_K_M", "Q6_K"),
        ("token_embd.weight", (1024, 64), "Q4_0", "Q6_K"),
        ("token_embd.weight", (576, 64), "Q8_0", "Q8_0"),
    ],
)
def test_the_type_of_a_tensor_is_llama_cpps(name: str, shape: tuple[int, ...], kind: str, expected: str) -> None:
    assert type_of(name, shape, kind, blocks=30, tied=True) == expected


def test_another_kind_is_refused(file: Path) -> None:
    with pytest.raises(FaspError, match="kind must be one of Q8_0, Q4_0, Q4_K_M, got 'Q2_K'"):
        quantized(file, file.with_name("q.gguf"), "Q2_K")
    assert [entry.name for entry in file.parent.iterdir()] == ["model.gguf"]
