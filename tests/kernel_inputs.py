"""Arrays for the kernel tests: every dtype, awkward sizes, awkward values, and strategies that draw them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from ggez_kernels.sparsify import KEEP_ALL_LAST, NAN_KEY, Sparsify

Array = np.ndarray[Any, np.dtype[Any]]

BF16, F16, F32, F64 = (np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
DTYPES = (BF16, F16, F32, F64)
SIZES = (0, 1, 15, 16, 17, 1023, 4096, 4097, 8209, 12289)
COUNTS = (1, 2, 3, 8, 17)
SPECIALS = (0.0, -0.0, 1e-45, -1e-40, 6e-8, -5.9e-8, 1e-320, 65504.0, -65520.0, 3.39e38, -1e300, 1.0, -1.0)
NONFINITE = (np.inf, -np.inf, np.nan)


def as_bytes(array: Array) -> bytes:
    return array.tobytes()


def with_gap(size: int, dtype: np.dtype[Any], lead: int = 8, tail: int = 8) -> tuple[Array, Callable[[], bool]]:
    """An output of `size` elements inside a larger buffer, and a question whether its surroundings are untouched.

    It begins `lead` elements after a cache line does.
    """
    room = np.full((lead + size + tail) * dtype.itemsize + 64, 0xA5, np.uint8)
    whole = room[-room.ctypes.data % 64 :][: (lead + size + tail) * dtype.itemsize]
    inside = whole[lead * dtype.itemsize : (lead + size) * dtype.itemsize].view(dtype)

    def untouched() -> bool:
        before, after = whole[: lead * dtype.itemsize], whole[(lead + size) * dtype.itemsize :]
        return bool((before == 0xA5).all() and (after == 0xA5).all())

    return inside, untouched


def make(rng: np.random.Generator, size: int, dtype: np.dtype[Any], flavour: str, base: Array | None = None) -> Array:
    """Values like weights near `base`; 'special' mixes in extreme ones, 'nonfinite' also NaN and infinities."""
    values = rng.standard_normal(size) * 0.02
    if base is not None:
        near = base.astype(np.float64)
        values = np.where(rng.random(size) < 0.3, near, near + rng.integers(-4, 5, size) * 2.0**-12)
    if flavour != "plain" and size:
        pool = np.array(SPECIALS if flavour == "special" else SPECIALS + NONFINITE)
        places = rng.random(size) < 0.2
        places[rng.integers(0, size)] = True
        values = np.where(places, rng.choice(pool, size), values)
    with np.errstate(all="ignore"):
        stored = values.astype(dtype)
    if flavour != "nonfinite":
        stored[~np.isfinite(stored.astype(np.float64))] = 1
    return stored


@dataclass(frozen=True)
class Case:
    base: Array | None
    models: list[Array]
    weights: list[float]
    out_dtype: np.dtype[Any]
    sparsify: Sequence[Sparsify | None] | None
    start: int

    def tile(self, begin: int, end: int) -> Case:
        base = None if self.base is None else self.base[begin:end]
        models = [model[begin:end] for model in self.models]
        return Case(base, models, self.weights, self.out_dtype, self.sparsify, self.start + begin)


def work_dtype(case: Case) -> Any:
    """What a kernel without an output works in."""
    inputs = case.models if case.base is None else [case.base, *case.models]
    return np.float64 if any(array.dtype == F64 for array in inputs) else np.float32


def widened(array: Array, work: Any) -> Array:
    wide: Array = array.astype(work)
    return wide


def keys(base: Array, model: Array) -> Array:
    """The magnitude keys of a delta, by numpy alone."""
    work = np.float64 if F64 in (base.dtype, model.dtype) else np.float32
    with np.errstate(all="ignore"):
        delta = (model.astype(work) - base.astype(work)).astype(np.float32)
    bits: Array = np.where(np.isnan(delta), np.uint32(NAN_KEY), delta.view(np.uint32) & np.uint32(0x7FFFFFFF))
    return bits


def draw_sparsify(draw: Any, base: Array, model: Array, start: int) -> Sparsify | None:
    kind = draw(st.sampled_from(("none", "trim", "drop", "both", "rescale")))
    if kind == "none":
        return None
    values: dict[str, Any] = {}
    if kind in ("trim", "both"):
        key = keys(base, model)
        values["threshold"] = int(draw(st.sampled_from(sorted({0, 0x7FFFFFFF, *key[:5].tolist()}))))
        values["last"] = draw(
            st.sampled_from((-1, KEEP_ALL_LAST)) | st.integers(max(start - 2, -1), start + base.size + 2)
        )
    if kind in ("drop", "both"):
        values["keep"] = draw(st.sampled_from((0.0, 0.1, 0.5, 0.9)))
        values["seed"] = draw(st.integers(0, 2**64 - 1))
    if kind == "rescale" or draw(st.booleans()):
        values["rescale"] = draw(st.sampled_from((2.0, 1 / 3, 1.0)))
    return Sparsify(**values)


@st.composite
def cases(
    draw: Any,
    with_base: bool | None = None,
    counts: Sequence[int] = COUNTS,
    sizes: Sequence[int] = SIZES,
    flavours: Sequence[str] = ("plain", "special", "nonfinite"),
    thin: bool = True,
) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from(sizes))
    count = draw(st.sampled_from(counts))
    flavour = draw(st.sampled_from(flavours))
    # all bfloat16, the commonest, has loops of its own; float64 changes the work dtype of everything
    pool = draw(st.sampled_from(((BF16,), (F16,), (F32,), (BF16, F16, F32), DTYPES)))
    dtypes = [draw(st.sampled_from(pool)) for _ in range(min(count, 3) + 2)]
    has_base = draw(st.booleans()) if with_base is None else with_base
    base = make(rng, size, dtypes[0], flavour) if has_base else None
    models = [make(rng, size, dtypes[2 + k % min(count, 3)], flavour, base) for k in range(count)]
    weight = st.sampled_from((0.3, 0.5, 0.75, 1.0, -0.4, 1.6, 0.0, 0.1))
    weights = [draw(weight) for _ in range(count)]
    start = draw(st.sampled_from((0, 1, 7, 65536, 2**33 + 5)))
    sparsify = None
    if thin and base is not None and draw(st.booleans()):
        sparsify = [draw_sparsify(draw, base, model, start) for model in models]
    return Case(base, models, weights, dtypes[1], sparsify, start)
