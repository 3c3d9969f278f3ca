"""Merges that must agree because they are the same mathematics: byte for byte where the arithmetic allows it.

The identities of the papers behind the methods (interpolation, task arithmetic, TIES, DARE), for all dtypes and shapes;
that blocks, threads and resuming change nothing is tested beside the engine.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import BF16, arrays, tensors
from models import merged

Array = np.ndarray[Any, Any]
State = dict[str, Array]
KINDS = {"bf16": BF16, "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
EPSILON = {"bf16": 2**-8, "f16": 2**-11, "f32": 2**-24, "f64": 2**-53}

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
ratios = st.floats(0, 1).map(lambda r: round(r, 3))
weights = st.floats(-2, 2).map(lambda w: round(w, 3))
densities = st.floats(0.01, 1).map(lambda d: round(d, 2))
checked = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Family:
    """Checkpoints 0 (the base), 1, 2 ... in one folder, and what is in them: every dtype, some shapes."""

    folder: Path
    states: list[State]

    def merge(self, method: str, count: int = 1, base: int | None = 0, **keys: Any) -> dict[str, tuple[str, bytes]]:
        """Dtype and bytes of every tensor; per_model: parameters of the models 1 ... count, in their order."""
        return tensors(self.write(method, count, base, **keys))

    def write(
        self,
        method: str,
        count: int = 1,
        base: int | None = 0,
        per_model: list[dict[str, Any]] | None = None,
        order: list[int] | None = None,
        **keys: Any,
    ) -> Path:
        order = order or list(range(1, count + 1))
        models: list[dict[str, Any]] = [{"model": self.folder / str(number)} for number in order]
        for model, parameters in zip(models, per_model or [], strict=False):
            model["parameters"] = parameters
        target = Path(tempfile.mkdtemp(dir=self.folder))
        base_model = None if base is None else self.folder / str(base)
        return merged(target, merge_method=method, base_model=base_model, models=models, **keys)

    def bytes_of(self, number: int) -> dict[str, tuple[str, bytes]]:
        return tensors(self.folder / str(number))


@contextmanager
def family(shape: tuple[int, ...], seed: int, count: int = 1, step: float | None = None) -> Iterator[Family]:
    """Models as far from the base as the base is from zero; with `step`, many equal values, zeros and -0.0."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = []
        for number in range(count + 1):
            state = {}
            for kind, dtype in KINDS.items():
                for part, size in (("a", shape), ("b", (3, 7)), ("c", (1,)), ("d", ())):
                    values = random.normal(size=size)
                    if step:
                        values = np.round(values / step) * step
                    state[f"{kind}.{part}"] = np.asarray(values, dtype)
            state["step"] = np.arange(3)
            states.append(state)
            write_checkpoint(folder / str(number), state)
        yield Family(folder, states)


# --- interpolation -------------------------------------------------------------------------------------------------


@checked
@given(shapes, ratios, st.integers(0, 99), st.sampled_from([None, 0.25]))
def test_interpolation_is_task_arithmetic_with_one_model(
    shape: tuple[int, ...], ratio: float, seed: int, step: float | None
) -> None:
    with family(shape, seed, step=step) as made:
        interpolated = made.merge("linear", parameters={"ratio": ratio})
        assert interpolated == made.merge("task_arithmetic", per_model=[{"weight": ratio}])
        assert interpolated == made.merge("task_arithmetic", per_model=[{"weight": 1.0}], parameters={"lambda": ratio})


@checked
@given(shapes, ratios, st.integers(0, 99))
def test_interpolation_is_the_formula_of_wise_ft(shape: tuple[int, ...], ratio: float, seed: int) -> None:
    """(1 - ratio) theta_0 + ratio theta_1, to within a rounding of the result and of the terms."""
    with family(shape, seed) as made:
        found = arrays(made.write("linear", parameters={"ratio": ratio}))
        for name, values in found.items():
            if name == "step":
                continue
            a, b = (state[name].astype(np.float64).ravel() for state in made.states)
            expected = (1 - ratio) * a + ratio * b
            epsilon = EPSILON[name.split(".")[0]]
            inner = max(2**-53, min(epsilon, 2**-24)) * 4 * (np.abs(a) + np.abs(b))
            assert (np.abs(values.astype(np.float64) - expected) <= epsilon * np.abs(expected) + inner + 1e-8).all()


@checked
@given(shapes, st.integers(0, 99), st.sampled_from([None, 0.25]))
def test_the_ends_of_the_way_are_the_models_themselves(shape: tuple[int, ...], seed: int, step: float | None) -> None:
    with family(shape, seed, step=step) as made:
        for method, key in (("linear", "ratio"), ("slerp", "t")):
            assert made.merge(method, parameters={key: 0}) == made.bytes_of(0)
            assert made.merge(method, parameters={key: 1}) == made.bytes_of(1)
        assert made.merge("passthrough") == made.bytes_of(1)


