"""Modes that torch or a model is put into for a while, and taken out of whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")
"""Types of devices that have an autocast of their own, beside the one that an extension of torch may add."""


@contextmanager
def own_modes(*, placing: bool = False) -> Iterator[None]:
    """Torch's modes as they are at its start, whatever the caller has set: results do not depend on them.

    Inference mode (its tensors could not be trained afterwards), autocast, gradients switched off, anomaly detection,
    default device and dtype, and the precision of float32 products. Deterministic algorithms stay asked for: they
    change no result. Usable as a decorator.

    Args:
        placing: Leave the caller's default device as it is, where it says where a model is to be.
    """
    with ExitStack() as stack:
        stack.callback(torch.clear_autocast_cache)  # it may hold casts of weights in the shapes they had
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        added = torch._C._get_privateuse1_backend_name()  # it may be renamed at any time
        for device in filter(torch.is_autocast_enabled, (*AUTOCAST, added)):
            stack.enter_context(torch.autocast(device, enabled=False))
        if not placing and torch.get_default_device().type != "cpu":  # the mode costs time on every call
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """The default dtype is float32, and its products are not computed in fewer bits: a gram must not be rounded."""
    dtype, products = torch.get_default_dtype(), _product_settings()
    before = [getattr(owner, name) for owner, name, _ in products]
    back = [partial(setattr, owner, name, value) for (owner, name, _), value in zip(products, before, strict=True)]
    with undone(*back, partial(torch.set_default_dtype, dtype)):
        torch.set_default_dtype(torch.float32)
        for owner, name, full in products:
            setattr(owner, name, full)
        yield


class _MatmulPrecision:
    """``torch.set_float32_matmul_precision`` as an attribute."""

    value = property(
        lambda self: torch.get_float32_matmul_precision(),
        lambda self, value: torch.set_float32_matmul_precision(value),
    )


def _product_settings() -> list[tuple[Any, str, str]]:
    """Where the precision of float32 products is set to less than full: owner, attribute, full value."""
    try:
        reduced = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # newer settings, one for each backend, were used, with which the getter is not to be mixed
        backends: Any = torch.backends
        return [(each.matmul, "fp32_precision", "ieee") for each in (backends.cuda, backends.mkldnn)]
    return [(_MatmulPrecision(), "value", "highest")] if reduced else []


def insist(*steps: Callable[[], Any]) -> None:
    """Take every step of a way back, whatever happens: what leaves a model half changed must not be left half undone.

    Args:
        steps: May be taken twice: one that a Ctrl-C has interrupted is.

    Raises:
        BaseException: The last error that came up, once all steps are taken.
    """
    left = list(steps)
    error: BaseException | None = None
    while left:
        try:
            while left:
                left[0]()
                del left[0]
        except KeyboardInterrupt as raised:
            error = raised
        except BaseException as raised:
            error = raised
            del left[0]
    if error is not None:
        raise error


@contextmanager
def undone(*steps: Callable[[], Any]) -> Iterator[None]:
    """Take every step of a way back at the end of the block, whatever happens in it or on the way.

    Args:
        steps: As for :func:`insist`, and made before: an interrupt may come while they are made.
    """
    taken = False
    try:
        try:
            yield
        finally:
            insist(*steps)
            taken = True
    finally:
        if not taken:  # a Ctrl-C may have come before the first step
            insist(*steps)


Hook = Callable[..., Any]


@contextmanager
def hooked(
    before: Sequence[tuple[nn.Module, Hook]] = (), after: Sequence[tuple[nn.Module, Hook]] = ()
) -> Iterator[None]:
    """Have modules call hooks while inside.

    Args:
        before: A module, and what it calls before its forward with itself and the positional and the named arguments.
        after: A module, and what it calls after its forward with itself, the positional arguments and the output.
    """
    mine = {id(hook) for _, hook in (*before, *after)}
    with undone(*(partial(remove_hooks, module, lambda hook: id(hook) in mine) for module, _ in (*before, *after))):
        for module, hook in before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in after:
            module.register_forward_hook(hook)
        yield


def remove_hooks(module: nn.Module, unwanted: Callable[[Hook], bool]) -> None:
    """Take forward hooks off a module, whoever has their handles."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]
            flags.pop(key, None)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires gradients; those that did do so again afterwards, whatever happens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undone(*(partial(parameter.requires_grad_, True) for parameter in trained)):
        for parameter in trained:
            parameter.requires_grad_(False)
        yield


@contextmanager
def requiring_gradients(embeddings: nn.Module) -> Iterator[None]:
    """Its outputs require gradients, so that all that follows has some, though no parameter does."""
    with hooked(after=[(embeddings, lambda module, args, output: output.requires_grad_())]):
        yield


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to the compute device, and back whatever happens."""
    home = next(module.parameters()).device
    with undone(partial(module.to, home)):
        module.to(device)  # inside, as it may find no room half-way
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}

    def put_back() -> None:
        for module, training in modes.items():
            module.training = training

    with undone(put_back, partial(torch.set_grad_enabled, torch.is_grad_enabled())):
        torch.set_grad_enabled(False)
        model.eval()
        yield
