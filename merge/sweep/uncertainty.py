"""How sure the figures of a sweep are: a paired bootstrap, McNemar's test, and standard errors.

Bootstrap: the items of each benchmark are drawn n at a time with replacement, the same draws for all candidates, so
what makes an item hard for all of them cancels in differences. Benchmarks are drawn independently, by a generator keyed
by seed and benchmark, so an interval depends neither on the other candidates nor on the order of anything. Intervals
are percentiles (Efron and Tibshirani 1993, chapter 13). They say how the figures would vary with other items of the
same kind; not with other benchmarks, training runs or prompts.

McNemar, exact: of the items that only one of two candidates gets right, how many are each one's? Under the null
hypothesis that is Binomial(b + c, 1/2); the test is two-sided.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ggez_merge.errors import Problem, Refused
from ggez_merge.sweep.scores import Benchmark, Mean, Side, differences, mean
from ggez_merge.untrusted import printable

Figure = Literal["regional", "global", "gain_percent", "retention_percent", "grp"]
_DRAWS_AT_ONCE = 1 << 22  # 32 MiB of counts


@dataclass(frozen=True)
class Interval:
    """A figure as observed, and the interval that holds it with the confidence asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Resampled figures of all candidates. samples: figure -> [candidate, resample], float64; observed: [candidate].

    A figure that is undefined (no alpha, other scales, a base at 0) is not there, or nan.
    """

    samples: Mapping[str, Any]
    observed: Mapping[str, Any]
    confidence: float

    def interval(self, figure: Figure, candidate: int) -> Interval | None:
        """The percentile interval of one candidate's figure; None where the figure is undefined."""
        if figure not in self.samples:
            return None
        return self._interval(self.observed[figure][candidate], self.samples[figure][candidate])

    def difference(self, figure: Figure, one: int, other: int) -> Interval | None:
        """The same for the difference one - other, paired: an interval without 0 tells them apart."""
        if figure not in self.samples:
            return None
        observed, samples = self.observed[figure], self.samples[figure]
        with np.errstate(invalid="ignore"):
            return self._interval(observed[one] - observed[other], samples[one] - samples[other])

    def _interval(self, value: float, samples: Any) -> Interval | None:
        if not (math.isfinite(value) and np.isfinite(samples).all()):
            return None
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(samples, [tail, 1 - tail])
        return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class McNemar:
    """Items that only the first, only the second candidate gets right; p_value: two-sided, exact."""

    only_first: int
    only_second: int
    p_value: float


