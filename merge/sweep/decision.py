"""Which candidate is shipped: the rule of the recipe's `select:`, and what it picks.

    select: {rule: max_regional, retention: 98}

    max_regional   the highest R with retention_percent >= `retention` (98) and gain_percent >= `gain` (0); the default
    max_global     the highest G with gain_percent >= `gain`, which must be given
    max_grp        the highest alpha * G + (1 - alpha) * R, the paper's rule; `alpha` must be given
    knee           the point of the Pareto front farthest beyond the line between its ends, each axis scaled to 0 ... 1

`retention` and `gain` (in percent) bind any rule that they are given to. The base itself is no answer to
max_regional and max_global, or they could never fail; to the other two it is, and the decision says so.
Of equals the one with the smaller values is picked. Where nothing satisfies the rule, nothing is picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ggez_merge.check import Check
from ggez_merge.errors import Problem, Refused, UserError
from ggez_merge.recipe import Recipe
from ggez_merge.reference import read_path, resolve_path
from ggez_merge.sweep.alpha import Alpha, read_alpha
from ggez_merge.sweep.front import Point, bulge, pareto

RuleName = Literal["max_regional", "max_global", "max_grp", "knee"]
RULES: tuple[RuleName, ...] = ("max_regional", "max_global", "max_grp", "knee")
SELECT_KEYS = ("rule", "alpha", "retention", "gain", "split", "report", "kof_file")
DEFAULT_RETENTION_PERCENT = 98.0
_ROUNDING = 1e-9  # of a score or of 100 percent: what floating point may lose, not what a benchmark's noise may


@dataclass(frozen=True)
class Rule:
    """How to select. Floors are in percent, None: none. split: of the data that decides; report: that is reported."""

    name: RuleName = "max_regional"
    alpha: Alpha | None = None
    retention_percent: float | None = DEFAULT_RETENTION_PERCENT
    gain_percent: float | None = 0.0
    split: str | None = None
    report: str | None = None


@dataclass(frozen=True)
class Decision:
    """The point that a rule picks; tied: others that are as good by that rule; notes: what a user should know."""

    point: Point
    rule: Rule
    tied: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()


class Infeasible(UserError):
    """No candidate satisfies the rule (exit code 3). nearest: the one that misses it by least, if any can be named.

    shortfalls: by how many percent it misses each floor, such as {"retention": 0.4}.
    """

    exit_code = 3

    def __init__(self, problem: Problem, nearest: Point | None, shortfalls: dict[str, float]) -> None:
        self.problem = problem
        self.nearest = nearest
        self.shortfalls = shortfalls
        super().__init__(str(problem))


def read_rule(recipe: Recipe) -> Rule:
    """The recipe's `select:`; the defaults where it has none. Raises Refused with everything that is wrong in it."""
    problems: list[Problem] = []
    check = Check(recipe.document, recipe.path, problems)
    given = check.mapping(("select",), recipe.document.data.get("select"), SELECT_KEYS)
    name = check.choice(("select", "rule"), given.get("rule"), RULES, absent="max_regional")
    if name == "max_grp" and "alpha" not in given:
        what = "`alpha` is missing: max_grp weighs the global score with it"
        check.refuse(("select",), what, remedy="write alpha: kof:SEA@2023, or a number")
    if name == "max_global" and "gain" not in given:
        check.refuse(("select",), "`gain` is missing: max_global needs the gain, in percent, that must be reached")
    retention = _percent(check, "retention", given.get("retention"))
    if retention is not None and not 1 < retention <= 1000:
        expected, remedy = "percent of the base's score, such as 98", "98 % is 98, not 0.98"
        check.refuse(("select", "retention"), "this is not a retention", expected, retention, remedy)
    rule = Rule(
        name=name,  # type: ignore[arg-type]
        alpha=_alpha(check, given),
        retention_percent=DEFAULT_RETENTION_PERCENT if name == "max_regional" and retention is None else retention,
        gain_percent=0.0
        if name == "max_regional" and "gain" not in given
        else _percent(check, "gain", given.get("gain")),
        split=check.text(("select", "split"), given.get("split")),
        report=check.text(("select", "report"), given.get("report")),
    )
    if problems:
        raise Refused(problems)
    return rule


