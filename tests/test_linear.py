"""Weighted sums: the compiled kernel against its definition, and what must hold whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import BF16, DTYPES, F16, F32, F64, Array, Case, as_bytes, cases, make, widened, with_gap, work_dtype
from numba import njit

from ggez_kernels.cpu.linear import STREAM_BYTES, linear, linear_many
from ggez_kernels.cpu.rounding import bits_to_f16, bits_to_f16_by_integers, f16_to_f32, f16_to_f32_by_integers
from ggez_kernels.reference.linear import linear as definition
from ggez_kernels.reference.linear import linear_many as definition_of_many
from ggez_kernels.sparsify import Sparsify, Stats

quickly = settings(max_examples=80, deadline=None)


TOPS = [(BF16, 3e38), (F16, 6e4), (F32, 3e38)]  # near the largest number that each can store


def run(kernel: Any, case: Case) -> tuple[Array, Stats]:
    out, untouched = with_gap(case.models[0].size, case.out_dtype)
    stats = kernel(out, case.base, case.models, case.weights, sparsify=case.sparsify, start=case.start)
    assert untouched()
    return out, stats


@settings(max_examples=200, deadline=None)
@given(cases())
def test_compiled_kernel_gives_the_bytes_of_the_definition(case: Case) -> None:
    with np.errstate(all="ignore"):
        found, stats = run(linear, case)
        expected, wanted = run(definition, case)
    assert as_bytes(found) == as_bytes(expected)
    assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weight", [0.3, 0.8, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("flavour", ["plain", "special", "nonfinite"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_fused_loops_give_the_bytes_of_the_definition(
    count: int, weight: float, with_base: bool, flavour: str, dtype: Any
) -> None:
    rng = np.random.default_rng(count)
    base = make(rng, 4096 * 20 + 77, dtype, "plain")
    base[::7] = -0.0
    models = [make(rng, base.size, dtype, "plain", base) for _ in range(count)]
    if flavour != "plain":  # in one span out of many: the others must not notice
        models[-1][9000:9100] = make(rng, 100, dtype, flavour)
    case = Case(base if with_base else None, models, [weight, 0.7][:count], dtype, None, 0)
    found, stats = run(linear, case)
    expected, wanted = run(definition, case)
    assert as_bytes(found) == as_bytes(expected)
    assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)
    if flavour == "plain":
        assert stats.delta_squares == pytest.approx(wanted.delta_squares, rel=1e-5)


@quickly
@given(cases(flavours=("plain",), sizes=(0, 17, 4097, 70001)))
def test_sums_of_squares(case: Case) -> None:
    _, stats = run(linear, case)
    work = np.float64 if case.out_dtype == F64 else work_dtype(case)
    for model, found in zip(case.models, stats.delta_squares, strict=True):
        delta = np.zeros(1) if case.base is None else widened(model, work) - widened(case.base, work)
        assert found == pytest.approx(float(np.sum(np.square(delta, dtype=np.float64))), rel=1e-5)


@pytest.mark.parametrize("share", [[1.0], [1.0, 0.3]])
@pytest.mark.parametrize(("dtype", "top"), TOPS)
def test_an_overflow_is_counted_and_squares_only_once(share: list[float], dtype: Any, top: float) -> None:
    """The fused loops give up on a span whose result is not finite; it is then computed again, row by row."""
    weights = [top * part for part in share]
    base = np.zeros(3 * 4096, dtype)
    model = np.ones(3 * 4096, dtype)
    model[4096:8192] = 2
    out, stats = run(linear, Case(base, [model] * len(weights), weights, dtype, None, 0))
    assert stats.nonfinite == (0,) * (1 + len(weights))
    assert stats.nonfinite_out == int(np.isinf(out.astype(np.float32)).sum()) >= 4096
    assert stats.delta_squares == (4096 * (1 + 4 + 1),) * len(weights)


@quickly
@given(cases(), st.data())
def test_tiles_give_the_bytes_of_the_whole(case: Case, data: Any) -> None:
    size = case.models[0].size
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    whole, stats = run(linear, case)
    parts = [run(linear, case.tile(begin, end)) for begin, end in zip(cuts, cuts[1:], strict=False)]
    assert b"".join(as_bytes(out) for out, _ in parts) == as_bytes(whole)
    assert sum(part.nonfinite_out for _, part in parts) == stats.nonfinite_out


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [17, 8209])
def test_weights_zero_and_one_give_the_ends(dtype: Any, out_dtype: Any, size: int) -> None:
    rng = np.random.default_rng(7)
    base, model = make(rng, size, dtype, "special"), make(rng, size, dtype, "special")
    base[: size // 4] = -0.0
    for weight, end in ((0.0, base), (1.0, model)):
        out, _ = run(linear, Case(base, [model], [weight], out_dtype, None, 0))
        copy, _ = run(linear, Case(None, [end], [1.0], out_dtype, None, 0))
        assert as_bytes(out) == as_bytes(copy)
        if out_dtype == dtype:
            assert as_bytes(out) == as_bytes(end)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[0.3], [0.9], [-1.5], [2.0], [0.3, -0.3], [0.4, 0.6, 5.0]])
def test_identical_models_give_the_base(dtype: Any, weights: list[float]) -> None:
    base = make(np.random.default_rng(3), 4111, dtype, "special")
    out, stats = run(linear, Case(base, [base.copy() for _ in weights], weights, dtype, None, 0))
    assert as_bytes(out) == as_bytes(base)
    assert stats.delta_squares == (0.0,) * len(weights)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_narrowing_rounds_every_neighbourhood_to_nearest_even(dtype: Any) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(dtype)
    wide = patterns.astype(np.float32)
    with np.errstate(all="ignore"):
        middles = ((wide[:-1].astype(np.float64) + wide[1:]) / 2).astype(np.float32)
        middles[patterns[1:].view(np.uint16) == 0x8000] = 0
        near = [f(x) for x in (wide, middles) for f in (np.copy, _up, _down)]
        values = np.concatenate(near)
        out, stats = run(linear, Case(None, [values], [1.0], dtype, None, 0))
        expected = values.astype(dtype)
    nan = np.isnan(expected.astype(np.float32))
    assert (out.view(np.uint16) == expected.view(np.uint16))[~nan].all()
    assert (out.view(np.uint16)[nan] == (0x7FC0 if dtype == BF16 else 0x7E00)).all()
    assert stats.nonfinite_out == int((~np.isfinite(expected.astype(np.float32))).sum())


def _up(values: Array) -> Array:
    return np.nextafter(values, np.float32(np.inf), dtype=np.float32)


def _down(values: Array) -> Array:
    return np.nextafter(values, np.float32(-np.inf), dtype=np.float32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float64_is_rounded_once(dtype: Any) -> None:
    """Just beside the middle of two neighbours, by less than float32 can tell."""
    patterns = np.arange(0x7BFF, dtype=np.uint16)
    low, high = patterns.view(dtype).astype(np.float64), (patterns + 1).astype(np.uint16).view(dtype).astype(np.float64)
    middle = (low + high) / 2
    for nudged, right in ((np.nextafter(middle, np.inf), high), (np.nextafter(middle, -np.inf), low)):
        out, _ = run(linear, Case(None, [nudged], [1.0], dtype, None, 0))
        assert (out.astype(np.float64) == right).all()
        out, _ = run(linear, Case(None, [-nudged], [1.0], dtype, None, 0))
        assert (out.astype(np.float64) == -right).all()


def test_widening_is_exact() -> None:
    for dtype in (BF16, F16):
        patterns = np.arange(65536, dtype=np.uint16).view(dtype)
        out, _ = run(linear, Case(None, [patterns], [1.0], F32, None, 0))
        expected = patterns.astype(np.float32)
        nan = np.isnan(expected)
        assert (out.view(np.uint32) == expected.view(np.uint32))[~nan].all()
        assert np.isnan(out[nan]).all()


def test_halves_are_the_same_bits_with_and_without_instructions_for_them() -> None:
    @njit
    def both_ways(patterns: Array, bits: Array, wide: Array, narrowed: Array) -> None:
        for i in range(patterns.size):
            wide[0, i] = f16_to_f32(patterns[i])
            wide[1, i] = f16_to_f32_by_integers(patterns[i])
        for i in range(bits.size):
            narrowed[0, i] = bits_to_f16(bits[i])
            narrowed[1, i] = bits_to_f16_by_integers(bits[i])

    halves = np.arange(65536, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    spread = np.random.default_rng(5).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    numbers = ~np.isnan(values)
    near = np.concatenate([f(values[numbers]) for f in (np.copy, _up, _down)] + [spread[~np.isnan(spread)]])
    wide, narrowed = np.empty((2, halves.size), np.float32), np.empty((2, near.size), np.uint16)
    both_ways(halves, near.view(np.uint32), wide, narrowed)
    assert (wide.view(np.uint32) == values.view(np.uint32))[:, numbers].all()
    assert np.isnan(wide[:, ~numbers]).all()
    with np.errstate(over="ignore"):
        assert (narrowed == near.astype(np.float16).view(np.uint16)).all()


def test_an_unaligned_view_is_as_good() -> None:
    rng = np.random.default_rng(1)
    base, model = make(rng, 8193, BF16, "plain"), make(rng, 8193, BF16, "plain")
    odd, _ = run(linear, Case(base[1:], [model[1:]], [0.4], BF16, None, 0))
    even, _ = run(linear, Case(base[1:].copy(), [model[1:].copy()], [0.4], BF16, None, 0))
    assert as_bytes(odd) == as_bytes(even)


def run_many(kernel: Any, case: Case, rows: list[list[float]], leads: list[int]) -> list[tuple[Array, Stats]]:
    """One output for each row of weights, each so many elements after a cache line begins."""
    outs, untouched = zip(*(with_gap(case.models[0].size, case.out_dtype, lead) for lead in leads), strict=True)
    stats = kernel(outs, case.base, case.models, rows)
    assert all(intact() for intact in untouched)
    return list(zip(outs, stats, strict=True))


def agree(case: Case, rows: list[list[float]], found: list[tuple[Array, Stats]]) -> None:
    """Each output has the bytes and the statistics of a call of its own."""
    for row, (out, stats) in zip(rows, found, strict=True):
        expected, wanted = run(linear, Case(case.base, case.models, row, case.out_dtype, None, 0))
        assert as_bytes(out) == as_bytes(expected)
        assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)
        for square, right in zip(stats.delta_squares, wanted.delta_squares, strict=True):
            if right < 1e30:  # beyond, single squares leave float32
                assert square == pytest.approx(right, rel=1e-5)


RATIOS = (0.3, 0.5, 0.75, 1.0, -0.4, 1.6, 0.0, 1e-42, 1 - 2.0**-24, -3e38, float("inf"))


@settings(max_examples=150, deadline=None)
@given(cases(thin=False), st.sampled_from((1, 2, 11)), st.data())
def test_many_outputs_in_one_read_have_the_bytes_of_many_calls(case: Case, count: int, data: Any) -> None:
    weight = st.sampled_from(RATIOS)
    rows = [[data.draw(weight) for _ in case.models] for _ in range(count)]
    leads = data.draw(st.sampled_from(([8], [0], [13], [8, 2]))) * count
    with np.errstate(all="ignore"):
        for kernel in (linear_many, definition_of_many):
            agree(case, rows, run_many(kernel, case, rows, leads[:count]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("leads", [[0], [8], [13], [8, 8, 2]])
@pytest.mark.parametrize(
    ("flavour", "dtype"), [("plain", BF16), ("special", BF16), ("nonfinite", BF16), ("special", F16), ("special", F32)]
)
def test_outputs_larger_than_the_caches(count: int, leads: list[int], flavour: str, dtype: Any) -> None:
    """They are stored in another way, line by line, which has to begin and end where each of them does."""
    rng = np.random.default_rng(count)
    rows = [[ratio, *[0.4] * (count - 1)] for ratio in (0.0, -0.4, 1e-42, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0, 1.6)]
    size = STREAM_BYTES // dtype.itemsize // len(rows) + 4096 + 77
    base = make(rng, size, dtype, "plain")
    base[::7] = -0.0
    models = [make(rng, size, dtype, "plain", base) for _ in range(count)]
    models[0][::7] = 0.0
    if flavour != "plain":  # in one span out of many
        models[count // 2][9000:9100] = make(rng, 100, dtype, flavour)
    case = Case(base, models, [], dtype, None, 0)
    agree(case, rows, run_many(linear_many, case, rows, (leads * len(rows))[: len(rows)]))


@pytest.mark.parametrize("share", [[1.0], [-1.0], [1.0, 0.3]])
@pytest.mark.parametrize(("dtype", "top"), TOPS)
def test_an_overflow_is_counted_for_the_output_that_has_it(share: list[float], dtype: Any, top: float) -> None:
    row = [top * part for part in share]
    base, model = np.zeros(3 * 4096, dtype), np.ones(3 * 4096, dtype)
    model[4096:8192] = 2
    case = Case(base, [model] * len(row), [], dtype, None, 0)
    found = run_many(linear_many, case, [[0.5] * len(row), row], [0, 0])
    assert [stats.nonfinite_out > 0 for _, stats in found] == [False, True]
    agree(case, [[0.5] * len(row), row], found)


FOUR = np.zeros(4, F32)
TWO_ROWS: dict[str, Any] = {"outs": [FOUR, FOUR], "base": FOUR, "models": [FOUR], "weights": [[0.5], [0.6]]}


@pytest.mark.parametrize("kernel", [linear_many, definition_of_many])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outs": [], "weights": []}, ValueError, "at least one output"),
        ({"weights": [[0.5]]}, ValueError, "2 outputs need 2 rows of weights, found 1"),
        ({"outs": [FOUR, np.zeros(4, F16)]}, TypeError, "one dtype, found float32, float16"),
        ({"outs": [np.zeros(4, np.int32)] * 2}, TypeError, "int32"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(
    kernel: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kernel(**(TWO_ROWS | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[0.5], [0.5, 0.5]]}, "1 models need 1 weights, output 1 has 2"),
        ({"outs": [FOUR, np.zeros(5, F32)]}, "output 1 has 5 elements"),
        ({"outs": [np.zeros(5, F32), FOUR]}, "output 0 has 5 elements"),
        ({"models": []}, "at least one model"),
    ],
)
def test_the_output_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_many(**(TWO_ROWS | change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"out": np.zeros(4, np.int32)}, TypeError),
        ({"out": np.zeros(5, np.float32)}, ValueError),
        ({"models": [np.zeros(8, np.float32)[::2]]}, ValueError),
        ({"models": []}, ValueError),
        ({"weights": [1.0, 2.0]}, ValueError),
        ({"base": None, "sparsify": [Sparsify(keep=0.5)]}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    four = np.zeros(4, np.float32)
    call: dict[str, Any] = {
        "out": four.copy(),
        "base": four,
        "models": [four],
        "weights": [1.0],
        "sparsify": None,
    } | change
    with pytest.raises(error):
        linear(**call)


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": -1}, {"threshold": 2**31}, {"last": -2}, {"keep": 1.5}, {"seed": 2**64}, {"rescale": np.inf}],
)
def test_wrong_sparsifiers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sparsify(**wrong)
