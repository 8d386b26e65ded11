"""A row is proved before it is trusted: what the laws say of every family is tried on a tiny twin."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fasp_lightning.checkpoints.dry_save import no_progress_bar, require_savable, savable
from fasp_lightning.checkpoints.forms import choose_form, stock_part
from fasp_lightning.checkpoints.saving import Whole, in_form, require_plan, write_folder
from fasp_lightning.errors import FaspError, of_library, one_line
from fasp_lightning.proving.masked import errors_of, masked, same, same_text
from fasp_lightning.pruning.budget.widths import decide_budget
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.pruner import Pruner
from fasp_lightning.structure.configs.stock_fields import cuts_in, groups_obstacle
from fasp_lightning.structure.configs.text_part import text_config, text_family
from fasp_lightning.structure.inferring.inference import packs
from fasp_lightning.structure.inferring.twin import random_tokens, run, shapes_of, twin
from fasp_lightning.structure.modes import own_modes
from fasp_lightning.structure.plan import resolve_pruned
from fasp_lightning.structure.registry import registered, spec_for
from fasp_lightning.structure.resolve import find_blocks, resolve
from fasp_lightning.structure.spec import ArchitectureSpec

SPARSITIES = (0.3, 0.4, 0.2, 0.1, 0.05, 0.02)
"""Of the blocks; the first is taken that a kind of pair can make up: of those of a hybrid little can go."""

KINDS = {"none": "ffn", "value_dims": "value", "kv_groups": "groups"}


@dataclass(frozen=True)
class Proof:
    """What was tried on the twin of a model, and held.

    Attributes:
        model_type: The family.
        spec: Its row.
        blocks: Blocks of the twin.
        kinds: Kinds of pairs that were cut: ``"ffn"``, ``"value"``, ``"groups"``.
        stock: Those of them whose cut model stock code loads in its small shapes.
        checks: What was tried of each.
        seconds: That it took.
    """

    model_type: str
    spec: ArchitectureSpec
    blocks: int
    kinds: tuple[str, ...]
    stock: tuple[str, ...]
    checks: tuple[str, ...]
    seconds: float


@own_modes()
def prove(model_or_config: Any, spec: ArchitectureSpec | None = None) -> Proof:
    """Try on a tiny random twin of a model, in seconds, what has to hold of its row.

    The twin has the class and config of the model, small sizes, and its blocks of every kind. Of each kind of pair
    that the row has: a cut model gives the logits of one whose units are masked, and generates the same text with
    its cache; the engine's statistics are those of whole forwards; what is saved is loaded again, by stock code where
    the row claims it; attention implementations that agree on the whole twin agree on the cut one. A sparsity of 0
    changes nothing, no token reaches an earlier one, and packing does what the row says of it.

    Args:
        model_or_config: A causal LM on any device, ``meta`` included, or its config.
        spec: The row; by default the registered one.

    Returns:
        What was tried.

    Raises:
        FaspError: If something does not hold; the message says what.

    Example::

        from fasp_lightning import prove

        proof = prove(model)
        print(proof.kinds, proof.stock, proof.checks)
    """
    start = time.perf_counter()
    model = shapes_of(model_or_config)
    small = twin(model)
    model_type = text_family(small.config)
    given = spec or spec_for(small.config)
    with registered(model_type, given), warnings.catch_warnings(), no_progress_bar():
        warnings.simplefilter("ignore")  # few tokens, and whatever a tiny model is warned of
        row = spec_for(small)
        _tried(model_type, "finding its pairs", lambda: resolve_pruned(model))
        _tried(model_type, "no token reaching an earlier one", lambda: _causal(small))
        _tried(model_type, "packed sequences kept apart", lambda: _packing(small, row))
        kinds = _kinds(small, row)
        _tried(model_type, "sparsity 0 is the identity", lambda: _identity(small))
        stock = tuple(kind for attention, kind in kinds.items() if _prove_kind(small, row, attention, kind))
    blocks = len(find_blocks(small, row))
    return Proof(model_type, given, blocks, tuple(kinds.values()), stock, tuple(CHECKS), time.perf_counter() - start)


def _kinds(small: Any, row: ArchitectureSpec) -> dict[str, str]:
    """What can be done with the attention → the kind of pair that it shows."""
    pairs = [pair for block in resolve(small, row) for pair in block]
    found = {pair.spec.kind for pair in pairs}
    groups = any(pair.layout.groups > 1 for pair in pairs)
    if groups and "value" in found and groups_obstacle(row, text_config(small.config)) is None:
        found.add("groups")
    kinds = {attention: kind for attention, kind in KINDS.items() if kind in found}
    return kinds if "ffn" in found or "experts" not in found else {"none": "experts", **kinds}


def _prove_kind(small: Any, row: ArchitectureSpec, attention: str, kind: str) -> bool:
    """Cut the twin and try everything on it; returns whether stock code loads it in its small shapes."""
    cut, tokens = copy.deepcopy(small), random_tokens(small, 8, 24, seed=1)
    config = _config(attention, _sparsity(small, attention, kind))
    report = _tried(text_family(small.config), f"pruning {kind} pairs", lambda: Pruner(config).prune(cut, [tokens]))
    mask = masked(small, cut.fasp_plan)
    errors = errors_of(small, mask, cut.fasp_plan, tokens)
    form = choose_form("auto", row, cuts_in(row, cut.fasp_plan))
    tries: dict[str, Callable[[], None]] = {
        "masked ≡ cut": lambda: same(run(cut), run(mask)),
        "generation with cache": lambda: same_text(cut, mask),
        "statistics ≡ whole forwards": lambda: _same_errors(report, errors),
        "eager ≡ sdpa": lambda: _same_attention(small, cut),
        "save → load": lambda: _saved(cut, "compact"),
        f"stock loads form {form}": lambda: _saved(cut, form),
    }
    for check, law in tries.items():
        _tried(text_family(small.config), f"{check}, {kind} pairs", law)
    return form == "stock"


CHECKS = ("causal", "packing", "sparsity 0", "masked ≡ cut", "generation with cache", "statistics ≡ whole forwards",
          "eager ≡ sdpa", "save → load", "stock loading")  # fmt: skip
"""What is tried."""


def _sparsity(small: Any, attention: str, kind: str) -> float:
    for sparsity in SPARSITIES:
        try:
            budget = decide_budget(small, _config(attention, sparsity))
        except FaspError:  # more than can be reached, or nothing is changed by it
            continue
        if kind in budget.cuts.kinds:
            return sparsity
    raise FaspError(f"the row of {text_family(small.config)} is refused: no sparsity cuts its {kind} pairs")


def _config(attention: str, sparsity: float) -> PruningConfig:
    uniform = PruningConfig(sparsity, restoration="none", score="wanda", own_text=None, multiple_of=1)
    return replace(uniform, attention=attention, allocation="uniform")  # type: ignore[arg-type]


def _tried(model_type: str, what: str, law: Callable[[], Any]) -> Any:
    """Refuse a row of which a law does not hold."""
    try:
        return law()
    except Exception as error:
        if not isinstance(error, (FaspError, RuntimeError)) and not of_library(error):
            raise
        raise FaspError(f"the row of {model_type} is refused, since it fails at {what}: {one_line(error)}") from error


def _identity(small: Any) -> None:
    model = copy.deepcopy(small)
    Pruner(_config("none", 0.0)).prune(model, [random_tokens(small)])
    before = small.state_dict()
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        raise FaspError("weights changed")


def _causal(small: Any) -> None:
    tokens = random_tokens(small)
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    same(run(small, changed)[:, :-1], run(small, tokens)[:, :-1])


def _packing(small: Any, row: ArchitectureSpec) -> None:
    if row.packing and not packs(small):
        raise FaspError("position_ids that start again do not do it; the row must have packing=False")


def _same_errors(report: Any, errors: dict[str, float]) -> None:
    for pair in (pair for pair in report.pairs if pair.layer in errors):
        if abs(pair.error_before - errors[pair.layer]) > 1e-2 * max(errors[pair.layer], 0.1):
            raise FaspError(f"error of {pair.layer} is {errors[pair.layer]:.4f}, got {pair.error_before:.4f}")


def _same_attention(small: Any, cut: Any) -> None:
    """Implementations that agree on the twin agree on the cut model; one that the class lacks is not asked for."""
    with _attention(small, "eager") as first, _attention(small, "sdpa") as second:
        if first is None or second is None or not torch.allclose(first, second, atol=1e-3 * float(first.abs().max())):
            return
    with _attention(cut, "eager") as first, _attention(cut, "sdpa") as second:
        same(first, second)  # type: ignore[arg-type]


@contextmanager
def _attention(model: Any, kind: str) -> Iterator[Tensor | None]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(kind)
        yield run(model)
    except (ValueError, ImportError):
        yield None
    finally:
        model.set_attn_implementation(before)


def _saved(cut: Any, form: str) -> None:
    """What is written gives the same logits as it is loaded: by stock code in every form but the compact one."""
    require_savable(cut)
    weights = Whole(cut, stock_part(require_plan(cut), spec_for(cut)) if form == "zero_filled" else None)
    with TemporaryDirectory() as folder:
        with savable(cut), in_form(cut, form):
            write_folder(cut, Path(folder), cut.dtype, write=weights.write)
        weights.verify(Path(folder), form, cut.dtype)
