"""A second device in host memory: builds ``device.cpp``, and gives it the name ``second``."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "second"
SOURCE = Path(__file__).parent / "device.cpp"
CACHE = Path(__file__).parents[2] / ".cache" / "second_device"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) if sys.platform == "linux" else None


@functools.cache
def second_device() -> torch.device:
    """The device, built and registered when it is first asked for."""
    torch.ops.load_library(str(_built()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)


def _built() -> Path:
    """The library of this source and this torch, compiled once by one of the processes that want it."""
    from torch.utils import cpp_extension

    command = [str(COMPILER), "-std=c++20", "-O0", "-shared", "-fPIC", "-w"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + [str(SOURCE)]
    command += ["-lc10", "-ltorch_cpu"]
    key = hashlib.sha256(repr((command, torch.__version__, sys.version)).encode() + SOURCE.read_bytes()).hexdigest()
    library = CACHE / f"{key[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return library


def _module() -> ModuleType:
    """What torch asks a device's module for; it stands as ``torch.second``."""
    ops, module = torch.ops.second_device, ModuleType(f"torch.{NAME}")

    def state(_: Any = None) -> torch.Tensor:
        return ops.random_state()

    def seed(value: int) -> None:
        ops.seed(value)

    def restore(state: torch.Tensor, _: Any = None) -> None:
        ops.set_random_state(state)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "get_rng_state": state,
        "set_rng_state": restore,
        "get_rng_state_all": lambda: [state()],
        "set_rng_state_all": lambda states: restore(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "max_memory_allocated": lambda _=None: ops.memory()[1],
        "memory_allocated": lambda _=None: ops.memory()[0],
        "reset_peak_memory_stats": lambda _=None: ops.forget_peak(),
        "mem_get_info": lambda _=None: (2**40 - ops.memory()[0], 2**40),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
