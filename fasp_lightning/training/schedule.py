"""When to prune during a training run, and how far: a schedule made of plain data, which prunes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fasp_lightning.errors import FaspError, FaspFileNotFoundError, one_line

DIGITS = 12
"""Decimals of a computed sparsity, so that a third of 0.3 is written as 0.1."""


@dataclass(frozen=True)
class ScheduledPruning:
    """One event of a schedule: at that point, prune to this sparsity.

    Attributes:
        sparsity: Fraction in (0, 1) that is gone after the event, counted from the original model.
        step: Optimizer step (``trainer.global_step``) before which it happens; 0 is before the first.
        epoch: Epoch, from 0, at whose start it happens. Exactly one of ``step`` and ``epoch`` is given.
    """

    sparsity: float
    step: int | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        _require_sparsity("sparsity", self.sparsity)
        if (self.step is None) == (self.epoch is None):
            got = "neither" if self.step is None else f"step {self.step} and epoch {self.epoch}"
            raise FaspError(f"exactly one of step and epoch must be given, got {got}")
        for name in ("step", "epoch"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name), least=0)

    def due(self, step: int, epoch: int) -> bool:
        """Whether its time has come at that optimizer step of that epoch."""
        return step >= self.step if self.step is not None else epoch >= (self.epoch or 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, its time first."""
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return {**{name: data[name] for name in data if name != "sparsity"}, "sparsity": self.sparsity}


@dataclass(frozen=True)
class PruningSchedule:
    """The events of a run in their order. Sparsity is cumulative: counted from the original model.

    An event whose time comes before that of the one above it waits for that one, so that sparsity only rises;
    events by step and by epoch may be mixed.

    Attributes:
        events: The events, each a :class:`ScheduledPruning` or plain data such as
            ``{"step": 5, "sparsity": 0.1}`` or ``{"epoch": 2, "sparsity": 0.2}``; kept as a tuple.

    Raises:
        FaspError: If there is no event, one is malformed, or sparsity, steps or epochs fall or repeat. The
            message gives the entry's index and content.

    Example::

        from fasp_lightning import PruningSchedule

        schedule = PruningSchedule.cubic(final_sparsity=0.4, every_n_steps=500, rounds=4)
        print([(event.step, event.sparsity) for event in schedule])  # much at first: [(0, 0.23125), (500, 0.35), ...
    """

    events: Sequence[ScheduledPruning | Mapping[str, Any]]

    def __post_init__(self) -> None:
        if isinstance(self.events, (str, Mapping)) or not isinstance(self.events, Iterable):
            raise FaspError(
                f"schedule must be a list of entries such as {{step: 5, sparsity: 0.1}}, got {self.events!r}; "
                "PruningSchedule.parse takes other notations"
            )
        events = tuple(_event(index, entry) for index, entry in enumerate(self.events))
        if not events:
            raise FaspError("schedule must have at least one entry, got none")
        for name in ("sparsity", "step", "epoch"):
            _require_rising(events, name)
        object.__setattr__(self, "events", events)

    @classmethod
    def one_shot(cls, sparsity: float, step: int = 0) -> PruningSchedule:
        """One event.

        Args:
            sparsity: Fraction in (0, 1) to remove.
            step: Optimizer step before which to prune.
        """
        return cls([{"step": step, "sparsity": sparsity}])

    @classmethod
    def linear(cls, final_sparsity: float, *, every_n_steps: int, rounds: int, start_step: int = 0) -> PruningSchedule:
        """The same number of parameters at every event: s_k = s_f · k/n, k = 1..n.

        Args:
            final_sparsity: s_f, the sparsity after the last event.
            every_n_steps: Optimizer steps between two events.
            rounds: n, the number of events.
            start_step: Optimizer step before which the first event happens.
        """
        return cls(_rounds(lambda done: done, final_sparsity, start_step, every_n_steps, rounds))

    @classmethod
    def cubic(cls, final_sparsity: float, *, every_n_steps: int, rounds: int, start_step: int = 0) -> PruningSchedule:
        """Much at first, when there is much to spare, then ever less: s_k = s_f · (1 − (1 − k/n)³), k = 1..n.

        The rule of Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
        compression", 2017, arXiv:1710.01878, equation 1, from an initial sparsity of 0.

        Args:
            final_sparsity: s_f, the sparsity after the last event.
            every_n_steps: Optimizer steps between two events.
            rounds: n, the number of events.
            start_step: Optimizer step before which the first event happens.
        """
        return cls(_rounds(lambda done: 1 - (1 - done) ** 3, final_sparsity, start_step, every_n_steps, rounds))

    @classmethod
    def parse(cls, data: Any) -> PruningSchedule:
        """A schedule from plain data.

        Args:
            data: A list of events; ``{"kind": "one_shot" | "linear" | "cubic", …}`` with the arguments of that
                classmethod; the path of a YAML file that holds either; or a schedule, which is returned.

        Raises:
            FaspError: If the data is none of these, or the schedule is refused.
            FaspFileNotFoundError: If a path is given and there is no such file.
        """
        if isinstance(data, cls):
            return data
        if isinstance(data, (str, Path)):
            return cls._read(Path(data).expanduser())
        if isinstance(data, Mapping):
            return cls(data["events"]) if set(data) == {"events"} else cls._of_kind(dict(data))
        return cls(data)

    @classmethod
    def _read(cls, path: Path) -> PruningSchedule:
        import yaml  # type: ignore[import-untyped]

        if not path.is_file():
            raise FaspFileNotFoundError(
                f"schedule must be data or the path of a YAML file, got {str(path)!r}: no such file"
            )
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FaspError(f"schedule {str(path)!r} is not valid YAML: {one_line(error)}") from error
        if not isinstance(data, (list, dict)):
            raise FaspError(f"schedule {str(path)!r} must hold a list or a mapping, got {data!r}")
        return cls.parse(data)

    @classmethod
    def _of_kind(cls, data: dict[str, Any]) -> PruningSchedule:
        kinds: dict[Any, Callable[..., PruningSchedule]] = {
            "one_shot": cls.one_shot,
            "linear": cls.linear,
            "cubic": cls.cubic,
        }
        kind = data.pop("kind", None)
        if kind not in kinds:
            raise FaspError(f"schedule kind must be one of {', '.join(kinds)}, got {kind!r}")
        try:
            return kinds[kind](**data)
        except TypeError as error:  # a missing or unknown argument; the message names it
            raise FaspError(f"schedule of kind {kind}: {str(error).split('() ')[-1]}") from error

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[ScheduledPruning]:
        return iter(self._events)

    @property
    def _events(self) -> tuple[ScheduledPruning, ...]:
        return self.events  # type: ignore[return-value]  # since __post_init__

    @property
    def final_sparsity(self) -> float:
        """Sparsity after the last event."""
        return self._events[-1].sparsity

    def due(self, done: int, step: int, epoch: int) -> ScheduledPruning | None:
        """The next event, if its time has come. Several may be due at once: ask again after each.

        Args:
            done: How many events have happened.
            step: Optimizer steps done so far, ``trainer.global_step``.
            epoch: The present epoch, from 0.
        """
        if done >= len(self.events) or not self._events[done].due(step, epoch):
            return None
        return self._events[done]

    def beyond(
        self,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        steps_per_epoch: float | None = None,
        done: int = 0,
    ) -> tuple[int, ScheduledPruning] | None:
        """The first entry that a run will never reach, with its index, or None.

        An event at step n needs a step after it: with ``max_steps`` = n it never happens.

        Args:
            max_steps: Optimizer steps of the whole run; None or -1 if there is no such limit.
            max_epochs: Its epochs; None or -1 likewise.
            steps_per_epoch: Optimizer steps of one epoch; None or infinite if unknown.
            done: How many events have happened; these are passed over.
        """
        steps, epochs, per_epoch = (_limit(value) for value in (max_steps, max_epochs, steps_per_epoch))
        if per_epoch < float("inf"):
            steps = min(steps, epochs * per_epoch if epochs < float("inf") else steps)
            epochs = min(epochs, steps / per_epoch if per_epoch else 0)
        for index, event in enumerate(self):
            late = event.step >= steps if event.step is not None else (event.epoch or 0) >= epochs
            if late and index >= done:
                return index, event
        return None

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data that :meth:`parse` takes back."""
        return [event.to_dict() for event in self]


def _rounds(
    curve: Callable[[float], float], final_sparsity: float, start_step: int, every_n_steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Events that follow a curve from (0, 0) to (1, 1)."""
    _require_sparsity("final_sparsity", final_sparsity)
    _require_count("start_step", start_step, least=0)
    _require_count("every_n_steps", every_n_steps, least=1)
    _require_count("rounds", rounds, least=1)
    return [
        {
            "step": start_step + (k - 1) * every_n_steps,
            "sparsity": round(final_sparsity * curve(k / rounds), DIGITS),
        }
        for k in range(1, rounds + 1)
    ]


