"""The same bytes, however a merge is carried out; identities of the methods; weights that must not be merged."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import (
    BF16,
    DTYPES,
    INTERPOLATE,
    LITTLE_MEMORY,
    TASK,
    TIES,
    arrays,
    carry_out,
    merged,
    models,
    plan_of,
    scratch,
    tensors,
)

from ggez_merge.backend import choose
from ggez_merge.errors import Interrupted, Problem, Refused
from ggez_merge.methods.method import Job, Kernels, Measurement
from ggez_merge.progress import Silent
from ggez_merge.run import HASH_BUFFER_BYTES, Stop, sizing
from ggez_merge.write import REPORT

CPU = choose("cpu", method="", measures=False, doubles=False)
FLOATS = {tag: DTYPES[tag] for tag in ("BF16", "F16", "F32", "F64")}
SHAPES = {"a": (70_001,), "scalar": (), "b": (3, 5), "none": (0,), "one": (1,), "wide": (2, 3, 40_000), "z": (131,)}
DARE = TASK.replace("task_arithmetic", "dare_linear").replace("weight:", "density: 0.6, weight:")
SLERP = "{merge_method: slerp, base_model: base, models: [{model: one}], parameters: {t: 0.3}}"
SOUP = """
merge_method: linear
models:
- {model: base, parameters: {weight: 0.5}}
- {model: one, parameters: {weight: 0.3}}
- {model: two, parameters: {weight: 0.1}}
"""
RECIPES = {
    "interpolate": INTERPOLATE,
    "soup": SOUP,
    "task arithmetic": TASK,
    "ties": TIES,
    "ties over all": TIES + "parameters: {scope: global, rescale: true}",
    "ties of the paper": TIES + "parameters: {scope: global, ties: all, vote: count}",
    "dare": DARE,
    "dare exact": DARE + "parameters: {rescale: exact, seed: 7}",
    "dare ties": DARE.replace("dare_linear", "dare_ties"),
    "slerp": SLERP,
    "passthrough": "{merge_method: passthrough, models: [{model: one, parameters: {scale: 0.7}}]}",
}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models with tensors larger and smaller than a block and than a chunk, in all float dtypes."""
    folder = tmp_path_factory.mktemp("trio")
    for model, made in trio_arrays().items():
        write_checkpoint(folder / model, made)
    return folder


def trio_arrays() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    random = np.random.default_rng(0)
    values = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    made: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for number, model in enumerate(("base", "one", "two")):
        made[model] = {}
        for position, (name, value) in enumerate(values.items()):
            step = random.integers(-8, 9, size=value.shape) / 64 * (number > 0)
            if name == "wide":  # far from parallel, so that slerp is no straight line
                step = step * 20
            tag = ("BF16", "BF16", "F16", "F32", "BF16", "BF16", "F64")[(position + number * (name in "bz")) % 7]
            made[model][name] = np.asarray(value + step, DTYPES[tag])
    return made


def bytes_of(folder: Path, recipe: str, overrides: Sequence[str] = (), **options: Any) -> dict[str, tuple[str, bytes]]:
    """What the recipe in `folder` gives, written somewhere else for the moment."""
    with scratch() as temporary:
        carry_out(plan_of(folder, recipe, temporary / "out", overrides), **options)
        return tensors(temporary / "out")


def set_all(**parameters: object) -> list[str]:
    return [f"parameters.{name}={json.dumps(value)}" for name, value in parameters.items()]


