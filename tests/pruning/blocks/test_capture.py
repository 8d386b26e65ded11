"""What blocks are called with is what the model calls them with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, random_tokens, tiny_model, with_positions
from tiny_pruning import calibration

from fasp_lightning import spec_for
from fasp_lightning.pruning.blocks.capture import capture, micro_batches
from fasp_lightning.pruning.blocks.replay import call_block
from fasp_lightning.pruning.blocks.standins import first
from fasp_lightning.pruning.blocks.store import TensorStore
from fasp_lightning.structure.modes import evaluating
from fasp_lightning.structure.resolve import find_blocks

CPU = torch.device("cpu")


def through_blocks(model: Any, batch: Any) -> torch.Tensor:
    """Output of the last block, by calling one block after the other as captured."""
    store = TensorStore("cpu", CPU)
    with evaluating(model), store:
        (sample,), (hidden,) = capture(model, [batch], None, store)
        for block, call in zip(find_blocks(model, spec_for(model)), sample.calls, strict=True):
            hidden = first(call_block(block, call, hidden, store))
    return hidden


def last_block_output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    found = []
    block = find_blocks(model, spec_for(model))[-1]
    handle = block.register_forward_hook(lambda module, args, output: found.append(first(output)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", TINY)
def test_blocks_called_as_captured_give_the_models_hidden_states(family: str) -> None:
    """With left padding: masks are the model's own, and positions, where it does not count padding along."""
    model, padded = tiny_model(family), calibration(1)[0]
    expected = last_block_output(model, with_positions(model, padded))
    torch.testing.assert_close(through_blocks(model, padded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
def test_position_ids_of_packed_sequences_are_passed_on(family: str) -> None:
    model, ids = tiny_model(family), random_tokens(1, 12)
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    found = through_blocks(model, packed)
    torch.testing.assert_close(found, last_block_output(model, packed), atol=1e-5, rtol=1e-5)
    assert (found - through_blocks(model, {"input_ids": ids})).abs().max() > 1e-3


def test_pieces_hold_all_rows_of_every_input() -> None:
    batch = {
        "input_ids": random_tokens(5),
        "attention_mask": torch.tensor([[0] + [1] * 11] * 5),
        "position_ids": torch.arange(12).expand(5, 12),
        "labels": random_tokens(5, seed=1),
        "source": "mine.txt",
    }
    pieces = list(micro_batches([batch], 2))
    assert [len(piece.input_ids) for piece in pieces] == [2, 2, 1]
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), batch[name])
    assert {piece.source for piece in pieces} == {"mine.txt"}


def test_a_mask_without_padding_is_left_out() -> None:
    ids = random_tokens()
    (batch,) = micro_batches([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], None)
    assert set(batch.inputs) == {"input_ids"}


def test_beside_positions_that_start_again_a_mask_stays() -> None:
    """Without one, transformers would take the sequences for packed and attend within each alone."""
    model, ids = tiny_model("llama"), random_tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(through_blocks(model, batch), last_block_output(model, batch), atol=1e-5, rtol=1e-5)
