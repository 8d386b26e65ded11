"""The forms in which a pruned model can be stored, and who can load them."""

from __future__ import annotations

from typing import NamedTuple

from fasp_lightning.errors import FaspError
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan
from fasp_lightning.structure.spec import ArchitectureSpec
from fasp_lightning.structure.stock_fields import stock_fields, stock_obstacle

FORMS = ("stock", "compact", "zero_filled")


class LoaderSupport(NamedTuple):
    """Whether a loader takes a saved model.

    Attributes:
        name: The loader.
        ok: True or false; ``None`` where it follows from the form but was not tried.
        reason: Why.
    """

    name: str
    ok: bool | None
    reason: str


def require_form(form: str) -> None:
    """Refuse what is neither a form nor ``"auto"``.

    Raises:
        FaspError: If it is neither.
    """
    if form not in ("auto", *FORMS):
        raise FaspError(f"form must be 'auto' or one of {', '.join(map(repr, FORMS))}, got {form!r}")


def choose_form(form: str, spec: ArchitectureSpec, cuts: Cuts) -> str:
    """The form to save in.

    * ``stock``: the FFN width, one for all blocks, and the number of heads stand in the config; loads with
      ``AutoModelForCausalLM``.
    * ``compact``: small on disk whatever was cut; loads with :func:`~fasp_lightning.load_pruned` alone.
    * ``zero_filled``: value pairs (and FFNs of a fixed width) in their original shapes, FFNs of different widths as
      wide as the widest, zeros where units are gone; loads with ``AutoModelForCausalLM``, saves nothing there.

    Args:
        form: One of these, or ``"auto"``: stock if it can be, else zero-filled.
        spec: The family's row.
        cuts: What was cut.

    Raises:
        FaspError: If ``form`` is unknown, or ``"stock"`` and stock code cannot hold these shapes.
    """
    require_form(form)
    obstacle = stock_obstacle(spec, cuts)
    if form == "stock" and obstacle:
        raise FaspError(f"form 'stock' cannot hold this model: {obstacle}; use 'compact' or 'zero_filled'")
    if form == "auto":
        return "zero_filled" if obstacle else "stock"
    return form


def stock_part(plan: PruningPlan, spec: ArchitectureSpec) -> PruningPlan:
    """The part of a plan that a stock config expresses: as many units in every block as the widest keeps.

    Blocks that keep fewer get back their first removed units, which a zero-filled checkpoint holds as zeros. Pairs
    whose width is fixed in the model's code are absent, that is, whole.
    """
    blocks: tuple[dict[str, PairPlan], ...] = tuple({} for _ in plan.blocks)
    for path, (layout, units) in plan.widths.items():
        if max(units) < layout.width and stock_fields(spec, layout, max(units)):
            for part, block in zip(blocks, plan.blocks, strict=True):
                part[path] = block[path].padded(max(units))
    return PruningPlan(plan.model_type, blocks)


def loaders_for(form: str, spec: ArchitectureSpec, cuts: Cuts) -> list[LoaderSupport]:
    """Which loaders take a model saved in ``form``, and why.

    Args:
        form: ``"stock"``, ``"compact"`` or ``"zero_filled"``.
        spec: The family's row.
        cuts: See :func:`choose_form`.
    """
    ours = LoaderSupport("fasp_lightning.load_pruned", True, "reads the plan in config.json")
    if form == "compact":
        reason = "shapes differ from the config; ignore_mismatched_sizes=True would re-initialise the weights"
        return [
            ours,
            LoaderSupport("transformers AutoModelForCausalLM", False, reason),
            LoaderSupport("vLLM, llama.cpp and other stock loaders", False, "they build the shapes from the config"),
        ]
    stock = _stock_shapes(spec, cuts)
    return [
        LoaderSupport("transformers AutoModelForCausalLM", True, stock),
        ours,
        LoaderSupport("vLLM, llama.cpp and other stock loaders", None, f"{stock}; a plain checkpoint, not tried here"),
    ]


def _stock_shapes(spec: ArchitectureSpec, cuts: Cuts) -> str:
    """How stock code comes by the shapes of a saved model."""
    parts = []
    if "groups" in cuts.kinds:
        parts.append("head counts and head size in the config")
    if "value" in cuts.kinds:
        parts.append("original V/O shapes, zeros where dims are gone")
    if "ffn" in cuts.kinds and spec.width_field is None:
        parts.append("original FFN shapes, zeros where units are gone")
    elif cuts.uneven:
        parts.append(f"FFNs padded with zeros to the widest, whose width is in config.{spec.width_field}")
    elif "ffn" in cuts.kinds:
        parts.append(f"one FFN width, in config.{spec.width_field}")
    return "; ".join(parts) or "original shapes"
