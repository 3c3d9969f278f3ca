"""Counting magnitudes: the compiled sweeps against their definition, and exact selection against a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import Array, Case, cases, keys

from ggez_kernels.cpu.linear import linear
from ggez_kernels.cpu.threshold import histogram, nth_tie, ties
from ggez_kernels.reference import threshold as definition
from ggez_kernels.sparsify import NAN_KEY, Sparsify

DIGITS = ((20, 11), (10, 10), (0, 10))


@settings(max_examples=120, deadline=None)
@given(cases(with_base=True, counts=(1,)), st.data())
def test_compiled_counts_are_those_of_the_definition(case: Case, data: Any) -> None:
    assert case.base is not None
    base, model = case.base, case.models[0]
    key = keys(base, model)
    some = int(data.draw(st.sampled_from(sorted({0, 0x7F800000, NAN_KEY, *key[:6].tolist()}))))
    for shift, bits in (*DIGITS, (16, 15), (0, 1), (0, 16)):
        prefix = some >> (shift + bits)
        found = histogram(base, model, shift=shift, bits=bits, prefix=prefix)
        assert found.dtype == np.int64
        expected = definition.histogram(base, model, shift=shift, bits=bits, prefix=prefix)
        assert found.tolist() == expected.tolist()
        digits = (key[key >> (shift + bits) == prefix] >> shift) & ((1 << bits) - 1)
        assert found.tolist() == np.bincount(digits, minlength=1 << bits).tolist()
    places = np.flatnonzero(key == some)
    assert ties(base, model, some) == definition.ties(base, model, some) == places.size
    for n in {0, places.size // 2, places.size - 1} - {-1}:
        if n < places.size:
            assert nth_tie(base, model, some, n) == definition.nth_tie(base, model, some, n) == places[n]
    for kernel in (nth_tie, definition.nth_tie):
        with pytest.raises(IndexError):
            kernel(base, model, some, places.size)


def select(base: Array, model: Array, k: int) -> tuple[int, int]:
    """(threshold, last) that keep exactly the k largest, the first of equals, from counts alone."""
    prefix, need = 0, k
    for shift, bits in DIGITS:
        counts = histogram(base, model, shift=shift, bits=bits, prefix=prefix)
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, need))
        need -= int(from_top[place] - counts[::-1][place])
        prefix = (prefix << bits) | (len(counts) - 1 - place)
    return prefix, nth_tie(base, model, prefix, need - 1)


@settings(max_examples=80, deadline=None)
@given(
    cases(with_base=True, counts=(1,), sizes=(1, 17, 1023, 8209), flavours=("plain", "special"), thin=False),
    st.floats(0, 1),
    st.sampled_from((0, 3, 2**33)),
)
def test_exactly_k_are_kept_as_a_sort_would(case: Case, density: float, start: int) -> None:
    assert case.base is not None
    key = keys(case.base, case.models[0])
    k = max(1, int(density * key.size))
    threshold, last = select(case.base, case.models[0], k)
    kept = np.sort(np.argsort(-key.astype(np.int64), kind="stable")[:k])
    # the same choice made by the kernel that merges: 2 * d where kept, else 0, from a base moved to zero
    delta = key.view(np.float32)
    out = np.empty_like(delta)
    how = Sparsify(threshold, start + last, rescale=2.0)
    with np.errstate(over="ignore"):
        linear(out, np.zeros_like(delta), [delta], [1.0], sparsify=[how], start=start)
        assert (out == np.where(np.isin(np.arange(key.size), kept), 2 * delta, 0)).all()
    assert ((key > threshold) | ((key == threshold) & (np.arange(key.size) <= last))).sum() == k


@settings(max_examples=40, deadline=None)
@given(cases(with_base=True, counts=(1,)), st.data())
def test_counts_of_tiles_add_up(case: Case, data: Any) -> None:
    assert case.base is not None
    size = case.base.size
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))})
    whole = histogram(case.base, case.models[0], shift=20, bits=11, prefix=0)
    parts = [case.tile(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False)]
    total = sum(
        (histogram(p.base, p.models[0], shift=20, bits=11, prefix=0) for p in parts if p.base is not None),
        np.zeros(2048, np.int64),
    )
    assert whole.tolist() == total.tolist()
    assert whole.sum() == size


@pytest.mark.parametrize(("shift", "bits"), [(21, 11), (-1, 4), (3, 0)])
def test_wrong_digits_are_refused(shift: int, bits: int) -> None:
    one = np.ones(1, np.float32)
    for kernel in (histogram, definition.histogram):
        with pytest.raises(ValueError, match="31 bits"):
            kernel(one, one, shift=shift, bits=bits, prefix=0)