class TestTheSameBytes:
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    def test_for_any_threads_memory_and_shard_size(self, recipe: str, trio: Path) -> None:
        whole = bytes_of(trio, recipe, threads=1)
        assert bytes_of(trio, recipe, threads=1, memory_bytes=LITTLE_MEMORY) == whole

        @settings(max_examples=4, deadline=None)
        @given(st.integers(1, 6), st.integers(LITTLE_MEMORY, 20 << 20), st.sampled_from(["1KB", "200KB", "5GB"]))
        def holds(threads: int, memory_bytes: int, shard_size: str) -> None:
            cut = [f"output.shard_size={shard_size}"]
            assert bytes_of(trio, recipe, cut, threads=threads, memory_bytes=memory_bytes) == whole

        holds()

    @pytest.mark.parametrize("recipe", ["interpolate", "ties", "dare ties", "slerp"])
    @settings(max_examples=6, deadline=None)
    @given(st.permutations(list(SHAPES)), st.integers(1, 5), st.integers(1, 5))
    def test_for_any_order_and_sharding_of_the_inputs(
        self, trio: Path, recipe: str, order: list[str], base_shards: int, shards: int
    ) -> None:
        whole = bytes_of(trio, RECIPES[recipe])
        with scratch() as temporary:
            for model, made in trio_arrays().items():
                shuffled = {name: made[name] for name in order} if model != "base" else made
                number = base_shards if model == "base" else shards
                write_checkpoint(temporary / model, shuffled, shards=number)
            assert bytes_of(temporary, RECIPES[recipe]) == whole

    def test_for_a_base_in_any_order_where_tensors_are_measured_alone(self, trio: Path, tmp_path: Path) -> None:
        for model, made in trio_arrays().items():
            write_checkpoint(tmp_path / model, dict(reversed(made.items())))
        assert merged(tmp_path, TIES) == bytes_of(trio, TIES)

    @pytest.mark.parametrize("recipe", ["interpolate", "ties", "dare", "slerp"])
    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.data())
    def test_for_any_number_of_interruptions(
        self, trio: Path, recipe: str, moments: list[float], data: st.DataObject
    ) -> None:
        whole = bytes_of(trio, RECIPES[recipe], threads=1)
        reference = report_of(trio, RECIPES[recipe])
        with scratch() as temporary:
            plan = plan_of(trio, RECIPES[recipe], temporary / "out")
            for moment in [*moments, 2.0]:
                stop = Stop()
                way = {
                    "threads": data.draw(st.integers(1, 3)),
                    "memory_bytes": data.draw(st.sampled_from([LITTLE_MEMORY, 12 << 20, 64 << 20])),
                }
                try:
                    carry_out(plan, StopAt(moment, stop), stop, resume=True, **way)
                except Interrupted as interrupted:
                    assert interrupted.exit_code == 130
                    assert not plan.folder.exists()
            assert tensors(plan.folder) == whole
            report = json.loads((plan.folder / REPORT).read_text())
            for name, said in reference["tensors"].items():
                if "delta_norms" in said:
                    assert report["tensors"][name]["delta_norms"] == pytest.approx(said["delta_norms"], rel=1e-4)


class StopAt(Silent):
    """Asks a merge to stop as Ctrl-C would, when it has done a share of measuring and merging (0 to 1 in all)."""

    def __init__(self, moment: float, stop: Stop) -> None:
        self.moment, self.stop, self.base = 2 * moment, stop, -1

    def phase(self, name: str, total_bytes: int) -> None:
        self.base, self.total, self.done = self.base + 1, max(total_bytes, 1), 0
        self.look()

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        self.look()

    def look(self) -> None:
        if self.base + self.done / self.total >= self.moment:
            self.stop.ask(signal.SIGINT)


def report_of(folder: Path, recipe: str) -> Any:
    with scratch() as temporary:
        carry_out(plan_of(folder, recipe, temporary / "out"))
        return json.loads((temporary / "out" / REPORT).read_text())


