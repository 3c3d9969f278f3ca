"""The TIES vote on a GPU: the CPU's bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import BF16, COUNTS, F16, F32, Case, keys, make
from placing import assert_same, on_gpu

from ggez_kernels.cpu.vote import vote as on_processor
from ggez_kernels.gpu.vote import vote
from ggez_kernels.sparsify import Sparsify

DTYPES = (BF16, F16, F32)
SIZES = (0, 1, 15, 16, 17, 1543, 4097)
WEIGHTS = (0.3, 0.9, -0.4, 1.6, 0.0, 0.5)
HOW = [
    {"count": count, "normalize": normalize, "scale": scale}
    for count, normalize, scale in itertools.product((False, True), (False, True), (1.0, -0.3))
]


def case_of(count: int, size: int, flavour: str, *dtypes: Any, out: Any = None) -> Case:
    rng = np.random.default_rng([count, size])
    base = make(rng, size, dtypes[0], flavour)
    base[::7] = -0.0
    models = [make(rng, size, dtypes[(1 + k) % len(dtypes)], flavour, base) for k in range(count)]
    return Case(base, models, [WEIGHTS[k % len(WEIGHTS)] for k in range(count)], out or dtypes[0], None, 0)


def trimmed(case: Case, density: float = 0.5) -> Case:
    """Half of each model, and of the ties at its threshold the first few."""
    assert case.base is not None
    hows = []
    for k, model in enumerate(case.models):
        key = keys(case.base, model)
        threshold = int(np.sort(key)[int(key.size * density)]) if key.size else 0
        hows.append(Sparsify(threshold=threshold, last=case.start + key.size // (2 + k), rescale=1.5 if k % 2 else 1.0))
    return replace(case, sparsify=hows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_the_processors(dtype: Any, count: int, size: int) -> None:
    for flavour in ("special", "nonfinite") if size < 4097 else ("nonfinite",):
        case = case_of(count, size, flavour, dtype)
        assert_same(vote, on_processor, case)
        assert_same(vote, on_processor, trimmed(case), scale=0.7)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_way_to_count(how: dict[str, Any], count: int) -> None:
    for dtype in DTYPES:
        for flavour in ("plain", "nonfinite"):
            assert_same(vote, on_processor, trimmed(case_of(count, 1543, flavour, dtype)), **how)


@pytest.mark.parametrize("weights", [[0.3, 0.9], [-1.5, 2.0], [0.0, 0.0], [1e-45, 3e38], [0.5, 0.5], [-0.4], [0.0]])
def test_any_weights(weights: list[float]) -> None:
    case = replace(case_of(len(weights), 1543, "nonfinite", F32), weights=weights)
    for count, normalize in itertools.product((False, True), repeat=2):
        assert_same(vote, on_processor, case, count=count, normalize=normalize, scale=0.7)


@pytest.mark.parametrize("start", [0, 1, 7, 2**33 + 5])
def test_drops(start: int) -> None:
    for dtype in DTYPES:
        case = replace(case_of(3, 1543, "special", dtype), start=start)
        hows = [Sparsify(keep=0.4, seed=2**64 - 1, rescale=2.5), None, Sparsify(threshold=5, keep=0.9, seed=start)]
        assert_same(vote, on_processor, replace(case, sparsify=hows))


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, BF16, F32), (BF16, F16)], ids=str)
def test_mixed_dtypes(dtypes: tuple[Any, ...], out: Any) -> None:
    assert_same(vote, on_processor, trimmed(case_of(3, 1543, "special", *dtypes, out=out)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors(dtype: Any) -> None:
    assert_same(vote, on_processor, trimmed(case_of(2, 1041, "nonfinite", dtype)), shift=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_models_give_the_base(dtype: Any) -> None:
    case = case_of(1, 1111, "special", dtype)
    assert case.base is not None
    found, stats = on_gpu(vote, replace(case, models=[case.base.copy()] * 3, weights=[-1.5, 2.0, 0.1]))
    assert found.tobytes() == case.base.tobytes()
    assert stats.delta_squares == (0.0, 0.0, 0.0)


def test_the_election_by_hand() -> None:
    base = np.zeros(6, F32)
    models = [np.array(row, F32) for row in ([4, 1, -1, 0, 8, 1], [-1, 1, -3, 0, -8, -1], [-1, -8, 2, 0, 0, -1])]
    # a clear +, outvoted by size, a clear -, nobody, a draw (which is +), and one against two
    case = Case(base, models, [1.0, 1.0, 1.0], F32, None, 0)
    assert on_gpu(vote, case)[0].tolist() == [4, -8, -2, 0, 8, -1]
    assert on_gpu(vote, case, count=True)[0].tolist() == [-1, 1, -2, 0, 8, -1]
    added, _ = on_gpu(vote, replace(case, weights=[1.0, 1.0, 2.0]), normalize=False, scale=0.5)
    assert added.tolist() == [2, -8, 2, 0, 4, -1.5]


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 8])
def test_the_result_is_near_the_truth(out: Any, count: int) -> None:
    case = replace(case_of(count, 2048, "plain", BF16, out=out), weights=[0.3 + 0.1 * k for k in range(count)])
    assert case.base is not None
    base, *models = (array.astype(np.float64) for array in (case.base, *case.models))
    votes = [weight * (model - base) for weight, model in zip(case.weights, models, strict=True)]
    sign = np.where(sum(votes) >= 0, 1, -1)
    size = sum(np.abs(each) for each in votes)
    clear = np.abs(sum(votes)) > 2.0**-20 * size  # where rounding cannot turn the election
    agree = [each * sign > 0 for each in votes]
    divisor = sum(weight * yes for weight, yes in zip(case.weights, agree, strict=True))
    truth = base + sum(each * yes for each, yes in zip(votes, agree, strict=True)) / np.where(divisor == 0, 1, divisor)
    found, _ = on_gpu(vote, case)
    rounding = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}[out] * np.abs(truth) + 2.0**-25  # half a subnormal half
    arithmetic = (2 * count + 4) * 2.0**-24 * (np.abs(base) + np.abs(truth - base))
    assert (np.abs(found.astype(np.float64) - truth) <= rounding + arithmetic)[clear].all()
    assert clear.mean() > 0.5


def test_wrong_arguments_are_refused() -> None:
    four = torch.zeros(4)
    with pytest.raises(ValueError, match="2 models need 2 weights"):
        vote(four.clone(), four, [four, four], [1.0])
    with pytest.raises(TypeError, match=r"models\[0\] .*float64"):
        vote(four.clone(), four, [four.double(), four], [1.0, 1.0])
    with pytest.raises(ValueError, match="at least one model"):
        vote(four.clone(), four, [], [])
