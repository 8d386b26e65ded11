"""The forms in which a pruned model can be stored, and who can load them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from fasp_lightning.checkpoints.loaders import LOADERS, Trial, trial_of, way_out
from fasp_lightning.errors import FaspError
from fasp_lightning.structure.configs.stock_fields import is_stock, parts_left, stock_obstacle
from fasp_lightning.structure.layout import Cuts
from fasp_lightning.structure.pruning_plan import PairPlan, PruningPlan
from fasp_lightning.structure.registry import spec_for
from fasp_lightning.structure.spec import ArchitectureSpec

FORMS = ("stock", "compact", "zero_filled")


class LoaderSupport(NamedTuple):
    """Whether a loader takes a saved model.

    Attributes:
        name: The loader, and how it comes by the model.
        ok: Whether it gave the same 40 greedy tokens as ``transformers`` when it was tried with a tiny model of the
            family in this form; ``None`` where the family was not tried.
        reason: What came of it.
        version: What it was tried with.
        remedy: What to do where it does not take the model.
    """

    name: str
    ok: bool | None
    reason: str
    version: str = ""
    remedy: str = ""

    @property
    def verdict(self) -> str:
        """Whether it takes the model, in words."""
        return {True: "yes", False: "no", None: "not tried"}[self.ok]

    @property
    def because(self) -> str:
        """Why, and what to do."""
        return "; ".join(filter(None, (self.reason, self.remedy)))


def require_form(form: str) -> None:
    """Refuse what is neither a form nor ``"auto"``.

    Raises:
        FaspError: If it is neither.
    """
    if form not in ("auto", *FORMS):
        raise FaspError(f"form must be 'auto' or one of {', '.join(map(repr, FORMS))}, got {form!r}")


def choose_form(form: str, spec: ArchitectureSpec, cuts: Cuts) -> str:
    """The form to save in.

    * ``stock``: the FFN width, one for all blocks, and the number of heads and experts stand in the config; loads with
      ``AutoModelForCausalLM``.
    * ``compact``: small on disk whatever was cut; loads with :func:`~fasp_lightning.load_pruned` alone.
    * ``zero_filled``: value pairs (and FFNs of a fixed width) in their original shapes, FFNs of different widths as
      wide as the widest, zeros where units are gone; loads with ``AutoModelForCausalLM``, saves nothing there.

    Args:
        form: One of these, or ``"auto"``: stock if it can be, else zero-filled, or compact where blocks have different
            numbers of experts, as a pruning that failed half-way leaves them.
        spec: The family's row.
        cuts: What was cut.

    Raises:
        FaspError: If ``form`` is unknown, or ``"stock"`` and stock code cannot hold these shapes.
    """
    require_form(form)
    obstacle = stock_obstacle(spec, cuts)
    lacking = cuts.uneven and "whole_experts" in cuts.kinds
    if form == "zero_filled" and lacking:
        raise FaspError(
            "form 'zero_filled' cannot hold blocks of different numbers of experts: tokens would be sent to zeros; use "
            "'compact'"
        )
    if form == "stock" and obstacle:
        raise FaspError(f"form 'stock' cannot hold this model: {obstacle}; use 'compact' or 'zero_filled'")
    if form == "auto":
        return "compact" if lacking else "zero_filled" if obstacle else "stock"
    return form


def stock_part(plan: PruningPlan, spec: ArchitectureSpec) -> PruningPlan:
    """The part of a plan that a stock config expresses: as many units in every block as the widest keeps.

    Blocks that keep fewer get back their first removed units, which a zero-filled checkpoint holds as zeros. Pairs
    whose width is fixed in the model's code are absent, that is, whole.
    """
    blocks: tuple[dict[str, PairPlan], ...] = tuple({} for _ in plan.blocks)
    widths, several = plan.widths, Counter(path for path, _ in plan.widths)
    for (path, layout), units in widths.items():
        widest = int(max(parts_left(spec, widths, path, layout)) * layout.width)
        if widest < layout.width and several[path] == 1 and is_stock(spec, path, layout):
            for index in units:
                blocks[index][path] = plan.blocks[index][path].padded(widest)
    return PruningPlan(plan.model_type, blocks)


def loaders_for(form: str, config: Any, cuts: Cuts) -> list[LoaderSupport]:
    """Which loaders take a model saved in ``form``, as they were tried.

    Args:
        form: ``"stock"``, ``"compact"`` or ``"zero_filled"``.
        config: The model's config, or whatever else has its ``model_type``.
        cuts: See :func:`choose_form`.
    """
    tried = tried_form(form, cuts)
    shapes = "" if form == "compact" else _stock_shapes(spec_for(config), cuts)
    rows = [row for loader in LOADERS if (row := trial_of(config.model_type, tried, loader))]
    if not rows:
        reason = f"models of type {config.model_type} were not tried"
        return [LoaderSupport(name, None, reason) for name in LOADERS.values()]
    return [_support(row, config.model_type, shapes) for row in rows]


def tried_form(form: str, cuts: Cuts) -> str:
    """The form under which the loaders were tried that decides on a model with these cuts."""
    if form == "stock" and not cuts.kinds:  # the original shapes
        return "zero_filled"
    if form == "stock" and "groups" in cuts.kinds:
        return "stock, fewer KV groups"
    return "compact, FFNs alone" if form == "compact" and "value" not in cuts.kinds else form


def _support(row: Trial, family: str, shapes: str) -> LoaderSupport:
    ok = row.verdict == "same"
    reason = {"other": f"other text: {row.why}"}.get(row.verdict, row.why)
    if ok:
        reason = f"same text, as {row.why}" if row.why else "same text"
        reason += f"; {shapes}" if shapes and row.loader == "transformers" else ""
    remedy = "" if ok else way_out(family, row.form, row.loader)
    return LoaderSupport(LOADERS[row.loader], ok, reason, row.version, remedy)


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
    if "experts" in cuts.kinds and not cuts.uneven:
        fields = [spec.width_field_of(pair.consumer) for pair in spec.pairs if pair.experts]
        parts.append(f"one width of all experts, in config.{fields[0]}")
    if "whole_experts" in cuts.kinds:
        counts = [pair.experts.count_field for pair in spec.pairs if pair.experts]
        parts.append(f"fewer experts, their number in config.{counts[0]}")
    return "; ".join(parts) or "original shapes"
