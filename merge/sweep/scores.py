"""The scores of one candidate, and what they say beside the base's: gain, retention, GRP.

    R, G        = unweighted means of the scores of the benchmarks tagged regional, global (`both` counts on both sides)
    gain_abs    = R - R0                       gain_percent      = 100 * (R / R0 - 1)
    GRP         = alpha * G + (1 - alpha) * R   retention_percent = 100 * G / G0
    GRP_norm    = alpha * G / G0 + (1 - alpha) * R / R0          corrected = (score - chance) / (scale - chance)

R0 and G0 are the base's. GRP is Global-Regional Parity (GG-EZ, arXiv 2604.11490, section 3.2), alpha its weight on the
global score. GRP_norm is ours, not the paper's: it needs no scale that the two sides share.

Where lower is better, ratios are turned over (R0 / R, G0 / G) and gain_abs is R0 - R, so that more is better in all of
these; R, G and GRP stay as measured, and a mean over benchmarks of both directions is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ggez_merge.errors import Problem, Refused
from ggez_merge.untrusted import printable

Tag = Literal["regional", "global", "both"]
Side = Literal["regional", "global"]
TAGS: tuple[Tag, ...] = ("regional", "global", "both")
_MEAN_TOLERANCE = 0.01  # how far a score may be from the mean of its items, of the scale: scores are often rounded


@dataclass(frozen=True)
class Benchmark:
    """One benchmark's score for one candidate.

    n: of the items it was measured on. chance: the score of a guess.
    scale: the other end of a range that begins at 0: the perfect score or, if lower is better, the worst one; None if
    there is no end to it (FID, a reward).
    aggregator: how items became the score: "mean", or something else, for which there are no intervals.
    split: of the data, such as "validation". groups: the score of each country or language.
    items: the outcome of each item by its id, as a share of the scale: score = (scale or 1) * mean(items).
    """

    name: str
    tag: Tag
    score: float
    n: int | None = None
    higher_is_better: bool = True
    chance: float | None = None
    scale: float | None = None
    aggregator: str = "mean"
    split: str | None = None
    groups: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, float] | None = None

    def on(self, side: Side) -> bool:
        """Whether it counts for that side."""
        return self.tag in (side, "both")


@dataclass(frozen=True)
class Mean:
    """The unweighted mean of one side's scores; scale: None if a benchmark has none."""

    value: float
    higher_is_better: bool
    scale: float | None


@dataclass(frozen=True)
class Summary:
    """One candidate beside the base. None: undefined, as the base's score is not above 0 or the scales differ.

    worst_benchmark is the global benchmark that keeps least of the base's score, worst_retention_percent how much.
    """

    regional: Mean
    global_: Mean
    gain_abs: float
    gain_percent: float | None
    retention_percent: float | None
    worst_benchmark: str
    worst_retention_percent: float | None
    grp: float | None
    grp_norm: float | None


def relative(value: float, base: float, higher_is_better: bool) -> float | None:
    """value / base, or base / value where lower is better: above 1 is better. None if the base is not above 0.

    A lower-is-better value of 0 is infinitely better; one below 0 has no ratio.
    """
    if not base > 0:
        return None
    if higher_is_better:
        return value / base
    return base / value if value > 0 else math.inf if value == 0 else None


def mean(benchmarks: Sequence[Benchmark], side: Side) -> Mean:
    """R or G. Raises Refused if no benchmark has the tag, or if their scales or directions differ."""
    tagged = [benchmark for benchmark in benchmarks if benchmark.on(side)]
    if not tagged:
        remedy = f"tag at least one benchmark `{side}` or `both`"
        raise Refused(Problem(f"no benchmark is tagged {side}", found=_scales(benchmarks) or "none", remedy=remedy))
    if not _alike(tagged):
        raise Refused(
            Problem(
                f"the {side} score is a mean over benchmarks, and these are not on one scale",
                found=_scales(tagged),
                remedy="write all of them on one scale (all in percent, say), or correct them for chance",
            )
        )
    first = tagged[0]
    return Mean(math.fsum(each.score for each in tagged) / len(tagged), first.higher_is_better, first.scale)


def grp(benchmarks: Sequence[Benchmark], alpha: float) -> float:
    """alpha * G + (1 - alpha) * R: Global-Regional Parity. Where all benchmarks are lower-is-better, so is this.

    Raises Refused unless all benchmarks have one known scale and direction.
    """
    if not _alike(benchmarks) or any(benchmark.scale is None for benchmark in benchmarks):
        raise Refused(
            Problem(
                "GRP adds global to regional scores, and these are not on one scale",
                expected="one scale and one direction for all benchmarks",
                found=_scales(benchmarks),
                remedy="correct the scores for chance, select with max_regional or max_global, or look at GRP_norm",
            )
        )
    return alpha * mean(benchmarks, "global").value + (1 - alpha) * mean(benchmarks, "regional").value


