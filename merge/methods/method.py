"""What a merge method is: the parameters it takes, what it measures, how it combines.

A method works on *jobs* (one output tensor with its resolved parameters) and on *tiles* (a span of every input of a
job, as 1-D arrays). It never sees files, blocks or threads: `measure` says which reductions it wants over all tiles,
`combine` gives a function that computes any tile by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ggez_kernels.sparsify import Counting, Sparsify, Stats
from ggez_merge.parameters import Scalar

if TYPE_CHECKING:
    import numpy as np

Array = Any  # a 1-D numpy array of float16, bfloat16 (ml_dtypes), float32 or float64


class Kernels(Protocol):
    """The arithmetic a backend offers; `ggez_kernels.reference` is its definition."""

    counting: Counting

    def linear(
        self,
        out: Array,
        base: Array | None,
        models: Sequence[Array],
        weights: Sequence[float],
        *,
        sparsify: Sequence[Sparsify] | None = None,
        start: int = 0,
    ) -> Stats: ...
    def vote(
        self,
        out: Array,
        base: Array,
        models: Sequence[Array],
        weights: Sequence[float],
        *,
        sparsify: Sequence[Sparsify] | None = None,
        start: int = 0,
        count: bool = False,
        normalize: bool = True,
        scale: float = 1.0,
    ) -> Stats: ...
    def gram(self, inputs: Sequence[Array], base: Array | None = None, *, start: int = 0) -> np.ndarray: ...
    def histogram(self, base: Array, model: Array, *, low: int, high: int, shift: int = 0) -> np.ndarray: ...
    def ties(self, base: Array, model: Array, threshold: int) -> int: ...
    def nth_tie(self, base: Array, model: Array, threshold: int, n: int) -> int: ...
    def l1(self, base: Array, model: Array, sparsify: Sparsify, *, start: int = 0) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its kind, bounds and default. `default` None and not `required` means "not used"."""

    kind: Literal["number", "integer", "flag", "choice"] = "number"
    default: Scalar | None = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[Scalar, ...] = ()

    def fault(self, value: Scalar) -> str | None:
        """What `value` should have been, or None if it is fine."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind == "choice":
            fine = any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.choices)
            return None if fine else "one of " + ", ".join(str(choice).lower() for choice in self.choices)
        if self.kind == "flag":
            return None if isinstance(value, bool) else "true or false"
        if self.kind == "integer" and not (number and float(value) == int(value)):
            return "a whole number"
        if not number:
            return "a number"
        low = self.low if self.low is not None else float("-inf")
        high = self.high if self.high is not None else float("inf")
        if low <= float(value) <= high:
            return None
        if self.high is None:
            return f"a number of at least {low:g}"
        return f"a number from {low:g} to {high:g}"


@dataclass(frozen=True)
class Job:
    """One output tensor as a method sees it: `n` elements, and every parameter resolved for this very tensor."""

    name: str
    n: int
    shared: Mapping[str, Scalar]
    models: Sequence[Mapping[str, Scalar]]

    def numbers(self, parameter: str) -> list[float]:
        """That parameter of every model, in recipe order."""
        return [float(model[parameter]) for model in self.models]


@dataclass(frozen=True)
class Tile:
    """A span of one job's inputs. `job` indexes the measured group, `start` is the first element's flat index."""

    job: int
    start: int
    base: Array | None
    models: Sequence[Array]


@dataclass(frozen=True)
class Sweep:
    """A reduction over the tiles of a group: `function(tile)` for each, added up with `+` in any order.

    `only` restricts it to the tile that starts at (job, start).
    """

    function: Callable[[Tile], Any]
    only: tuple[int, int] | None = None


Measurement = Generator[Sweep, Any, list[Any]]  # yields sweeps, is sent their sums, returns one result a job


def answered(measurement: Measurement, answer: Callable[[Sweep], Any]) -> list[Any]:
    """What a measurement returns once `answer` has told it the sum of every sweep that it asked for."""
    total: Any = None
    while True:
        try:
            sweep = measurement.send(total)
        except StopIteration as done:
            return list(done.value)
        total = answer(sweep)


Apply = Callable[[Array, "Array | None", Sequence[Array], int], Stats]  # (out, base, models, start)


def _always(given: Collection[str]) -> bool:
    return True


@dataclass(frozen=True)
class Method:
    """A merge method.

    `uses_base(given)` tells, from the names of the parameters a recipe gives, whether the base takes part in the
    arithmetic; `n_models` is how many models besides the base it accepts (least, most). `check_given` names
    contradictions among those names, `check` among a job's resolved parameters. `measure(kernels, jobs)` returns None
    when these jobs need no measuring; `measures_together` tells whether a job must be measured together with all
    others (a threshold over the whole model) or alone; `check_together` names contradictions among those jobs.
    """

    name: str
    combine: Callable[[Kernels, Job, Any], Apply]
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    uses_base: Callable[[Collection[str]], bool] = _always
    n_models: tuple[int, int | None] = (1, None)
    check_given: Callable[[Collection[str]], str | None] = lambda given: None
    check: Callable[[Job], str | None] = lambda job: None
    measure: Callable[[Kernels, Sequence[Job]], Measurement | None] | None = None
    measures_together: Callable[[Job], bool] = lambda job: False
    check_together: Callable[[Sequence[Job]], str | None] = lambda jobs: None


WEIGHT = Parameter(required=True)
NORMALIZE_ON = Parameter("flag", default=True)
NORMALIZE_OFF = Parameter("flag", default=False)
LAMBDA = Parameter(default=1.0)
INT8_MASK = Parameter("flag", default=False)  # mergekit's; chooses the dtype of a temporary there, changes no result


def summed(partials: Sequence[float]) -> float:
    """Their sum, rounded once; NaN where it has none (an overflow, infinities of both signs)."""
    try:
        return math.fsum(partials)
    except (OverflowError, ValueError):
        return math.nan


def normalised(weights: Sequence[float], normalize: bool) -> list[float]:
    """weights / sum(weights) if asked for; a sum of (nearly) zero divides by one, as in mergekit's task arithmetic."""
    total = sum(weights) if normalize else 1.0
    return [weight / (total if abs(total) >= 1e-8 else 1.0) for weight in weights]
