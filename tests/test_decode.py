"""Codes and scales to float32: the definition's bytes, and the formula's."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ggez_kernels.cpu.decode import decode
from ggez_kernels.reference.decode import decode as definition

VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype("f4")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 300)),
    block=st.tuples(st.sampled_from([1, 2, 7, 128]), st.sampled_from([1, 3, 32, 128, 1000])),
    data=st.data(),
)
def test_compiled_kernel_gives_the_bytes_of_the_definition_and_of_the_formula(
    shape: tuple[int, int], block: tuple[int, int], data: st.DataObject
) -> None:
    row, column = (data.draw(st.integers(0, size - 1)) for size in block)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = random.integers(0, 256, shape).astype(np.uint8)
    p, q = ((start + np.arange(n)) // size for start, n, size in zip((row, column), shape, block, strict=True))
    scale = (random.random((p[-1] + 1, q[-1] + 1)) * 2 - 1).astype("f4")
    zero = random.integers(-8, 8, scale.shape).astype("f4")
    found, expected = np.full(shape, np.nan, "f4"), np.full(shape, np.nan, "f4")
    decode(found, codes, VALUES, scale, zero, row, column, *block)
    definition(expected, codes, VALUES, scale, zero, row, column, *block)
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert found[~nan].tobytes() == expected[~nan].tobytes()
    plain = (VALUES[codes] - zero[p][:, q]) * scale[p][:, q]
    assert found[~nan].tobytes() == plain[~nan].tobytes()