class TestIdentities:
    @pytest.mark.parametrize("dtype", FLOATS)
    @settings(max_examples=6, deadline=None)
    @given(seed=st.integers(0, 99), ratio=st.floats(-1, 2, width=32))
    def test_ratio_0_and_1_are_the_endpoints_and_ratio_is_a_task_weight(
        self, dtype: str, seed: int, ratio: float
    ) -> None:
        with scratch() as folder:
            models(folder, ["base", "one"], {"x": (5, 7), "y": (70_000,), "s": ()}, FLOATS[dtype], seed)
            base, one = tensors(folder / "base"), tensors(folder / "one")
            assert base != one
            for recipe, name in ((INTERPOLATE, "ratio"), (SLERP, "t")):
                assert bytes_of(folder, recipe, set_all(**{name: 0})) == base
                assert bytes_of(folder, recipe, set_all(**{name: 1})) == one
            alone = f"base_model: base\nmodels: [model: one]\nparameters: {{weight: {ratio!r}}}"
            task = f"merge_method: task_arithmetic\n{alone}"
            assert bytes_of(folder, INTERPOLATE, set_all(ratio=ratio)) == bytes_of(folder, task)

    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 99), weight=st.floats(0.01, 1.5), dtype=st.sampled_from(list(FLOATS)))
    def test_sparse_methods_of_density_1_are_their_dense_ones(self, seed: int, weight: float, dtype: str) -> None:
        with scratch() as folder:
            models(folder, ["base", "one", "two"], {"x": (5, 7), "y": (70_000,)}, FLOATS[dtype], seed)
            alone = f"base_model: base\nmodels: [{{model: one}}]\nparameters: {{weight: {weight!r}"
            task = bytes_of(folder, f"merge_method: task_arithmetic\n{alone}}}")
            assert bytes_of(folder, f"merge_method: ties\n{alone}, normalize: false, density: 1}}") == task
            assert bytes_of(folder, f"merge_method: dare_linear\n{alone}, density: 1}}") == task
            both = f"base_model: base\nmodels: [model: one, model: two]\nparameters: {{weight: {weight!r}"
            dense = bytes_of(folder, f"merge_method: task_arithmetic\n{both}}}")
            assert bytes_of(folder, f"merge_method: dare_linear\n{both}, density: 1}}") == dense
            ties = bytes_of(folder, f"merge_method: ties\n{both}, normalize: true}}")
            assert bytes_of(folder, f"merge_method: dare_ties\n{both}, normalize: true, density: 1}}") == ties
            assert ties != dense

    @settings(max_examples=6, deadline=None)
    @given(seed=st.integers(0, 99), dtype=st.sampled_from(list(FLOATS)))
    def test_merging_copies_of_one_model_changes_nothing(self, seed: int, dtype: str) -> None:
        with scratch() as folder:
            models(folder, ["base"], {"x": (5, 7), "y": (70_000,)}, FLOATS[dtype], seed)
            for copy in ("one", "two"):
                (folder / copy).mkdir()
                (folder / copy / "model.safetensors").write_bytes((folder / "base/model.safetensors").read_bytes())
            for name, recipe in RECIPES.items():
                if name != "passthrough":
                    assert bytes_of(folder, recipe) == tensors(folder / "base"), name

    def test_a_global_threshold_keeps_the_largest_of_the_whole_model(self, tmp_path: Path) -> None:
        base = {"small": np.zeros(100, np.float32), "large": np.zeros(100, np.float32)}
        moved = {"small": np.arange(1, 101, dtype=np.float32), "large": np.arange(101, 201, dtype=np.float32)}
        write_checkpoint(tmp_path / "base", base)
        write_checkpoint(tmp_path / "one", moved)
        recipe = "{merge_method: ties, base_model: base, models: [model: one], parameters: {weight: 1, density: 0.25}}"
        kept = {name: np.count_nonzero(x) for name, x in arrays_of(tmp_path, recipe).items()}
        assert kept == {"small": 25, "large": 25}
        kept = {
            name: np.count_nonzero(x) for name, x in arrays_of(tmp_path, recipe, ["parameters.scope=global"]).items()
        }
        assert kept == {"small": 0, "large": 50}

    @pytest.mark.parametrize("memory_bytes", [LITTLE_MEMORY, 64 << 20])
    def test_equal_magnitudes_are_kept_from_the_front_or_all(self, tmp_path: Path, memory_bytes: int) -> None:
        n = 300_000  # several chunks
        write_checkpoint(tmp_path / "base", {"first": np.zeros(n, np.float32), "second": np.zeros(n, np.float32)})
        write_checkpoint(tmp_path / "one", {"first": np.ones(n, np.float32), "second": -np.ones(n, np.float32)})
        recipe = "{merge_method: ties, base_model: base, models: [model: one], parameters: {weight: 1, density: 0.7}}"
        exact = arrays_of(tmp_path, recipe, memory_bytes=memory_bytes)
        for array in exact.values():
            assert np.flatnonzero(array).tolist() == list(range(210_000))
        everywhere = arrays_of(tmp_path, recipe, ["parameters.scope=global"], memory_bytes=memory_bytes)
        assert np.count_nonzero(everywhere["first"]) == n
        assert np.flatnonzero(everywhere["second"]).tolist() == list(range(120_000))
        everything = arrays_of(tmp_path, recipe, ["parameters.ties=all"], memory_bytes=memory_bytes)
        assert all(np.count_nonzero(array) == n for array in everything.values())

    def test_ties_of_the_paper_against_its_formula(self, tmp_path: Path) -> None:
        """Yadav et al. 2023, section 4, on the whole model as one vector, in float64."""
        random = np.random.default_rng(1)
        shapes = {"u": (30, 40), "v": (999,), "w": (5,)}
        dense = {m: {k: random.normal(size=s).astype("f4") for k, s in shapes.items()} for m in ("base", "one", "two")}
        for model, made in dense.items():
            write_checkpoint(tmp_path / model, made)
        flat = {m: np.concatenate([x.ravel() for x in made.values()]).astype("f8") for m, made in dense.items()}
        trimmed = []
        for model in ("one", "two"):
            delta = flat[model] - flat["base"]
            kth = np.sort(np.abs(delta))[-int(0.2 * delta.size)]
            trimmed.append(np.where(np.abs(delta) >= kth, delta, 0))
        sign = np.sign(trimmed[0] + trimmed[1])
        agree = [np.where(np.sign(delta) == sign, delta, 0) for delta in trimmed]
        voters = sum(np.sign(np.abs(delta)) for delta in agree)
        expected = flat["base"] + 0.7 * (agree[0] + agree[1]) / np.maximum(voters, 1)
        recipe = """
        merge_method: ties
        base_model: base
        models: [model: one, model: two]
        parameters: {weight: 1, density: 0.2, scope: global, ties: all, lambda: 0.7}
        """
        found = np.concatenate(list(arrays_of(tmp_path, recipe).values()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    def test_dropped_entries_depend_on_the_seed_alone(self, trio: Path) -> None:
        first = bytes_of(trio, DARE, set_all(seed=1))
        assert bytes_of(trio, DARE, set_all(seed=1)) == first
        assert bytes_of(trio, DARE, set_all(seed=1.0)) == first
        assert bytes_of(trio, DARE, set_all(seed=2)) != first

    def test_every_model_and_every_tensor_drops_entries_of_its_own(self, tmp_path: Path) -> None:
        n = 20_000
        for model, value in (("base", 0), ("one", 1), ("two", 2)):
            write_checkpoint(tmp_path / model, {name: np.full(n, value, np.float32) for name in ("x", "y")})
        recipe = """
        merge_method: dare_linear
        base_model: base
        models: [model: one, model: two]
        parameters: {weight: 1, density: 0.25, rescale: false}
        """
        found = arrays_of(tmp_path, recipe)
        assert not np.array_equal(found["x"], found["y"])
        for array in found.values():
            shares = [np.count_nonzero(array == value) / n for value in range(4)]
            np.testing.assert_allclose(shares, [9 / 16, 3 / 16, 3 / 16, 1 / 16], atol=0.02)

    def test_slerp_of_orthogonal_tensors_is_on_the_arc(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "base", {"x": np.array([1, 0, 0], np.float64)})
        write_checkpoint(tmp_path / "one", {"x": np.array([0, 1, 0], np.float64)})
        angle = 0.3 * math.pi / 2
        np.testing.assert_allclose(
            arrays_of(tmp_path, SLERP)["x"], [math.cos(angle), math.sin(angle), 0], rtol=0, atol=1e-15
        )


def arrays_of(
    folder: Path, recipe: str, overrides: Sequence[str] = (), **options: Any
) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.frombuffer(raw, DTYPES[dtype])
        for name, (dtype, raw) in bytes_of(folder, recipe, overrides, **options).items()
    }


class TestDtypes:
    @pytest.mark.parametrize("out", FLOATS)
    @pytest.mark.parametrize("key", ["dtype", "out_dtype"])
    def test_the_output_has_the_dtype_that_is_asked_for(self, trio: Path, out: str, key: str) -> None:
        name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[out]
        found = bytes_of(trio, INTERPOLATE, [f"{key}={name}", "parameters.ratio=1"])
        for tensor, array in trio_arrays()["one"].items():
            # by way of float64, since ml_dtypes rounds float64 -> bfloat16 twice
            assert found[tensor][0] == out
            near = np.frombuffer(found[tensor][1], FLOATS[out]).astype("f8")
            step = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-24, "F64": 0}[out]
            np.testing.assert_allclose(near, array.astype("f8").ravel(), rtol=step, atol=6e-8)

    def test_inputs_of_different_dtypes_give_one_that_holds_them(self, tmp_path: Path) -> None:
        pairs = {
            "same": ("BF16", "BF16"),
            "halves": ("BF16", "F16"),
            "single": ("F32", "F16"),
            "double": ("F16", "F64"),
        }
        for model, position in (("base", 0), ("one", 1)):
            made = {name: np.full((9,), 1 + position, DTYPES[tags[position]]) for name, tags in pairs.items()}
            write_checkpoint(tmp_path / model, made)
        found = merged(tmp_path, INTERPOLATE.replace("0.3", "0.25"))
        assert {n: dtype for n, (dtype, _) in found.items()} == {
            "same": "BF16",
            "halves": "F32",
            "single": "F32",
            "double": "F64",
        }
        assert all((x == 1.25).all() for x in arrays(tmp_path / "out").values())

    def test_float64_keeps_what_float32_cannot_hold(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "base", {"x": np.array([1 + 2.0**-50, 0.0])})
        write_checkpoint(tmp_path / "one", {"x": np.array([1 + 2.0**-49, 1e300])})
        found = arrays_of(tmp_path, INTERPOLATE, set_all(ratio=0.5))["x"]
        assert found.tolist() == [1 + 1.5 * 2.0**-50, 5e299]


