"""Run-time modules for value pairs: the stock attention code sees its full widths, the weights are compact.

Both are transparent to ``state_dict``: the keys are those of the module inside, so that a compact checkpoint meets
a stock model with a size mismatch, loudly, and never with a key that is quietly initialised anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

_INNER = "linear."


class _Transparent(nn.Module):
    """Holds one linear module and hides its own level from the keys of the state dict.

    The positions are no buffer: averages of a model would round a mean of equal integers down.

    Attributes:
        positions: (m,) where the linear module's rows or columns are in the full width; moves with the module.
        hides_level: Set it to false where keys must be the paths of the parameters, as ``torch.distributed`` has it;
            such keys are read in either case.
    """

    def __init__(self, linear: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.positions = positions
        self.hides_level = True
        self.training = linear.training
        self.register_state_dict_post_hook(_strip_level)
        self.register_load_state_dict_pre_hook(_add_level)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Transparent:
        """What ``to``, ``cuda`` and the like go through."""
        super()._apply(fn, recurse)
        self.positions = fn(self.positions)
        return self


def _strip_level(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not module.hides_level:
        return
    for key in [key for key in state if key.startswith(prefix + _INNER)]:
        state[prefix + key.removeprefix(prefix + _INNER)] = state.pop(key)


def _add_level(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + _INNER)]:
        state[prefix + _INNER + key.removeprefix(prefix)] = state.pop(key)


class ScatterRows(_Transparent):
    """A producer with fewer rows whose output is scattered into zeros of the full width.

    Args:
        linear: The producer; its weight has one row an entry of ``rows``.
        rows: (m,) positions of its outputs in the full width.
        width: Full output width.
    """

    def __init__(self, linear: nn.Module, rows: Tensor, width: int) -> None:
        super().__init__(linear, rows)
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) → (…, width)."""
        outputs = self.linear(inputs)
        full = outputs.new_zeros(*outputs.shape[:-1], self.width)
        return full.index_copy(-1, self.positions.to(outputs.device), outputs)  # sharding moves parameters alone


class GatherColumns(_Transparent):
    """A consumer with fewer columns that gathers them from an input of the full width.

    Args:
        linear: The consumer; its weight has one column an entry of ``columns``.
        columns: (m,) positions of its inputs in the full width.
    """

    def __init__(self, linear: nn.Module, columns: Tensor) -> None:
        super().__init__(linear, columns)

    def gather(self, inputs: Tensor) -> Tensor:
        """(…, full width) → (…, m)."""
        return inputs.index_select(-1, self.positions.to(inputs.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, full width) → (…, out)."""
        return self.linear(self.gather(inputs))


def inner(module: nn.Module) -> nn.Linear:
    """The linear module itself, whether or not it is wrapped; a ``Conv1D`` is typed as what it is used like."""
    return cast(nn.Linear, module.linear if isinstance(module, _Transparent) else module)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def set_features(linear: nn.Module, inputs: int, outputs: int) -> None:
    """Make the width attributes of a linear module agree with its weight again, whatever its class calls them."""
    _set(linear, ("in_features", "nx"), inputs)
    _set(linear, ("out_features", "nf"), outputs)


def set_heads(attention: nn.Module, heads: int, kv_heads: int) -> None:
    """Make the head counts of an attention module agree with its projections again, where it holds them."""
    _set(attention, ("num_heads", "num_attention_heads"), heads)
    _set(attention, ("num_key_value_heads", "num_kv_heads"), kv_heads)


def _set(module: nn.Module, names: tuple[str, ...], value: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)
