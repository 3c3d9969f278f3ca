"""Candidates in the plane of global and regional scores: who is on the Pareto front, and who wins at which alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.scores import Summary


@dataclass(frozen=True)
class Point:
    """One candidate, evaluated and set beside the base."""

    candidate: Candidate
    summary: Summary

    @property
    def g(self) -> float:
        """The global score; with the other sign if lower is better."""
        return self.summary.global_.value if self.summary.global_.higher_is_better else -self.summary.global_.value

    @property
    def r(self) -> float:
        """The regional score; with the other sign if lower is better."""
        return self.summary.regional.value if self.summary.regional.higher_is_better else -self.summary.regional.value


@dataclass(frozen=True)
class Winner:
    """The candidate whose alpha * G + (1 - alpha) * R is highest from alpha `low` to `high`, both included."""

    low: float
    high: float
    point: Point


def pareto(points: Sequence[Point]) -> list[bool]:
    """Which points are on the front of (G, R): no other is at least as good on both sides and better on one."""
    front = [False] * len(points)
    best = float("-inf")  # of R, among the points with a higher G
    order = sorted(range(len(points)), key=lambda i: (-points[i].g, -points[i].r))
    for _, same in groupby(order, key=lambda i: points[i].g):
        group = [*same]
        highest = points[group[0]].r
        for i in group:
            front[i] = points[i].r == highest > best
        best = max(best, highest)
    return front


def winners(points: Sequence[Point]) -> list[Winner]:
    """Who has the highest GRP at which alpha, from 0 to 1 without a gap: the upper envelope of the candidates' lines.

        GRP(alpha) = R + alpha * (G - R)

    Exact: borders are computed as fractions and rounded once. A candidate that wins at a single alpha only is left
    out; of candidates with the same scores the one with the smaller values is named.
    """
    # From the right of alpha = 0 on: the highest R wins, of these the highest G. Of equals the first stays.
    lines = [(Fraction(point.r), Fraction(point.g) - Fraction(point.r), point) for point in _by_values(points)]
    if not lines:
        return []
    at, (r, slope, point) = Fraction(0), max(lines, key=lambda line: line[:2])
    found: list[Winner] = []
    while True:
        crossings = [((r - other[0]) / (other[1] - slope), -other[1], other) for other in lines if other[1] > slope]
        after, _, following = min(crossings, key=lambda crossing: crossing[:2], default=(Fraction(1), 0, None))
        if following is None or after >= 1:
            return [*found, Winner(float(at), 1.0, point)]
        found.append(Winner(float(at), float(after), point))
        at, (r, slope, point) = after, following


def bulge(points: Sequence[Point]) -> list[float]:
    """How far each point lies beyond the straight line between the ends of the front, which are those highest in G, R.

    Both axes are scaled so that the ends are (1, 0) and (0, 1); distances in that plane, negative on the inner side.
    All 0 where the front is a single point of the plane.
    """
    front = [point for point, on in zip(points, pareto(points), strict=True) if on]
    high_g, high_r = max(point.g for point in front), max(point.r for point in front)
    low_g, low_r = min(point.g for point in front), min(point.r for point in front)
    if high_g == low_g:  # and so the same R
        return [0.0] * len(points)
    return [
        ((point.g - low_g) / (high_g - low_g) + (point.r - low_r) / (high_r - low_r) - 1) / 2**0.5 for point in points
    ]


def _by_values(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.candidate.order)
