"""What is stored comes back, wherever it lay, and nothing is kept twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fasp_lightning.pruning.blocks.store import ALIKE, TensorStore

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", ["cpu", "accelerator", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_tensor_comes_back(place: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)[:, ::2]
    with TensorStore(place, CPU) as store:
        assert torch.equal(store.get(store.put(tensor)), tensor)


def test_dropped_file_is_gone_and_the_folder_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TensorStore("disk", CPU) as store:
        kept, dropped = store.put(torch.ones(2)), store.put(torch.ones(2))
        store.drop(dropped)
        assert list(tmp_path.rglob("*.pt")) == [kept]
    assert list(tmp_path.iterdir()) == []


def test_equal_arguments_are_kept_once() -> None:
    """Batch after batch, layer after layer: cos and sin of one shape, of local and of global layers."""
    store, calls = TensorStore("cpu", CPU), []
    for _ in range(3):
        for layer in (0, 1, 0, 1):
            rotary = (torch.full((2, 3), layer + 0.0), torch.full((2, 3), layer + 0.5))
            calls.append(store.share({"position_embeddings": rotary, "mask": None, "cache": [torch.ones(2), 7]}))
    tensors = [t for call in calls for t in (*call["position_embeddings"], call["cache"][0])]
    assert len({id(tensor) for tensor in tensors}) == 5
    assert [tensor[0, 0].item() for tensor in calls[-1]["position_embeddings"]] == [1.0, 1.5]
    assert calls[0].keys() == {"position_embeddings", "mask", "cache"}
    assert calls[0]["cache"][1] == 7


def test_arguments_of_the_same_shape_that_differ_stay_apart() -> None:
    store = TensorStore("cpu", CPU)
    kept = [store.share(torch.full((2,), float(i))) for i in range(2 * ALIKE)]
    assert [tensor[0].item() for tensor in kept] == list(range(2 * ALIKE))
