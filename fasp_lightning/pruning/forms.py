"""The forms in which a pruned model can be stored, and who can load them."""

from __future__ import annotations

from typing import NamedTuple

from fasp_lightning.structure.spec import ArchitectureSpec

FORMS = ("stock", "compact", "zero_filled")


class Loader(NamedTuple):
    """Whether a loader takes a saved model.

    Attributes:
        name: The loader.
        ok: True or false; ``None`` where it follows from the form but was not tried.
        reason: Why.
    """

    name: str
    ok: bool | None
    reason: str


def choose_form(form: str, spec: ArchitectureSpec, kinds: set[str]) -> str:
    """The form to save in.

    * ``stock``: the FFN width stands in the config; loads with ``AutoModelForCausalLM``.
    * ``compact``: small on disk whatever was cut; loads with :func:`~fasp_lightning.load_pruned` alone.
    * ``zero_filled``: value pairs (and FFNs of a fixed width) in their original shapes, zeros where units are gone;
      loads with ``AutoModelForCausalLM``, saves nothing there.

    Args:
        form: One of these, or ``"auto"``: stock if it can be, else zero-filled.
        spec: The family's row.
        kinds: Kinds of the pairs that were cut.

    Raises:
        ValueError: If ``form`` is unknown, or ``"stock"`` and stock code cannot hold these shapes.
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"form must be 'auto' or one of {', '.join(map(repr, FORMS))}, got {form!r}")
    obstacle = _obstacle(spec, kinds)
    if form == "stock" and obstacle:
        raise ValueError(f"form 'stock' cannot hold this model: {obstacle}; use 'compact' or 'zero_filled'")
    if form == "auto":
        return "zero_filled" if obstacle else "stock"
    return form


def _obstacle(spec: ArchitectureSpec, kinds: set[str]) -> str | None:
    if "value" in kinds:
        return "stock attention has one head size for queries, keys and values"
    if "ffn" in kinds and spec.width_field is None:
        return "the FFN width is fixed in the model's code"
    return None


def loaders_for(form: str, spec: ArchitectureSpec, kinds: set[str]) -> list[Loader]:
    """Which loaders take a model saved in ``form``, and why.

    Args:
        form: ``"stock"``, ``"compact"`` or ``"zero_filled"``.
        spec: The family's row.
        kinds: Kinds of the pairs that were cut.
    """
    ours = Loader("fasp_lightning.load_pruned", True, "reads fasp_plan.json")
    if form == "compact":
        reason = "shapes differ from the config; ignore_mismatched_sizes=True would re-initialise the weights"
        return [
            ours,
            Loader("transformers AutoModelForCausalLM", False, reason),
            Loader("vLLM, llama.cpp and other stock loaders", False, "they build the shapes from the config"),
        ]
    if form == "zero_filled":
        stock = "original shapes" if _fixed(spec, kinds) else f"original V/O shapes, FFN width in {spec.width_field}"
    else:
        stock = f"one FFN width, in config.{spec.width_field}"
    return [
        Loader("transformers AutoModelForCausalLM", True, stock),
        ours,
        Loader("vLLM, llama.cpp and other stock loaders", None, f"{stock}; a plain checkpoint, not tried here"),
    ]


def _fixed(spec: ArchitectureSpec, kinds: set[str]) -> bool:
    return spec.width_field is None or "ffn" not in kinds
