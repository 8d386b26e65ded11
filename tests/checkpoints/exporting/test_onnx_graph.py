"""An ONNX graph answers as the model does, whatever was cut, and sizes of its inputs are free."""

import importlib.util
import logging

import onnxruntime
import pytest
import torch
from tiny import TINY, VOCAB, tiny_model
from tiny_pruning import pruned_model

from fasp_lightning import FaspError, export_onnx
from fasp_lightning.checkpoints.exporting import onnx_graph


def logits(folder, ids, mask):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(found)
