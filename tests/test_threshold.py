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

KEYS = 1 << 31


@settings(max_examples=120, deadline=None)
@given(cases(with_base=True, counts=(1,)), st.data())
def test_compiled_counts_are_those_of_the_definition(case: Case, data: Any) -> None:
    assert case.base is not None
    base, model = case.base, case.models[0]
    key = keys(base, model)
    some = int(data.draw(st.sampled_from(sorted({0, 0x7F800000, NAN_KEY, *key[:6].tolist()}))))
    near = max(0, some - 300), min(KEYS, some + 300)
    for low, high, shift in (
        (0, KEYS, 16),
        (0, KEYS, 20),
        (some, some + 1, 0),
        (*near, 0),
        (*near, 5),
        (some, KEYS, 12),
    ):
        found = histogram(base, model, low=low, high=high, shift=shift)
        assert found.dtype == np.uint32
        assert found.tolist() == definition.histogram(base, model, low=low, high=high, shift=shift).tolist()
        inside = key[(key >= low) & (key < high)].astype(np.int64) - low
        assert found[:-1].tolist() == np.bincount(inside >> shift, minlength=len(found) - 1).tolist()
        assert found[-1] == (key >= high).sum()
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
    low, high, need = 0, KEYS, k
    for shift in (20, 10, 0):
        counts = histogram(base, model, low=low, high=high, shift=shift)[:-1]
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, need))
        need -= int(from_top[place] - counts[::-1][place])
        low += (len(counts) - 1 - place) << shift
        high = low + (1 << shift)
    return low, nth_tie(base, model, low, need - 1)


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
    whole = histogram(case.base, case.models[0], low=0, high=KEYS, shift=20)
    parts = [case.tile(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False)]
    total = sum(
        (histogram(p.base, p.models[0], low=0, high=KEYS, shift=20) for p in parts if p.base is not None),
        np.zeros(2049, np.uint32),
    )
    assert whole.tolist() == total.tolist()
    assert whole.sum() == size


@pytest.mark.parametrize(("low", "high", "shift"), [(5, 5, 0), (-1, 4, 0), (0, KEYS + 1, 0), (0, 4, 31), (0, 4, -1)])
def test_keys_that_do_not_exist_are_refused(low: int, high: int, shift: int) -> None:
    one = np.ones(1, np.float32)
    for kernel in (histogram, definition.histogram):
        with pytest.raises(ValueError, match="31 bits"):
            kernel(one, one, low=low, high=high, shift=shift)