@checked
@given(shapes, st.integers(0, 16).filter(lambda sixteenths: sixteenths != 8), st.integers(0, 99))
def test_the_arc_is_the_same_from_its_other_end(shape: tuple[int, ...], sixteenths: int, seed: int) -> None:
    t = sixteenths / 16
    with family(shape, seed) as made:
        there = made.merge("slerp", parameters={"t": t})
        assert there == made.merge("slerp", base=1, order=[0], parameters={"t": 1 - t})


@checked
@given(shapes, st.integers(0, 16), st.integers(0, 99))
def test_interpolation_is_the_average_of_two_listed_models(shape: tuple[int, ...], sixteenths: int, seed: int) -> None:
    ratio = sixteenths / 16
    with family(shape, seed) as made:
        average = made.merge("linear", base=None, order=[0, 1], per_model=[{"weight": 1 - ratio}, {"weight": ratio}])
        assert average == made.merge("linear", parameters={"ratio": ratio})


@checked
@given(shapes, st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=3), st.integers(0, 99))
def test_the_scale_of_normalised_weights_does_not_matter(
    shape: tuple[int, ...], listed: list[float], seed: int
) -> None:
    with family(shape, seed, count=len(listed)) as made:
        one, many = (
            made.merge("linear", len(listed), base=None, per_model=[{"weight": factor * w} for w in listed])
            for factor in (1, 8)
        )
        assert one == many


# --- the same model several times, and models that did not move ------------------------------------------------------

STILL = {
    "linear": ([{"weight": 0.3}, {"weight": 0.9}], {}),
    "task_arithmetic": ([{"weight": 0.3}, {"weight": -1.7}], {"lambda": 0.7}),
    "ties": ([{"weight": 0.3, "density": 0.5}, {"weight": 0.9, "density": 0.2}], {}),
    "dare_linear": ([{"weight": 0.3, "density": 0.5}, {"weight": 0.9, "density": 0.2}], {"rescale": "exact"}),
    "dare_ties": ([{"weight": 0.3, "density": 0.5}, {"weight": 0.9, "density": 0.2}], {"rescale": "l1"}),
    "slerp": ([{}], {"t": 0.3}),
}


@pytest.mark.parametrize("method", STILL)
@pytest.mark.parametrize("step", [None, 0.25])
def test_models_that_did_not_move_give_the_base(method: str, step: float | None) -> None:
    per_model, shared = STILL[method]
    with family((4, 5), seed=1, step=step) as made:
        for number in (1, 2):
            write_checkpoint(made.folder / str(number), made.states[0])
        base = None if method == "linear" else 0
        assert made.merge(method, len(per_model), base, per_model=per_model, parameters=shared) == made.bytes_of(0)


# --- TIES and DARE --------------------------------------------------------------------------------------------------


def trimmed(state: State, base: State, density: float) -> State:
    """The model with all but its int(density n) largest deltas (the first of equals) put back to the base."""
    result = {}
    for name, values in state.items():
        wide = np.float64 if values.dtype == np.float64 else np.float32
        delta = np.abs(values.astype(wide) - base[name].astype(wide)).astype(np.float32).ravel()
        keep = np.zeros(delta.size, bool)
        k = delta.size if density >= 1 else max(1, int(density * delta.size))
        keep[np.argsort(-delta, kind="stable")[:k]] = True
        result[name] = np.where(keep.reshape(values.shape), values, base[name])
    return result


@checked
@given(
    shapes,
    densities,
    weights.filter(lambda weight: weight not in (0, 1)),  # at 1 it is the model itself, to the signs of its zeros
    st.sampled_from(["sum", "count"]),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([None, 0.25]),
)
def test_ties_of_one_model_is_trimmed_task_arithmetic(
    shape: tuple[int, ...], density: float, scale: float, vote: str, normalize: bool, seed: int, step: float | None
) -> None:
    """With one model the election changes nothing, and normalising takes any positive weight away."""
    with family(shape, seed, step=step) as made:
        ties = made.merge(
            "ties",
            per_model=[{"weight": 0.5 if normalize else scale, "density": density}],
            parameters={"vote": vote, "normalize": normalize, "lambda": scale if normalize else 1.0},
        )
        write_checkpoint(made.folder / "1", trimmed(made.states[1], made.states[0], density))
        assert ties == made.merge("task_arithmetic", per_model=[{"weight": scale}])


@checked
@given(shapes, weights, st.integers(0, 99))
def test_ties_at_full_density_of_one_model_is_task_arithmetic(shape: tuple[int, ...], scale: float, seed: int) -> None:
    with family(shape, seed) as made:
        plain = made.merge("task_arithmetic", per_model=[{"weight": 1.0}], parameters={"lambda": scale})
        for scope, equals in itertools.product(("tensor", "global"), ("index", "all")):
            shared = {"lambda": scale, "scope": scope, "ties": equals}
            assert plain == made.merge("ties", per_model=[{"weight": 1.0, "density": 1.0}], parameters=shared)


