"""An ONNX graph answers as the model does, whatever was cut, and sizes of its inputs are free."""

import onnxruntime
import torch


def logits(folder, ids, mask):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(found)
