"""Run twice by ``test_processes.py``: two processes without Lightning prune copies of the same models.

Each writes what it has after every case to ``FOLDER/CASE-RANK.pt``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import VOCAB, random_tokens, tiny_model
from tiny_pruning import INGREDIENTS, OWN, basic, calibration

from fasp_lightning import FASPPruner, OwnTextConfig, PruningConfig
from fasp_lightning.pruning import round
from fasp_lightning.pruning.config import LearningConfig
from fasp_lightning.pruning.own_text.writing import calibration_starts, mixed, own_sequences, own_text
from fasp_lightning.pruning.processes import Processes

CONFIG = basic(0.2, attention="value_dims")
LEARNED = basic(0.3, score="learned", learning=LearningConfig(steps=4, tokens=80, rate=0.3))
FAMILIES = ("llama-gqa", "opt")


def uneven(rank: int) -> list[Any]:
    """The part of ``calibration(3)`` that a process has: two batches, one of them padded, or one."""
    return calibration(3)[:2] if rank == 0 else calibration(3)[2:]


def eight(rank: int) -> list[Any]:
    """Four of ``calibration(8)`` in each process, of which one is held back, as two of eight in one process are."""
    return calibration(8)[4 * rank : 4 * rank + 4]


def out_of_range(rank: int) -> list[Any]:
    return [torch.full((2, 5), VOCAB)] if rank == 1 else calibration()


def nothing_in_one(rank: int) -> list[Any]:
    return calibration() if rank == 0 else []


def breaks_in_one(rank: int) -> Iterator[Any]:
    yield random_tokens()
    if rank == 1:
        raise OSError("disk gone")


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def prune(case: str, batches: Callable[[int], Any], family: str = "llama", config: PruningConfig = CONFIG) -> None:
        model, found = tiny_model(family), {"solved": 0}
        with counted(found):
            try:
                report = FASPPruner(config).prune(model, batches(rank), processes=Processes.everyone())
                found |= {"tokens": report.tokens, "errors": [pair.error_after for pair in report.pairs]}
                found |= {"dampings": [pair.damping for pair in report.pairs]}
            except Exception as error:
                found["message"] = f"{type(error).__name__}: {error}"
        found |= {"plan": model.fasp_plan.to_json() if hasattr(model, "fasp_plan") else None}
        torch.save(found | {"weights": model.state_dict()}, folder / f"{case}-{rank}.pt")

    write(folder, rank)
    for family in FAMILIES:
        prune(family, uneven, family)
        for name, config in INGREDIENTS.items():
            prune(f"{family}-{name}", eight, family, config)
    prune("learned", lambda rank: calibration(8), "llama-gqa", LEARNED)
    prune("token", out_of_range)
    prune("nothing", nothing_in_one)
    prune("breaks", breaks_in_one)
    round.restore_pair = failing_late(round.restore_pair)
    prune("solver", lambda rank: calibration())
    dist.destroy_process_group()


def pieces(folder: Path) -> list[OwnTextConfig]:
    """Three sequences, and one, of which a process has no part."""
    return [OwnTextConfig(tokens=20 * n, seq_len=20, seed=n, cache_dir=str(folder)) for n in (3, 1)]


def write(folder: Path, rank: int) -> None:
    """Own text without a cache, into one and from it, mixed with the calibration text; and a model that cannot."""
    processes = Processes.everyone()
    caches = (None, str(folder / "cache"), str(folder / "cache"))
    starts = calibration_starts(uneven(rank), processes)
    written = [own_text(tiny_model("opt"), replace(OWN, cache_dir=cache), processes, starts) for cache in caches]
    batches = mixed(uneven(rank), written[0], OWN.share, processes)
    whole = list(own_sequences(tiny_model("opt"), pieces(folder / "pieces"), processes))
    broken = tiny_model("opt")
    if rank == 1:
        broken.model.decoder.final_layer_norm.weight.data.fill_(float("nan"))
    try:
        own_text(broken, OWN, processes, starts)
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    found = {"written": written, "batches": batches, "message": message, "files": len(list(folder.glob("cache/*")))}
    found["pieces"] = whole
    torch.save(found, folder / f"own-{rank}.pt")


@contextmanager
def counted(found: dict[str, Any]) -> Iterator[None]:
    """Count restorations in ``found["solved"]``."""
    original = round.restore_pair

    def restore(*arguments: Any) -> Any:
        found["solved"] += 1
        return original(*arguments)

    round.restore_pair = restore
    try:
        yield
    finally:
        round.restore_pair = original


def failing_late(original: Callable[..., Any]) -> Callable[..., Any]:
    """A restoration that fails in the second block."""

    def restore(pair: Any, *arguments: Any) -> Any:
        if pair.name.endswith("1"):
            raise RuntimeError("no solution")
        return original(pair, *arguments)

    return restore
