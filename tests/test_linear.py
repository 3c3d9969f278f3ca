"""Weighted sums: the compiled kernel against its definition, and what must hold whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import BF16, DTYPES, F16, F32, F64, Array, Case, as_bytes, cases, make, widened, with_gap, work_dtype

from ggez_kernels.cpu.linear import linear
from ggez_kernels.reference.linear import linear as definition
from ggez_kernels.sparsify import Sparsify, Stats

quickly = settings(max_examples=80, deadline=None)


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
def test_bfloat16_loops_give_the_bytes_of_the_definition(
    count: int, weight: float, with_base: bool, flavour: str
) -> None:
    rng = np.random.default_rng(count)
    base = make(rng, 4096 * 20 + 77, BF16, "plain")
    base[::7] = -0.0
    models = [make(rng, base.size, BF16, "plain", base) for _ in range(count)]
    if flavour != "plain":  # in one span out of many: the others must not notice
        models[-1][9000:9100] = make(rng, 100, BF16, flavour)
    case = Case(base if with_base else None, models, [weight, 0.7][:count], BF16, None, 0)
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


@pytest.mark.parametrize("weights", [[3e38], [3e38, 1e38]])
def test_an_overflow_is_counted_and_squares_only_once(weights: list[float]) -> None:
    """The bfloat16 loops give up on a span whose result is not finite; it is then computed again, row by row."""
    base = np.zeros(3 * 4096, BF16)
    model = np.ones(3 * 4096, BF16)
    model[4096:8192] = 2
    out, stats = run(linear, Case(base, [model] * len(weights), weights, BF16, None, 0))
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


def test_an_unaligned_view_is_as_good() -> None:
    rng = np.random.default_rng(1)
    base, model = make(rng, 8193, BF16, "plain"), make(rng, 8193, BF16, "plain")
    odd, _ = run(linear, Case(base[1:], [model[1:]], [0.4], BF16, None, 0))
    even, _ = run(linear, Case(base[1:].copy(), [model[1:].copy()], [0.4], BF16, None, 0))
    assert as_bytes(odd) == as_bytes(even)


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
