"""The TIES vote: the compiled kernel against its definition, and what must hold whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import BF16, DTYPES, F16, F32, Array, Case, as_bytes, cases, keys, make, with_gap

from ggez_kernels.cpu.linear import linear
from ggez_kernels.cpu.vote import vote
from ggez_kernels.reference.vote import vote as definition
from ggez_kernels.sparsify import Sparsify, Stats


def run(kernel: Any, case: Case, **options: Any) -> tuple[Array, Stats]:
    out, untouched = with_gap(case.models[0].size, case.out_dtype)
    stats = kernel(out, case.base, case.models, case.weights, sparsify=case.sparsify, start=case.start, **options)
    assert untouched()
    return out, stats


options = st.fixed_dictionaries(
    {"count": st.booleans(), "normalize": st.booleans(), "scale": st.sampled_from((1.0, 0.7, -0.3, 0.0))}
)


@settings(max_examples=200, deadline=None)
@given(cases(with_base=True), options)
def test_compiled_kernel_gives_the_bytes_of_the_definition(case: Case, how: dict[str, Any]) -> None:
    with np.errstate(all="ignore"):
        found, stats = run(vote, case, **how)
        expected, wanted = run(definition, case, **how)
    assert as_bytes(found) == as_bytes(expected)
    assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)


@pytest.mark.parametrize("flavour", ["plain", "special", "nonfinite"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, -0.8]])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_fused_loop_gives_the_bytes_of_the_definition(
    flavour: str, normalize: bool, weights: list[float], dtype: Any
) -> None:
    rng = np.random.default_rng(5)
    base = make(rng, 4096 * 20 + 77, dtype, "plain")
    base[::7] = -0.0
    models = [make(rng, base.size, dtype, "plain", base) for _ in range(2)]
    if flavour != "plain":
        models[1][9000:9100] = make(rng, 100, dtype, flavour)
    median = int(np.median(keys(base, models[0])))
    sparsify = [Sparsify(median, 4096 * 8 + 11), Sparsify(median, rescale=1.5)]
    case = Case(base, models, weights, dtype, sparsify, 0)
    found, stats = run(vote, case, normalize=normalize, scale=0.9)
    expected, wanted = run(definition, case, normalize=normalize, scale=0.9)
    assert as_bytes(found) == as_bytes(expected)
    assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)
    if flavour == "plain":
        assert stats.delta_squares == pytest.approx(wanted.delta_squares, rel=1e-5)


@pytest.mark.parametrize(("dtype", "top"), [(BF16, 3e38), (F16, 6e4), (F32, 3e38)])
def test_an_overflow_is_counted_and_squares_only_once(dtype: Any, top: float) -> None:
    base = np.zeros(2 * 4096, dtype)
    model = np.ones(2 * 4096, dtype)
    model[4096:] = 2
    _, stats = run(vote, Case(base, [model] * 2, [0.5, 0.5], dtype, None, 0), scale=top)
    assert (stats.nonfinite, stats.nonfinite_out) == ((0, 0, 0), 4096)
    assert stats.delta_squares == (4096 * (1 + 4),) * 2


@settings(max_examples=60, deadline=None)
@given(cases(with_base=True), options, st.data())
def test_tiles_give_the_bytes_of_the_whole(case: Case, how: dict[str, Any], data: Any) -> None:
    size = case.models[0].size
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    whole, _ = run(vote, case, **how)
    parts = [run(vote, case.tile(begin, end), **how)[0] for begin, end in zip(cuts, cuts[1:], strict=False)]
    assert b"".join(map(as_bytes, parts)) == as_bytes(whole)


@settings(max_examples=60, deadline=None)
@given(cases(with_base=True, counts=(1,)), options)
def test_a_single_voter_is_a_linear_merge(case: Case, how: dict[str, Any]) -> None:
    weight = case.weights[0]
    effective = how["scale"] * (np.sign(weight) if how["normalize"] else weight)
    for kernel in (vote, definition):
        found, _ = run(kernel, case, **how)
        expected, _ = run(linear, Case(case.base, case.models, [effective], case.out_dtype, case.sparsify, case.start))
        assert as_bytes(found) == as_bytes(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[0.3, 0.9], [-1.5, 2.0, 0.1]])
def test_identical_models_give_the_base(dtype: Any, weights: list[float]) -> None:
    base = make(np.random.default_rng(3), 4111, dtype, "special")
    out, _ = run(vote, Case(base, [base.copy() for _ in weights], weights, dtype, None, 0))
    assert as_bytes(out) == as_bytes(base)


def test_the_election_by_hand() -> None:
    base = np.zeros(6, F32)
    models = [np.array(row, F32) for row in ([4, 1, -1, 0, 8, 1], [-1, 1, -3, 0, -8, -1], [-1, -8, 2, 0, 0, -1])]
    # a clear +, outvoted by size, a clear -, nobody, a draw (which is +), and one against two
    by_sum, _ = run(vote, Case(base, models, [1.0, 1.0, 1.0], F32, None, 0))
    assert by_sum.tolist() == [4, -8, -2, 0, 8, -1]
    by_count, _ = run(vote, Case(base, models, [1.0, 1.0, 1.0], F32, None, 0), count=True)
    assert by_count.tolist() == [-1, 1, -2, 0, 8, -1]
    added, _ = run(vote, Case(base, models, [1.0, 1.0, 2.0], F32, None, 0), normalize=False, scale=0.5)
    assert added.tolist() == [2, -8, 2, 0, 4, -1.5]


def test_equal_models_vote_as_one() -> None:
    rng = np.random.default_rng(2)
    base = make(rng, 5003, F32, "plain")
    model = make(rng, 5003, F32, "plain", base)
    together, _ = run(vote, Case(base, [model] * 4, [0.5] * 4, F32, None, 0))
    alone, _ = run(linear, Case(base, [model], [0.49999], F32, None, 0))
    expected = base + (model - base)
    assert np.allclose(together, expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(alone, expected, rtol=1e-6, atol=1e-7)
