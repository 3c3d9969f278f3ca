"""Parameters with axes: the bytes of merging every part by itself, no needless copy, and what is refused."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_dicts import raw

import ggez_merge
from ggez_merge.axes import by_part, rows_of
from ggez_merge.errors import Refused
from ggez_merge.work import FLOATS

README = Path(__file__).parents[1] / "README.md"
Select = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]

# Axes of the tensor (nested where a dimension has several), those of the parameters, and a part by plain indexing.
CASES: dict[str, tuple[tuple[str | tuple[str, ...], ...], tuple[str, ...], Select]] = {
    "heads": ((("head", "d"), "m"), ("head",), lambda x, i: x[i[0]]),
    "fused heads": ((("qkv", "head", "d"), "m"), ("qkv", "head"), lambda x, i: x[i]),
    "experts": (("expert", "i", "o"), ("expert",), lambda x, i: x[i[0]]),
    "rows": (("row", "column"), ("row",), lambda x, i: x[i[0]]),
    "entries": (("row", "column"), ("row", "column"), lambda x, i: x[i]),
    "middle": (("expert", ("gate_up", "f"), "m"), ("gate_up",), lambda x, i: x[:, i[0]]),
    "ends": (("expert", "i", "o"), ("o", "expert"), lambda x, i: x[i[1], :, i[0]]),
    "columns": (("row", "column"), ("column",), lambda x, i: x[:, i[0]]),
    "heads of columns": (("m", ("head", "d")), ("head",), lambda x, i: x[:, i[0]]),
    "words of Python": (("in", "tensor"), ("tensor",), lambda x, i: x[:, i[0]]),
}
LEADING = ["heads", "fused heads", "experts", "rows", "entries"]


def pattern(case: str) -> str:
    dimensions, names, _ = CASES[case]
    left = (name if isinstance(name, str) else f"({' '.join(name)})" for name in dimensions)
    return f"{' '.join(left)} -> {' '.join(names)}"


def all_axes(case: str) -> list[str]:
    return [name for part in CASES[case][0] for name in ((part,) if isinstance(part, str) else part)]


def shape_of(case: str, lengths: dict[str, int]) -> tuple[int, ...]:
    dimensions = ((part,) if isinstance(part, str) else part for part in CASES[case][0])
    return tuple(int(np.prod([lengths[name] for name in part])) for part in dimensions)


def each_part(case: str, lengths: dict[str, int], tensor: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Views of the parts, by index."""
    _, names, select = CASES[case]
    split = tensor.view([lengths[name] for name in all_axes(case)])
    return {i: select(split, i) for i in itertools.product(*(range(lengths[name]) for name in names))}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, of which every two patterns differ."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, dict[str, int], list[torch.Tensor], np.random.Generator]:
    """A case, the lengths of its axes, a base and two models with many equal deltas, and where to draw more from."""
    case = draw(st.sampled_from(list(CASES)))
    lengths = {name: draw(st.integers(1, 5), name) for name in all_axes(case)}
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(FLOATS))
    base = random.normal(size=shape_of(case, lengths))
    near = [base, *(base + random.integers(-4, 5, base.shape) / 64 for _ in range(2))]
    return case, lengths, [torch.tensor(array).to(dtype) for array in near], random


