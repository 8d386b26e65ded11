"""Mixed precision that is switched on by a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from fasp_lightning.checkpoints.devices import faster_than_fp32


class AutocastWhereFaster(MixedPrecision):
    """Computes in bf16 what ``precision="bf16-mixed"`` does, if the device is faster with it, and else in fp32.

    For ``Trainer(plugins=…)``, without ``precision``. On a CPU a probe tells: those without hardware for bf16 take
    hundreds of times longer with it, those with AMX a quarter of the time.
    """

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self._module: nn.Module | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Note the module, which moves to its device later; its weights stay as they are."""
        self._module = module
        return module

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast on the module's device, or nothing."""
        if self._module is not None:
            self.device = next(self._module.parameters()).device.type
        with super().forward_context() if self._pays() else nullcontext():
            yield

    def _pays(self) -> bool:
        if self.device == "cpu":
            return faster_than_fp32(torch.bfloat16)
        return self.device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
