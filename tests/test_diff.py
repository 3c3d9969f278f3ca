"""A diff says what a dense computation in float64 says, whatever the chunks, and leaves nothing unsaid."""

from __future__ import annotations

import io
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from checkpoints import TAGS, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from rich.console import Console

from ggez_merge.checkpoint import Checkpoint, open_checkpoint
from ggez_merge.diff import Change, Diff, Group, as_json, diff, show, total
from ggez_merge.diff_plot import plot
from ggez_merge.errors import Failed, Refused

BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, np.ndarray[Any, Any]]


def opened(folder: Path, arrays: Arrays, shards: int = 1) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(folder, arrays, shards=shards)))


def compared(folder: Path, a: Arrays, b: Arrays, **options: Any) -> Diff:
    return diff(opened(folder / "a", a), opened(folder / "b", b), **options)


def only(result: Diff) -> Change:
    (group,) = result.groups
    return group.change


def printed(result: Diff, width: int = 140) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=width))
    return out.getvalue()


def pair(n: int, dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    a = random.standard_normal(n)
    b = np.where(random.random(n) < 0.5, a, a + 0.1 * random.standard_normal(n))
    return a.astype(dtype), b.astype(dtype)


@pytest.mark.parametrize(
    "dtypes", [(np.float32, np.float32), (BF16, BF16), (BF16, np.float32), (np.float64, np.float16)]
)
@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 5000])
def test_against_a_dense_computation(dtypes: tuple[Any, Any], n: int, tmp_path: Path) -> None:
    a, b = pair(n)[0].astype(dtypes[0]), pair(n)[1].astype(dtypes[1])
    change = only(compared(tmp_path, {"w": a}, {"w": b}, memory_bytes=0))  # chunks of 1024
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert change.relative_l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert change.max_abs == np.abs(y - x).max()
    assert change.changed == np.count_nonzero(x != y) / n
    assert (change.n_tensors, change.n_elements, change.n_nonfinite) == (1, n, 0)


@pytest.mark.parametrize("dtype", [*TAGS, np.dtype(ml_dtypes.float8_e4m3fn)], ids=str)
def test_every_dtype_is_unchanged_against_itself(dtype: np.dtype[Any], tmp_path: Path) -> None:
    array = np.arange(1, 7).reshape(2, 3).astype(dtype)
    result = compared(tmp_path, {"w": array}, {"w": array})
    if dtype == np.complex64:
        assert [mismatch.a for mismatch in result.not_compared] == ["C64 [2, 3]"]
    elif dtype.kind in "iub":
        assert not result.groups and not result.integers and not result.not_compared
    else:
        assert (only(result).relative_l2, only(result).max_abs, only(result).changed) == (0, 0, 0)


def test_zeros(tmp_path: Path) -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert only(compared(tmp_path / "1", {"w": zero}, {"w": zero})).relative_l2 == 0
    assert only(compared(tmp_path / "2", {"w": one}, {"w": zero})).relative_l2 == 1
    result = compared(tmp_path / "3", {"w": zero}, {"w": one})
    assert only(result).relative_l2 is None
    assert "undefined" in printed(result)
    assert only(compared(tmp_path / "4", {"w": zero}, {"w": -zero})).changed == 0


def test_nan_and_infinity_are_counted_and_in_no_norm(tmp_path: Path) -> None:
    a = np.array([1, np.nan, np.nan, np.inf, np.inf, 2], np.float32)
    b = np.array([1, np.nan, 3.0, np.inf, -np.inf, 4], np.float32)
    result = compared(tmp_path, {"w": a}, {"w": b})
    change = only(result)
    assert (change.n_changed, change.n_nonfinite, change.max_abs) == (3, 4, 2)
    assert change.relative_l2 == pytest.approx(2 / math.sqrt(5))
    assert "4 elements are NaN or infinite" in printed(result)


def test_beyond_the_range_of_float64(tmp_path: Path) -> None:
    result = compared(tmp_path, {"w": np.full(2, 1.7e308)}, {"w": np.full(2, -1.7e308)})
    assert only(result).relative_l2 is None
    table = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert (table["groups"][0]["max_abs"], table["groups"][0]["changed"]) == (None, 1)
    plot(result, tmp_path / "x.svg")
    assert "<!-- undefined -->" in (tmp_path / "x.svg").read_text()


