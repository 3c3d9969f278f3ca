"""Intervals and tests: exact properties, and scipy as the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.sweep.scores import Benchmark, Tag, summarise
from ggez_merge.sweep.uncertainty import Figure, bootstrap, mcnemar, mean_standard_error, standard_error

FIGURES: tuple[Figure, ...] = ("regional", "global", "gain_percent", "retention_percent", "grp")


def measured(name: str, tag: Tag, outcomes: object, **fields: object) -> Benchmark:
    items = {f"q{i}": float(value) for i, value in enumerate(np.asarray(outcomes))}
    score = 100 * math.fsum(items.values()) / len(items)
    return replace(Benchmark(name, tag, score, scale=100, items=items), **fields)  # type: ignore[arg-type]


def candidate(seed: int, lift: float = 0.0, n: int = 200) -> list[Benchmark]:
    """Answers to the same questions: hard questions are hard for every candidate."""
    own = np.random.default_rng([seed, 1])
    hard = np.random.default_rng(5).normal(size=(2, n))
    answers = hard + 0.4 * own.normal(size=(2, n)) + lift > 0
    return [measured("world", "global", answers[0]), measured("sea", "regional", answers[1])]


def with_a_third(candidates: list[list[Benchmark]]) -> list[list[Benchmark]]:
    """One more benchmark, on both sides and of other size."""
    return [[*each, measured("cvqa", "both", [*(each[1].items or {}).values()][:70])] for each in candidates]


CANDIDATES = [candidate(0), candidate(1, 0.3), candidate(2, -0.2)]


def test_the_observed_figures_are_those_of_the_scores() -> None:
    candidates = with_a_third(CANDIDATES)
    result = bootstrap(candidates, 0, 0.43)
    for k, each in enumerate(candidates):
        summary = summarise(each, candidates[0], 0.43)
        expected = (summary.regional.value, summary.global_.value, summary.gain_percent)
        expected += (summary.retention_percent, summary.grp)  # type: ignore[assignment]
        for figure, value in zip(FIGURES, expected, strict=True):
            interval = result.interval(figure, k)
            assert interval is not None and interval.value == pytest.approx(value)
            assert interval.low <= interval.value <= interval.high


def test_the_same_call_gives_the_same_and_another_seed_other_numbers() -> None:
    one, two, three = (bootstrap(CANDIDATES, 0, 0.43, seed=seed, n_resamples=300) for seed in (1, 1, 2))
    for figure in FIGURES:
        assert np.array_equal(one.samples[figure], two.samples[figure])
        assert not np.array_equal(one.samples[figure], three.samples[figure])


def test_intervals_depend_neither_on_order_nor_on_who_else_is_there() -> None:
    candidates = with_a_third(CANDIDATES)
    turned = [[*reversed(each)] for each in reversed(candidates)]
    shuffled = [[replace(b, items=dict(reversed((b.items or {}).items()))) for b in each] for each in candidates]
    whole = bootstrap(candidates, 0, 0.43, n_resamples=300)
    for figure in FIGURES:
        expected = whole.interval(figure, 1)
        assert bootstrap(turned, 2, 0.43, n_resamples=300).interval(figure, 1) == expected
        assert bootstrap(candidates[:2], 0, 0.43, n_resamples=300).interval(figure, 1) == expected
        assert bootstrap(shuffled, 0, 0.43, n_resamples=300).interval(figure, 1) == expected


def test_a_candidate_differs_from_itself_by_exactly_nothing() -> None:
    result = bootstrap([*CANDIDATES, candidate(1, 0.3)], 0, 0.43, n_resamples=300)
    for figure in FIGURES:
        for one, other in ((1, 1), (1, 3), (3, 1)):
            interval = result.difference(figure, one, other)
            assert interval is not None
            assert (interval.value, interval.low, interval.high) == (0, 0, 0)
    gain, kept = result.interval("gain_percent", 0), result.interval("retention_percent", 0)
    assert gain is not None and (gain.low, gain.high) == (0, 0)
    assert kept is not None and (kept.low, kept.high) == (100, 100)


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    result = bootstrap(CANDIDATES, 0, 0.43)
    for figure in ("regional", "global", "grp"):
        paired = result.difference(figure, 1, 0)  # type: ignore[arg-type]
        apart = np.quantile(result.samples[figure][1] - result.samples[figure][0][::-1], [0.025, 0.975])
        assert paired is not None and paired.high - paired.low < 0.7 * (apart[1] - apart[0])


def test_a_difference_is_antisymmetric() -> None:
    result = bootstrap(CANDIDATES, 0, 0.43, n_resamples=999)
    one, other = result.difference("grp", 1, 2), result.difference("grp", 2, 1)
    assert one is not None and other is not None
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_intervals_are_about_those_of_scipy() -> None:
    result = bootstrap(CANDIDATES, 0, n_resamples=4000, confidence=0.9)
    arrays = [100 * np.array([*(each[1].items or {}).values()]) for each in CANDIDATES]
    ours = result.interval("regional", 1)
    theirs = scipy.stats.bootstrap(
        (arrays[1],), np.mean, method="percentile", confidence_level=0.9, n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.8)
    ratio = result.interval("gain_percent", 1)

    def gain(new: np.ndarray, old: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(100 * (new.mean(axis) / old.mean(axis) - 1))

    theirs = scipy.stats.bootstrap(
        (arrays[1], arrays[0]),
        gain,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=0.9,
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ratio is not None
    assert (ratio.low, ratio.high) == pytest.approx((theirs.low, theirs.high), abs=0.08 * (theirs.high - theirs.low))


def test_resamples_that_do_not_fit_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap(CANDIDATES, 0, n_resamples=200)
    monkeypatch.setattr("ggez_merge.sweep.uncertainty._DRAWS_AT_ONCE", 7 * 200)
    parts = bootstrap(CANDIDATES, 0, n_resamples=200)
    assert all(np.allclose(whole.samples[figure], parts.samples[figure]) for figure in FIGURES[:4])


def test_more_items_or_less_confidence_narrow_the_interval() -> None:
    def width(n: int, confidence: float) -> float:
        interval = bootstrap([candidate(0, n=n)], 0, confidence=confidence).interval("regional", 0)
        assert interval is not None
        return interval.high - interval.low

    assert width(400, 0.95) < 0.7 * width(100, 0.95)
    assert width(100, 0.8) < width(100, 0.95)


def test_a_figure_that_is_undefined_has_no_interval() -> None:
    base = [measured("world", "global", [1, 0, 1]), measured("sea", "regional", [0, 0, 0])]
    new = [measured("world", "global", [1, 1, 1]), measured("sea", "regional", [1, 0, 1])]
    below = [[base[0], replace(base[1], items={"q0": -1.0, "q1": -1.0, "q2": -1.0}, score=-100)], new]
    assert bootstrap(below, 0).interval("gain_percent", 1) is None
    rarely = [[base[0], measured("sea", "regional", [0, 0, 1])], new]  # some resamples of the base are 0
    assert bootstrap(rarely, 0).interval("gain_percent", 1) is None
    result = bootstrap([base, new], 0)
    assert result.interval("gain_percent", 1) is result.difference("gain_percent", 1, 0) is None
    assert result.interval("grp", 1) is result.difference("grp", 1, 0) is None  # no alpha
    assert result.interval("regional", 1) is not None
    other = [[replace(each[0], scale=1.0, score=each[0].score / 100), each[1]] for each in (base, new)]
    assert bootstrap(other, 0, 0.43).interval("grp", 1) is None


def test_error_rates_turn_gain_and_retention_over() -> None:
    down = [[replace(each, higher_is_better=False) for each in side] for side in CANDIDATES]
    up, turned = bootstrap(CANDIDATES, 0), bootstrap(down, 0)
    for figure in ("gain_percent", "retention_percent"):
        shift = 1 if figure == "gain_percent" else 0
        assert np.allclose(turned.samples[figure] / 100 + shift, 1 / (up.samples[figure] / 100 + shift))


def test_what_cannot_be_paired_is_refused_by_benchmark() -> None:
    world, sea = CANDIDATES[1]
    (first, *rest) = (world.items or {}).items()
    for broken, said in (
        ([replace(world, items=None), sea], "world: a candidate has no outcomes"),
        (
            [replace(world, items=dict(rest)), sea],
            f"world: two candidates(?s:.*)1 that only one has, such as {first[0]}",
        ),
        ([world, replace(sea, aggregator="corpus bleu")], "sea: the score is no mean"),
        ([world], "the candidate has no score of sea"),
        ([world, replace(sea, scale=1.0, score=sea.score / 100)], "sea: `scale` is not that of the base"),
    ):
        with pytest.raises(Refused, match=said):
            bootstrap([CANDIDATES[0], broken], 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test(answers: list[tuple[bool, bool]]) -> None:
    first, second = (measured("x", "both", [pair[k] for pair in answers]) for k in (0, 1))
    result = mcnemar(first, second)
    b, c = answers.count((True, False)), answers.count((False, True))
    assert (result.only_first, result.only_second) == (b, c)
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first).p_value == result.p_value


def test_mcnemar_of_thousands_of_items() -> None:
    n = 6000
    first = measured("x", "both", np.arange(n) % 2)
    second = measured("x", "both", np.where(np.arange(n) < 5900, 1 - np.arange(n) % 2, 1))
    result = mcnemar(first, second)
    assert result.p_value == pytest.approx(scipy.stats.binomtest(result.only_first, 5950, 0.5).pvalue, rel=1e-9)


def test_mcnemar_needs_right_and_wrong() -> None:
    with pytest.raises(Refused, match="right and wrong"):
        mcnemar(measured("x", "both", [0.5, 1]), measured("x", "both", [1, 1]))
    with pytest.raises(Refused, match="other items"):
        mcnemar(measured("x", "both", [0, 1]), measured("x", "both", [1, 1, 0]))


def test_the_standard_error_of_right_and_wrong_needs_no_items() -> None:
    whole = CANDIDATES[0][1]
    counted = replace(whole, items=None, n=200)
    assert standard_error(counted) == pytest.approx(standard_error(whole))
    shares = scipy.stats.sem(100 * np.array([*(whole.items or {}).values()]), ddof=0)
    assert standard_error(whole) == pytest.approx(shares)
    soft = measured("soft", "both", np.linspace(0.2, 0.7, 200))
    assert (standard_error(soft) or 0) < (standard_error(replace(soft, items=None, n=200)) or 0)
    assert [standard_error(replace(counted, score=score)) for score in (0.0, 100.0)] == [0, 0]
    for unknown in ({"n": None}, {"scale": None}, {"score": -1.0}, {"aggregator": "median"}):
        assert standard_error(replace(counted, **unknown)) is None  # type: ignore[arg-type]


def test_the_standard_error_of_a_mean_of_benchmarks() -> None:
    parts = [Benchmark(name, "regional", 50, n=n, scale=100) for name, n in (("a", 100), ("b", 400))]
    assert mean_standard_error(parts, "regional") == pytest.approx(math.sqrt(5**2 + 2.5**2) / 2)
    assert mean_standard_error([*parts, Benchmark("c", "regional", 50)], "regional") is None
    assert mean_standard_error(parts, "global") is None
    third = with_a_third(CANDIDATES)
    for side in ("regional", "global"):
        spread = float(np.std(bootstrap(third, 0, n_resamples=4000).samples[side][0]))
        assert spread == pytest.approx(mean_standard_error(third[0], side), rel=0.08)  # type: ignore[arg-type]