def spoil(folder: Path, model: str, tensor: str, index: int, value: float) -> None:
    path = folder / model / "model.safetensors"
    made = {name: np.array(x) for name, x in arrays(folder / model).items()}
    shapes = {name: x.shape for name, x in made.items()}
    made[tensor][index] = value
    write_checkpoint(path.parent, {name: x.reshape(shapes[name]) for name, x in made.items()})


def bad_weights(folder: Path, recipe: str, **options: Any) -> list[Problem]:
    """Why the merge is refused; nothing of it may be left."""
    with pytest.raises(Refused) as caught:
        merged(folder, recipe, **options)
    assert caught.value.exit_code == 2
    assert [path.name for path in folder.iterdir() if path.name.startswith("out")] == []
    return caught.value.problems


class TestWeightsThatMustNotBeMerged:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    def test_every_tensor_with_nan_or_inf_is_named_with_its_file(self, recipe: str, dtype: str, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one", "two"], {"x": (9000,), "y": (5000,), "z": (7,)}, FLOATS[dtype])
        spoil(tmp_path, "one", "x", 8999, math.nan)
        spoil(tmp_path, "one", "z", 0, -math.inf)
        problems = bad_weights(tmp_path, recipe)
        found = {(p.place, p.tensor, p.found) for p in problems}
        place = str(tmp_path / "one/model.safetensors")
        assert found == {(place, "x", "1 of 9,000 elements"), (place, "z", "1 of 7 elements")}
        assert all("nonfinite: allow" in str(p.remedy) for p in problems)

    @pytest.mark.parametrize("model", ["base", "one", "two"])
    def test_in_whichever_model_it_is(self, model: str, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one", "two"], {"x": (9000,)})
        spoil(tmp_path, model, "x", 4242, math.nan)
        (problem,) = bad_weights(tmp_path, TIES)
        assert problem.place == str(tmp_path / model / "model.safetensors")

    def test_even_where_the_weight_is_zero_or_the_tensor_only_copied(self, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one"], {"x": (9000,)})
        write_checkpoint(tmp_path / "one", {"x": arrays(tmp_path / "one")["x"], "own": np.array([math.nan], "f4")})
        spoil(tmp_path, "one", "x", 1, math.inf)
        problems = bad_weights(tmp_path, "missing: copy\n" + json_of(INTERPOLATE, ratio=0))
        assert {problem.tensor for problem in problems} == {"x", "own"}

    @pytest.mark.parametrize("recipe", ["slerp", "dare", "ties over all"])
    @pytest.mark.parametrize("values", [(math.inf, -math.inf), (1.2e154, 1.2e154)])
    def test_measuring_survives_infinities_of_both_signs_and_sums_that_overflow(
        self, recipe: str, values: tuple[float, float], tmp_path: Path
    ) -> None:
        models(tmp_path, ["base", "one", "two"], {"x": (140_000,)}, FLOATS["F64"])
        for index, value in zip((0, 139_999), values, strict=True):  # in different chunks
            spoil(tmp_path, "base", "x", index, 1.0)
            spoil(tmp_path, "one", "x", index, value)
        if math.isinf(values[0]):
            (problem,) = bad_weights(tmp_path, RECIPES[recipe])
            assert problem.found == "2 of 140,000 elements"
        else:
            assert merged(tmp_path, RECIPES[recipe])

    def test_they_are_let_through_if_allowed(self, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one"], {"x": (9000,), "y": (10,)})
        clean = bytes_of(tmp_path, INTERPOLATE)
        spoil(tmp_path, "one", "x", 17, math.nan)
        merged(tmp_path, "nonfinite: allow\n" + json_of(INTERPOLATE))
        found = arrays(tmp_path / "out")
        assert np.flatnonzero(np.isnan(found["x"].astype("f4"))).tolist() == [17]
        assert found["y"].tobytes() == clean["y"][1]
        report = json.loads((tmp_path / "out" / REPORT).read_text(), parse_constant=pytest.fail)
        assert report["tensors"]["x"]["nonfinite"] == [0, 1]

    def test_a_result_too_large_for_its_dtype(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "base", {"x": np.full((9,), 6e4, "f4"), "fine": np.ones(3, "f4")})
        write_checkpoint(tmp_path / "one", {"x": np.full((9,), 9e4, "f4"), "fine": np.ones(3, "f4")})
        (problem,) = bad_weights(tmp_path, json_of(INTERPOLATE, out_dtype="float16", ratio=0.5))
        assert (problem.tensor, problem.found) == ("x", "9 elements overflow")
        assert "F16" in problem.what

    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fnuz"])
    def test_what_cannot_be_averaged_must_be_equal(self, dtype: str, tmp_path: Path) -> None:
        np_dtype = np.dtype(ml_dtypes.float8_e4m3fnuz) if dtype == "float8_e4m3fnuz" else np.dtype(dtype)
        for model in ("base", "one"):
            made = {"w": np.ones(3, "f4"), "ids": np.zeros(70_000, np_dtype), "other": np.ones(3, np_dtype)}
            write_checkpoint(tmp_path / model, made)
        equal = merged(tmp_path, INTERPOLATE, "equal")
        assert equal["ids"] == tensors(tmp_path / "base")["ids"]
        for name, last in (("ids", 69_999), ("other", 0)):
            made[name][last] = 0 if name == "other" else 1
        write_checkpoint(tmp_path / "one", made)
        problems = bad_weights(tmp_path, INTERPOLATE)
        assert {problem.tensor for problem in problems} == {"ids", "other"}
        for problem in problems:
            assert all(str(tmp_path / model) in str(problem.expected) for model in ("base", "one"))
        taken = json_of(INTERPOLATE, buffers="base")
        if dtype == "float8_e4m3fnuz":
            assert {problem.tensor for problem in bad_weights(tmp_path, taken)} == {"ids", "other"}
        else:
            found = merged(tmp_path, taken)
            assert {name: found[name] for name in ("ids", "other")} == {
                name: tensors(tmp_path / "base")[name] for name in ("ids", "other")
            }

    def test_all_kinds_at_once(self, tmp_path: Path) -> None:
        write_checkpoint(
            tmp_path / "base", {"nan": np.ones(3, "f4"), "ids": np.zeros(3, "i8"), "big": np.ones(3, "f4")}
        )
        write_checkpoint(
            tmp_path / "one",
            {"nan": np.array([1, np.nan, 1], "f4"), "ids": np.ones(3, "i8"), "big": np.full(3, 3e38, "f4")},
        )
        problems = bad_weights(tmp_path, json_of(INTERPOLATE, ratio=3))
        assert {problem.tensor for problem in problems} == {"nan", "ids", "big"}


def json_of(recipe: str, **changes: Any) -> str:
    """The recipe with other top-level keys or parameters."""
    import yaml

    said = yaml.safe_load(recipe)
    for key, value in changes.items():
        if key in ("ratio", "t"):
            said["parameters"][key] = value
        else:
            said[key] = value
    return yaml.safe_dump(said)


class TestStopping:
    def test_a_stop_while_measuring_leaves_the_other_tensors_unmeasured(self, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one", "two"], {f"t{i}": (500_000,) for i in range(24)})
        plan = plan_of(tmp_path, TIES)
        begun: list[str] = []

        def measure(kernels: Kernels, jobs: Sequence[Job]) -> Measurement | None:
            begun.append(jobs[0].name)
            assert plan.method.measure is not None
            return plan.method.measure(kernels, jobs)

        watched = replace(plan, method=replace(plan.method, measure=measure))
        stop = Stop()
        with pytest.raises(Interrupted, match="--resume"):
            carry_out(watched, StopAt(0.01, stop), stop, threads=1)
        assert 1 <= len(begun) <= 8


class TestSizing:
    def test_a_budget_too_small_is_refused_with_one_that_is_enough(self, trio: Path) -> None:
        plan = plan_of(trio, TIES)
        with pytest.raises(Refused) as caught:
            sizing(plan, 4, 1 << 20, CPU)
        expected = str(caught.value.problems[0].expected)
        enough = int(expected.split(" bytes")[0].removeprefix("at least ").replace(",", ""))
        assert sizing(plan, 4, enough, CPU).threads == 1
        with pytest.raises(Refused):
            sizing(plan, 4, enough - 8192, CPU)
        assert bytes_of(trio, TIES, memory_bytes=enough, threads=4) == bytes_of(trio, TIES)

    @settings(max_examples=50, deadline=None)
    @given(threads=st.integers(1, 64), memory_bytes=st.integers(LITTLE_MEMORY, 1 << 30))
    def test_arenas_and_hashing_stay_within_the_budget(self, trio: Path, threads: int, memory_bytes: int) -> None:
        size = sizing(plan_of(trio, TIES), threads, memory_bytes, CPU)
        assert size.threads * size.arena_bytes + HASH_BUFFER_BYTES <= memory_bytes
        assert 1 <= size.threads <= threads
        assert size.block_bytes % 4096 == 0


def test_no_file_descriptor_stays_open(trio: Path) -> None:
    bytes_of(trio, TIES)
    before = len(os.listdir("/proc/self/fd"))
    bytes_of(trio, TIES)
    assert len(os.listdir("/proc/self/fd")) == before


def test_bf16_is_the_dtype_of_the_helpers(tmp_path: Path) -> None:
    models(tmp_path, ["base"], {"x": (3,)}, BF16)
    assert tensors(tmp_path / "base")["x"][0] == "BF16"
