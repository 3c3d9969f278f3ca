"""Random drops: the generator's published answers, the rate, and the L1 sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, F32, Case, as_bytes, cases, keys, make

from ggez_kernels.cpu import drop as compiled
from ggez_kernels.cpu.linear import linear
from ggez_kernels.reference import drop as definition
from ggez_kernels.sparsify import CHUNK, Sparsify

BACKENDS = pytest.mark.parametrize("backend", [compiled, definition], ids=["compiled", "definition"])


@BACKENDS
@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        # our counter fills two words of four, so that only the first of the paper's three vectors can be asked for;
        # the others come from an independent implementation in plain integers, below
        (0x0123456789ABCDEF, 2**40 + 3, None),
        (2**64 - 1, 2**61 - 1, None),
    ],
)
def test_known_answers(backend: Any, seed: int, counter: int, words: str | None) -> None:
    found = backend.random_words(seed, 4 * counter, 4)
    assert found.tolist() == philox_by_hand(seed, (counter % 2**32, counter >> 32, 0, 0))
    assert words is None or [f"{word:08x}" for word in found] == words.split()


def philox_by_hand(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    a, b, c, d = counter
    k, m = seed % 2**32, seed >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def test_the_independent_implementation_is_the_published_one() -> None:
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_by_hand(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_by_hand(2**64 - 1, (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_by_hand(0x299F31D0A4093822, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 5000), st.floats(0, 1))
def test_compiled_mask_is_that_of_the_definition(seed: int, start: int, size: int, keep: float) -> None:
    how = Sparsify(keep=keep, seed=seed)
    found = compiled.keep_mask(how, size, start=start)
    assert as_bytes(found) == as_bytes(definition.keep_mask(how, size, start=start))
    assert found.size == size
    assert as_bytes(found[3:]) == as_bytes(compiled.keep_mask(how, max(size - 3, 0), start=start + 3))


@BACKENDS
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_rate(backend: Any, keep: float) -> None:
    n = 200_000
    kept = int(backend.keep_mask(Sparsify(keep=keep, seed=11), n).sum())
    assert abs(kept - n * keep) <= 5 * math.sqrt(n * keep * (1 - keep))
    other = backend.keep_mask(Sparsify(keep=keep, seed=12), n)
    if 0 < keep < 1:
        assert (other != backend.keep_mask(Sparsify(keep=keep, seed=11), n)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 5, 2**34 + 2])
def test_the_merge_drops_what_the_mask_says(dtype: Any, start: int) -> None:
    delta = np.full(4099, 0.25, dtype)
    how = Sparsify(keep=0.4, seed=99, rescale=2.0)
    out = np.empty_like(delta)
    linear(out, np.zeros_like(delta), [delta], [1.0], sparsify=[how], start=start)
    assert ((out == 0.5) == compiled.keep_mask(how, 4099, start=start)).all()
    assert ((out == 0) != compiled.keep_mask(how, 4099, start=start)).all()


@settings(max_examples=60, deadline=None)
@given(
    cases(with_base=True, counts=(1,), sizes=(0, 17, 4097, CHUNK + 1, 2 * CHUNK + 4099)),
    st.sampled_from((0, 3 * CHUNK)),
)
def test_l1_is_that_of_the_definition(case: Case, start: int) -> None:
    assert case.base is not None
    how = (case.sparsify or [None])[0] or Sparsify(keep=0.3, seed=5)
    with np.errstate(all="ignore"):
        found = compiled.l1(case.base, case.models[0], how, start=start)
        expected = definition.l1(case.base, case.models[0], how, start=start)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine, theirs, equal_nan=True)


def test_l1_is_right_and_does_not_depend_on_tiles() -> None:
    rng = np.random.default_rng(8)
    size = 3 * CHUNK + 777
    base, model = make(rng, size, F32, "plain"), make(rng, size, F32, "plain")
    threshold = int(np.median(keys(base, model)))
    how = Sparsify(threshold=threshold, keep=0.7, seed=1, rescale=3.0)
    delta = np.abs((model - base).astype(np.float64))
    kept = delta * (keys(base, model) >= threshold) * compiled.keep_mask(how, size)
    whole = compiled.l1(base, model, how, start=0)
    for found, expected in zip(whole, (delta, kept), strict=True):
        assert math.fsum(found) == pytest.approx(math.fsum(expected), rel=1e-12)
    cut = 2 * CHUNK
    tiles = [compiled.l1(base[a:b], model[a:b], how, start=a) for a, b in ((0, cut), (cut, size))]
    for k in range(2):
        assert as_bytes(np.concatenate([tile[k] for tile in tiles])) == as_bytes(whole[k])


@BACKENDS
def test_a_start_inside_a_chunk_is_refused(backend: Any) -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="multiple"):
        backend.l1(one, one, Sparsify(), start=1)
