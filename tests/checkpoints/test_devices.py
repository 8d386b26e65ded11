"""Which device and dtype a model is loaded with."""

from __future__ import annotations

import pytest
import torch

from fasp_lightning.checkpoints import devices
from fasp_lightning.checkpoints.devices import choose_device, choose_dtype, home, parse_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """The outcome of the CPU probe, to be set by the test; a probe that was not set fails."""
    outcome: dict[str, bool] = {}
    monkeypatch.setattr(devices, "faster_than_fp32", lambda dtype: outcome["faster"])
    return outcome


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_auto_takes_half_precision_on_a_cpu_only_where_it_is_faster(
    probe: dict[str, bool], faster: bool, stored: torch.dtype
) -> None:
    probe["faster"] = faster
    assert choose_dtype("auto", stored, CPU) == (stored if faster else torch.float32)


def test_auto_says_when_it_leaves_the_checkpoints_dtype(
    probe: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    probe["faster"] = False
    with caplog.at_level("INFO"):
        choose_dtype("auto", torch.bfloat16, CPU)
    assert "fp32 instead of torch.bfloat16" in caplog.text


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_checkpoints_dtype_on_an_accelerator(stored: torch.dtype) -> None:
    assert choose_dtype("auto", stored, CUDA) == stored


def test_auto_without_a_checkpoint_dtype() -> None:
    assert choose_dtype("auto", None, CPU) == torch.float32
    assert choose_dtype("auto", None, CUDA) == torch.bfloat16


def test_fp32_and_requested_dtypes_are_not_probed(probe: dict[str, bool]) -> None:
    assert choose_dtype("auto", torch.float32, CPU) == torch.float32
    assert choose_dtype("bf16", torch.float32, CPU) == torch.bfloat16


def test_probe_compares_the_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 3.0}
    monkeypatch.setattr(devices, "_matmul_seconds", seconds.__getitem__)
    devices.faster_than_fp32.cache_clear()
    assert devices.faster_than_fp32(torch.bfloat16)
    assert not devices.faster_than_fp32(torch.float16)
    devices.faster_than_fp32.cache_clear()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_names(name: str, dtype: torch.dtype) -> None:
    assert parse_dtype(name) == dtype


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be .*float32.*, got 'int7'"):
        choose_dtype("int7", None, CPU)


def test_auto_device_is_one_that_works() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu please", "cuda:99", "meta2"])
def test_unusable_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device.*{name}"):
        choose_device(name)


@pytest.mark.parametrize(
    ("device", "free", "expected", "reason"),
    [
        (CPU, 0, CPU, None),
        (CUDA, 2 * 2**30, CUDA, None),
        (CUDA, 2**30, CPU, "cuda has 1.00 GiB free of the 2.00 GiB needed"),
    ],
    ids=["cpu", "room", "no room"],
)
def test_model_stays_on_the_cpu_where_an_accelerator_has_no_room(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, free: int, expected: torch.device, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 2**30))
    assert home(device, 2 * 2**30) == (expected, reason)
