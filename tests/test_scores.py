"""The scores of a candidate: their formulas, what is refused, and what does not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.sweep import scores
from ggez_merge.sweep.scores import Benchmark

finite = st.floats(1, 100)
alphas = st.floats(0, 1)


def percent(name: str, tag: scores.Tag, score: float, **fields: object) -> Benchmark:
    return replace(Benchmark(name, tag, score, scale=100), **fields)  # type: ignore[arg-type]


BASE = [percent("wc", "global", 60), percent("sea", "regional", 40), percent("cvqa", "both", 50, chance=25)]
MERGED = [percent("wc", "global", 57), percent("sea", "regional", 52), percent("cvqa", "both", 45, chance=25)]


def test_the_formulas_on_numbers_that_a_pencil_can_check() -> None:
    summary = scores.summarise(MERGED, BASE, alpha=0.25)
    assert summary.regional.value == (52 + 45) / 2
    assert summary.global_.value == (57 + 45) / 2
    assert summary.gain_abs == 48.5 - 45
    assert summary.gain_percent == pytest.approx(100 * (48.5 / 45 - 1))
    assert summary.retention_percent == pytest.approx(100 * 51 / 55)
    assert (summary.worst_benchmark, summary.worst_retention_percent) == ("cvqa", pytest.approx(90))
    assert summary.grp == pytest.approx(0.25 * 51 + 0.75 * 48.5)
    assert summary.grp_norm == pytest.approx(0.25 * 51 / 55 + 0.75 * 48.5 / 45)


@given(st.lists(finite, min_size=3, max_size=3), alphas)
def test_the_base_beside_itself_gains_nothing_and_keeps_all(values: list[float], alpha: float) -> None:
    base = [replace(each, score=value) for each, value in zip(BASE, values, strict=True)]
    summary = scores.summarise(base, base, alpha)
    assert summary.gain_abs == 0 and summary.gain_percent == 0
    assert summary.retention_percent == 100 and summary.worst_retention_percent == 100
    assert summary.grp_norm == pytest.approx(1)
    assert summary.grp is not None
    low, high = sorted((summary.regional.value, summary.global_.value))
    assert low - 1e-9 <= summary.grp <= high + 1e-9


@given(st.lists(finite, min_size=6, max_size=6), alphas, st.floats(0.001, 1000))
def test_ratios_do_not_depend_on_the_unit(values: list[float], alpha: float, unit: float) -> None:
    base = [replace(each, score=value) for each, value in zip(BASE, values[:3], strict=True)]
    new = [replace(each, score=value) for each, value in zip(BASE, values[3:], strict=True)]
    other = [[replace(each, score=each.score * unit, scale=100 * unit) for each in side] for side in (new, base)]
    one, two = scores.summarise(new, base, alpha), scores.summarise(*other, alpha=alpha)
    assert one.gain_percent == pytest.approx(two.gain_percent, abs=1e-9)
    assert one.retention_percent == pytest.approx(two.retention_percent)
    assert one.worst_benchmark == two.worst_benchmark or one.worst_retention_percent == pytest.approx(
        two.worst_retention_percent
    )
    assert one.grp_norm == pytest.approx(two.grp_norm)
    assert two.grp == pytest.approx((one.grp or 0) * unit)


@given(st.permutations(range(3)))
def test_the_order_of_benchmarks_does_not_matter(order: list[int]) -> None:
    assert scores.summarise([MERGED[i] for i in order], BASE, 0.43) == scores.summarise(MERGED, BASE, 0.43)


@given(st.lists(finite, min_size=4, max_size=4))
def test_where_lower_is_better_more_gain_and_retention_still_mean_better(values: list[float]) -> None:
    """An error rate e and the speed 1 / e say the same."""
    error = [
        Benchmark("g", "global", 1.0, higher_is_better=False),
        Benchmark("r", "regional", 1.0, higher_is_better=False),
    ]
    pairs = [
        [replace(each, score=value) for each, value in zip(error, side, strict=True)]
        for side in (values[:2], values[2:])
    ]
    speeds = [[replace(each, score=1 / each.score, higher_is_better=True) for each in side] for side in pairs]
    one, two = scores.summarise(*pairs), scores.summarise(*speeds)
    assert one.gain_percent == pytest.approx(two.gain_percent, abs=1e-9)
    assert one.retention_percent == pytest.approx(two.retention_percent)
    assert (one.gain_abs > 0) == (two.gain_abs > 0) or one.gain_abs == pytest.approx(0)
    assert not one.regional.higher_is_better


def test_grp_of_unlike_scales_is_refused_with_their_list() -> None:
    fid = [Benchmark("FID", "regional", 21.0, higher_is_better=False), Benchmark("CLIPScore", "global", 0.7, scale=1)]
    with pytest.raises(Refused) as refused:
        scores.grp(fid, 0.43)
    assert refused.value.problems[0].found == "FID: no scale, lower is better; CLIPScore: 0 to 1"
    summary = scores.summarise(fid, fid, 0.43)
    assert summary.grp is None and summary.grp_norm == pytest.approx(1)
    for lonely in (None, 1.0):  # an unknown scale is no shared scale, and 0..1 is not 0..100
        mixed = [percent("a", "global", 60), Benchmark("b", "regional", 0.5, scale=lonely)]
        with pytest.raises(Refused, match="not on one scale"):
            scores.grp(mixed, 0.43)
    unknown = [replace(each, scale=None) for each in BASE]
    with pytest.raises(Refused, match="not on one scale"):
        scores.grp(unknown, 0.43)


def test_a_mean_over_unlike_scales_or_directions_is_refused() -> None:
    for other in (replace(BASE[2], scale=1, score=0.5), replace(BASE[2], higher_is_better=False)):
        with pytest.raises(Refused, match="the regional score is a mean"):
            scores.mean([BASE[1], other], "regional")
    with pytest.raises(Refused, match="no benchmark is tagged global"):
        scores.mean([BASE[1]], "global")


def test_error_rates_alone_have_a_grp_and_it_is_an_error_rate() -> None:
    rates = [percent("a", "global", 20, higher_is_better=False), percent("b", "regional", 40, higher_is_better=False)]
    assert scores.grp(rates, 0.25) == pytest.approx(0.25 * 20 + 0.75 * 40)


@pytest.mark.parametrize("base", [0.0, -3.0])
def test_no_ratio_to_a_base_that_is_not_above_zero(base: float) -> None:
    old = [replace(each, score=base) for each in BASE]
    summary = scores.summarise(MERGED, old, 0.43)
    assert summary.gain_percent is summary.retention_percent is summary.grp_norm is None
    assert summary.worst_retention_percent is None
    for one in (0, 1):  # either side alone is enough
        sides = [replace(each, score=base if i == one else each.score) for i, each in enumerate(BASE[:2])]
        assert scores.grp_norm(MERGED[:2], sides, 0.43) is None
    assert summary.gain_abs == 48.5 - base and summary.grp is not None


def test_an_error_rate_of_zero_is_infinitely_better() -> None:
    assert scores.relative(0.0, 0.2, higher_is_better=False) == math.inf
    assert scores.relative(-1.0, 0.2, higher_is_better=False) is None


@given(finite, st.floats(0, 99), st.booleans())
def test_chance_is_zero_and_perfection_is_one(score: float, chance: float, higher: bool) -> None:
    chance = chance if higher else chance + 1
    perfect = 100.0 if higher else 0.0
    benchmark = percent("x", "both", score, chance=chance, higher_is_better=higher)
    assert scores.corrected(replace(benchmark, score=chance)) == 0
    assert scores.corrected(replace(benchmark, score=perfect)) == 1
    better = scores.corrected(replace(benchmark, score=(score + perfect) / 2))
    now = scores.corrected(benchmark)
    assert better is not None and now is not None and better >= now


def test_corrected_benchmarks_are_on_one_scale_whatever_they_were_on() -> None:
    four = percent("four choices", "global", 62.5, chance=25, items={"a": 1.0, "b": 0.25}, groups={"sg": 25.0})
    errors = Benchmark("errors", "regional", 0.2, chance=0.8, scale=1, higher_is_better=False)
    one, two = scores.correct([four, errors])
    assert one.score == 0.5 and one.groups == {"sg": 0.0} and two.score == pytest.approx(0.75)
    assert one.items == {"a": 1.0, "b": 0.0} and not [*scores.faults(one)]
    assert scores.grp([one, two], 0.5) == pytest.approx(0.625)
    with pytest.raises(Refused, match="cannot be corrected"):
        scores.correct([four, Benchmark("FID", "global", 20.0, higher_is_better=False)])


def test_worse_than_chance_is_said() -> None:
    below = percent("cvqa", "both", 20, chance=25)
    assert [text.split(":")[0] for text in scores.cautions([below])] == ["cvqa"]
    assert not [*scores.cautions([replace(below, score=25), replace(below, higher_is_better=False)])]
    assert [*scores.cautions([replace(below, score=30, higher_is_better=False)])]
    assert not [*scores.cautions([replace(below, score=25, higher_is_better=False)])]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": math.nan}, "`score` is not a finite"),
        ({"score": 101.0, "items": None}, "better than perfect"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": math.inf}, "`scale` is not a finite"),
        ({"chance": 100.0}, "chance is not below"),
        ({"n": 0, "items": None}, "number of items"),
        ({"n": 3}, "`n` is not the number of its items"),
        ({"items": {"a": 1.0, "b": 0.0}}, "not the mean of its items"),
        ({"items": {"a": 100.0, "b": 20.0}}, "not the mean of its items"),
    ],
)
def test_what_cannot_be_true_of_a_benchmark(changes: dict[str, object], said: str) -> None:
    fine = percent("x", "both", 60, chance=25, n=2, items={"a": 1.0, "b": 0.2})
    assert not [*scores.faults(fine)]
    (problem,) = scores.faults(replace(fine, **changes), "f.csv:3")  # type: ignore[arg-type]
    assert said in problem.what and problem.place == "f.csv:3"
    assert not [*scores.faults(replace(fine, items={"a": 1.0, "b": 1.0}, aggregator="median"))]


def test_scores_of_other_benchmarks_are_not_compared() -> None:
    with pytest.raises(Refused) as refused:
        scores.summarise([*MERGED[1:], percent("new", "global", 3)], [BASE[0], replace(BASE[1], n=7), BASE[2]])
    assert [problem.what for problem in refused.value.problems] == [
        "the candidate has no score of wc",
        "the base has no score of new",
    ]
    with pytest.raises(Refused, match="`n` is not that of the base"):
        scores.summarise([replace(each, n=8) for each in MERGED], [replace(each, n=7) for each in BASE])
    with pytest.raises(Refused, match="`tag` is not"):
        scores.summarise([replace(MERGED[0], tag="both"), *MERGED[1:]], BASE)
