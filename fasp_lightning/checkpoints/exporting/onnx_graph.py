"""A model as an ONNX graph, in whatever form it is."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasp_lightning.checkpoints.dry_save import save_tokenizer
from fasp_lightning.checkpoints.exporting.exported import Exported, LoaderCheck, Reference, compared, expected_of
from fasp_lightning.checkpoints.output import check_output
from fasp_lightning.checkpoints.writing import bytes_of
from fasp_lightning.errors import FaspError, as_refusal, one_line
from fasp_lightning.staging import require_space, staged
from fasp_lightning.structure.adapters import has_adapters
from fasp_lightning.structure.modes import evaluating, own_modes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

GRAPH_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
EXPORTER = ("onnx", "onnxscript")
LARGEST = 2**31 - 2**24
"""Bytes that one protobuf file holds; more goes into a file beside it."""


@own_modes()
def export_onnx(
    model: PreTrainedModel, path: str | Path, tokenizer: Any = None, check: bool = True, overwrite: bool = False
) -> Exported:
    """Write a pruned or whole model as a folder with an ONNX graph, its config and its tokenizer.

    Any form goes, since the graph has the shapes that the model has: widths that differ between blocks and value dims
    that are cut included. Inputs are ``input_ids`` and ``attention_mask``, (batch, seq) int64, both sizes free;
    ``logits`` (batch, seq, vocabulary) come out. There is no cache of keys and values in it: scoring, classification
    and prefill are what it is for, and a text that is generated is computed anew for each token.

    Args:
        model: A causal LM, such as :func:`~fasp_lightning.load_pruned` gives; written in fp32, which all of ONNX
            Runtime's kernels on a CPU take.
        path: Folder to write; the graph in it is ``model.onnx``.
        tokenizer: Saved along if given.
        check: Run the graph with ONNX Runtime, if ``onnxruntime`` is installed, and compare its answers.
        overwrite: Replace a folder that holds such a graph.

    Returns:
        What was written, and what ONNX Runtime makes of it.

    Raises:
        FaspError: If ``onnx`` or ``onnxscript`` is missing, the model has adapters, its code cannot be exported, or
            ONNX Runtime does not run the graph.
        FaspFileExistsError: If ``path`` is not empty and ``overwrite`` is false, or holds something else.
        FaspOSError: If the disk has too little room, or the place is not writable.

    Example::

        from fasp_lightning import FASPPruner, PruningConfig, export_onnx

        FASPPruner(PruningConfig(sparsity=0.2)).prune(model, batches)
        exported = export_onnx(model, folder, tokenizer)
        print(exported.bytes, exported.check)
    """
    path = Path(path)
    require_onnx(model)
    check_output(path, overwrite, GRAPH_FILE, "graph")
    require_space(path, 2 * bytes_of(model.parameters(), torch.float32))
    full: Any = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    found: LoaderCheck | None = None
    with staged(path) as stage:
        _write_graph(full, stage / GRAPH_FILE)
        model.config.save_pretrained(stage)
        if tokenizer is not None:
            save_tokenizer(tokenizer, stage)
        if check:
            found = _checked(full, stage / GRAPH_FILE, tokenizer)
    size = sum(file.stat().st_size for file in path.iterdir())
    return Exported(path, "onnx", type(model).__name__, size, found)


def require_onnx(model: PreTrainedModel) -> None:
    """Refuse what cannot be exported, before anything is spent.

    Args:
        model: The model, whose weights may be on ``meta``.

    Raises:
        FaspError: If packages are missing, or the model has adapters.
    """
    missing = [name for name in EXPORTER if find_spec(name) is None]
    if missing:
        raise FaspError(
            f"ONNX export needs the packages {' and '.join(EXPORTER)}, and {' and '.join(missing)} cannot be found; "
            "run pip install 'fasp-lightning[serve]'"
        )
    if has_adapters(model):
        raise FaspError("model must have its LoRA merged before it is exported")


class _Logits(nn.Module):
    """A model whose inputs and outputs are those of the graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _write_graph(model: Any, file: Path) -> None:
    """Let torch trace the model; both sizes of the inputs stay free."""
    ids = torch.ones((2, 7), dtype=torch.int64, device=model.device)  # a size of 1 would be taken for a constant
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}

    def refusal(error: BaseException) -> FaspError:
        while error.__cause__ is not None:  # torch.onnx wraps the reason in advice to report it
            error = error.__cause__
        name = type(model).__name__
        return FaspError(f"{name} must be exportable by torch.onnx, which says: {one_line(error, first=True)}")

    with evaluating(model), _silent(), as_refusal(refusal):
        program: Any = torch.onnx.export(
            _Logits(model),
            (ids, mask),
            input_names=INPUTS,
            output_names=("logits",),
            dynamic_shapes=(free, free),
            dynamo=True,
            verbose=False,
        )
    program.save(file, external_data=bytes_of(model.parameters(), torch.float32) > LARGEST)


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns of what it skips of other packages."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _checked(model: Any, file: Path, tokenizer: Any) -> LoaderCheck | None:
    """ONNX Runtime's answer beside that of the model."""
    if find_spec("onnxruntime") is None:
        log.info("%s is not tried: onnxruntime is not there; pip install 'fasp-lightning[serve]'", file)
        return None
    return answer(file, expected_of(model, tokenizer))


def answer(file: Path, expected: Reference) -> LoaderCheck:
    """ONNX Runtime's greedy continuation of a prompt, and its logits, beside those of ``transformers``.

    Its logits are those of a batch of two, with a masked token after the prompt.

    Args:
        file: The graph.
        expected: The answer of ``transformers``.

    Raises:
        FaspError: If it does not run.
    """
    import onnxruntime

    with as_refusal(lambda error: FaspError(f"ONNX Runtime must run {file.name}, but it says: {one_line(error)}")):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        prompt, greedy = list(expected.prompt), list(expected.greedy)
        padded = _run(session, [[*prompt, prompt[0]]] * 2, [[1] * len(prompt) + [0]] * 2)
        whole = _run(session, [prompt + greedy[:-1]], [[1] * (len(prompt) + len(greedy) - 1)])
    found = whole[0, len(prompt) - 1 :].argmax(-1).tolist()  # each after the reference's tokens, as far as they agree
    return compared(expected, "ONNX Runtime", onnxruntime.__version__, found, padded[1, -2])


def _run(session: Any, ids: list[list[int]], mask: list[list[int]]) -> Tensor:
    """(batch, seq, vocabulary) logits."""
    given = {name: torch.tensor(value).numpy() for name, value in zip(INPUTS, (ids, mask), strict=True)}
    (logits,) = session.run(None, given)
    return torch.from_numpy(logits)