def test_integers_have_no_norm(tmp_path: Path) -> None:
    big = 2**60
    a = {"w": np.ones(2, np.float32), "steps": np.array([big, 5]), "same": np.arange(3), "flag": np.array([True])}
    b = {"w": np.ones(2, np.float32), "steps": np.array([big + 1, 5]), "same": np.arange(3), "flag": np.array([False])}
    result = compared(tmp_path, a, b)
    assert only(result).n_tensors == 1
    assert [(c.name, c.n_changed, c.n_elements) for c in result.integers] == [("steps", 1, 2), ("flag", 1, 1)]
    assert "steps: 1 of 2 elements" in printed(result)


def test_empty_and_0d_tensors(tmp_path: Path) -> None:
    a: Arrays = {"w": np.zeros((3, 0), np.float32), "x": np.array(2, np.float32)}
    change = only(compared(tmp_path, a, {"w": a["w"], "x": np.array(3, np.float32)}))
    assert (change.n_tensors, change.n_elements, change.relative_l2) == (2, 1, 0.5)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = np.ones(2, np.float32)
    a: Arrays = {"same": one, "mine": one, "shape": np.ones((2, 1), BF16), "kind": one, "narrow": one}
    b: Arrays = {"same": one, "yours": one, "shape": one, "kind": np.ones(2, np.int32), "narrow": one.astype(BF16)}
    result = compared(tmp_path, a, b)
    assert (result.only_a, result.only_b) == (("mine",), ("yours",))
    assert {(m.name, m.a, m.b) for m in result.not_compared} == {
        ("shape", "BF16 [2, 1]", "F32 [2]"),
        ("kind", "F32 [2]", "I32 [2]"),
    }
    assert [(m.name, m.a, m.b) for m in result.other_dtype] == [("narrow", "F32 [2]", "BF16 [2]")]
    assert only(result).n_tensors == 2  # same and narrow
    text = printed(result)
    for line in ("only in a: 1", "  mine", "only in b: 1", "  yours", "another dtype: 1", "not compared: 2"):
        assert line in text.splitlines()
    assert "  shape: BF16 [2, 1], F32 [2]" in text.splitlines()