def _event(index: int, entry: Any) -> ScheduledPruning:
    if isinstance(entry, ScheduledPruning):
        return entry
    known = [field.name for field in fields(ScheduledPruning)]
    try:
        if not isinstance(entry, Mapping):
            raise FaspError("it must be a mapping with sparsity, and step or epoch")
        unknown = [str(key) for key in entry if key not in known]
        if unknown:
            raise FaspError(f"its keys must be among {', '.join(known)}, got {', '.join(unknown)}")
        if "sparsity" not in entry:
            raise FaspError("sparsity must be given")
        return ScheduledPruning(**entry)
    except FaspError as error:
        content = dict(entry) if isinstance(entry, Mapping) else entry
        raise FaspError(f"schedule entry {index}, {content!r}: {error}") from None


def _require_rising(events: Sequence[ScheduledPruning], name: str) -> None:
    """Each value must exceed the one before, among the entries that have one."""
    last = None
    for index, event in enumerate(events):
        value = getattr(event, name)
        if value is None:
            continue
        if last is not None and value <= last:
            raise FaspError(
                f"schedule entry {index}, {event.to_dict()!r}: {name} must exceed the {last} before it, got {value}"
            )
        last = value


def _require_sparsity(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise FaspError(f"{name} must be in (0, 1), got {value!r}")


def _require_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FaspError(f"{name} must be an integer >= {least}, got {value!r}")


def _limit(value: float | None) -> float:
    return float("inf") if value is None or value == -1 else value
