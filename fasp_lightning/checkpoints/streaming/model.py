"""A model whose weights are in files: a part of it is read when it is computed with, and freed afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fasp_lightning.checkpoints.dry_save import no_progress_bar
from fasp_lightning.checkpoints.pruned_folder import unreadable_weights
from fasp_lightning.checkpoints.publishing.record import sampled
from fasp_lightning.checkpoints.streaming.files import read_weights
from fasp_lightning.errors import FaspError, FaspOSError, as_refusal
from fasp_lightning.staging import fingerprint
from fasp_lightning.structure.registry import spec_for

Places = list[tuple[Path, str]]
"""File and stored name of each weight of a part."""


@dataclass
class Traffic:
    """What went between the disk and the memory.

    Attributes:
        read: Bytes.
        read_seconds: Time that reading took, most of it beside the computing.
        written: Bytes.
        written_seconds: Likewise.
    """

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0


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
        parts: Path of each part → its module, the blocks in their order, then the others.
        blocks: Paths of the blocks.
        traffic: What was read and written.
        finished: Files that parts were moved to.
    """

    def __init__(self, model: Any, files: dict[str, Path], device: torch.device, name: str) -> None:
        self.model = model
        self.device = device
        self.name = name
        self.traffic = Traffic()
        model.fasp_sampled = {}
        self.finished: set[Path] = set()
        self._stored: torch.dtype | None = None
        self.blocks = [f"{spec_for(model).layers}.{index}" for index in range(len(_blocks(model)))]
        self.parts = _parts(model, self.blocks)
        self._loading = _loading(model, device)
        self._empty = {
            (module, name): parameter
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._places = self._find(files)
        self._held: Counter[str] = Counter()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fasp-stream")  # one: at most two blocks in memory
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._written: Future[None] | None = None
        self._last = -1
        _fill_buffers(model)
        model.get_input_embeddings().computes_on = device
        for path, part in self.parts.items():
            part.register_forward_pre_hook(lambda *_, path=path: self._take(path), prepend=True)
            part.register_forward_hook(lambda *_, path=path: self._give_back(path), always_call=True)

    @contextmanager
    def held(self, path: str) -> Iterator[nn.Module]:
        """A part with its weights, while inside."""
        self._take(path)
        try:
            yield self.parts[path]
        finally:
            self._give_back(path)

    def fingerprint(self) -> str:
        """Hash of the config, and of the files' names, sizes, times of change and headers: another one for others."""
        files = sorted({place[0] for places in self._places.values() for place in places} - self.finished)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        stored = sorted((path, name) for path, places in self._places.items() for _, name in places)
        return fingerprint(self.model.config.to_json_string(use_diff=False), stats, stored)

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

        own = {f"{path}.{name}": value for name, value in _state(self.parts[path], path in self.blocks)}
        own = {name: instead.get(name, value.detach()) for name, value in own.items()}
        state = {name: value for name, value in own.items() if name not in self._loading.tied}
        found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return found

    def in_background(self, write: Any, size: int) -> None:
        """Write something beside the computing; what was to be written before is written by then.

        Args:
            write: Does it.
            size: Bytes.
        """
        self.settle()

        def timed() -> None:
            start = time.perf_counter()
            write()
            self.traffic.written += size
            self.traffic.written_seconds += time.perf_counter() - start

        self._written = self._worker.submit(timed)

    def settle(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: If it could not be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

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
        self._forget()
        self._worker.shutdown()

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
            for name, value in _state(self.parts[path], path in self.blocks):
                if not value.is_meta:
                    self.model.fasp_sampled[f"{path}.{name}"] = sampled(value).clone()
            for module in _modules(self.parts[path], path in self.blocks):
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
        trained = _modules(part, path in self.blocks)
        wanted = {(one, name): p.requires_grad for one in trained for name, p in one.named_parameters(recurse=False)}
        if places:
            stored = self._fetched(path)
            with self._in_place(path):
                self._loading.load(self.model, stored, self.name)
        for module in _modules(part, path in self.blocks):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._tie(path)
        for name, value in _state(part, path in self.blocks):
            if value.is_meta:
                raise FaspOSError(f"model {self.name!r} must hold all weights, got none for {path}.{name}")
            if self._stored is not None and value.dtype == self.model.dtype:
                value.data = value.data.to(self._stored).to(value.dtype)
        for (module, name), trains in wanted.items():
            module.get_parameter(name).requires_grad_(trains)
        if path in self.blocks:
            self._look_ahead(self.blocks.index(path))

    @contextmanager
    def _in_place(self, path: str) -> Iterator[None]:
        """A block at its path in the model, where a stand-in may be while it is filled."""
        owner, _, name = path.rpartition(".")
        parent = self.model.get_submodule(owner)
        present = parent._modules[name]
        parent._modules[name] = self.parts[path]
        try:
            yield
        finally:
            parent._modules[name] = present

    def _tie(self, path: str) -> None:
        """Give a part the weights that it shares with another one."""
        for name, _ in _state(self.parts[path], path in self.blocks):
            source = self._loading.tied.get(f"{path}.{name}")
            if source is not None:
                owner, _, own = f"{path}.{name}".rpartition(".")
                with self.held(self.part_of(source)):
                    self.model.get_submodule(owner)._parameters[own] = self.model.get_parameter(source)

    def _fetched(self, path: str) -> dict[str, Tensor]:
        if self._next is not None and self._next[0] == path:
            ahead, self._next = self._next[1], None
            return ahead.result()
        if path in self.blocks:
            self._forget()
        self.settle()
        return self._read(self._places[path])

    def _read(self, places: Places) -> dict[str, Tensor]:
        start = time.perf_counter()
        found = read_weights(places)
        self.traffic.read_seconds += time.perf_counter() - start
        self.traffic.read += sum(tensor.nbytes for tensor in found.values())
        return found

    def _look_ahead(self, index: int) -> None:
        """Read the next block in the direction in which they are asked for."""
        step = -1 if self._last == index + 1 else 1
        self._last, following = index, index + step
        if 0 <= following < len(self.blocks):
            path = self.blocks[following]
            self._next = path, self._worker.submit(self._read, self._places[path])

    def _forget(self) -> None:
        ahead, self._next = self._next, None
        if ahead is not None and not ahead[1].cancel():
            ahead[1].exception()

    def _find(self, files: dict[str, Path]) -> dict[str, Places]:
        """Where the weights of each part are; names that no part has are left out, as transformers does."""
        places: dict[str, Places] = {path: [] for path in self.parts}
        for stored, name in self._loading.names(self.model, files):
            part = self.part_of(name)
            if part and name not in self._loading.tied:
                places[part].append((files[stored], stored))
        return places


@dataclass(frozen=True)
class _Loading:
    """Transformers' own way from stored weights to those of a model: other names, split or joined tensors.

    Attributes:
        config: What ``convert_and_load_state_dict_in_model`` (transformers, core_model_loading.py) is given.
        tied: Name of each weight that is another one → that one's name.
    """

    config: Any
    tied: dict[str, str]

    def load(self, model: Any, stored: dict[str, Tensor], name: str) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with as_refusal(lambda error: unreadable_weights(name, error)), no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(model, stored, self.config)
        if wrong := sorted(info.mismatched_keys):
            key, found, expected = wrong[0]
            raise FaspOSError(f"model {name!r} must have {key} of {tuple(expected)}, got {tuple(found)}")
        if info.conversion_errors:
            key, reason = next(iter(info.conversion_errors.items()))
            raise FaspOSError(f"{key} of {name!r} cannot be made of a part of the stored weights: {reason}")

    def names(self, model: Any, stored: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The name in the model of each stored weight, the first one where it becomes several."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [one for one in self.config.weight_mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self.config.weight_mapping if isinstance(one, WeightConverter)]
        prefix, state = model.base_model_prefix, model.state_dict()
        for name in stored:
            found, _ = rename_source_key(name, renamings, converters, prefix, state)
            if found not in state and name in state:
                found = name
            yield name, found


def _loading(model: Any, device: torch.device) -> _Loading:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(model)
    except (ImportError, TypeError) as error:
        raise FaspError(f"streaming needs transformers 5.23, which loads a part of a model; {error}") from None
    plan = model._get_dtype_plan(model.dtype)
    config = LoadStateDictConfig(device_map={"": device}, dtype=model.dtype, dtype_plan=plan, weight_mapping=mapping)
    return _Loading(config, dict(getattr(model, "all_tied_weights_keys", {})))


def _blocks(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.get_submodule(spec_for(model).layers)
    return found


def _parts(model: Any, blocks: list[str]) -> dict[str, nn.Module]:
    parts = {path: model.get_submodule(path) for path in blocks}
    inside = tuple(f"{path}." for path in blocks)
    for path, module in model.named_modules():
        own = module._parameters or module._buffers
        if own and path not in parts and not path.startswith(inside):
            parts[path] = module
    return parts


def _modules(part: nn.Module, whole: bool) -> list[nn.Module]:
    """The modules whose weights are a part's: all below a block, and the module alone around the blocks."""
    return list(part.modules()) if whole else [part]


def _state(part: nn.Module, whole: bool) -> list[tuple[str, Tensor]]:
    """A part's parameters, and those buffers that are stored."""
    if whole:
        return list(part.state_dict(keep_vars=True).items())
    buffers = ((name, value) for name, value in part._buffers.items() if name not in part._non_persistent_buffers_set)
    return [(name, value) for name, value in (*part._parameters.items(), *buffers) if value is not None]


@torch.no_grad()
def _fill_buffers(model: Any) -> None:
    """Compute buffers that are not stored, such as the frequencies of rotary embeddings.

    As ``_initialize_missing_keys`` (transformers, modeling_utils.py) does; they are small, and stay in memory.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            model._init_weights(module)