def grp_norm(candidate: Sequence[Benchmark], base: Sequence[Benchmark], alpha: float) -> float | None:
    """alpha * G / G0 + (1 - alpha) * R / R0, ours and not the paper's; None where a ratio is undefined.

    It is 1 for the base. Ratios are turned over on a side where lower is better.
    """
    g = _relative_mean(candidate, base, "global")
    r = _relative_mean(candidate, base, "regional")
    if g is None or r is None:
        return None
    return (alpha * g if alpha else 0.0) + ((1 - alpha) * r if alpha < 1 else 0.0)  # 0 * inf would be nan


def gain_abs(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> float:
    """R - R0, or R0 - R where lower is better: what the region gains, in points."""
    new, old = mean(candidate, "regional"), mean(base, "regional")
    return new.value - old.value if new.higher_is_better else old.value - new.value


def gain_percent(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> float | None:
    """100 * (R / R0 - 1); None if it is undefined."""
    ratio = _relative_mean(candidate, base, "regional")
    return None if ratio is None else 100 * (ratio - 1)


def retention_percent(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> float | None:
    """100 * G / G0; None if it is undefined."""
    ratio = _relative_mean(candidate, base, "global")
    return None if ratio is None else 100 * ratio


def worst_retention(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> tuple[str, float | None]:
    """The global benchmark that keeps least of the base's score, and how many percent; one without a ratio is worst."""
    old = {benchmark.name: benchmark for benchmark in base}
    kept: dict[str, float | None] = {}
    for each in candidate:
        if each.on("global"):
            ratio = relative(each.score, old[each.name].score, each.higher_is_better)
            kept[each.name] = None if ratio is None else 100 * ratio
    return min(kept.items(), key=lambda pair: -math.inf if pair[1] is None else pair[1])


def summarise(candidate: Sequence[Benchmark], base: Sequence[Benchmark], alpha: float | None = None) -> Summary:
    """All of a candidate's figures. Without alpha, or where the scales differ, there is no GRP.

    Raises Refused unless both have the same benchmarks, and for what `mean` refuses.
    """
    problems = [*differences(candidate, base)]
    if problems:
        raise Refused(problems)
    worst_benchmark, worst = worst_retention(candidate, base)
    comparable = _alike(candidate) and all(benchmark.scale is not None for benchmark in candidate)
    return Summary(
        regional=mean(candidate, "regional"),
        global_=mean(candidate, "global"),
        gain_abs=gain_abs(candidate, base),
        gain_percent=gain_percent(candidate, base),
        retention_percent=retention_percent(candidate, base),
        worst_benchmark=worst_benchmark,
        worst_retention_percent=worst,
        grp=grp(candidate, alpha) if comparable and alpha is not None else None,
        grp_norm=None if alpha is None else grp_norm(candidate, base, alpha),
    )


def corrected(benchmark: Benchmark) -> float | None:
    """(score - chance) / (scale - chance): 0 is a guess, 1 is perfect; also where lower is better, whose best is 0.

    None without a chance level, or without a scale where it is needed.
    """
    return _correct(benchmark, benchmark.score)


def correct(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """The same benchmarks with scores, groups and items corrected for chance: one scale of 1, higher is better.

    Raises Refused for every benchmark that cannot be corrected.
    """
    lacking = [each for each in benchmarks if corrected(each) is None]
    if lacking:
        what, expected = (
            "these benchmarks cannot be corrected for chance",
            "`chance`, and a `scale` that differs from it",
        )
        raise Refused(Problem(what, expected=expected, found=_scales(lacking)))
    return [
        replace(
            each,
            score=_correct(each, each.score) or 0.0,
            groups={name: _correct(each, score) or 0.0 for name, score in each.groups.items()},
            items=each.items
            and {name: _correct(each, (each.scale or 1) * item) or 0.0 for name, item in each.items.items()},
            chance=0.0,
            scale=1.0,
            higher_is_better=True,
        )
        for each in benchmarks
    ]


def _correct(benchmark: Benchmark, score: float) -> float | None:
    perfect = benchmark.scale if benchmark.higher_is_better else 0.0
    if benchmark.chance is None or perfect is None or perfect == benchmark.chance:
        return None
    return (score - benchmark.chance) / (perfect - benchmark.chance)


def cautions(benchmarks: Iterable[Benchmark]) -> Iterator[str]:
    """What is odd about scores without being wrong, for people."""
    for each in benchmarks:
        chance = each.chance
        if chance is not None and (each.score < chance if each.higher_is_better else each.score > chance):
            yield (
                f"{each.name}: {each.score:g} is worse than chance ({chance:g}); "
                "answers in another format than the scorer expects are a frequent reason"
            )


def faults(benchmark: Benchmark, place: str | None = None) -> Iterator[Problem]:
    """What cannot be true of a benchmark."""
    name = printable(benchmark.name)
    numbers = {"score": benchmark.score, "chance": benchmark.chance, "scale": benchmark.scale}
    broken = [key for key, value in numbers.items() if value is not None and not math.isfinite(value)]
    for key in broken:
        yield Problem(f"{name}: `{key}` is not a finite number", place, found=str(numbers[key]))
    if benchmark.n is not None and benchmark.n < 1:
        yield Problem(f"{name}: `n` is the number of items", place, expected="at least 1", found=str(benchmark.n))
    elif benchmark.n is not None and benchmark.items is not None and len(benchmark.items) != benchmark.n:
        what, found = f"{name}: `n` is not the number of its items", str(benchmark.n)
        yield Problem(what, place, expected=str(len(benchmark.items)), found=found)
    if broken or benchmark.scale is None:
        return
    scale, chance, score = benchmark.scale, benchmark.chance, benchmark.score
    if scale <= 0:
        yield Problem(f"{name}: the scale must be above 0", place, found=f"{scale:g}")
        return
    if benchmark.higher_is_better and score > scale:
        remedy = f"a score in percent has the scale 100, a fraction the scale 1 (here {scale:g})"
        yield Problem(f"{name}: the score is better than perfect", place, f"at most {scale:g}", f"{score:g}", remedy)
    if chance is not None and benchmark.higher_is_better and chance >= scale:
        yield Problem(f"{name}: chance is not below the scale", place, expected=f"< {scale:g}", found=f"{chance:g}")
    if benchmark.items and benchmark.aggregator == "mean":
        average = scale * math.fsum(benchmark.items.values()) / len(benchmark.items)
        if not abs(average - score) <= _MEAN_TOLERANCE * scale:
            what, remedy = f"{name}: the score is not the mean of its items", "items are shares: 1 is right, 0 is wrong"
            yield Problem(what, place, expected=f"{average:g} (scale {scale:g})", found=f"{score:g}", remedy=remedy)


def differences(candidate: Sequence[Benchmark], base: Sequence[Benchmark]) -> Iterator[Problem]:
    """Why a candidate's scores cannot be set beside the base's: each benchmark must be the same measurement."""
    old = {benchmark.name: benchmark for benchmark in base}
    new = {benchmark.name: benchmark for benchmark in candidate}
    for name in [name for name in old if name not in new]:
        yield Problem(
            f"the candidate has no score of {printable(name)}", remedy="evaluate it, or leave the benchmark out"
        )
    for name in [name for name in new if name not in old]:
        yield Problem(f"the base has no score of {printable(name)}", remedy="evaluate the base too")
    for name in [name for name in new if name in old]:
        for key in ("tag", "higher_is_better", "scale", "split", "n"):
            expected, found = getattr(old[name], key), getattr(new[name], key)
            if expected != found and not (key == "n" and None in (expected, found)):
                yield Problem(
                    f"{printable(name)}: `{key}` is not that of the base", None, None, str(expected), str(found)
                )


def _relative_mean(candidate: Sequence[Benchmark], base: Sequence[Benchmark], side: Side) -> float | None:
    new, old = mean(candidate, side), mean(base, side)
    return relative(new.value, old.value, new.higher_is_better)


def _alike(benchmarks: Sequence[Benchmark]) -> bool:
    """Whether all have one scale and direction. Those without a scale are taken to be of one unit."""
    return len({(benchmark.scale, benchmark.higher_is_better) for benchmark in benchmarks}) == 1


def _scales(benchmarks: Iterable[Benchmark]) -> str:
    """ "CVQA: 0 to 100; FID: no scale, lower is better"."""
    return "; ".join(
        printable(each.name)
        + (": no scale" if each.scale is None else f": 0 to {each.scale:g}")
        + ("" if each.higher_is_better else ", lower is better")
        for each in benchmarks
    )