def bootstrap(
    candidates: Sequence[Sequence[Benchmark]],
    base: int,
    alpha: float | None = None,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Bootstrap:
    """Resample R, G, gain, retention and (with alpha, on one scale) GRP of all candidates together.

    base: the index of the base among them. The same arguments give the same result. Raises Refused unless all
    benchmarks have outcomes of the same items for every candidate, and their scores are means of these.
    """
    problems = [problem for candidate in candidates for problem in _unpaired(candidate, candidates[base])]
    if problems:
        raise Refused(problems)
    drawn = {each.name: _resampled(each.name, candidates, n_resamples, seed) for each in candidates[base]}
    samples: dict[str, Any] = {}
    observed: dict[str, Any] = {}
    sides: tuple[Side, Side] = ("regional", "global")
    for side in sides:
        tagged = sorted(each.name for each in candidates[base] if each.on(side))
        samples[side] = sum(drawn[name][1] for name in tagged) / len(tagged)
        observed[side] = sum(drawn[name][0] for name in tagged) / len(tagged)
    means = {side: mean(candidates[base], side) for side in sides}
    for figures in (samples, observed):
        figures["gain_percent"] = 100 * (_relative(figures["regional"], base, means["regional"].higher_is_better) - 1)
        figures["retention_percent"] = 100 * _relative(figures["global"], base, means["global"].higher_is_better)
        if alpha is not None and means["regional"].scale is not None and _alike(means["regional"], means["global"]):
            figures["grp"] = alpha * figures["global"] + (1 - alpha) * figures["regional"]
    return Bootstrap(samples, observed, confidence)


def mcnemar(first: Benchmark, second: Benchmark) -> McNemar:
    """Whether two candidates differ on one benchmark of right and wrong answers, item by item.

    p = min(1, 2 * P(X <= min(b, c))) for X ~ Binomial(b + c, 1/2). Raises Refused unless both have outcomes of the same
    items, all of them 0 or 1.
    """
    problems = [*_unpaired([second], [first])]
    outcomes = {value for each in (first, second) for value in (each.items or {}).values()}
    if not problems and not outcomes <= {0, 1}:
        what = f"{printable(first.name)}: McNemar's test is for right and wrong answers"
        found = ", ".join(f"{value:g}" for value in sorted(outcomes - {0, 1})[:3])
        problems.append(Problem(what, expected="outcomes of 0 and 1", found=found, remedy="use the bootstrap"))
    if problems or first.items is None or second.items is None:
        raise Refused(problems)
    b = sum(outcome > second.items[item] for item, outcome in first.items.items())
    c = sum(outcome < second.items[item] for item, outcome in first.items.items())
    ways, term = 0, 1  # exact: sum of binomial coefficients, over 2 ** (b + c)
    for k in range(min(b, c) + 1):
        ways += term
        term = term * (b + c - k) // (k + 1)
    return McNemar(b, c, min(1.0, 2 * ways / 2 ** (b + c)))


def standard_error(benchmark: Benchmark) -> float | None:
    """Of a benchmark's score, in its unit: from its items, else sqrt(p (1 - p) / n) * scale with p = score / scale.

    The second is exact for right and wrong answers, and an upper bound for outcomes in between. None without items, or
    without n and scale, or if the score is no mean of items.
    """
    if benchmark.aggregator != "mean":
        return None
    if benchmark.items:
        unit = 1.0 if benchmark.scale is None else benchmark.scale
        return float(np.std(_outcomes(benchmark)) * unit / math.sqrt(len(benchmark.items)))
    if benchmark.n is None or benchmark.scale is None or not 0 <= benchmark.score <= benchmark.scale:
        return None
    share = benchmark.score / benchmark.scale
    return benchmark.scale * math.sqrt(share * (1 - share) / benchmark.n)


def mean_standard_error(benchmarks: Sequence[Benchmark], side: Side) -> float | None:
    """Of R or G, whose benchmarks are taken as independent: sqrt(sum of squares) / count. None if one has none."""
    errors = [standard_error(each) for each in benchmarks if each.on(side)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def _unpaired(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> Iterator[Problem]:
    """Why the items of a candidate cannot be paired with those of the base."""
    yield from differences(candidate, base)
    mine = {each.name: each for each in candidate}
    for theirs in (each for each in base if each.name in mine):
        name, own = printable(theirs.name), mine[theirs.name]
        if own.aggregator != "mean":
            yield Problem(f"{name}: the score is no mean over items", expected="aggregator mean", found=own.aggregator)
        elif not own.items:
            remedy = "evaluate with outcomes item by item, or use the standard error"
            yield Problem(f"{name}: a candidate has no outcomes by item", remedy=remedy)
        elif theirs.items and own.items.keys() != theirs.items.keys():
            odd = sorted(own.items.keys() ^ theirs.items.keys())
            found = f"{len(odd)} that only one has, such as {printable(odd[0])}"
            yield Problem(f"{name}: two candidates were measured on other items", found=found)


def _outcomes(benchmark: Benchmark) -> Any:
    """By item, in the order of the items' ids."""
    items = benchmark.items or {}
    return np.array([items[item] for item in sorted(items)], np.float64)


def _resampled(name: str, candidates: Sequence[Sequence[Benchmark]], n_resamples: int, seed: int) -> tuple[Any, Any]:
    """One benchmark's score for each candidate, as observed and [candidate, resample]."""
    benchmarks = [next(each for each in candidate if each.name == name) for candidate in candidates]
    units = [1.0 if each.scale is None else each.scale for each in benchmarks]
    outcomes = [_outcomes(each) for each in benchmarks]
    n = len(outcomes[0])
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    samples = np.empty((len(candidates), n_resamples))
    rows = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        places = random.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(places.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
        for k, own in enumerate(outcomes):  # one by one: the columns of one product may be rounded in different ways
            samples[k, start : start + count] = counts @ own * units[k] / n
    return np.array([own.mean() * unit for own, unit in zip(outcomes, units, strict=True)]), samples


def _relative(values: Any, base: int, higher_is_better: bool) -> Any:
    """scores.relative for arrays: nan where undefined."""
    origin = values[base]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = values / origin if higher_is_better else origin / values
        return np.where((origin > 0) & ((values >= 0) | higher_is_better), ratio, np.nan)


def _alike(one: Mean, other: Mean) -> bool:
    return (one.scale, one.higher_is_better) == (other.scale, other.higher_is_better)
