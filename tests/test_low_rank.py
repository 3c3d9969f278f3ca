"""Low-rank changes of a weight: the definition's bytes, right against exact arithmetic, and the same however cut up."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, F32, F64, Array

from ggez_kernels.cpu import low_rank as compiled
from ggez_kernels.reference import low_rank as definition


def draw(rows: int, columns: int, rank: int, dtype: Any, seed: int) -> tuple[Array, Array, Array, Array]:
    """base (columns of a wider matrix), left, right and factors, some of them zero, huge or tiny."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> Array:
        found = random.normal(size=shape) * 2.0 ** random.integers(-20, 21, shape)
        return np.where(random.random(shape) < 0.1, -0.0, found)

    with np.errstate(all="ignore"):
        base = values(rows, columns + 3).astype(dtype)[:, 2 : columns + 2]
    return base, values(rows, rank), values(rank, columns), values(rows)


SHAPES = st.tuples(
    st.integers(0, 5), st.sampled_from((1, 2, 511, 512, 513, 1030)), st.sampled_from((1, 3, 4, 5, 16, 17))
)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.sampled_from(DTYPES), st.sampled_from((F32, F64)), st.floats(-3, 3), st.booleans(), st.integers(0, 99)
)
def test_compiled_kernels_give_the_bytes_of_the_definition(
    shape: tuple[int, int, int], dtype: Any, out: Any, scale: float, scaled: bool, seed: int
) -> None:
    base, left, right, factors = draw(*shape, dtype, seed)
    ours, theirs = (np.zeros((shape[0], shape[1] + 2), out) for _ in range(2))
    for module, target in ((compiled, ours), (definition, theirs)):
        with np.errstate(all="ignore"):
            module.low_rank(target[:, 1:-1], base, left, right, scale, factors if scaled else None)
    assert ours.tobytes() == theirs.tobytes()
    assert not ours[:, [0, -1]].any()
    sums = np.full((2, shape[0]), 0.25)
    for module, row in zip((compiled, definition), sums, strict=True):
        module.row_squares(row, base, left, right, scale)
    assert sums[0].tobytes() == sums[1].tobytes()


def test_the_definition_is_w_plus_s_times_b_a() -> None:
    base, left, right, factors = draw(3, 40, 5, F32, 0)
    out = np.zeros((3, 40), np.float64)
    compiled.low_rank(out, base, left, right, 0.75, factors)
    sums = np.zeros(3)
    compiled.row_squares(sums, base, left, right, 0.75)
    for i in range(3):
        exact = [
            Fraction(float(base[i, j]))
            + Fraction(3, 4) * sum(Fraction(left[i, k]) * Fraction(right[k, j]) for k in range(5))
            for j in range(40)
        ]
        largest = max(abs(left[i]).max() * abs(right).max() * 4, abs(base[i].astype("f8")).max())
        for j in range(40):
            assert abs(out[i, j] - float(Fraction(factors[i]) * exact[j])) <= 2e-15 * largest * abs(factors[i])
        assert sums[i] == pytest.approx(float(sum(value**2 for value in exact)), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1029), st.integers(1, 1030), st.sampled_from(DTYPES))
def test_strips_of_columns_give_the_same_bytes(first: int, n: int, dtype: Any) -> None:
    base, left, right, factors = draw(2, 1030, 5, dtype, 1)
    whole = np.empty((2, 1030), np.float32)
    compiled.low_rank(whole, base, left, right, 0.3, factors)
    some = slice(first, first + n)
    part = np.empty_like(whole[:, some])
    compiled.low_rank(part, base[:, some], left, np.ascontiguousarray(right[:, some]), 0.3, factors)
    assert part.tobytes() == whole[:, some].tobytes()
    at_once, in_turn = np.zeros(2), np.zeros(2)
    compiled.row_squares(at_once, base, left, right, 0.3)
    for some in (slice(0, first), slice(first, None)):
        compiled.row_squares(in_turn, base[:, some], left, np.ascontiguousarray(right[:, some]), 0.3)
    assert in_turn.tobytes() == at_once.tobytes()


def test_what_has_no_contiguous_rows_is_refused() -> None:
    base = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="contiguous rows"):
        compiled.low_rank(np.zeros((6, 4), np.float32), base.T, np.zeros((6, 1)), np.zeros((1, 4)), 1.0)