def test_two_layouts_of_one_model_have_the_same_names(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a = {
        **{
            f"visual.blocks.{i}.{word}.weight": random.normal(size=(4, 4)) for i in range(2) for word in ("q", "k", "v")
        },
        **{f"model.layers.{i}.{word}.weight": random.normal(size=(4, 6)) for i in range(2) for word in ("q", "k", "v")},
        "lm_head.weight": random.normal(size=(9, 4)),
    }
    b = {name: array + 0.5 for name, array in a.items()}

    def newer(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")

    expected = compared(tmp_path / "same", a, b)
    result = compared(tmp_path / "other", a, {newer(name): array for name, array in reversed(b.items())})
    assert result.groups == expected.groups
    assert (result.only_a, result.only_b, expected.names) == ((), (), ())
    rules = [
        "model.visual.blocks.* ↔ visual.blocks.*: 6 tensors",
        "model.language_model.layers.* ↔ model.layers.*: 6 tensors",
    ]
    assert list(result.names) == as_json(result)["names"] == rules
    assert all(printed(result).count(rule) == 1 for rule in rules)
    extra = {**{newer(name): array for name, array in b.items()}, "model.visual.extra.bias": np.ones(1)}
    assert compared(tmp_path / "extra", a, extra).only_b == ("model.visual.extra.bias",)


def test_fused_experts_are_compared_with_those_apart(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    apart = {f"layers.0.mlp.experts.{i}.down_proj.weight": random.normal(size=(4, 6)) for i in range(3)}
    fused = {"layers.0.mlp.experts.down_proj": np.stack(list(apart.values()))}
    fused["layers.0.mlp.experts.down_proj"][1, 2, 3] += 1
    for a, b, n in ((apart, fused, 3), (fused, apart, 1)):
        result = compared(tmp_path / str(n), a, b)
        assert (only(result).n_tensors, only(result).n_elements, only(result).n_changed) == (n, 72, 1)
        assert (result.only_a, result.only_b, len(result.names)) == ((), (), 1)


def test_names_that_fit_twice_are_compared_as_they_stand(tmp_path: Path) -> None:
    words = ("attn.q", "attn.k", "mlp.up", "norm")
    tower = {f"layers.{i}.{word}.weight": np.ones((8, 8)) for i in range(2) for word in words}
    two = {f"{side}.{name}": array for name, array in tower.items() for side in ("left", "right")}
    result = compared(tmp_path, two, {**tower, "left.layers.0.norm.weight": np.ones((8, 8))})
    assert "not clear" in result.names[0] and "not clear" in printed(result)
    assert set(result.only_b) == tower.keys() and only(result).n_tensors == 1


def test_a_tensor_under_two_names_hides_none(tmp_path: Path) -> None:
    tower = {f"model.layers.{i}.{word}.weight": np.ones((8, 8)) for i in range(2) for word in ("q", "k", "v", "norm")}
    b = {f"module.{name}": array for name, array in tower.items()} | {"model.layers.0.norm.weight": np.zeros((8, 8))}
    result = compared(tmp_path, tower, b)
    assert "under several names" in result.names[0]
    assert only(result).n_tensors == 1 and only(result).changed == 1
    assert set(result.only_b) == b.keys() - tower.keys()


def test_groups_are_components_and_layers_in_order(tmp_path: Path) -> None:
    names = ["lm_head.weight", "model.norm.weight", *(f"model.layers.{i}.{w}" for i in (10, 2) for w in "ab")]
    names += ["visual.blocks.0.w", "visual.merger.mlp.0.weight", "visual.pos_embed"]
    arrays = {name: np.full(3, i + 1.0, np.float32) for i, name in enumerate(names)}
    result = compared(tmp_path, arrays, {name: array * 1.5 for name, array in arrays.items()})
    assert [(g.component, g.stack, g.number, g.change.n_tensors) for g in result.groups] == [
        ("vision_tower", None, None, 1),
        ("vision_tower", "visual.blocks", 0, 1),
        ("projector", None, None, 1),
        ("language_model", None, None, 1),
        ("language_model", "model.layers", 2, 2),
        ("language_model", "model.layers", 10, 2),
        ("lm_head", None, None, 1),
    ]
    assert all(group.change.relative_l2 == pytest.approx(0.5) for group in result.groups)
    assert result.components()["language_model"].n_tensors == 5
    text = printed(result)
    assert "model.layers.10" in text and "outside the layers" in text and "50 %" in text


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 5000), memory_bytes=st.integers(0, 400_000), shards=st.integers(1, 3), seed=st.integers(0, 99))
def test_chunks_and_shards_change_nothing(
    n: int, memory_bytes: int, shards: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    a, b = pair(3 * n, BF16, seed)
    split = [{f"layers.0.{i}": array[i * n : (i + 1) * n] for i in range(3)} for array in (a, b)]
    parts = only(
        diff(opened(folder / "a", split[0], shards), opened(folder / "b", split[1]), memory_bytes=memory_bytes)
    )
    whole = only(compared(folder / "whole", {"layers.0.w": a}, {"layers.0.w": b}))
    assert (parts.n_elements, parts.n_changed, parts.max_abs) == (whole.n_elements, whole.n_changed, whole.max_abs)
    assert parts.delta_squares == pytest.approx(whole.delta_squares, rel=1e-12)
    assert parts.base_squares == pytest.approx(whole.base_squares, rel=1e-12)


def test_progress_adds_up_to_all_bytes(tmp_path: Path) -> None:
    a, b = pair(5000, BF16)
    told: list[int] = []
    compared(tmp_path, {"w": a, "v": a}, {"w": b, "v": b.astype(np.float32)}, memory_bytes=0, advance=told.append)
    assert sum(told) == 3 * a.nbytes + 2 * a.nbytes
    assert max(told) <= 1024 * 6


def test_memory_is_bounded(tmp_path: Path) -> None:
    n = 2_000_000  # 8 MB each, 16 MB in float64
    a, b = (opened(tmp_path / name, {"w": np.full(n, 1.5, np.float32)}) for name in "ab")
    tracemalloc.start()
    try:
        diff(a, b, memory_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000


def test_a_file_that_shrank_since_it_was_opened(tmp_path: Path) -> None:
    a, b = (opened(tmp_path / name, {"w": np.ones(100, np.float32)}) for name in "ab")
    path = b.files[0].path
    os.truncate(path, b.files[0].size - 4)
    with pytest.raises(Failed, match=str(path)):
        diff(a, b)
    os.utime(path, ns=(0, b.files[0].mtime_ns))
    path.unlink()
    with pytest.raises(Failed, match=str(path)):
        diff(a, b)


def test_json(tmp_path: Path) -> None:
    a, b = pair(100)
    result = compared(
        tmp_path, {"model.layers.0.w": a, "i": np.arange(2)}, {"model.layers.0.w": b, "i": np.arange(1, 3)}
    )
    table = json.loads(json.dumps(as_json(result), allow_nan=False))
    change = only(result)
    numbers = {
        "tensors": 1,
        "elements": 100,
        "changed_elements": change.n_changed,
        "nonfinite_elements": 0,
        "relative_l2": change.relative_l2,
        "max_abs": change.max_abs,
        "changed": change.changed,
    }
    assert table["groups"] == [{"component": "language_model", "stack": "model.layers", "layer": 0, **numbers}]
    assert table["components"] == [{"component": "language_model", **numbers}]
    assert table["integers"] == [{"name": "i", "n_changed": 2, "n_elements": 2}]
    assert (table["a"], table["b"]) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_table_never_rounds_to_all_or_nothing() -> None:
    for n_changed, text in [(0, "0 %"), (1, "1e-05 %"), (9_999_999, "> 99.9 %"), (10_000_000, "100 %")]:
        change = Change(1, 10_000_000, n_changed, 0, 1, 1, 1)
        table = printed(Diff("a", "b", (Group("other", None, None, change),), (), (), (), (), ()))
        (row,) = (line.strip() for line in table.splitlines() if line.strip().startswith("other"))
        assert row.endswith(f" {text}")


@pytest.mark.parametrize("name", ["\x1b[2Jred", "\u202egnp", "[red]x[/red]", "[/]"])
def test_hostile_names_do_nothing(name: str, tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    a: Arrays = {f"{name}.layers.0.w": one, f"{name}.shape": one, f"{name}.mine": one, "w": one}
    b: Arrays = {f"{name}.layers.0.w": one, f"{name}.shape": np.ones(2, np.float32), "w": one}
    text = printed(compared(tmp_path, a, b))
    assert not {"\x1b", "\u202e"} & set(text)
    assert text.count(name if name.isprintable() else name.encode("unicode_escape").decode()) == 3


# --- the plot


@pytest.fixture
def example() -> Diff:
    def change(relative: float) -> Change:
        return Change(1, 9, 9, 0, 0.1, relative**2, 1.0)

    groups = [Group("vision_tower", "visual.blocks", i, change(0.01 * i)) for i in range(12)]
    groups += [Group("vision_tower", "visual.$x^{$.global_blocks", i, change(0.02)) for i in range(3)]
    groups += [Group("language_model", "model.layers", i, change(0.03)) for i in range(16)]
    groups += [Group(part, None, None, change(0.02)) for part in ("projector", "embeddings", "lm_head")]
    return Diff("org/a$_", "b_$^{", tuple(groups), (), (), (), (), ())


def test_png(example: Diff, tmp_path: Path) -> None:
    plot(example, tmp_path / "x.PNG")
    pixels = image.imread(tmp_path / "x.PNG", format="png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_svg_names_what_it_shows(example: Diff, tmp_path: Path) -> None:
    plot(example, tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("How far b_$^{ is from a$_", "language_model", "vision_tower (visual.$x^{$.global_blocks)", "lm_head"):
        assert f"<!-- {text} -->" in svg


@pytest.mark.parametrize("layered", [True, False])
def test_plots_of_layers_alone_and_of_none(layered: bool, example: Diff, tmp_path: Path) -> None:
    groups = tuple(group for group in example.groups if (group.stack is not None) is layered)
    plot(Diff("a", "b", groups, (), (), (), (), ()), tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text()
    assert ("<!-- layer -->" in svg) is layered
    assert ("<!-- outside the layers -->" in svg) is not layered


def test_a_layer_without_a_norm_is_no_point_at_zero(example: Diff, tmp_path: Path) -> None:
    shapes = []
    for base_squares in (1.0, 0.0):
        undefined = Group("other", "layers", 0, Change(1, 9, 9, 0, 0.1, 1.0, base_squares))
        plot(Diff("a", "b", (undefined, *example.groups[:9]), (), (), (), (), ()), tmp_path / "x.svg")
        shapes.append((tmp_path / "x.svg").read_text().count("<use "))
    assert shapes[1] < shapes[0]


def test_plots_that_cannot_be(example: Diff, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"a plot is a \.png or an \.svg file"):
        plot(example, tmp_path / "x.jpg")
    with pytest.raises(Refused, match="no tensor in common"):
        plot(Diff("a", "b", (), (), (), (), (), ()), tmp_path / "x.png")
    with pytest.raises(Failed, match="cannot be written"):
        plot(example, tmp_path / "no" / "x.png")


def test_total_of_nothing() -> None:
    assert total([]) == Change()
    assert (Change().relative_l2, Change().changed) == (0, 0)
