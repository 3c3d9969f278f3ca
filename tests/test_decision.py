"""Which candidate is picked: every rule against its definition, on curves of any form."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.recipe import parse_recipe
from ggez_merge.sweep.alpha import Alpha, read_alpha
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.decision import RULES, Infeasible, Rule, decide, read_rule, shortfalls
from ggez_merge.sweep.front import Point, bulge, pareto, winners
from ggez_merge.sweep.scores import Benchmark, summarise

ALPHA = 0.43
PAIRS = [(63.5, 56.3), (64.35, 63.7), (64.4, 63.8), (56.7, 57.8), (56.3, 56.0), (42.1, 42.2)]  # G, R of GG-EZ, Table 1
TRIED = [0, 0.05, 0.1, 0.5, 0.7, 1]

# Scores on a coarse grid have ties, flat stretches and duplicates; the others are noise.
coarse = st.integers(1, 8).map(lambda step: step * 12.5)
curves = st.lists(st.tuples(coarse, coarse), min_size=2, max_size=9) | st.lists(
    st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=2, max_size=9
)


def benchmarks(g: float, r: float, higher: bool = True, scale: float | None = 100) -> list[Benchmark]:
    return [
        Benchmark("world", "global", g, scale=scale, higher_is_better=higher),
        Benchmark("sea", "regional", r, scale=scale, higher_is_better=higher),
    ]


def curve(
    pairs: list[tuple[float, float]], tried: list[float] | None = None, **kind: bool | float | None
) -> list[Point]:
    """Points at ratios from 0 to 1: the base first, the regional model last."""
    n = len(pairs) - 1
    base = benchmarks(*pairs[0], **kind)  # type: ignore[arg-type]
    points = []
    for i, pair in enumerate(pairs):
        ratio = tried[i] if tried else i / n
        candidate = Candidate({"ratio": ratio}, "base" if i == 0 else "regional" if i == n else "candidate")
        points.append(Point(candidate, summarise(benchmarks(*pair, **kind), base, ALPHA)))  # type: ignore[arg-type]
    return points


def ratio(point: Point) -> float:
    return point.candidate.values["ratio"]


def alpha(value: float) -> Alpha:
    return read_alpha(value)


def test_the_papers_choice() -> None:
    points = curve(PAIRS, TRIED)
    for rule in (Rule("max_grp", alpha(0.43), None, None), Rule(), Rule("max_global", None, None, 5.0), Rule("knee")):
        assert ratio(decide(points, rule).point) == 0.1
    assert [round(point.summary.grp or 0, 1) for point in points] == [59.4, 64.0, 64.1, 57.3, 56.1, 42.2]
    assert [ratio(point) for point, on in zip(points, pareto(points), strict=True) if on] == [0.1]


@given(curves, st.floats(0, 1))
def test_max_grp_is_the_highest_of_all(pairs: list[tuple[float, float]], weight: float) -> None:
    points = curve(pairs)
    decision = decide(points, Rule("max_grp", alpha(weight), None, None))
    values = [weight * g + (1 - weight) * r for g, r in pairs]
    first = next(i for i, value in enumerate(values) if math.isclose(value, max(values), rel_tol=1e-9))
    assert decision.point == points[first]
    assert len(decision.tied) == sum(math.isclose(value, max(values), rel_tol=1e-9) for value in values) - 1
    assert any("the base" in note for note in decision.notes) == (first == 0 or pairs[first][1] <= pairs[0][1])


@given(curves, st.floats(50, 110), st.floats(-20, 20))
def test_max_regional_is_the_highest_above_the_floors(
    pairs: list[tuple[float, float]], retention: float, gain: float
) -> None:
    points = curve(pairs)
    rule = Rule("max_regional", None, retention, gain)
    allowed = [point for point in points[1:] if not shortfalls(point, rule)]
    if not allowed:
        with pytest.raises(Infeasible):
            decide(points, rule)
        return
    decision = decide(points, rule)
    assert decision.point in allowed and decision.point.candidate.role != "base"
    assert decision.point.r >= max(point.r for point in allowed) * (1 - 1e-9)
    assert (decision.point.summary.retention_percent or 0) >= retention - 1e-6
    assert (decision.point.summary.gain_percent or 0) >= gain - 1e-6
    same = [point for point in allowed if math.isclose(point.r, decision.point.r, rel_tol=1e-9)]
    assert ratio(decision.point) == min(map(ratio, same))


@given(curves, st.floats(-20, 20))
def test_max_global_is_the_highest_that_gains_enough(pairs: list[tuple[float, float]], gain: float) -> None:
    points = curve(pairs)
    allowed = [i for i in range(1, len(pairs)) if 100 * (pairs[i][1] / pairs[0][1] - 1) >= gain - 1e-7]
    rule = Rule("max_global", None, None, gain)
    if not allowed:
        with pytest.raises(Infeasible):
            decide(points, rule)
        return
    best = max(pairs[i][0] for i in allowed)
    expected = next(i for i in allowed if math.isclose(pairs[i][0], best, rel_tol=1e-9))
    assert decide(points, rule).point == points[expected]


@given(curves, st.floats(50, 110), st.floats(-20, 20))
def test_an_infeasible_rule_names_the_nearest_miss(
    pairs: list[tuple[float, float]], retention: float, gain: float
) -> None:
    points, rule = curve(pairs), Rule("max_regional", None, retention, gain)
    try:
        decide(points, rule)
    except Infeasible as infeasible:
        assert infeasible.exit_code == 3 and infeasible.nearest is not None
        by = {
            "retention": retention - 100 * infeasible.nearest.g / points[0].g,
            "gain": gain - 100 * (infeasible.nearest.r / points[0].r - 1),
        }
        assert infeasible.shortfalls == pytest.approx({key: short for key, short in by.items() if short > 1e-7})
        totals = [
            max(retention - 100 * p.g / points[0].g, 0) + max(gain - 100 * (p.r / points[0].r - 1), 0)
            for p in points[1:]
        ]
        assert sum(infeasible.shortfalls.values()) == pytest.approx(min(totals))
        assert str(infeasible.nearest.candidate) in str(infeasible)


def test_a_flat_curve_takes_the_smallest_ratio_and_says_so() -> None:
    points = curve([(60, 50)] * 5)
    for rule in (Rule(), Rule("max_global", None, None, 0.0)):
        decision = decide(points, rule)
        assert ratio(decision.point) == 0.25 and len(decision.tied) == 3
        assert any("ties with 3 others" in note for note in decision.notes)
        assert any("no better in the region" in note for note in decision.notes)
    assert ratio(decide(points, Rule("max_grp", alpha(0.43), None, None)).point) == 0
    assert ratio(decide(points, Rule("knee", None, None, None)).point) == 0


def test_a_floor_that_is_just_reached_is_reached() -> None:
    points = curve([(63.5, 50), (63.5 * 0.98, 60), (60, 70)])
    assert ratio(decide(points, Rule()).point) == 0.5
    with pytest.raises(Infeasible):
        decide(curve([(63.5, 50), (63.5 * 0.9799, 60)]), Rule())


def test_the_base_is_never_a_silent_answer() -> None:
    worse = curve([(60, 50), (59.5, 49), (40, 55)])
    with pytest.raises(Infeasible) as infeasible:
        decide(worse, Rule())
    assert infeasible.value.nearest == worse[1] and infeasible.value.shortfalls == {"gain": pytest.approx(2)}
    decision = decide(worse, Rule("max_grp", alpha(0.9), None, None))
    assert decision.point.candidate.role == "base" and "no merge is better than the base" in decision.notes[0]
    for rule in (Rule(), Rule("max_grp", alpha(0.43), None, 1.0)):
        with pytest.raises(Infeasible):
            decide(worse[:1], rule)


def test_a_dominated_pick_is_said() -> None:
    decision = decide(curve([(60, 50), (59, 55), (61, 55), (30, 40)]), Rule())
    assert ratio(decision.point) == 1 / 3  # of equals the smaller ratio, although the other is better globally
    assert any("at least as good on both sides" in note for note in decision.notes)


def test_what_the_notes_say_of_an_end() -> None:
    points = curve([(60, 50), (60, 52), (61, 55)])
    assert any("the regional model as it is" in note for note in decide(points, Rule()).notes)
    assert decide(points[:2] + curve([(60, 50), (61, 54), (50, 50)])[1:2], Rule()).notes == ()


@given(curves, st.floats(0, 1))
def test_a_better_point_is_noted_and_only_then(pairs: list[tuple[float, float]], weight: float) -> None:
    points = curve(pairs)
    for rule in (Rule("max_grp", alpha(weight), None, None), Rule("max_regional", None, None, None)):
        decision = decide(points, rule)
        dominated = not pareto(points)[points.index(decision.point)]
        assert any("at least as good on both sides" in note for note in decision.notes) == dominated


@given(curves)
def test_the_knee_is_on_the_front_and_farthest_out(pairs: list[tuple[float, float]]) -> None:
    points = curve(pairs)
    front = [point for point, on in zip(points, pareto(points), strict=True) if on]
    try:
        knee = decide(points, Rule("knee", None, None, None)).point
    except Infeasible as infeasible:
        assert max(out for point, out in zip(points, bulge(points), strict=True) if point in front) <= 1e-9
        assert len({(point.g, point.r) for point in front}) > 1
        assert infeasible.nearest is None or infeasible.nearest in front
        return
    assert knee in front
    # The distance from the line through both ends, by the cross product.
    a, b = max(front, key=lambda p: p.g), max(front, key=lambda p: p.r)
    if len({(point.g, point.r) for point in front}) == 1:
        return
    wide, high = a.g - b.g, b.r - a.r
    out = {id(p): ((p.g - b.g) / wide + (p.r - a.r) / high - 1) / math.sqrt(2) for p in front}
    assert out[id(knee)] == pytest.approx(max(out.values()), abs=1e-9)


def test_a_front_without_a_knee_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="no knee") as infeasible:
        decide(curve([(80, 20), (40, 30), (20, 80)]), Rule("knee", None, None, None))
    assert infeasible.value.nearest is not None and ratio(infeasible.value.nearest) == 0.5
    assert infeasible.value.shortfalls == {"knee": pytest.approx(0.5 / math.sqrt(2))}  # (1/3, 1/6) below x + y = 1
    bent = curve([(80, 20), (70, 60), (20, 80)])
    assert ratio(decide(bent, Rule("knee", None, None, None)).point) == 0.5
    assert bulge(bent) == pytest.approx([0, (5 / 6 + 4 / 6 - 1) / math.sqrt(2), 0])
    with pytest.raises(Infeasible, match="only the ends") as infeasible:
        decide(curve([(80, 20), (20, 80)]), Rule("knee", None, None, None))
    assert infeasible.value.nearest is None and infeasible.value.shortfalls == {}


@given(curves)
def test_the_front_is_who_is_not_dominated(pairs: list[tuple[float, float]]) -> None:
    by_definition = [
        not any(g >= own_g and r >= own_r and (g, r) != (own_g, own_r) for g, r in pairs) for own_g, own_r in pairs
    ]
    assert pareto(curve(pairs)) == by_definition


@given(curves)
def test_winners_by_alpha_are_those_of_a_fine_grid(pairs: list[tuple[float, float]]) -> None:
    points = curve(pairs)
    found = winners(points)
    assert found[0].low == 0 and found[-1].high == 1
    assert all(one.high == two.low for one, two in zip(found, found[1:], strict=False))
    assert all(winner.low < winner.high for winner in found)
    assert len({ratio(winner.point) for winner in found}) == len(found)
    for step in range(257):
        weight = Fraction(step, 256)
        values = [weight * Fraction(g) + (1 - weight) * Fraction(r) for g, r in pairs]
        (first, *others) = [winner for winner in found if winner.low <= weight <= winner.high]
        for winner in (first, *others):
            # exact, but where a border was rounded to a float
            assert values[points.index(winner.point)] >= max(values) - Fraction(1, 10**12)
        if step not in (0, 256) and not others:
            assert first.point == points[values.index(max(values))]  # of equals the smaller ratio


def test_borders_between_winners_are_exact() -> None:
    # 50 + 10 alpha, 40 + 40 alpha and 30 + 60 alpha: the first two meet at 1/3, the last two at 1/2.
    points = curve([(60, 50), (80, 40), (90, 30)])
    assert [(w.low, w.high, ratio(w.point)) for w in winners(points)] == [(0, 1 / 3, 0), (1 / 3, 0.5, 0.5), (0.5, 1, 1)]
    assert winners([]) == []


def test_a_winner_at_a_single_alpha_is_left_out() -> None:
    points = curve([(40, 80), (60, 60), (80, 40), (60, 60)])  # all four meet at alpha = 1/2
    assert [(w.low, w.high, ratio(w.point)) for w in winners(points)] == [(0, 0.5, 0), (0.5, 1, 2 / 3)]


@given(curves)
def test_error_rates_are_selected_like_accuracies(pairs: list[tuple[float, float]]) -> None:
    """100 - x is an error rate: the same front, the same GRP winner."""
    pairs = [(round(g, 2), round(r, 2)) for g, r in pairs]
    up = curve(pairs)
    down = curve([(round(101 - g, 2), round(101 - r, 2)) for g, r in pairs], higher=False)
    assert pareto(up) == pareto(down)
    rule = Rule("max_grp", alpha(0.5), None, None)
    assert ratio(decide(up, rule).point) == ratio(decide(down, rule).point)
    assert ratio(winners(down)[0].point) == ratio(max(up, key=lambda p: (p.r, p.g, -ratio(p))))


def test_a_base_that_scores_nothing_in_the_region() -> None:
    points = curve([(60, 0), (60, 5), (59, 9)])
    assert ratio(decide(points, Rule()).point) == 1
    with pytest.raises(Infeasible, match="not above 0") as infeasible:
        decide(points, Rule("max_global", None, None, 5.0))
    assert infeasible.value.nearest is None


def test_grp_without_a_shared_scale_selects_nothing() -> None:
    points = curve(PAIRS, TRIED, scale=None)
    with pytest.raises(Refused, match="not on one scale"):
        decide(points, Rule("max_grp", alpha(0.43), None, None))
    assert ratio(decide(points, Rule()).point) == 0.1


def test_endpoints_without_values_stand_at_the_ends() -> None:
    base, merged, tuned = (Candidate(role="base"), Candidate({"w": -1.0}), Candidate(role="regional", model="./sea"))
    assert sorted([tuned, merged, base], key=lambda each: each.order) == [base, merged, tuned]
    assert [str(each) for each in (base, merged, tuned)] == ["base", "w -1", "regional ./sea"]
    assert str(Candidate({"ratio": 0.0}, "base")) == "ratio 0 (base)"


RECIPE = "merge_method: linear\nbase_model: a\nmodels: [{model: b}]\nparameters: {ratio: 0.1}\n"


def rule_of(select: str, path: Path | None = None) -> Rule:
    return read_rule(parse_recipe(RECIPE + select, path))


def test_rules_as_recipes_write_them() -> None:
    assert rule_of("") == rule_of("select: {}") == Rule("max_regional", None, 98, 0)
    assert rule_of("select: {rule: max_regional, retention: 95, gain: -1}") == Rule("max_regional", None, 95, -1)
    assert rule_of("select: {rule: max_global, gain: 5}") == Rule("max_global", None, None, 5)
    grp = rule_of("select: {rule: max_grp, alpha: kof:SEA@2023, split: val, report: test}")
    assert grp == Rule("max_grp", read_alpha("SEA"), None, None, "val", "test")
    assert rule_of("select: {rule: knee, alpha: 0.5}") == Rule("knee", read_alpha(0.5), None, None)
    assert set(RULES) == {"max_regional", "max_global", "max_grp", "knee"}


def test_a_file_of_the_index_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "kof.csv").write_text("code,year,KOFIpGIdf\nSGP,2024,90\n")
    select = "select: {rule: max_grp, alpha: 'kof:SGP@2024', kof_file: kof.csv}"
    rule = rule_of(select, tmp_path / "recipe.yaml")
    assert rule.alpha is not None and rule.alpha.value == 0.9
    with pytest.raises(Refused, match="there is no such file"):
        rule_of(select.replace("kof.csv", "cof.csv"), tmp_path / "recipe.yaml")


def test_everything_wrong_with_a_rule_is_found_at_once() -> None:
    with pytest.raises(Refused) as refused:
        rule_of("select:\n  rule: max_grb\n  alfa: 0.3\n  alpha: 43\n  retention: 0.98\n  gain: much\n  split: 3\n")
    said = {problem.place: problem for problem in refused.value.problems}
    assert sorted(said) == [f"recipe:{line}" for line in (10, 11, 6, 7, 8, 9)]
    assert said["recipe:6"].remedy == "did you mean `max_grp` or `max_global`?"
    assert said["recipe:7"].remedy == "did you mean `alpha`?"
    assert said["recipe:9"].remedy == "98 % is 98, not 0.98"


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("{rule: max_grp}", "`alpha` is missing"),
        ("{rule: max_global}", "`gain` is missing"),
        ("{gain: .nan}", "`gain` must be a number"),
        ("{retention: true}", "`retention` must be a number"),
    ],
)
def test_what_a_rule_needs(select: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        rule_of(f"select: {select}")
    assert len(refused.value.problems) == 1
