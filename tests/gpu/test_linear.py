"""Weighted sums on a GPU: the CPU's bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import BF16, COUNTS, F16, F32, Case, keys, make
from placing import as_array, assert_same, on_cpu, on_gpu, place, poisoned, waited_for

from ggez_kernels.cpu.linear import linear as on_processor
from ggez_kernels.gpu.linear import linear, linear_many
from ggez_kernels.sparsify import Sparsify

DTYPES = (BF16, F16, F32)
SIZES = (0, 1, 15, 16, 17, 1543, 4097)
WEIGHTS = (0.3, -0.4, 1.6, 0.0, 1.0, 0.5, 0.75)
WAYS = (0.0, 1.0, 0.3, 0.5, 0.8, -0.4, 1.6)  # of a single model: each end, from either end, and beyond them


def case_of(
    count: int, size: int, flavour: str, dtypes: tuple[Any, ...], has_base: bool = True, out: Any = None
) -> Case:
    rng = np.random.default_rng([count, size])
    base = make(rng, size, dtypes[0], flavour)
    base[::7] = -0.0
    models = [make(rng, size, dtypes[(1 + k) % len(dtypes)], flavour, base) for k in range(count)]
    models[0][1::5] = -0.0
    weights = [WEIGHTS[k % len(WEIGHTS)] for k in range(count)]
    return Case(base if has_base else None, models, weights, out or dtypes[0], None, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_the_processors(dtype: Any, count: int, size: int) -> None:
    for has_base in (True, False):
        for flavour in ("special", "nonfinite") if size < 4097 else ("nonfinite",):
            assert_same(linear, on_processor, case_of(count, size, flavour, (dtype,), has_base))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flavour", ["plain", "special", "nonfinite"])
@pytest.mark.parametrize("has_base", [True, False])
def test_a_single_model_with_any_weight(dtype: Any, flavour: str, has_base: bool) -> None:
    case = case_of(1, 1543, flavour, (dtype,), has_base)
    for weight in WAYS:
        assert_same(linear, on_processor, replace(case, weights=[weight]))
        assert_same(linear, on_processor, replace(case, weights=[weight], sparsify=[None] if has_base else None))


def sparsifiers(case: Case, k: int) -> list[Sparsify | None]:
    assert case.base is not None
    key = keys(case.base, case.models[k])
    threshold = int(np.sort(key)[key.size // 2])
    tie = case.start + int(np.flatnonzero(key == threshold)[0])  # the first of those at the threshold
    return [
        None,
        Sparsify(threshold=threshold, last=tie, rescale=1.5),
        Sparsify(threshold=threshold, last=tie - 1),
        Sparsify(keep=0.4, seed=0xFEDCBA9876543210 + k, rescale=2.5),
        Sparsify(threshold=threshold, keep=0.7, seed=k),
        Sparsify(threshold=0x7FC00000, last=case.start + key.size // 2),
        Sparsify(threshold=0x7FFFFFFF, last=-1),
        Sparsify(threshold=0x7F800000, last=-1, rescale=-1.0),
        Sparsify(keep=0.0),
        Sparsify(rescale=1 / 3),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 6, 7, 2**33 + 5])
@pytest.mark.parametrize("count", [1, 3])
def test_sparsified_deltas(dtype: Any, start: int, count: int) -> None:
    case = replace(case_of(count, 1543, "nonfinite", (dtype,)), start=start)
    choices = [sparsifiers(case, k) for k in range(count)]
    for first in range(len(choices[0])):
        how = [choices[k][(first + 3 * k) % len(choices[k])] for k in range(count)]
        for weight in (0.3, 0.8, 1.0) if count == 1 else (0.3,):
            weights = [weight, *case.weights[1:]]
            assert_same(linear, on_processor, replace(case, sparsify=how, weights=weights))


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, BF16, F32), (BF16, F16), (F32, BF16, BF16)], ids=str)
def test_mixed_dtypes(dtypes: tuple[Any, ...], out: Any) -> None:
    for count, has_base in ((1, True), (3, True), (3, False)):
        assert_same(linear, on_processor, case_of(count, 1543, "special", dtypes, has_base, out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_unaligned_tensors(dtype: Any, shift: int) -> None:
    for count in (1, 2):
        assert_same(linear, on_processor, case_of(count, 1041, "nonfinite", (dtype,)), shift)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_result_is_near_the_truth(out: Any, count: int) -> None:
    case = case_of(count, 2048, "plain", (BF16,), out=out)
    assert case.base is not None
    base, *models = (array.astype(np.float64) for array in (case.base, *case.models))
    terms = [weight * (model - base) for weight, model in zip(case.weights, models, strict=True)]
    truth = base + sum(terms)
    found, _ = on_gpu(linear, case)
    rounding = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}[out] * np.abs(truth) + 2.0**-25  # half a subnormal half
    arithmetic = (count + 3) * 2.0**-24 * (np.abs(base) + sum(np.abs(term) for term in terms))
    assert (np.abs(found.astype(np.float64) - truth) <= rounding + arithmetic).all()


@pytest.mark.parametrize("out", [BF16, F16], ids=str)
def test_every_neighbourhood_is_rounded_to_nearest_even(out: Any) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(out)
    wide = patterns.astype(np.float32)
    middles = ((wide[:-1].astype(np.float64) + wide[1:]) / 2).astype(np.float32)
    for values in (
        wide,
        middles,
        np.nextafter(middles, np.float32(np.inf)),
        np.nextafter(middles, -np.float32(np.inf)),
    ):
        assert_same(linear, on_processor, Case(None, [values], [1.0], out, None, 0))
    assert_same(linear, on_processor, Case(None, [patterns], [1.0], F32, None, 0))  # and widening is exact


@pytest.mark.parametrize(("out", "bits"), [(BF16, 0x7FC0), (F16, 0x7E00), (F32, 0x7FC00000)], ids=str)
def test_there_is_one_nan(out: Any, bits: int) -> None:
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFC00000, 0x7FC12345], np.uint32).view(np.float32)
    unsigned = np.uint16 if out.itemsize == 2 else np.uint32
    for base, weight in ((None, 1.0), (nans, 0.3), (nans, 1.0), (nans, 0.0)):
        found, stats = on_gpu(linear, Case(base, [nans], [weight], out, None, 0))
        assert found.view(unsigned).tolist() == [bits] * 5
        assert stats.nonfinite == (5,) * (2 - (base is None)) and stats.nonfinite_out == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_many_outputs_of_one_reading(dtype: Any, rows: int) -> None:
    for count, has_base in ((1, True), (1, False), (3, True), (3, False)):
        case = case_of(count, 1543, "nonfinite", (dtype,), has_base)
        weights = [[WAYS[(r + k) % len(WAYS)] for k in range(count)] for r in range(rows)]
        hows = [Sparsify(keep=0.6, seed=k) for k in range(count)] if has_base else None
        for how in {id(each): each for each in (None, hows)}.values():
            placed = [poisoned(1543, dtype) for _ in range(rows)]
            base = None if case.base is None else place(case.base)[0]
            models = [place(model)[0] for model in case.models]
            answers = linear_many([out for out, _ in placed], base, models, weights, sparsify=how, start=3)
            assert len(answers) == rows
            for row, (out, untouched), stats in zip(weights, placed, answers, strict=True):
                alone = replace(case, weights=row, sparsify=how, start=3)
                expected, wanted = on_cpu(on_processor, alone)
                assert untouched() and as_array(out, dtype).tobytes() == expected.tobytes()
                found = waited_for(stats)
                assert (found.nonfinite, found.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)


@pytest.mark.parametrize("how", [Sparsify(0x7FC00000, last=4), Sparsify(0x7FC00001, last=-1), Sparsify(0x7FBFFFFF)])
def test_every_nan_is_as_large_as_another(how: Sparsify) -> None:
    model = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0x7FC12345] * 2 + [0x7F800000, 0xFF800000], np.uint32)
    case = Case(np.zeros(10, F32), [model.view(np.float32)], [0.3], F32, [how], 0)
    assert_same(linear, on_processor, case)


@pytest.mark.parametrize("size", [1, 17])
def test_infinite_weights(size: int) -> None:
    """An infinity times the nothing beyond a tensor's end is not counted as NaN."""
    for count, has_base in ((1, True), (1, False), (2, True), (2, False)):
        assert_same(
            linear, on_processor, replace(case_of(count, size, "plain", (F32,), has_base), weights=[np.inf] * count)
        )


