"""Value pairs at run time: the stock attention code sees its full widths, the layers have fewer rows and columns.

The layers of a cut pair stay the modules that they were, under the names that they had, with the features that their
weights have now. What lies between them and the attention's code is done from outside, by forward hooks on whatever
module stands at their path: an adapter that a library puts around such a layer works on the layer's own widths, and
its result is scattered, or its input gathered, like that of the plain layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasp_lightning.structure.modes import remove_hooks


class WidthHook(ABC):
    """A forward hook between a compact layer and code that knows its full width.

    The positions are no buffer of a module: averages of a model would round a mean of equal integers down.

    Args:
        positions: (m,) where the layer's rows or columns are in the full width.
    """

    def __init__(self, positions: Tensor) -> None:
        with torch.inference_mode(False):  # autograd saves them, whatever mode the cut was made in
            self.positions = positions.cpu().clone()
        self._near = self.positions
        self._handle: RemovableHandle | None = None
        self._id = -1  # the handle's, which torch.compile can read; the handle itself it cannot

    def positions_on(self, device: torch.device) -> Tensor:
        """The positions on a device; the copy on the last one is kept."""
        near = self._near  # read once: the replicas of a model run in threads
        if near.device != device:
            with torch.inference_mode(False):
                self._near = near = self.positions.to(device)
        return near

    def stands_on(self, module: nn.Module) -> bool:
        """Whether the hook is on a module."""
        return self._hooks(module).get(self._id) is self

    def put_on(self, module: nn.Module) -> None:
        """Take the hook off the module that it is on, and those that came with copied layers off the copies."""
        self.remove()
        for each in module.modules():  # torch.ao.quantization.swap_module, too, hands hooks on to another module
            remove_hooks(each, lambda hook: isinstance(hook, type(self)))
        self._handle = self._register(module)
        self._id = self._handle.id

    def remove(self) -> None:
        """Take the hook off the module that it is on."""
        if self._handle is not None:
            self._handle.remove()

    @abstractmethod
    def _register(self, module: nn.Module) -> RemovableHandle: ...

    @staticmethod
    @abstractmethod
    def _hooks(module: nn.Module) -> Mapping[int, Any]: ...


class ScatterRows(WidthHook):
    """Scatters the output of a producer with fewer rows into zeros of the full width.

    Args:
        rows: (m,) positions of its outputs in the full width.
        width: Full output width.
    """

    def __init__(self, rows: Tensor, width: int) -> None:
        super().__init__(rows)
        self.width = width

    def __call__(self, module: nn.Module, args: Any, outputs: Tensor) -> Tensor:
        """(…, m) → (…, width)."""
        full = outputs.new_zeros(*outputs.shape[:-1], self.width)
        return full.index_copy_(-1, self.positions_on(outputs.device), outputs)

    def _register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self)

    @staticmethod
    def _hooks(module: nn.Module) -> Mapping[int, Any]:
        return module._forward_hooks


class GatherColumns(WidthHook):
    """Gathers what a consumer with fewer columns reads from an input of the full width."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """(…, full width) → (…, m), in the first argument; an input of m columns is gathered already."""
        if args:
            return (self._gather(args[0]), *args[1:]), kwargs
        (name, inputs), *others = kwargs.items()
        return args, {name: self._gather(inputs), **dict(others)}

    def _gather(self, inputs: Tensor) -> Tensor:
        if inputs.shape[-1] == len(self.positions):
            return inputs
        return inputs.index_select(-1, self.positions_on(inputs.device))

    def _register(self, module: nn.Module) -> RemovableHandle:
        # first, so that other hooks see the inputs that the module's features tell of
        return module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    @staticmethod
    def _hooks(module: nn.Module) -> Mapping[int, Any]:
        return module._forward_pre_hooks


class CompactPaths:
    """Forward pre-hook of a block: each width hook stands on the module that is at its path now.

    Adapter libraries put their modules around a layer, and the layer back in its place, at any time and unasked.

    Attributes:
        hooks: Path of a layer below the block → its hook.
    """

    def __init__(self) -> None:
        self.hooks: dict[str, WidthHook] = {}

    def __call__(self, block: nn.Module, args: Any = ()) -> None:
        """Move the hooks whose module was replaced."""
        for path, hook in self.hooks.items():
            module = _module_at(block, path)
            if not hook.stands_on(module):
                hook.put_on(module)

    def replace(self, block: nn.Module, hooks: Mapping[str, WidthHook | None]) -> None:
        """Put other hooks at paths, or none."""
        for path, hook in hooks.items():
            if path in self.hooks:
                self.hooks.pop(path).remove()
            if hook is not None:
                self.hooks[path] = hook
        self(block)


def _module_at(block: nn.Module, path: str) -> nn.Module:
    """What ``get_submodule`` finds, in a tenth of the time: each forward of a block asks for it."""
    module: Any = block
    for name in path.split("."):
        # stand-ins and wrappers answer for what is in their original
        module = module._modules.get(name) or getattr(module, name)
    return module


def set_widths(block: nn.Module, hooks: Mapping[str, WidthHook | None]) -> None:
    """Let layers of a block have the full width for their neighbours, or their own again.

    Args:
        block: A decoder block.
        hooks: Path of a layer below the block → its hook, which takes the place of an earlier one, or ``None``.
    """
    paths = _paths_of(block)
    if paths is None and any(hooks.values()):
        paths = CompactPaths()
        block.register_forward_pre_hook(paths)
    if paths is not None:
        paths.replace(block, hooks)


def width_hooks(model: nn.Module) -> Iterator[tuple[str, WidthHook]]:
    """The width hooks below a module, each with the path of its layer."""
    for name, block in model.named_modules():
        paths = _paths_of(block)
        for path, hook in paths.hooks.items() if paths else ():
            yield f"{name}.{path}", hook


def _paths_of(block: nn.Module) -> CompactPaths | None:
    return next((hook for hook in block._forward_pre_hooks.values() if isinstance(hook, CompactPaths)), None)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def set_features(linear: nn.Module, inputs: int, outputs: int) -> None:
    """Make the width attributes of a linear module agree with its weight again, whatever its class calls them."""
    set_attributes(linear, ("in_features", "nx"), inputs)
    set_attributes(linear, ("out_features", "nf"), outputs)


class BlockConfig:
    """The shared config as one block sees it, whose number of heads is not that of all.

    Args:
        shared: The model's config; what is set there later is seen here.
        fields: What is otherwise in this block.
    """

    shared: Any

    def __init__(self, shared: Any, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields, shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.__dict__["shared"], name)


def set_heads(attention: nn.Module, heads: int, kv_heads: int) -> None:
    """Make the head counts of an attention module agree with its projections again, where it or its config holds them.

    Phi3Attention.forward (transformers, models/phi3/modeling_phi3.py) splits its fused projection by the heads in the
    config: while blocks differ, no number there is right for all of them.
    """
    set_attributes(attention, ("num_heads", "num_attention_heads"), heads)
    set_attributes(attention, ("num_key_value_heads", "num_kv_heads"), kv_heads)
    seen = getattr(attention, "config", None)
    shared = seen.shared if isinstance(seen, BlockConfig) else seen
    own = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if shared is not None:
        agrees = all(getattr(shared, name, value) == value for name, value in own.items())
        attention.config = shared if agrees else BlockConfig(shared, own)  # type: ignore[assignment]


def set_attributes(module: nn.Module, names: tuple[str, ...], value: int) -> None:
    """Set those of some attributes that a module has."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)
