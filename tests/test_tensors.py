"""Merging in memory: the bytes of a merge of files, and what is refused."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import BF16, merged, models
from safetensors.torch import load_file
from state_dicts import StateDict, bytes_of, raw

import ggez_merge
from ggez_merge.errors import Refused
from ggez_merge.methods import METHODS

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": ggez_merge.linear,
    "task_arithmetic": ggez_merge.task_arithmetic,
    "ties": ggez_merge.ties,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (70, 1001),  # more than one chunk
    "model.layers.0.mlp.weight": (64, 65),
    "model.layers.0.empty": (0, 3),
    "logit_scale": (),
}
DTYPES = {"bf16": BF16, "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}


def load(folder: Path, name: str) -> StateDict:
    loaded: StateDict = load_file(folder / name / "model.safetensors")
    return loaded


def recipe_of(method: str, base: str | None, names: list[str], arguments: dict[str, Any], out_dtype: str = "") -> str:
    """The recipe that says what a call with these keyword arguments says."""
    own = {key: value for key, value in arguments.items() if isinstance(value, list)}
    shared = {key.rstrip("_"): value for key, value in arguments.items() if key not in own}
    listed = [
        {"model": name, "parameters": {key: value[k] for key, value in own.items()}} for k, name in enumerate(names)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": listed, "parameters": shared}
    recipe |= {"base_model": base} if base else {}
    recipe |= {"out_dtype": out_dtype} if out_dtype else {}
    return str(recipe).replace("True", "true").replace("False", "false")  # YAML reads Python's literals


CALLS: list[tuple[str, str | None, int, dict[str, Any]]] = [
    ("linear", "base", 1, {"ratio": 0.3}),
    ("linear", "base", 1, {"ratio": 0.75}),
    ("linear", "base", 1, {"ratio": 0}),
    ("linear", None, 2, {"weight": [0.3, 0.9]}),
    ("linear", "base", 2, {"weight": [0.3, 0.9]}),
    ("linear", None, 2, {"weight": [0.3, -0.9], "normalize": False}),
    ("task_arithmetic", "base", 1, {"weight": 0.4}),
    ("task_arithmetic", "base", 2, {"weight": [0.5, -0.4], "lambda_": 1.5}),
    ("task_arithmetic", "base", 2, {"weight": [0.5, 0.4], "normalize": True}),
    ("ties", "base", 2, {"weight": [0.5, 0.4], "density": [0.3, 0.5]}),
    ("ties", "base", 2, {"weight": 1, "density": 0.2, "lambda_": 0.7, "vote": "count", "ties": "all"}),
    ("ties", "base", 2, {"weight": [0.5, 0.4], "density": 0.3, "scope": "global", "rescale": True}),
    ("ties", "base", 2, {"weight": [0.5, 0.4], "density": 0.3, "scope": "global", "ties": "all", "normalize": False}),
    ("ties", "base", 2, {"weight": 0.5}),
]


@pytest.fixture(scope="module", params=DTYPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    models(path, ["base", "one", "two"], SHAPES, DTYPES[request.param])
    return path


@pytest.mark.parametrize(("method", "base", "count", "arguments"), CALLS)
def test_state_dicts_merge_to_the_bytes_of_their_files(
    folder: Path, method: str, base: str | None, count: int, arguments: dict[str, Any], tmp_path: Path
) -> None:
    names = ["one", "two"][:count]
    expected = merged(folder, recipe_of(method, base, names, arguments), out=str(tmp_path / "out"))
    found = FUNCTIONS[method](base and load(folder, base), [load(folder, name) for name in names], **arguments)
    assert bytes_of(found) == {name: data for name, (_, data) in expected.items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert list(found) == list(load(folder, "one"))


@pytest.mark.parametrize(("dtype", "tag"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_another_output_dtype_is_rounded_once(folder: Path, dtype: torch.dtype, tag: str, tmp_path: Path) -> None:
    expected = merged(folder, recipe_of("linear", "base", ["one"], {"ratio": 0.3}, tag), out=str(tmp_path / "out"))
    found = ggez_merge.linear(load(folder, "base"), load(folder, "one"), ratio=0.3, out_dtype=dtype)
    assert bytes_of(found) == {name: data for name, (_, data) in expected.items()}
    assert all(tensor.dtype == dtype for tensor in found.values())


@pytest.mark.parametrize("method", FUNCTIONS)
def test_a_single_tensor_is_merged_like_one_of_many(folder: Path, method: str) -> None:
    base, one = load(folder, "base"), load(folder, "one")
    arguments = {"ratio": 0.3} if method == "linear" else {"weight": 0.5}
    together = FUNCTIONS[method](base, [one], **arguments)
    for name in SHAPES:
        alone = FUNCTIONS[method](base[name], one[name], **arguments)
        assert alone.shape == base[name].shape and raw(alone) == raw(together[name])


def test_threads_do_not_change_a_byte(folder: Path) -> None:
    states = [load(folder, name) for name in ("base", "one", "two")]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(bytes_of(ggez_merge.ties(states[0], states[1:], weight=1, density=0.3, scope="global")))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("method", FUNCTIONS)
def test_parameters_and_defaults_are_those_of_the_recipes(method: str) -> None:
    parameters = inspect.signature(FUNCTIONS[method]).parameters
    common = {"base", "models", "axes", "out", "out_dtype", "nonfinite", "buffers"}
    found = {
        name.rstrip("_"): None if parameter.default is parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name not in common
    }
    known = METHODS[method].shared | METHODS[method].per_model
    assert found == {name: known[name].default for name in known if name != "int8_mask"}
    required = {name.rstrip("_") for name, p in parameters.items() if p.default is p.empty} - common
    assert required == {name for name in known if known[name].required}


def test_given_outputs_are_written_and_returned(folder: Path) -> None:
    base, one = load(folder, "base"), load(folder, "one")
    expected = bytes_of(ggez_merge.linear(base, one, ratio=0.3))
    room = {name: torch.full_like(tensor, torch.nan) for name, tensor in base.items()}
    assert ggez_merge.linear(base, one, ratio=0.3, out=room) is room
    assert bytes_of(room) == expected


# --- what is no float -----------------------------------------------------------------------------------------------


def test_integers_are_copied_if_they_agree() -> None:
    base = {"w": torch.zeros(3), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    tuned = {"w": torch.ones(3), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    found = ggez_merge.linear(base, tuned, ratio=0.25)
    assert found["w"].tolist() == [0.25] * 3
    assert found["steps"].item() == 7 and found["mask"].tolist() == [True, False]
    found["steps"] += 1
    assert base["steps"].item() == 7, "a copy, not the base's own"


def test_integers_that_differ_are_refused_or_the_bases() -> None:
    base, tuned = {"w": torch.zeros(3), "steps": torch.tensor(7)}, {"w": torch.ones(3), "steps": torch.tensor(8)}
    with pytest.raises(Refused, match="int64 values cannot be averaged") as refused:
        ggez_merge.linear(base, tuned, ratio=0.5)
    assert refused.value.problems[0].tensor == "steps"
    assert ggez_merge.linear(base, tuned, ratio=0.5, buffers="base")["steps"].item() == 7


def test_float8_has_to_agree_whatever_is_said_of_buffers() -> None:
    base, tuned = torch.zeros(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(Refused, match="float8_e4m3fn values cannot be averaged"):
        ggez_merge.linear(base, tuned, ratio=0.5, buffers="base")
    assert raw(ggez_merge.linear(base, base.clone(), ratio=0.5)) == raw(base)


# --- what is refused ------------------------------------------------------------------------------------------------

ONE = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ggez_merge.linear(None, ONE, ratio=0.5), "linear needs a base"),
        (lambda: ggez_merge.linear(ONE, ONE), "needs either `ratio`"),
        (lambda: ggez_merge.linear(ONE, [], ratio=0.5), "at least 1 model"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, weight=0.5), "contradict"),
        (lambda: ggez_merge.linear(ONE, [ONE, ONE], ratio=0.5), "interpolates base_model and one model, not 2"),
        (lambda: ggez_merge.linear(None, [ONE, ONE], weight=[1, -1]), "add up to zero"),
        (lambda: ggez_merge.linear(None, [ONE, ONE], weight=[1, 1, 1]), "one for each of 2 models"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=float("inf")), "must be a finite number"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=True), "must be a number"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, nonfinite="ignore"), "`nonfinite` must be one of error, allow"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, out_dtype=torch.int8), "no float"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, out_dtype=torch.float16, out=ONE.clone()), "its own dtype"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, out=ONE), "shares memory"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, out=torch.zeros(4, dtype=torch.int32)), "int32"),
        (lambda: ggez_merge.linear(ONE, ONE, ratio=0.5, out=torch.zeros(5)), r"\[4\] as in base"),
        (lambda: ggez_merge.linear(ONE, torch.zeros(2, 2), ratio=0.5), r"\[4\] as in base"),
        (lambda: ggez_merge.linear(ONE, torch.zeros(4, device="meta"), ratio=0.5), "on meta"),
        (lambda: ggez_merge.linear(torch.zeros(8)[::2], ONE, ratio=0.5), "not contiguous"),
        (lambda: ggez_merge.linear(ONE.to_sparse(), ONE, ratio=0.5), "dense tensors"),
        (lambda: ggez_merge.task_arithmetic(ONE, ONE, weight=None), "needs `weight`"),  # type: ignore[type-var]
        (lambda: ggez_merge.ties(ONE, ONE, weight=1, density=1.5), "a number from 0 to 1"),
        (lambda: ggez_merge.ties(ONE, ONE, weight=1, vote="most"), "one of sum, count"),
        (lambda: ggez_merge.linear({"a": ONE}, {"b": ONE}, ratio=0.5), r"models\[0\] lacks 1 tensor that base has"),
        (lambda: ggez_merge.linear({"a": ONE}, {"a": ONE}, ratio=0.5, out={}), "out lacks 1 tensor that base has"),
        (lambda: ggez_merge.linear({"a": ONE}, {"a": [1.0]}, ratio=0.5), "only plain torch tensors"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        call()


class Scaled(torch.Tensor):
    """What a quantisation library might keep weights in."""


def test_tensors_that_are_more_than_their_memory_are_refused() -> None:
    with pytest.raises(Refused, match=r"only plain torch tensors(.|\n)*found: *Scaled"):
        ggez_merge.linear(ONE, torch.ones(4).as_subclass(Scaled), ratio=0.5)
    assert ggez_merge.linear(ONE, torch.nn.Parameter(torch.ones(4)), ratio=0.5).tolist() == [0.5] * 4


def test_none_is_the_default() -> None:
    base, one = torch.zeros(9), torch.arange(9.0)
    expected = ggez_merge.ties(base, one, weight=1)
    assert torch.equal(ggez_merge.ties(base, one, weight=1, density=None, scope=None, normalize=None), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 2])
def test_an_output_that_reaches_into_an_input_is_refused(first: int) -> None:
    room = torch.zeros(6)
    with pytest.raises(Refused, match="shares memory"):
        ggez_merge.linear(room[2 - first :][:4], ONE, ratio=0.5, out=room[first:][:4])


def test_two_outputs_in_one_place_are_refused() -> None:
    states_ = {"a": torch.zeros(4), "b": torch.zeros(4)}, {"a": torch.ones(4), "b": torch.ones(4)}
    room = torch.zeros(6)
    with pytest.raises(Refused, match="shares memory"):
        ggez_merge.linear(*states_, ratio=0.5, out={"a": room[:4], "b": room[2:]})
    assert room.tolist() == [0.0] * 6
    beside = torch.zeros(8)
    ggez_merge.linear(*states_, ratio=0.5, out={"a": beside[:4], "b": beside[4:]})
    assert beside.tolist() == [0.5] * 8


def test_tensors_and_mappings_do_not_mix() -> None:
    with pytest.raises(TypeError, match="found Tensor, dict"):
        ggez_merge.linear(ONE, {"a": ONE}, ratio=0.5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="found list"):
        ggez_merge.linear([1.0], {"a": ONE}, ratio=0.5)  # type: ignore[type-var]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_nan_is_refused_by_place_and_tensor(scope: str) -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    one = {"a": torch.tensor([0, torch.inf, torch.nan, 0]), "b": torch.ones(4)}
    with pytest.raises(Refused, match="NaN or Inf among the weights") as refused:
        ggez_merge.ties(base, [base, one], weight=1, density=0.5, scope=scope)
    (problem,) = refused.value.problems
    assert (problem.place, problem.tensor, problem.found) == ("models[1]", "a", "2 of 4 elements")
    allowed = ggez_merge.ties(base, [base, one], weight=1, density=0.5, scope=scope, nonfinite="allow")
    assert allowed["a"].isnan().any()


def test_an_average_names_the_model_that_holds_nan() -> None:
    with pytest.raises(Refused) as refused:
        ggez_merge.linear(None, [ONE, torch.tensor([torch.nan] * 4), ONE], weight=[1, 1, 1])
    assert [problem.place for problem in refused.value.problems] == ["models[1]"]


def test_an_overflow_of_the_output_is_refused() -> None:
    with pytest.raises(Refused, match=r"too large for torch\.float16"):
        ggez_merge.task_arithmetic(ONE.half(), torch.full((4,), 6e4).half(), weight=2.0)


# --- how it is imported ---------------------------------------------------------------------------------------------


def test_the_package_is_light_until_a_function_is_wanted() -> None:
    code = (
        "import sys, ggez_merge\n"
        "assert 'torch' not in sys.modules\n"
        "for name in ggez_merge.__all__: getattr(ggez_merge, name)\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
        "try: ggez_merge.tie\n"
        "except AttributeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "module 'ggez_merge' has no attribute 'tie'\n", result.stderr


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("method", "base", "count", "arguments"), CALLS)
def test_a_gpu_gives_the_bytes_of_the_cpu(
    method: str, base: str | None, count: int, arguments: dict[str, Any], tmp_path: Path
) -> None:
    models(tmp_path, ["base", "one", "two"], SHAPES)
    loaded = [load(tmp_path, name) for name in ("base", "one", "two")]
    here, there = ([{k: x.to(device) for k, x in state.items()} for state in loaded] for device in ("cpu", "cuda"))
    expected = FUNCTIONS[method](base and here[0], here[1 : 1 + count], **arguments)
    found = FUNCTIONS[method](base and there[0], there[1 : 1 + count], **arguments)
    assert all(tensor.is_cuda for tensor in found.values())
    assert bytes_of({name: tensor.cpu() for name, tensor in found.items()}) == bytes_of(expected)