def test_an_overflow_is_no_fault_of_the_inputs() -> None:
    model = np.full(2000, 2.0, F32)
    _, stats = on_gpu(linear, Case(np.zeros(2000, F32), [model], [0.3], BF16, None, 0))
    assert (stats.nonfinite, stats.nonfinite_out, stats.delta_squares) == ((0, 0), 0, (8000.0,))
    _, stats = on_gpu(linear, Case(None, [model, model], [3e38, 1.0], F32, None, 0))
    assert (stats.nonfinite, stats.nonfinite_out, stats.delta_squares) == ((0, 0), 2000, (0.0, 0.0))
    _, stats = on_gpu(linear, Case(np.zeros(2000, F32), [model * np.float32(1e25)], [0.3], F32, None, 0))
    assert (stats.nonfinite, stats.nonfinite_out, stats.delta_squares) == ((0, 0), 0, (np.inf,))


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out": torch.zeros(4, dtype=torch.float64)}, TypeError, "out .*float64"),
        ({"base": torch.zeros(4, dtype=torch.int32)}, TypeError, "base .*int32"),
        ({"out": torch.zeros(5)}, ValueError, "out has 5"),
        ({"models": [FOUR, torch.zeros(8)[::2]]}, ValueError, r"models\[1\] must be contiguous"),
        ({"base": torch.zeros(2, 2)}, ValueError, "base must be .*one-dimensional"),
        ({"base": torch.zeros(4, device="meta")}, ValueError, "base is on meta"),
        ({"models": [], "weights": []}, ValueError, "at least one model"),
        ({"weights": [1.0]}, ValueError, "2 models need 2 weights"),
        ({"sparsify": [None]}, ValueError, "2 models need 2 sparsifiers"),
        ({"base": None, "sparsify": [None, Sparsify(keep=0.5)]}, ValueError, "needs a base"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    call: dict[str, Any] = {
        "out": FOUR.clone(),
        "base": FOUR,
        "models": [FOUR, FOUR],
        "weights": [1.0, 2.0],
        "sparsify": None,
    } | change
    with pytest.raises(error, match=words):
        linear(**call)


def test_wrong_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one output"):
        linear_many([], FOUR, [FOUR], [])
    with pytest.raises(ValueError, match="2 outputs need"):
        linear_many([FOUR.clone(), FOUR.clone()], FOUR, [FOUR], [[1.0]])
    with pytest.raises(TypeError, match="one dtype"):
        linear_many([FOUR.clone(), FOUR.half()], FOUR, [FOUR], [[1.0], [0.5]])
