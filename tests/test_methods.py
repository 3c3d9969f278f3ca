"""Each merge method by itself: its parameters and their limits, what it measures, what it computes.

Every method runs on both backends, the compiled kernels and their definition in torch, with the same bytes required.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from merging import arrays, refusals
from models import merged

import ggez_kernels.reference.drop
import ggez_kernels.reference.gram
import ggez_kernels.reference.linear
import ggez_kernels.reference.threshold
import ggez_kernels.reference.vote
from ggez_kernels.sparsify import CHUNK, KEEP_ALL_LAST, Counting, Sparsify
from ggez_merge.arithmetic import load_kernels
from ggez_merge.errors import Refused
from ggez_merge.methods import METHODS
from ggez_merge.methods.method import Job, Kernels, Measurement, Parameter, Tile, normalised
from ggez_merge.methods.trim import SAMPLE_SLICES, SMALL, n_kept, thresholds

Array = np.ndarray[Any, Any]
reference = ggez_kernels.reference
DEFINITION = SimpleNamespace(
    linear=reference.linear.linear,
    vote=reference.vote.vote,
    gram=reference.gram.gram,
    l1=reference.drop.l1,
    histogram=reference.threshold.histogram,
    ties=reference.threshold.ties,
    nth_tie=reference.threshold.nth_tie,
    counting=reference.threshold.COUNTING,
)
BACKENDS = {"compiled": load_kernels()[0], "definition": cast(Kernels, DEFINITION)}


def counting_with(digit_bits: int, most_bins: int, sample_share: int) -> Kernels:
    """The compiled kernels, counting in another way."""
    changed = {**vars(BACKENDS["compiled"]), "counting": Counting(digit_bits, most_bins, sample_share)}
    return cast(Kernels, SimpleNamespace(**changed))


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return BACKENDS[str(request.param)]


def answer(measurement: Measurement | None, tiles: Sequence[Tile]) -> list[Any]:
    """Carry out a measurement over tiles, in the given order, as the engine does."""
    assert measurement is not None
    sums: Any = None
    while True:
        try:
            sweep = measurement.send(sums)
        except StopIteration as done:
            return list(done.value)
        parts = [sweep.function(tile) for tile in tiles if sweep.only in (None, (tile.job, tile.start))]
        sums = parts[0]
        for part in parts[1:]:
            sums = sums + part


def cut(job: int, base: Array | None, models: Sequence[Array], size: int) -> list[Tile]:
    n = len(models[0])
    return [
        Tile(job, at, base[at : at + size] if base is not None else None, [x[at : at + size] for x in models])
        for at in range(0, n, size)
    ]


def apply(
    kernels: Kernels,
    method: str,
    base: Array | None,
    models: Sequence[Array],
    per_model: Sequence[dict[str, Any]],
    **given: Any,
) -> Array:
    """One tensor merged, its parameters completed from the defaults."""
    shared = {k: p.default for k, p in METHODS[method].shared.items() if p.default is not None} | given
    own = {k: p.default for k, p in METHODS[method].per_model.items() if p.default is not None}
    job = Job("w", len(models[0]), shared, [own | parameters for parameters in per_model])
    assert METHODS[method].check(job) is None
    measure = METHODS[method].measure
    measurement = measure(kernels, [job]) if measure else None
    measured = answer(measurement, cut(0, base, models, CHUNK))[0] if measurement else None
    out = np.empty_like(models[0])
    METHODS[method].combine(kernels, job, measured)(out, base, models, 0)
    return out


def vectors(count: int, n: int = 1000, seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.normal(size=n).astype(np.float32) for _ in range(count)]


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=2e-6, atol=1e-6)


# --- what each computes ----------------------------------------------------------------------------------------------


def test_linear_interpolates(kernels: Kernels) -> None:
    b, x = vectors(2)
    close(apply(kernels, "linear", b, [x], [{}], ratio=0.3), 0.7 * b.astype(np.float64) + 0.3 * x)
    close(apply(kernels, "linear", b, [x], [{}], ratio=1.5), -0.5 * b.astype(np.float64) + 1.5 * x)


def test_linear_averages_with_and_without_dividing(kernels: Kernels) -> None:
    xs = vectors(3)
    weights = [0.5, 1.0, -0.25]
    total = sum(w * x.astype(np.float64) for w, x in zip(weights, xs, strict=True))
    given_ = [{"weight": w} for w in weights]
    close(apply(kernels, "linear", None, xs, given_), total / 1.25)
    close(apply(kernels, "linear", None, xs, given_, normalize=False), total)


def test_one_model_of_any_weight_is_itself_when_normalised(kernels: Kernels) -> None:
    (x,) = vectors(1)
    assert np.array_equal(apply(kernels, "linear", None, [x], [{"weight": 0.2}]), x)
    assert np.array_equal(apply(kernels, "linear", None, [x], [{"weight": 0.5}], normalize=False), x / 2)


def test_task_arithmetic_adds_deltas(kernels: Kernels) -> None:
    b, x, y = vectors(3)
    deltas = 0.6 * (x.astype(np.float64) - b) - 0.2 * (y.astype(np.float64) - b)
    given_ = [{"weight": 0.6}, {"weight": -0.2}]
    close(apply(kernels, "task_arithmetic", b, [x, y], given_), b + deltas)
    scale = {"lambda": 0.5}
    close(apply(kernels, "task_arithmetic", b, [x, y], given_, normalize=True, **scale), b + 0.5 * deltas / 0.4)


def test_passthrough_scales(kernels: Kernels) -> None:
    (x,) = vectors(1)
    assert np.array_equal(apply(kernels, "passthrough", None, [x], [{}]), x)
    close(apply(kernels, "passthrough", None, [x], [{"scale": -0.5}]), -0.5 * x.astype(np.float64))


@pytest.mark.parametrize("degrees", [0, 1, 1.8, 1.9, 30, 90, 150, 178.2, 179.9, 180])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_follows_the_arc(degrees: float, t: float, kernels: Kernels) -> None:
    """Vectors of different lengths at a known angle; below 1.812 degrees from a line (cos 0.9995), the chord."""
    theta = math.radians(degrees)
    u, v = np.zeros(64), np.zeros(64)
    u[::2], v[1::2] = 1 / math.sqrt(32), 1 / math.sqrt(32)
    a = (2 * u).astype(np.float32)
    c = (3 * (math.cos(theta) * u + math.sin(theta) * v)).astype(np.float32)
    if abs(math.cos(theta)) > 0.9995:
        expected = (1 - t) * a.astype(np.float64) + t * c
    else:
        expected = (math.sin((1 - t) * theta) * a + math.sin(t * theta) * c.astype(np.float64)) / math.sin(theta)
    np.testing.assert_allclose(apply(kernels, "slerp", a, [c], [{}], t=t), expected, rtol=1e-4, atol=1e-6)


def test_slerp_of_a_tensor_without_length(kernels: Kernels) -> None:
    """All zeros have no direction: they count as at right angles to everything, as in mergekit."""
    zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
    root = math.sqrt(0.5)
    close(apply(kernels, "slerp", zeros, [ones], [{}], t=0.5), root * ones.astype(np.float64))
    assert np.array_equal(apply(kernels, "slerp", zeros, [zeros], [{}], t=0.5), zeros)


def test_ties_elects_and_averages_what_agrees(kernels: Kernels) -> None:
    """By hand: each column is one case of the election."""
    b = np.zeros(5, np.float32)
    x = np.array([1, -3, 2, 0, 5], np.float32)
    y = np.array([3, 2, -2, -4, 0], np.float32)
    one = [{"weight": 1.0}, {"weight": 1.0}]
    assert apply(kernels, "ties", b, [x, y], one).tolist() == [2, -3, 2, -4, 5]
    assert apply(kernels, "ties", b, [x, y], one, normalize=False).tolist() == [4, -3, 2, -4, 5]
    assert apply(kernels, "ties", b, [x, y], one, vote="count").tolist() == [2, 2, 2, -4, 5]
    scale = {"lambda": 0.5}
    assert apply(kernels, "ties", b, [x, y], one, **scale).tolist() == [1, -1.5, 1, -2, 2.5]
    # weights 1 and 2: deltas 1 -3 2 0 5 and 6 4 -4 -8 0
    assert apply(kernels, "ties", b, [x, y], [one[0], {"weight": 2.0}]).tolist() == [
        pytest.approx(7 / 3),
        2,
        -2,
        -4,
        5,
    ]


def test_ties_trims_and_can_restore_the_size(kernels: Kernels) -> None:
    b = np.zeros(4, np.float32)
    x = np.array([1, -3, 2, -4], np.float32)
    half = [{"weight": 1.0, "density": 0.5}]
    assert apply(kernels, "ties", b, [x], half).tolist() == [0, -3, 0, -4]
    close(apply(kernels, "ties", b, [x], half, rescale=True), np.array([0, -3, 0, -4]) * 10 / 7)


def test_a_density_of_zero_takes_nothing(kernels: Kernels) -> None:
    b, x = vectors(2)
    for method in ("ties", "dare_linear", "dare_ties"):
        assert np.array_equal(apply(kernels, method, b, [x], [{"weight": 1.0, "density": 0.0}]), b)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_both_backends_give_the_same_bytes(method: str) -> None:
    b, x, y = vectors(3, n=CHUNK + 77)
    dense = [{"weight": 0.6, "density": 0.3}, {"weight": 0.5, "density": 0.7}]
    cases: dict[str, tuple[Sequence[dict[str, Any]], dict[str, Any]]] = {
        "linear": ([{}], {"ratio": 0.3}),
        "task_arithmetic": ([{"weight": 0.6}, {"weight": 0.5}], {"lambda": 0.9}),
        "ties": (dense, {"rescale": True}),
        "dare_linear": (dense, {"rescale": "l1"}),
        "dare_ties": (dense, {"rescale": "exact"}),
        "slerp": ([{}], {"t": 0.3}),
    }
    per_model, shared = cases[method]
    outs = [apply(k, method, b, [x, y][: len(per_model)], per_model, **shared) for k in BACKENDS.values()]
    assert outs[0].tobytes() == outs[1].tobytes()


# --- measuring: exact thresholds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "n", "kept"),
    [
        (0.5, 10, 5),
        (0.57, 100, 56),  # int(0.57 * 100) in floating point, as everybody computes it
        (0.01, 10, 1),  # at least one: a temperature of shape [1] must not vanish
        (1e-9, 1, 1),
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.999, 10, 9),
        (0.5, 0, 0),
        (1.0, 0, 0),
    ],
)
def test_how_many_a_density_keeps(density: float, n: int, kept: int) -> None:
    assert n_kept(density, n) == kept


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0),
    st.data(),
    st.booleans(),
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([(15, 1 << 21, 16), (11, 1 << 11, 1), (4, 1, 1), (14, 1 << 18, 2)]),
)
def test_thresholds_keep_what_a_stable_sort_keeps(
    sizes: list[int], data: st.DataObject, all_ties: bool, step: float, counting: tuple[int, int, int]
) -> None:
    """Over a group of tensors cut into tiles that arrive in any order; with `step`, most magnitudes are equal."""
    kernels = counting_with(*counting)
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    total = sum(sizes)
    keep = [data.draw(st.integers(0, total)) for _ in range(2)]
    deltas = [random.normal(size=(2, n)).astype(np.float32) for n in sizes]
    if step:
        deltas = [np.round(d / step).astype(np.float32) * np.float32(step) for d in deltas]
    tiles = [
        tile
        for job, d in enumerate(deltas)
        if d.shape[1]
        for tile in cut(job, np.zeros(d.shape[1], np.float32), list(d), data.draw(st.integers(1, 40)))
    ]
    order = data.draw(st.permutations(range(len(tiles))))
    found = answer(thresholds(kernels, sizes, keep, all_ties), [tiles[i] for i in order])
    for m in range(2):
        flat = np.abs(np.concatenate([d[m] for d in deltas]))
        expected = np.zeros(total, bool)
        expected[np.argsort(-flat, kind="stable")[: keep[m]]] = True
        if all_ties and keep[m]:
            expected = flat >= np.sort(flat)[-keep[m]]
        masks = [is_kept(np.abs(d[m]), found[job][m]) for job, d in enumerate(deltas)]
        np.testing.assert_array_equal(np.concatenate(masks), expected)


@pytest.mark.parametrize("kind", ["smooth", "quantised", "misleading", "mostly zero"])
@pytest.mark.parametrize("n_tiles", [1, 2])
def test_large_tensors_keep_exactly_k_however_their_sample_looks(kind: str, n_tiles: int) -> None:
    """Above SMALL entries a tile is sampled first; `misleading` ones are large just where the sample is taken."""
    kernels = BACKENDS["compiled"]
    share = kernels.counting.sample_share
    size = SMALL + 4321
    random = np.random.default_rng(3)
    flat = random.normal(size=n_tiles * size).astype(np.float32)
    if kind == "quantised":
        flat = flat.astype(ml_dtypes.bfloat16).astype(np.float32)
    elif kind == "mostly zero":
        flat[random.random(len(flat)) < 0.7] = 0
    elif kind == "misleading":
        for tile in range(n_tiles):
            for i in range(SAMPLE_SLICES):
                at = tile * size + i * size // SAMPLE_SLICES
                flat[at : at + size // share // SAMPLE_SLICES] *= 1000
    tiles = cut(0, np.zeros(len(flat), np.float32), [flat, flat[::-1].copy()], size)
    keep = [len(flat) // 2, len(flat) // 5 + 1]
    (trims,) = answer(thresholds(kernels, [len(flat)], keep, all_ties=False), tiles[::-1])
    for sparsify, model, k in zip(trims, (flat, flat[::-1]), keep, strict=True):
        magnitudes = np.abs(model)
        kth = np.partition(magnitudes, len(flat) - k)[len(flat) - k]
        assert sparsify.threshold == int(kth.view(np.int32))
        equal = np.flatnonzero(magnitudes == kth)
        n_equal_kept = k - int((magnitudes > kth).sum())
        assert sparsify.last == (KEEP_ALL_LAST if n_equal_kept == len(equal) else equal[n_equal_kept - 1])


def is_kept(magnitudes: Array, sparsify: Sparsify) -> Array:
    keys = magnitudes.astype(np.float32).view(np.int32)
    first = np.arange(len(keys)) <= min(sparsify.last, KEEP_ALL_LAST)
    return (keys > sparsify.threshold) | ((keys == sparsify.threshold) & first)


def test_different_densities_over_the_whole_model_keep_their_mean(tmp_path: Path) -> None:
    """A filter sets 0.2 for 300 entries, the rest is 0.6 of 100: the 120 largest of all 400 are kept."""
    random = np.random.default_rng(0)
    states = [
        {"a.w": random.normal(size=300).astype(np.float32) * s, "b.w": random.normal(size=100).astype(np.float32) * s}
        for s in (0, 1)
    ]
    for name, state in zip(("base", "one"), states, strict=True):
        write_checkpoint(tmp_path / name, state)
    density = [{"filter": "a.", "value": 0.2}, {"value": 0.6}]
    models = [{"model": tmp_path / "one", "parameters": {"weight": 1.0, "density": density}}]
    base = tmp_path / "base"
    found = arrays(
        merged(tmp_path, merge_method="ties", base_model=base, models=models, parameters={"scope": "global"})
    )
    whole, kept = (np.concatenate([state["a.w"], state["b.w"]]) for state in (states[1], found))
    assert set(np.flatnonzero(kept)) == set(np.argsort(-np.abs(whole))[:120])

    ties = {"scope": "global", "ties": [{"filter": "a.", "value": "all"}, {"value": "index"}]}
    with pytest.raises(Refused, match="`ties` must be the same for all tensors"):
        merged(tmp_path / "again", merge_method="ties", base_model=base, models=models, parameters=ties)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "good", "bad"),
    [
        (Parameter(), [0, -3, 0.5, 1e9], [True, "0.5", "x"]),
        (Parameter(low=0, high=1), [0, 1, 0.5], [-0.1, 1.01, True, "1"]),
        (Parameter(low=0), [0, 7], [-1]),
        (Parameter("integer", low=0, high=9), [0, 9, 3.0], [0.5, -1, 10, "3", True]),
        (Parameter("flag"), [True, False], [0, 1, "true"]),
        (Parameter("choice", choices=("exact", "l1", True)), ["exact", "l1", True], ["L1", False, 1]),
    ],
)
def test_values_are_held_to_their_kind_and_limits(parameter: Parameter, good: list[Any], bad: list[Any]) -> None:
    assert [parameter.fault(value) for value in good] == [None] * len(good)
    assert all(parameter.fault(value) for value in bad)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_values_that_may_be_given(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    for parameter in [*method.shared.values(), *method.per_model.values()]:
        assert not (parameter.required and parameter.default is not None)
        assert parameter.default is None or parameter.fault(parameter.default) is None


def test_parameters_and_defaults_are_mergekits() -> None:
    """Of all that both know; `ratio`, `scope`, `ties`, `vote`, `seed` are ours."""
    unknown = set()
    compared = 0
    for name, method in METHODS.items():
        for theirs in merge_methods.get(name).spec.parameters:
            ours = (method.shared if theirs.scope.value == "shared" else method.per_model).get(theirs.name)
            if ours is None:
                unknown.add((name, theirs.name))
                continue
            default = theirs.default if isinstance(theirs.default, (bool, float)) else None
            assert ours.default == (1.0 if name == "passthrough" else default), (name, theirs.name)
            compared += 1
    assert unknown == {("task_arithmetic", "density"), ("task_arithmetic", "rescale")}  # without effect there
    assert compared == 26


def test_weights_are_divided_by_their_sum_unless_it_is_zero() -> None:
    assert normalised([1.0, 3.0], True) == [0.25, 0.75]
    assert normalised([1.0, 3.0], False) == [1.0, 3.0]
    assert normalised([1.0, -1.0], True) == [1.0, -1.0]
    assert normalised([1e-4, 1e-4], True) == [0.5, 0.5]


BASE = "base_model: base\n"
BAD = {
    "ratio and weight": ("linear", "[{model: one, parameters: {weight: 1}}]", "{ratio: 0.5}", "contradict"),
    "ratio of two": ("linear", "[{model: one}, {model: two}]", "{ratio: 0.5}", "not 2"),
    "neither": ("linear", "[{model: one}]", "{}", "either `ratio`"),
    "a weight too few": ("linear", "[{model: one, parameters: {weight: 1}}, {model: two}]", "{}", "for every model"),
    "no weight": ("ties", "[{model: one}]", "{}", "`weight`"),
    "density": ("ties", "[{model: one}]", "{weight: 1, density: 1.2}", "from 0 to 1"),
    "negative density": ("dare_ties", "[{model: one}]", "{weight: 1, density: -0.2}", "from 0 to 1"),
    "scope": ("ties", "[{model: one}]", "{weight: 1, scope: model}", "tensor, global"),
    "a word for a number": ("slerp", "[{model: one}]", "{t: half}", "a number"),
    "no t": ("slerp", "[{model: one}]", "{}", "`t`"),
    "slerp of three": ("slerp", "[{model: one}, {model: two}]", "{t: 0.5}", "exactly 1"),
    "unknown": ("ties", "[{model: one}]", "{weight: 1, densty: 0.5}", "did you mean `density`"),
    "of another method": ("task_arithmetic", "[{model: one}]", "{weight: 1, density: 0.5}", "density"),
    "shared given to one": ("ties", "[{model: one, parameters: {lambda: 2}}]", "{weight: 1}", "whole merge"),
    "flag": ("ties", "[{model: one}]", "{weight: 1, normalize: 1}", "true or false"),
    "seed": ("dare_linear", "[{model: one}]", "{weight: 1, seed: 0.5}", "whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_and_bad_values_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    method, models, parameters, word = BAD[case]
    for name in ("base", "one", "two"):
        write_checkpoint(tmp_path / name, {"w": np.zeros(3, np.float32) + len(name)})
    recipe = f"merge_method: {method}\n{BASE}models: {models}\nparameters: {parameters}\n"
    problems = refusals(tmp_path, recipe)
    assert any(word in str(problem) for problem in problems), problems


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"])
def test_what_needs_a_base_says_so(method: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", {"w": np.zeros(3, np.float32)})
    models = [{"model": tmp_path / "one"}]
    with pytest.raises(Refused, match="needs a base_model"):
        merged(tmp_path, merge_method=method, models=models)


def test_a_component_can_have_its_own_rescaling_under_a_global_threshold(tmp_path: Path) -> None:
    """Parameters hold tensor by tensor, also where all tensors are measured together."""
    values = np.array([1, -3, 2, -4], np.float32)
    for name, factor in (("base", 0), ("one", 1)):
        write_checkpoint(tmp_path / name, {"a.w": factor * values, "b.w": factor * values})
    found = arrays(
        merged(
            tmp_path,
            merge_method="ties",
            base_model=tmp_path / "base",
            models=[{"model": tmp_path / "one"}],
            parameters={"weight": 1.0, "density": 0.5, "scope": "global"},
            components={"b.*": {"rescale": True}},
        )
    )
    assert found["a.w"].tolist() == [0, -3, 0, -4]
    np.testing.assert_allclose(found["b.w"], values * [0, 1, 0, 1] * 10 / 7, rtol=1e-6)