def arguments_of(
    method: str, shape: tuple[int, ...], random: np.random.Generator
) -> tuple[int, dict[str, Any], Callable[[tuple[int, ...]], dict[str, Any]]]:
    """How many models, the arguments with arrays, and the same arguments for one part."""

    def array(low: float = 0.1) -> Any:
        return random.uniform(low, 1, shape)

    a, b, c = array(-1), array(), array()
    number = float(random.uniform(0.1, 1))
    return {
        "ratio": (1, {"ratio": a.tolist()}, lambda i: {"ratio": a[i]}),
        "average": (2, {"weight": [b, torch.tensor(c)]}, lambda i: {"weight": [b[i], c[i]]}),
        "task_arithmetic": (
            2,
            {"weight": [a, number], "lambda_": b},
            lambda i: {"weight": [a[i], number], "lambda_": b[i]},
        ),
        "one model": (1, {"weight": [a], "normalize": False}, lambda i: {"weight": a[i], "normalize": False}),
        "ties": (
            2,
            {"weight": [a, b], "density": [number, c], "rescale": True},
            lambda i: {"weight": [a[i], b[i]], "density": [number, c[i]], "rescale": True},
        ),
    }[method]


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ratio": ggez_merge.linear,
    "average": ggez_merge.linear,
    "task_arithmetic": ggez_merge.task_arithmetic,
    "one model": ggez_merge.task_arithmetic,
    "ties": ggez_merge.ties,
}


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FUNCTIONS)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_every_part_is_merged_as_if_it_were_alone(method: str, problem: Any) -> None:
    case, lengths, (base, *models), random = problem
    shape = tuple(lengths[name] for name in CASES[case][1])
    count, arguments, for_part = arguments_of(method, shape, random)
    before = [raw(tensor) for tensor in (base, *models)]
    found = FUNCTIONS[method](base, models[:count], axes=pattern(case), **arguments)
    expected = torch.full_like(base, torch.nan)
    parts = [each_part(case, lengths, tensor) for tensor in (expected, base, *models[:count])]
    for index, part in parts[0].items():
        of_base, *of_models = (there[index].contiguous() for there in parts[1:])
        part.copy_(FUNCTIONS[method](of_base, of_models, **for_part(index)))
    assert found.shape == base.shape and raw(found) == raw(expected)
    assert [raw(tensor) for tensor in (base, *models)] == before, "the inputs are untouched"


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_ratios_of_0_and_1_give_the_endpoints_bytes(problem: Any) -> None:
    case, lengths, (base, tuned, _), random = problem
    base.view(-1)[::3] = -0.0
    ratios = random.integers(0, 2, tuple(lengths[name] for name in CASES[case][1]))
    found = ggez_merge.linear(base, tuned, ratio=ratios, axes=pattern(case))
    of_found, of_base, of_tuned = (each_part(case, lengths, tensor) for tensor in (found, base, tuned))
    for index, part in of_found.items():
        assert torch.equal(bits(part), bits((of_tuned if ratios[index] else of_base)[index]))


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_one_threshold_for_all_parts_is_that_of_the_whole_tensor(problem: Any) -> None:
    case, lengths, (base, *models), random = problem
    ones = np.ones(tuple(lengths[name] for name in CASES[case][1]))
    arguments = {"density": float(random.uniform(0.1, 1)), "scope": "global", "ties": "all"}
    found = ggez_merge.ties(base, models, weight=[ones, ones], axes=pattern(case), **arguments)
    assert raw(found) == raw(ggez_merge.ties(base, models, weight=1, **arguments))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_output_that_is_given_is_filled_and_nothing_beside_it(case: str, dtype: torch.dtype) -> None:
    lengths = dict(zip(all_axes(case), (3, 4, 2, 5), strict=False))
    base = torch.randn(shape_of(case, lengths), dtype=torch.float32)
    ratios = np.random.default_rng(0).uniform(size=tuple(lengths[name] for name in CASES[case][1]))
    arguments: dict[str, Any] = {"ratio": ratios, "axes": pattern(case)}
    room = torch.full((base.numel() + 2,), 7.0, dtype=dtype)
    out = room[1:-1].view(base.shape)
    assert ggez_merge.linear(base, base + 1, out=out, **arguments) is out
    assert room[0] == room[-1] == 7
    made = ggez_merge.linear(base, base + 1, out_dtype=dtype, **arguments)
    assert made.dtype == dtype and made.is_contiguous() and raw(made) == raw(out)


def test_threads_do_not_change_a_byte() -> None:
    base, one, two = torch.randn(3, 64, 48).bfloat16()
    arguments: dict[str, Any] = {"weight": [np.linspace(0, 1, 8), 1], "axes": "m (head d) -> head"}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results += [
                raw(ggez_merge.ties(base, [one, two], density=0.3, scope=scope, **arguments))
                for scope in ("tensor", "global")
            ]
    finally:
        torch.set_num_threads(threads)
    assert results[:2] == results[2:]


