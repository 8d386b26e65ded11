"""A streamed model, written and checked part by part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasp_lightning.checkpoints.loading import load_config
from fasp_lightning.checkpoints.source import WEIGHTS_INDEX, ModelSource
from fasp_lightning.checkpoints.streaming.files import stored_weights
from fasp_lightning.checkpoints.streaming.model import StreamedModel
from fasp_lightning.checkpoints.streaming.opening import built
from fasp_lightning.checkpoints.verifying import compared, logits_of
from fasp_lightning.checkpoints.writing import bytes_of, converted, wider, zero_filled
from fasp_lightning.staging import staged_file, write_json
from fasp_lightning.structure.pair import ResolvedPair
from fasp_lightning.structure.plan import adopt_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fasp_lightning.structure.pruning_plan import PruningPlan

METADATA = {"format": "pt"}
"""What transformers insists on in the header of a safetensors file."""


def write_shard(state: dict[str, Tensor], file: Path) -> None:
    """Write weights into a file that is there as a whole, and on the disk, or not at all.

    Args:
        state: The weights, by their names in files.
        file: The file.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors.torch import save_file

    with staged_file(file) as new:
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, new, METADATA)


class Shards:
    """The weights of a streamed model, as they are saved: a shard a block, and others of the parts around them.

    Args:
        streamed: The model.
        shapes: Keeps more units than the model, zeros in their place; ``None`` for the shapes that it has.
    """

    def __init__(self, streamed: StreamedModel, shapes: PruningPlan | None) -> None:
        self._streamed = streamed
        self._wider: dict[str, list[tuple[ResolvedPair, Tensor]]] = {}
        self._sizes = [] if shapes is None else list(zero_filled(streamed.model, shapes).values())  # on meta
        for pair, units in () if shapes is None else wider(streamed.model, shapes):
            self._wider.setdefault(pair.name, []).append((pair, units))

    def size(self, dtype: torch.dtype) -> int:
        """Bytes that they will take."""
        return bytes_of((*self._streamed.model.parameters(), *self._sizes), dtype)

    def write(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> torch.dtype:
        """Write the config and every shard; finished ones that are right as they are get a second name."""
        model.save_pretrained(folder, state_dict={})
        for file in folder.glob("*.safetensors"):
            file.unlink()
        if not self._write_all(folder, dtype):
            dtype = model.dtype  # a weight would overflow
            self._write_all(folder, dtype)
        return dtype

    def verify(self, folder: Path, form: str, dtype: torch.dtype) -> float:
        """Stream what was written, built from its own config, and compare its logits with those of the model.

        Raises:
            FaspError: If a weight is missing, or of another shape.
            RuntimeError: If they differ by more than rounding.
        """
        model = self._streamed.model
        with self._streamed.rounded(dtype):
            expected = logits_of(model)
        source = ModelSource(str(folder), str(folder), local=True)
        config = load_config(folder, trust_remote_code=getattr(type(model), "_auto_class", None) is not None)
        attention = getattr(model.config, "_attn_implementation", None)
        stock = built(source, config, model.dtype, False, attention)
        saved = adopt_plan(stock) if form == "compact" else stock
        reread = StreamedModel(saved, stored_weights(source, folder), self._streamed.device, source.name)
        with reread:
            return compared(logits_of(saved), expected, model.dtype)

    def _write_all(self, folder: Path, dtype: torch.dtype) -> bool:
        """Write the shards and their index, unless a weight is too large for the dtype."""
        weight_map, total = dict[str, str](), 0
        groups = self._groups()
        for number, paths in enumerate(groups):
            file = folder / f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
            if not (names := self._as_it_is(paths, file, dtype)):
                state: dict[str, Tensor] = {}
                for path in paths:
                    state |= self._state(path)
                if dtype != self._streamed.model.dtype:
                    state, reached = converted(state, self._streamed.model.dtype, dtype)
                    if reached != dtype:
                        return False
                write_shard(state, file)
                names = list(state)
            weight_map |= dict.fromkeys(names, file.name)
            total += file.stat().st_size
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return True

    def _groups(self) -> list[list[str]]:
        """The parts of each shard: a block, or as many others as are no larger together than the largest block."""
        blocks, parts = self._streamed.blocks, self._streamed.parts
        sizes = {path: part.numel for path, part in parts.items()}
        largest = max(sizes[path] for path in blocks)
        groups = [[path] for path in blocks]
        room = 0
        for path in parts:
            if path in blocks or not self._streamed.places(path):
                continue
            if sizes[path] > room:
                groups.append([])
                room = largest
            groups[-1].append(path)
            room -= sizes[path]
        return groups

    def _state(self, path: str) -> dict[str, Tensor]:
        with self._streamed.held(path):
            instead: dict[str, Tensor] = {}
            for pair, units in self._wider.get(path, ()):
                instead |= {f"{path}.{key}": tensor for key, tensor in pair.zero_filled(units).items()}
            return self._streamed.state(path, instead)

    def _as_it_is(self, paths: list[str], file: Path, dtype: torch.dtype) -> list[str]:
        """Give a finished shard its second name; the names of its weights, or none if it must be written anew."""
        places = self._streamed.places(paths[0])
        files = {place for place, _ in places}
        (shard, *others) = files
        finished = len(paths) == 1 and not others and shard in self._streamed.finished
        if not finished or paths[0] in self._wider or dtype != self._streamed.model.dtype:
            return []
        self._streamed.disk.settle()
        try:
            os.link(shard, file)
        except OSError:  # a file system without such names
            shutil.copyfile(shard, file)
        return [name for _, name in places]
