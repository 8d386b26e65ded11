"""How to prune: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from fasp_lightning.errors import FaspError


@dataclass(frozen=True)
class OwnTextConfig:
    """How much text the model writes itself for its calibration, and how.

    Its sequences start like those of the calibration text; without any, with the model's beginning-of-text token.

    Attributes:
        tokens: How many tokens in all, rounded down to whole sequences.
        share: Weight of this text in the whole calibration, in (0, 1]; 1 is this text alone.
        seq_len: Tokens of a sequence, all positions of the model if it has fewer; many short ones are sampled in a
            batch.
        temperature: Of the sampling; 1 is the model's own distribution.
        seed: Seed of the sampling.
        cache_dir: Folder in which sampled text is kept for the next run with the same weights and settings. "auto"
            is a folder of the user's cache in commands, and none in Python; null keeps none.

    Raises:
        FaspError: If a field is outside its range.
    """

    tokens: int = 8192
    share: float = 0.33
    seq_len: int = 128
    temperature: float = 1.0
    seed: int = 0
    cache_dir: str | None = "auto"
    cached_as: ClassVar[str] = "own_text"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise FaspError(f"own_text.seq_len must be 2 or more, got {self.seq_len}: the first token is given")
        if self.tokens < self.seq_len:
            raise FaspError(
                f"own_text.tokens must be at least own_text.seq_len, {self.seq_len}, got {self.tokens}; "
                "set own_text to null for none"
            )
        if not 0 < self.share <= 1:
            raise FaspError(f"own_text.share must be in (0, 1], got {self.share}; set own_text to null for none")
        if not 0 < self.temperature < math.inf:
            raise FaspError(f"own_text.temperature must be positive and finite, got {self.temperature}")
        _require_folder("own_text", self.cache_dir)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.tokens // self.seq_len


@dataclass(frozen=True)
class LearningConfig:
    """How the columns that go are learned, with ``score="learned"``.

    Each unit has a gate, which the best scores open, as many as the budget keeps; the scores follow the divergence
    from the model without gates, which alone is trained on. They start as the logarithm of the loss sensitivity, and
    those that did best on calibration tokens that are held back are the outcome.

    Attributes:
        steps: Optimizer steps; 0 leaves the scores as they start.
        tokens: Tokens of a step, at least one sequence, in each process.
        rate: Size of the first step, by Adam, in standard deviations of the starting scores of a pair; it falls to 0
            in a straight line.
        seed: Seed of the order of the calibration tokens.
        cache_dir: Folder in which the state of the learning is kept now and then, so that a run that was stopped goes
            on where it was, and another one with the same weights, text and settings need not learn again. "auto" is
            a folder of the user's cache in commands, and none in Python; null keeps none.

    Raises:
        FaspError: If a field is outside its range.
    """

    steps: int = 60
    tokens: int = 1024
    rate: float = 0.02
    seed: int = 0
    cache_dir: str | None = "auto"
    cached_as: ClassVar[str] = "learning"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise FaspError(f"learning.steps must be 0 or more, got {self.steps}")
        if self.tokens < 2:
            raise FaspError(f"learning.tokens must be 2 or more, got {self.tokens}: one of them predicts another")
        if not 0 < self.rate < math.inf:
            raise FaspError(f"learning.rate must be positive and finite, got {self.rate}; set steps to 0 to learn none")
        _require_folder("learning", self.cache_dir)


@dataclass(frozen=True)
class PruningConfig:
    """Settings of one pruning. All fields have defaults; each is checked at construction.

    Attributes:
        sparsity: Fraction in [0, 1) of the decoder blocks' linear parameters (weights and biases of q, k, v, o and
            the FFN) to remove, counted from the original model.
        attention: "value_dims" cuts V rows with O columns; "kv_groups" cuts whole KV heads with their query heads,
            keys, values and output columns; "none" cuts the FFN only; "auto" is "none" with grouped-query attention,
            where it measured better at equal size, and "value_dims" elsewhere.
        experts: "columns" cuts hidden units inside each expert, as many of one as of the others, whose weights are
            restored; "whole" drops those experts whose output, times the router's weight, is smallest in the mean over
            the tokens that it sends them. Models without experts do not ask.
        head_balance: "even" cuts the same number of value dims in each KV head, "free" the worst of all heads.
        value_basis: "principal" turns the value dims of each KV head, before some of them are cut, to a basis that
            sorts them by what the consumer makes of them, wherever that leaves less calibration error than the "given"
            one. Turning changes nothing that the model computes. Such dims are scored by activations, whatever the
            score.
        score: "wanda" is the sum over a column of |weight| times the norm of its input; "fisher" the column's loss
            sensitivity, from gradients with respect to activations; "learned" starts from that and learns which
            columns go, in minutes where the others take seconds; "magnitude" leaves the input out. "auto" is "fisher"
            with adaptive allocation, which measures the loss sensitivity anyway, and "wanda" elsewhere, where it
            measured as good in less time.
        learning: How columns are learned; only "learned" reads it.
        sensitivity_tokens: Tokens behind the loss sensitivity, and behind block influence.
        allocation: "uniform" gives all blocks one FFN width, which stock code can load; "adaptive" lets the loss
            sensitivity decide how much each pair of each block loses, to the same total; "block_influence" takes more
            from blocks that change the hidden states less, which needs no gradient.
        influence_temperature: How evenly "block_influence" takes: the blocks share by softmax(−influence / this).
        restoration: "least_squares" refits the remaining weights in closed form; "none" leaves them.
        ridge: What the least squares are pulled towards: the "original" weights, or "zero".
        damping: Strength of that pull, times the mean diagonal of the gram matrix; at least 0. "auto" chooses it for
            each pair, by the error on calibration tokens that are held back.
        refit_bias: Refit the bias of consumers that have one, on centred inputs.
        own_text: Text sampled from the model itself, mixed into the calibration text; null for none.
        rounds: Prune in this many even steps to the sparsity, each with statistics and loss sensitivity of what the
            last one left; the time grows with it.
        multiple_of: Round the FFN widths that are left to the nearest multiple of this. "auto" is what kernels and
            quantised formats work well on: the largest of 256, 128, 64 and 32 that is at most 1/32 of the width (of a
            width below 1024: 32 if it divides by that, else 1). What is left over goes from value dims where they
            are cut, and between blocks with adaptive allocation; the sparsity that results is the one reported.
        device: Device to compute on, block by block, such as "cuda" or "cpu"; by default where the model is.
        offload: Where the calibration set's hidden states and consumer inputs live: "cpu", "accelerator" or "disk".
        micro_batch_size: Split the calibration batches into pieces of this many sequences; by default they are
            taken as they come.

    Example::

        from fasp_lightning import OwnTextConfig, PruningConfig

        best = PruningConfig(sparsity=0.3, allocation="adaptive")  # a width for each block, by loss sensitivity
        paper = PruningConfig.paper(sparsity=0.3)
        alone = PruningConfig(own_text=OwnTextConfig(share=1.0))  # no calibration text at hand
    """

    sparsity: float = 0.2
    attention: Literal["auto", "value_dims", "kv_groups", "none"] = "auto"
    experts: Literal["columns", "whole"] = "columns"
    head_balance: Literal["even", "free"] = "even"
    value_basis: Literal["given", "principal"] = "given"
    score: Literal["auto", "wanda", "fisher", "learned", "magnitude"] = "auto"
    learning: LearningConfig = field(default_factory=LearningConfig)
    sensitivity_tokens: int = 16384
    allocation: Literal["uniform", "adaptive", "block_influence"] = "uniform"
    influence_temperature: float = 0.1
    restoration: Literal["least_squares", "none"] = "least_squares"
    ridge: Literal["original", "zero"] = "original"
    damping: float | Literal["auto"] = 0.1
    refit_bias: bool = True
    own_text: OwnTextConfig | None = field(default_factory=OwnTextConfig)
    rounds: int = 1
    multiple_of: int | Literal["auto"] = "auto"
    device: str | None = None
    offload: Literal["cpu", "accelerator", "disk"] = "cpu"
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.own_text, dict):  # as to_dict() gives it
            object.__setattr__(self, "own_text", OwnTextConfig(**self.own_text))
        if isinstance(self.learning, dict):
            object.__setattr__(self, "learning", LearningConfig(**self.learning))
        if not 0 <= self.sparsity < 1:
            raise FaspError(f"sparsity must be in [0, 1), got {self.sparsity}")
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            if get_origin(hint) is Literal:
                _require_choice(name, getattr(self, name), get_args(hint))
        if self.value_basis == "principal" and self.attention in ("kv_groups", "none"):
            raise FaspError(
                f"attention must be 'value_dims' or 'auto' with value_basis 'principal', got {self.attention!r}, which "
                "cuts no value dims; set value_basis to 'given'"
            )
        if self.damping != "auto" and not (isinstance(self.damping, (int, float)) and 0 <= self.damping < math.inf):
            raise FaspError(f"damping must be a finite number >= 0 or 'auto', got {self.damping!r}")
        if isinstance(self.multiple_of, str) and self.multiple_of != "auto":
            raise FaspError(f"multiple_of must be a number or 'auto', got {self.multiple_of!r}")
        if not 0 < self.influence_temperature < math.inf:
            raise FaspError(f"influence_temperature must be positive and finite, got {self.influence_temperature}")
        for name in ("sensitivity_tokens", "rounds", "multiple_of", "micro_batch_size"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise FaspError(f"{name} must be at least 1, got {value}")
        if self.device is not None:
            _require_device(self.device)

    @classmethod
    def paper(cls, sparsity: float = 0.2, **changes: Any) -> PruningConfig:
        """The settings of the FASP paper: V/O and FFN of any width, Wanda score, least squares ridged towards zero.

        The paper gives no damping; 1e-4 is ours. It does not refit biases.

        Args:
            sparsity: As in the class.
            changes: Fields to set otherwise.
        """
        settings: dict[str, Any] = dict(
            attention="value_dims",
            score="wanda",
            ridge="zero",
            damping=1e-4,
            refit_bias=False,
            own_text=None,
            multiple_of=1,
        )
        return cls(sparsity=sparsity, **{**settings, **changes})

    @property
    def scores_by_sensitivity(self) -> bool:
        """Whether columns are scored by loss sensitivity, or what is learned from it, and not by activations."""
        return self.score in ("fisher", "learned") or (self.score == "auto" and self.allocation == "adaptive")

    @property
    def needs_sensitivity(self) -> bool:
        """Whether any setting reads the loss sensitivity."""
        return self.scores_by_sensitivity or self.allocation == "adaptive"

    @property
    def whole(self) -> frozenset[str]:
        """Kinds of pairs of which KV groups, or experts, are cut as a whole."""
        asked = {"groups": self.attention == "kv_groups", "whole_experts": self.experts == "whole"}
        return frozenset(kind for kind, whole in asked.items() if whole)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


Kept = TypeVar("Kept", OwnTextConfig, LearningConfig)
"""Settings of what is kept on disk for the next run."""


def _require_folder(owner: str, cache_dir: str | None) -> None:
    if cache_dir == "":
        raise FaspError(f"{owner}.cache_dir must be a folder, 'auto' or null, got ''")


def _require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise FaspError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _require_device(device: str) -> None:
    try:
        torch.device(device)
    except RuntimeError:
        raise FaspError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from None


def with_user_cache(config: Kept) -> Kept:
    """What "auto" means in a command: a folder below XDG_CACHE_HOME, or below ~/.cache without that.

    The home folder is not spelt out, since settings are saved along with the model.
    """
    if config.cache_dir != "auto":
        return config
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return replace(config, cache_dir=str(Path(cache) / "fasp_lightning" / config.cached_as))