def test_integers_are_copied_as_ever() -> None:
    steps = torch.arange(6).view(2, 3)
    arguments: dict[str, Any] = {"ratio": [0.1, 0.2], "axes": "row column -> row"}
    assert torch.equal(ggez_merge.linear(steps, steps.clone(), **arguments), steps)
    assert torch.equal(ggez_merge.linear(steps, steps + 1, buffers="base", **arguments), steps)
    with pytest.raises(Refused, match="int64 values cannot be averaged"):
        ggez_merge.linear(steps, steps + 1, **arguments)


@pytest.mark.parametrize("axes", ["row column -> row", "row column -> column"])
def test_parts_without_elements_are_fine(axes: str) -> None:
    empty = torch.zeros((3, 0) if axes.endswith("row") else (0, 3))
    assert ggez_merge.linear(empty, empty.clone(), ratio=[0, 1, 2], axes=axes).shape == empty.shape


@pytest.mark.parametrize("axes", ["row column -> row", "row column -> column"])
def test_outputs_made_for_inference_are_filled_and_autograd_notices_others(axes: str) -> None:
    base, tuned, weight = torch.zeros(3, 3), torch.ones(3, 3), torch.nn.Parameter(torch.ones(3, 3))
    with torch.inference_mode():
        frozen = torch.full((3, 3), 7.0)
    expected = ggez_merge.linear(base, tuned, ratio=[0, 0.5, 1], axes=axes)
    assert torch.equal(ggez_merge.linear(base, tuned, ratio=[0, 0.5, 1], axes=axes, out=frozen), expected)
    loss = (weight**2).sum()
    ggez_merge.linear(base, tuned, ratio=[0, 0.5, 1], axes=axes, out=weight)
    assert torch.equal(weight, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- no copy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parts_are_pieces_of_the_tensor_where_their_axes_lead(case: str) -> None:
    lengths = dict(zip(all_axes(case), (3, 4, 2, 5), strict=False))
    tensor = torch.randn(shape_of(case, lengths))
    by_index = each_part(case, lengths, tensor)
    rows = rows_of(by_part(tensor, pattern(case), by_index), len(by_index))
    assert all(torch.equal(row, part.reshape(-1)) for row, part in zip(rows, by_index.values(), strict=True))
    size = tensor.nbytes // len(rows)
    assert [row.data_ptr() - rows[0].data_ptr() for row in rows] == [i * size for i in range(len(rows))]
    assert (rows[0].data_ptr() == tensor.data_ptr()) == (case in LEADING)


PEAK = """
import re, torch, ggez_merge

def most_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000

def merge(rows):
    base, tuned, out = (torch.full((rows, 1000), 1.0, dtype=torch.bfloat16) for _ in range(3))
    before = most_mb()
    ggez_merge.linear(base, tuned, ratio=[0.1] * 10, axes={axes!r}, out=out)
    return most_mb() - before

merge(10)  # loads the kernels
print(merge(50_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory the process has had")
@pytest.mark.parametrize(("axes", "least", "most"), [("(head d) m -> head", 0, 20), ("m (head d) -> head", 250, 400)])
def test_memory_is_needed_for_copies_only(axes: str, least: float, most: float) -> None:
    """Of three times 100 MB: none where heads are rows, another three times where they are columns."""
    code = PEAK.format(axes=axes)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert least <= float(result.stdout or "inf") < most, result.stderr


def test_einops_is_imported_by_axes_alone() -> None:
    code = (
        "import sys, torch, ggez_merge\n"
        "x, y = torch.zeros(2, 2), torch.ones(2, 2)\n"
        "ggez_merge.linear(x, y, ratio=0.5); print('einops' in sys.modules)\n"
        "ggez_merge.linear(x, y, ratio=[0, 1], axes='a b -> a'); print('einops' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False", "True"], result.stderr


# --- what is refused ------------------------------------------------------------------------------------------------

X = torch.zeros(4, 6)
HEADS = "(head d) m -> head"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="head m"), "must end in names of axes"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="(head d) m ->"), "must end in names of axes"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="(head d) m -> expert"), "must end in names of axes"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="a b -> (a b)"), "must end in names of axes"),
        (lambda: ggez_merge.linear(X, X, ratio=[[0, 1]], axes="a b -> a a"), "must end in names of axes"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1, 2], axes=HEADS), r"\[4, 6\](.|\n)*head = 3(.|\n)*remedy"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="(head d m -> head"), "does not describe the tensor"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="a b c -> a"), "does not describe the tensor"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="(a b c) m -> a"), "does not describe the tensor"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="(a 2) m -> a"), "does not describe the tensor"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1], axes="_a m -> _a"), "does not describe the tensor"),
        (lambda: ggez_merge.linear(X, X, ratio=0.5, axes=HEADS), "no parameter is an array(.|\n)*remedy"),
        (lambda: ggez_merge.linear(X, X, ratio=[[0, 1]], axes=HEADS), r"the axes head(.|\n)*shape \[1, 2\]"),
        (lambda: ggez_merge.linear(X, X, ratio=[], axes=HEADS), r"shape \[0\]"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, 1]), "`ratio` of linear must be a number"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, torch.nan], axes=HEADS), r"`ratio\[1\]` of linear must be a finite"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, True], axes=HEADS), r"`ratio\[1\]` of linear must be a number"),
        (lambda: ggez_merge.linear(X, X, ratio=[0, [1, 2]], axes=HEADS), r"`ratio\[1\]` of linear must be a number"),
        (
            lambda: ggez_merge.ties(X, [X, X], weight=1, density=[1, [[1, 1], [1, 2]]], axes="(a b) c -> a b"),
            r"`density\[1\]\[1\]\[1\]` of ties must be a number from 0 to 1",
        ),
        (
            lambda: ggez_merge.ties(X, [X, X], weight=[[1, 1], 1], density=[1, [1, 1, 1, 1]], axes=HEADS),
            r"`density\[1\]` and `weight\[0\]` disagree(.|\n)*\[2\](.|\n)*\[4\](.|\n)*remedy",
        ),
        (lambda: ggez_merge.ties(X, [X, X], weight=[1, 1, 1, 1], axes=HEADS), "a number or an array for each model"),
        (lambda: ggez_merge.ties(X, X, weight=[[1, 1]], normalize=[True, False], axes=HEADS), "must be true or false"),  # type: ignore[arg-type]
        (
            lambda: ggez_merge.linear(None, [X, X], weight=[[1, 1, 1, 1], [1, -1, 1, -1]], axes=HEADS),
            r"add up to zero(.|\n)*head 1, head 3",
        ),
        (
            lambda: ggez_merge.linear({"x": X}, {"x": X}, ratio=[0, 1], axes=HEADS),
            "of a single tensor(.|\n)*one by one",
        ),
        (lambda: ggez_merge.linear(X, X.clone(), ratio=[0, 1], axes=HEADS, out=X), "shares memory"),
        (lambda: ggez_merge.linear(X.t(), X.t(), ratio=[0, 1], axes=HEADS), "not contiguous"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        call()


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written() -> None:
    out = torch.full((4, 6), 7.0)
    with pytest.raises(Refused) as refused:
        ggez_merge.linear(X, X.double()[:3], ratio=[torch.inf, 0, torch.nan], axes=HEADS, out=out, nonfinite="no")  # type: ignore[arg-type]
    said = [problem.what for problem in refused.value.problems]
    assert len(said) == 4 and "`ratio[0]`" in said[0] and "`ratio[2]`" in said[1]
    assert bool((out == 7).all())


@settings(max_examples=300, deadline=None)
@given(axes=st.lists(st.sampled_from([*"abc()1_. ", "...", "->", "2a", "a_", "in"]), max_size=12).map(" ".join))
def test_no_pattern_is_worse_than_refused(axes: str) -> None:
    try:
        found = ggez_merge.linear(X, X + 1, ratio=[0.5, 0.5], axes=axes)
    except Refused:
        return
    assert bool((found == 0.5).all())


@pytest.mark.parametrize("axes", ["row column -> row", "row column -> column"])
def test_nan_and_overflows_are_those_of_the_whole_tensor(axes: str) -> None:
    base, tuned = torch.zeros(4, 4), torch.zeros(4, 4)
    tuned[1, 2], tuned[3, 0] = torch.nan, torch.inf
    weight = [np.array([1, 2, 3, 4])]
    with pytest.raises(Refused) as refused:
        ggez_merge.task_arithmetic(base, tuned, weight=weight, axes=axes)
    (problem,) = refused.value.problems
    assert (problem.place, problem.tensor, problem.found) == ("models[0]", None, "2 of 16 elements")
    allowed = ggez_merge.task_arithmetic(base, tuned, weight=weight, axes=axes, nonfinite="allow")
    assert allowed.isfinite().sum() == 14
    with pytest.raises(Refused, match="12 elements overflow"):
        ggez_merge.task_arithmetic(base.half(), torch.full((4, 4), 6e4).half(), weight=weight, axes=axes)


# --- what the documentation shows -----------------------------------------------------------------------------------


def test_the_example_for_unequal_parts_in_the_docstring() -> None:
    block = re.search(r"need no axes:\n\n((?: {8}.*\n)+)", str(ggez_merge.linear.__doc__))
    assert block
    base, tuned, out = torch.zeros(768, 4), torch.ones(768, 4), torch.empty(768, 4)
    names = {"ggez_merge": ggez_merge, "base": base, "tuned": tuned, "out": out, "ratios": [0.25, 0.5, 1.0]}
    exec(textwrap.dedent(block[1]), names)
    assert out[:, 0].tolist() == [0.25] * 512 + [0.5] * 128 + [1.0] * 128


def test_the_examples_in_the_readme() -> None:
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "axes=" in text]
    random = np.random.default_rng(0)
    base, tuned = torch.zeros(768, 16), torch.ones(768, 16)
    experts = [torch.full((4, 2, 3), value) for value in (0.0, 1.0, 2.0)]
    names = {
        "ggez_merge": ggez_merge,
        "torch": torch,
        "q_base": base,
        "q_tuned": tuned,
        "per_head": random.uniform(size=32),
        "gate_up_base": base,
        "gate_up_tuned": tuned,
        "experts": experts[0],
        "a": experts[1],
        "b": experts[2],
        "of_a": [0, 0, 1, 1],
        "of_b": [0, 1, 0, 1],
        "qkv_base": base,
        "qkv_tuned": tuned,
    }
    exec(block, names)
    found: list[Any] = [names[name] for name in ("q", "gate_up", "moe", "qkv")]
    assert np.allclose(found[0][:, 0], np.repeat(names["per_head"], 24))  # type: ignore[call-overload]
    assert np.allclose(found[1][:, 0], np.repeat([0.3, 0.5], 384))
    assert found[2][:, 0, 0].tolist() == [0, 2, 1, 3]
    assert np.allclose(found[3][:, 0], [0.5] * 512 + [0.3] * 128 + [0.1] * 128)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", FUNCTIONS)
def test_a_gpu_gives_the_bytes_of_the_cpu(method: str, case: str) -> None:
    lengths = dict(zip(all_axes(case), (3, 4, 2, 5), strict=False))
    here = [torch.randn(shape_of(case, lengths)).bfloat16() for _ in range(3)]
    there = [tensor.cuda() for tensor in here]
    random = np.random.default_rng(0)
    count, arguments, _ = arguments_of(method, tuple(lengths[name] for name in CASES[case][1]), random)
    expected = FUNCTIONS[method](here[0], here[1 : 1 + count], axes=pattern(case), **arguments)
    found = FUNCTIONS[method](there[0], there[1 : 1 + count], axes=pattern(case), **arguments)
    assert found.is_cuda and raw(found.cpu()) == raw(expected)