@checked
@given(shapes, st.lists(weights, min_size=1, max_size=3), st.booleans(), st.integers(0, 99))
def test_dare_that_drops_nothing_is_what_it_drops_from(
    shape: tuple[int, ...], listed: list[float], normalize: bool, seed: int
) -> None:
    with family(shape, seed, count=len(listed)) as made:
        plain = [{"weight": w} for w in listed]
        full = [{"weight": w, "density": 1.0} for w in listed]
        shared = {"normalize": normalize, "lambda": 0.75}
        for rescale in ("exact", "l1", False):
            dropping = {**shared, "rescale": rescale, "seed": seed}
            assert made.merge("dare_linear", len(listed), per_model=full, parameters=dropping) == made.merge(
                "task_arithmetic", len(listed), per_model=plain, parameters=shared
            )
            assert made.merge("dare_ties", len(listed), per_model=full, parameters=dropping) == made.merge(
                "ties", len(listed), per_model=full, parameters=shared
            )


# --- order ------------------------------------------------------------------------------------------------------------


@checked
@given(shapes, st.integers(0, 99), st.sampled_from([None, 0.25]))
def test_the_order_of_two_models_does_not_matter(shape: tuple[int, ...], seed: int, step: float | None) -> None:
    """A sum of two is the same either way; but which entries DARE drops depends on a model's place."""
    with family(shape, seed, count=2, step=step) as made:
        parameters = [{"weight": 0.7, "density": 0.4}, {"weight": 0.5, "density": 0.8}]
        for method in ("task_arithmetic", "ties"):
            given_ = [{k: p[k] for k in p if k == "weight" or method == "ties"} for p in parameters]
            forth = made.merge(method, order=[1, 2], per_model=given_)
            assert forth == made.merge(method, order=[2, 1], per_model=given_[::-1])
        given_ = [{"weight": p["weight"]} for p in parameters]
        shared = {"normalize": False}
        forth = made.merge("linear", base=None, order=[1, 2], per_model=given_, parameters=shared)
        assert forth == made.merge("linear", base=None, order=[2, 1], per_model=given_[::-1], parameters=shared)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_the_order_of_three_models_matters_only_to_rounding(method: str) -> None:
    with family((6, 11), seed=3, count=3) as made:
        parameters = [{"weight": w} for w in (0.2, 0.3, 0.4)]
        outs = []
        for order in itertools.permutations((1, 2, 3)):
            chosen = [parameters[number - 1] for number in order]
            base = None if method == "linear" else 0
            outs.append(arrays(made.write(method, base=base, order=list(order), per_model=chosen)))
        for out in outs[1:]:
            for name, values in out.items():
                if name != "step":
                    tolerance = 4 * EPSILON[name.split(".")[0]]
                    first = outs[0][name].astype(np.float64)
                    np.testing.assert_allclose(values.astype(np.float64), first, rtol=tolerance, atol=2 * tolerance)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@checked
@given(shapes, ratios, st.integers(0, 99), st.sampled_from(["bfloat16", "float16"]))
def test_results_are_rounded_once_and_last(shape: tuple[int, ...], ratio: float, seed: int, narrow: str) -> None:
    """To float32 and then to 16 bits is the same as to 16 bits, because that is how it is computed.

    float64 inputs are left out: they are computed in float64, and float32 would be a rounding more.
    """
    with family(shape, seed) as made:
        for number, state in enumerate(made.states):
            kept = {name: values for name, values in state.items() if not name.startswith("f64")}
            write_checkpoint(made.folder / str(number), kept)
        keys: dict[str, Any] = {"parameters": {"ratio": ratio}}
        direct = made.merge("linear", **keys, out_dtype=narrow)
        wide = made.write("linear", **keys, out_dtype="float32")
        again = merged(wide.parent / "again", merge_method="passthrough", models=[{"model": wide}], out_dtype=narrow)
        assert tensors(again) == direct


@checked
@given(shapes, st.integers(0, 99))
def test_a_wider_dtype_and_back_gives_the_same_bytes(shape: tuple[int, ...], seed: int) -> None:
    with family(shape, seed) as made:
        for kind, narrow in (("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32")):
            state = {name: values for name, values in made.states[1].items() if name.startswith(kind)}
            write_checkpoint(made.folder / "1", state)
            for wider in ("float32", "float64"):
                wide = made.write("passthrough", base=None, out_dtype=wider)
                again = merged(
                    wide.parent / "again", merge_method="passthrough", models=[{"model": wide}], out_dtype=narrow
                )
                assert tensors(again) == made.bytes_of(1)


@checked
@given(shapes, ratios, st.integers(0, 99))
def test_the_dtype_of_the_inputs_does_not_matter_once_they_are_read(
    shape: tuple[int, ...], ratio: float, seed: int
) -> None:
    """bfloat16 models, and the same values held in float32: one result."""
    with family(shape, seed) as made:
        for number, state in enumerate(made.states):
            write_checkpoint(made.folder / str(number), {n: v for n, v in state.items() if n.startswith("bf16")})
        keys: dict[str, Any] = {"parameters": {"ratio": ratio}, "out_dtype": "bfloat16"}
        narrow = made.merge("linear", **keys)
        for number, state in enumerate(made.states):
            wide = {n: v.astype(np.float32) for n, v in state.items() if n.startswith("bf16")}
            write_checkpoint(made.folder / str(number), wide)
            assert made.merge("linear", **keys) == narrow