def _percent(check: Check, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        check.refuse(("select", key), f"`{key}` must be a number.", "percent, without a sign for it", value)
        return None
    return float(value)


def _alpha(check: Check, given: dict[str, Any]) -> Alpha | None:
    name = read_path(check, ("select", "kof_file"), given.get("kof_file"))
    file = resolve_path(name, check.path) if name else None
    if name and file is None:
        check.refuse(("select", "kof_file"), "there is no such file", found=name)
    elif "alpha" in given:
        try:
            return read_alpha(given["alpha"], file, check.document.place("select", "alpha"))
        except Refused as refused:
            check.problems += refused.problems
    return None


def decide(points: Sequence[Point], rule: Rule) -> Decision:
    """What the rule picks of the evaluated points, the base among them.

    Raises Infeasible if no point satisfies it, and Refused if the rule needs a GRP that the points do not have.
    """
    wanted = sorted(points, key=lambda point: point.candidate.order)
    if rule.name in ("max_regional", "max_global"):
        wanted = [point for point in wanted if point.candidate.role != "base"]
    if not wanted:
        raise Infeasible(Problem("there is no merged candidate to select"), None, {})
    missed = [shortfalls(point, rule) for point in wanted]
    feasible = [point for point, short in zip(wanted, missed, strict=True) if not short]
    if not feasible:
        raise _infeasible(wanted, missed, rule)
    if rule.name == "knee":
        best = _knees(feasible)
    else:
        merits = [_merit(rule)(point) for point in feasible]
        best = [point for point, merit in zip(feasible, merits, strict=True) if _same(merit, max(merits))]
    return Decision(best[0], rule, tuple(best[1:]), tuple(_notes(best, points)))


def shortfalls(point: Point, rule: Rule) -> dict[str, float]:
    """By how many percent a point misses each floor of the rule; empty if it misses none, inf where undefined.

    A gain floor of 0 needs no ratio: a base that scores 0 in the region is no obstacle to it.
    """
    found = {"retention": point.summary.retention_percent, "gain": point.summary.gain_percent}
    floors = {"retention": rule.retention_percent, "gain": rule.gain_percent}
    if found["gain"] is None and rule.gain_percent == 0:
        found["gain"] = point.summary.gain_abs
    missed = {}
    for key, floor in floors.items():
        value = found[key]
        if floor is not None and value is None:
            missed[key] = math.inf
        elif floor is not None and value is not None and value < floor - 100 * _ROUNDING:
            missed[key] = floor - value
    return missed


def _merit(rule: Rule) -> Callable[[Point], float]:
    if rule.name == "max_regional":
        return lambda point: point.r
    if rule.name == "max_global":
        return lambda point: point.g
    return lambda point: _grp(point, rule)


def _grp(point: Point, rule: Rule) -> float:
    if rule.alpha is None:
        raise Refused(Problem("max_grp needs an alpha", remedy="write alpha: kof:SEA@2023, or a number, in `select:`"))
    if point.summary.grp is None:
        what = f"{point.candidate} has no GRP: its scores are not on one scale"
        raise Refused(Problem(what, remedy="select with max_regional or max_global, or give every benchmark its scale"))
    return rule.alpha.value * point.g + (1 - rule.alpha.value) * point.r


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=1e-12)


def _knees(points: Sequence[Point]) -> list[Point]:
    """The points farthest out; those that share the place of a front of one."""
    distances = bulge(points)
    on_front = [(point, out) for point, out, on in zip(points, distances, pareto(points), strict=True) if on]
    if len({(point.g, point.r) for point, _ in on_front}) == 1:
        return [point for point, _ in on_front]
    farthest = max(out for _, out in on_front)
    if farthest > _ROUNDING:
        return [point for point, out in on_front if _same(out, farthest)]
    inner = [(point, out) for point, out in on_front if out < -_ROUNDING]
    nearest = max(inner, key=lambda pair: pair[1], default=(None, 0.0))
    said = f"{nearest[0].candidate} lies {-nearest[1]:.3g} inside it" if nearest[0] else "only the ends of the front"
    raise Infeasible(
        Problem(
            "the Pareto front has no knee",
            expected="a point beyond the straight line between its ends",
            found=said,
            remedy="use max_regional or max_grp, or evaluate more candidates",
        ),
        nearest[0],
        {"knee": -nearest[1]} if nearest[0] else {},
    )


def _infeasible(points: Sequence[Point], missed: Sequence[dict[str, float]], rule: Rule) -> Infeasible:
    totals = [sum(short.values()) for short in missed]
    i = min(range(len(points)), key=lambda i: totals[i])  # the first of equals: the smaller values
    floors = {"retention": rule.retention_percent, "gain": rule.gain_percent}
    expected = " and ".join(f"{key} of at least {floor:g} %" for key, floor in floors.items() if floor is not None)
    if totals[i] == math.inf:
        what = f"{rule.name}: no candidate can satisfy it, as the base's score is not above 0 and has no percents"
        return Infeasible(Problem(what, expected=expected, remedy="correct the scores, or use max_grp"), None, {})
    said = ", ".join(f"{key} short by {short:.3g} %" for key, short in missed[i].items())
    return Infeasible(
        Problem(
            f"no candidate satisfies {rule.name}",
            expected=expected,
            found=f"the nearest is {points[i].candidate}: {said}",
            remedy="evaluate candidates nearer to the base, lower the floor, or do not merge",
        ),
        points[i],
        missed[i],
    )


def _notes(best: Sequence[Point], points: Sequence[Point]) -> Iterator[str]:
    chosen = best[0]
    name = str(chosen.candidate)
    if chosen.candidate.role == "base":
        yield f"{name}: by this rule no merge is better than the base"
    elif chosen.candidate.role == "regional":
        yield f"{name}: by this rule no merge is better than the regional model as it is"
    if chosen.candidate.role != "base" and chosen.summary.gain_abs <= 0:
        yield f"{name} is no better in the region than the base"
    if best[1:]:
        others = str(best[1].candidate) if len(best) == 2 else f"{len(best) - 1} others"
        yield f"{name} ties with {others} by this rule: the smaller values win"
    better = next((other for other in points if _dominates(other, chosen)), None)
    if better:
        yield f"{better.candidate} is at least as good on both sides as {name}, and better on one"


def _dominates(one: Point, other: Point) -> bool:
    return one.g >= other.g and one.r >= other.r and (one.g, one.r) != (other.g, other.r)
