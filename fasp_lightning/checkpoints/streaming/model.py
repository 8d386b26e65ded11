"""A model whose weights are in files: a part of it is read when it is computed with, and freed afterwards."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.checkpoints.publishing.record import sampled
from fasp_lightning.checkpoints.streaming.disk import Disk, Places
from fasp_lightning.checkpoints.streaming.loading import part_loading
from fasp_lightning.checkpoints.streaming.parts import Part, fill_buffers, parts_of
from fasp_lightning.errors import FaspOSError
from fasp_lightning.staging import fingerprint


class StreamedModel:
    """The parts of a model on ``meta``: its blocks, and each module around them that has weights of its own.

    A part is filled when it is called, or for as long as it is :meth:`held`, and is on ``meta`` again afterwards. While
    one block is held the next one in the same direction is read; what is written is written beside the computing. At
    most two blocks are in memory.

    Args:
        model: The causal LM on ``meta``, in evaluation mode.
        files: The file of each stored weight.
        device: Where parts are filled.
        name: Of the model, for messages.

    Attributes:
        parts: Path of each part → the part, the blocks in their order, then the others.
        blocks: Paths of the blocks.
        disk: Reads and writes.
        finished: Files that parts were moved to.
    """

    def __init__(self, model: Any, files: dict[str, Path], device: torch.device, name: str) -> None:
        self.model = model
        self.device = device
        self.name = name
        self.disk = Disk()
        model.fasp_sampled = {}
        self.finished: set[Path] = set()
        self._stored: torch.dtype | None = None
        self.parts = parts_of(model)
        self.blocks = [path for path, part in self.parts.items() if part.block]
        self._loading = part_loading(model, device)
        self._empty = {
            (module, name): parameter
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._places = self._find(files)
        self._held: Counter[str] = Counter()
        self._last = -1
        fill_buffers(model)
        model.get_input_embeddings().computes_on = device
        for path, part in self.parts.items():
            part.module.register_forward_pre_hook(lambda *_, path=path: self._take(path), prepend=True)
            part.module.register_forward_hook(lambda *_, path=path: self._give_back(path), always_call=True)

    @contextmanager
    def held(self, path: str) -> Iterator[None]:
        """A part with its weights, while inside."""
        self._take(path)
        try:
            yield
        finally:
            self._give_back(path)

    def fingerprint(self) -> str:
        """Hash of the config, and of the files' names, sizes, times of change and headers: another one for others."""
        files = sorted({place[0] for places in self._places.values() for place in places} - self.finished)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        stored = sorted((path, name) for path, places in self._places.items() for _, name in places)
        return fingerprint(self.model.config.to_json_string(use_diff=False), stats, stored)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by name, as the model has them, a part at a time."""
        for items in (self.model.named_parameters, self.model.named_buffers):
            names = [name for name, _ in items()]
            for path, inside in itertools.groupby(names, self.part_of):
                with self.held(path):
                    for name in inside:
                        owner, _, own = name.rpartition(".")
                        yield name, getattr(self.model.get_submodule(owner), own)

    def sample_rest(self) -> None:
        """Read what no forward on text has: of a model that takes images, what makes inputs of them."""
        for path, part in self.parts.items():
            if not part.state().keys() <= self.model.fasp_sampled.keys():
                with self.held(path):
                    pass

    def part_of(self, name: str) -> str:
        """The part that a weight of the model belongs to."""
        while name and name not in self.parts:
            name = name.rpartition(".")[0]
        return name

    def move(self, path: str, shard: Path, names: Iterable[str]) -> None:
        """From now on a part is read from a shard of its own.

        Args:
            path: The part.
            shard: The file, which may still be written in the background.
            names: Of the weights in it.
        """
        self.finished.add(shard)
        self._places[path] = [(shard, name) for name in names]

    def places(self, path: str) -> Places:
        """Where a part is read from."""
        return self._places[path]

    def state(self, path: str, instead: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """The weights of a part that is held, by the names that they have in files; tied ones are another part's.

        Args:
            path: The part.
            instead: Other tensors, by the names that they have in the model.
        """
        from transformers.core_model_loading import revert_weight_conversion

        own = self.parts[path].state()
        state = {
            name: instead.get(name, value.detach()) for name, value in own.items() if name not in self._loading.tied
        }
        found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return found

    @contextmanager
    def rounded(self, dtype: torch.dtype) -> Iterator[None]:
        """While inside, parts are filled with their weights as a narrower dtype has them."""
        self._stored = dtype
        try:
            yield
        finally:
            self._stored = None

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading and writing."""
        self.disk.close()

    def _take(self, path: str) -> None:
        self._held[path] += 1
        if self._held[path] == 1:
            try:
                self._fill(path)
            except BaseException:
                self._give_back(path)
                raise

    def _give_back(self, path: str) -> None:
        self._held[path] -= 1
        if not self._held[path]:
            part = self.parts[path]
            self.model.fasp_sampled |= {
                name: sampled(value).clone() for name, value in part.state().items() if not value.is_meta
            }
            for module in part.modules:
                self._free(module)

    def _free(self, module: nn.Module) -> None:
        """Put a module's own weights on ``meta``, in the shapes that they have now."""
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = self._empty.get((module, name))
                if empty is None or empty.shape != parameter.shape:  # else the very one, which tied ones share
                    empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                    self._empty[module, name] = empty
                module._parameters[name] = empty
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")

    def _fill(self, path: str) -> None:
        part, places = self.parts[path], self._places[path]
        trains = {
            (module, name): parameter.requires_grad
            for module in part.modules
            for name, parameter in module.named_parameters(recurse=False)
        }
        if places:
            stored = self.disk.read(places) if part.block else self.disk.read_beside(places)
            with self._in_place(path):
                self._loading.load(self.model, stored, self.name)
        for module in part.modules:
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._tie(part)
        for name, value in part.state().items():
            if value.is_meta:
                raise FaspOSError(f"model {self.name!r} must hold all weights, got none for {name}")
            if self._stored is not None and value.dtype == self.model.dtype:
                value.data = value.data.to(self._stored).to(value.dtype)
        for (module, name), required in trains.items():
            module.get_parameter(name).requires_grad_(required)
        if part.block:
            self._look_ahead(self.blocks.index(path))

    @contextmanager
    def _in_place(self, path: str) -> Iterator[None]:
        """A block at its path in the model, where a stand-in may be while it is filled."""
        owner, _, name = path.rpartition(".")
        parent = self.model.get_submodule(owner)
        present = parent._modules[name]
        parent._modules[name] = self.parts[path].module
        try:
            yield
        finally:
            parent._modules[name] = present

    def _tie(self, part: Part) -> None:
        """Give a part the weights that it shares with another one."""
        for name in part.state():
            source = self._loading.tied.get(name)
            if source is not None:
                owner, _, own = name.rpartition(".")
                with self.held(self.part_of(source)):
                    self.model.get_submodule(owner)._parameters[own] = self.model.get_parameter(source)

    def _look_ahead(self, index: int) -> None:
        """Read the next block in the direction in which they are asked for."""
        step = -1 if self._last == index + 1 else 1
        self._last, following = index, index + step
        if 0 <= following < len(self.blocks):
            self.disk.look_ahead(self._places[self.blocks[following]])

    def _find(self, files: dict[str, Path]) -> dict[str, Places]:
        """Where the weights of each part are; names that no part has are left out, as transformers does."""
        places: dict[str, Places] = {path: [] for path in self.parts}
        for stored, name in self._loading.names(self.model, files):
            part = self.part_of(name)
            if part and name not in self._loading.tied:
                places[part].append((files[stored], stored))
        return places
