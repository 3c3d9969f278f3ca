"""Experts in one tensor, merged with experts in one each."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, LITTLE_MEMORY, TIES, arrays, merged, refusals, scratch

from ggez_merge.checkpoint import joined, open_checkpoint
from ggez_merge.read import Files

BF16 = np.dtype(ml_dtypes.bfloat16)
PARENT = "model.layers.0.mlp.experts"
Arrays = dict[str, np.ndarray]


def split(n: int, height: int, width: int, seed: int, dtype: np.dtype = BF16) -> Arrays:
    """One layer with experts in one tensor each, saved in the order in which nobody needs them."""
    random = np.random.default_rng(seed)
    shapes = {"down_proj": (width, height), "up_proj": (height, width), "gate_proj": (height, width)}
    return {
        f"{PARENT}.{e}.{stem}.weight": random.normal(size=shape).astype(dtype)
        for stem, shape in shapes.items()
        for e in reversed(range(n))
    } | {"model.norm.weight": random.normal(size=width).astype(dtype)}


def fused(tensors: Arrays, n: int) -> Arrays:
    """The same experts in one tensor, as transformers 5 holds them."""

    def stacked(*stems: str) -> np.ndarray:
        return np.stack([np.concatenate([tensors[f"{PARENT}.{e}.{s}.weight"] for s in stems]) for e in range(n)])

    return {
        "model.norm.weight": tensors["model.norm.weight"],
        f"{PARENT}.gate_up_proj": stacked("gate_proj", "up_proj"),
        f"{PARENT}.down_proj": stacked("down_proj"),
    }


@settings(deadline=None)
@given(n=st.integers(1, 12), height=st.integers(1, 9), width=st.integers(1, 9), base_is_fused=st.booleans())
def test_the_bytes_are_those_of_one_form(n: int, height: int, width: int, base_is_fused: bool) -> None:
    if width in (2 * height, height):
        return  # could be transposed: refused
    base, one = split(n, height, width, 0), split(n, height, width, 1)
    with scratch() as folder:
        write_checkpoint(folder / "base", fused(base, n))
        write_checkpoint(folder / "one", fused(one, n))
        expected = merged(folder, INTERPOLATE, "fused")
        write_checkpoint(folder / ("one" if base_is_fused else "base"), one if base_is_fused else base)
        merged(folder, INTERPOLATE, "mixed")
        found = arrays(folder / "mixed")
        if not base_is_fused:
            shaped = {name: found[name].reshape(base[name].shape) for name in base}
            found = {name: array.reshape(-1) for name, array in fused(shaped, n).items()}
        assert {name: array.tobytes() for name, array in found.items()} == {n: raw for n, (_, raw) in expected.items()}


def test_blocks_that_end_inside_an_expert(tmp_path: Path) -> None:
    """Many spans of each tensor, measured and combined."""
    n, height, width = 7, 301, 211
    parents = [split(n, height, width, seed) for seed in range(3)]
    for name, tensors in zip(("base", "one", "two"), parents, strict=True):
        write_checkpoint(tmp_path / name, fused(tensors, n))
    expected = merged(tmp_path, TIES, "fused", memory_bytes=LITTLE_MEMORY)
    write_checkpoint(tmp_path / "two", parents[2], shards=4)
    (tmp_path / "two" / "model.safetensors").unlink()
    assert merged(tmp_path, TIES, "mixed", memory_bytes=LITTLE_MEMORY) == expected


def test_the_report_says_what_was_put_together(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", fused(split(3, 4, 5, 0), 3))
    write_checkpoint(tmp_path / "one", split(3, 4, 5, 1))
    merged(tmp_path, INTERPOLATE)
    rules = json.loads((tmp_path / "out" / "merge_report.json").read_text())["names"][0]["rules"]
    experts = "model.layers.*.mlp.experts"
    assert {rule["said"] for rule in rules} == {
        "1 tensor of the same name",
        f"{experts}.*.(gate_proj, up_proj).weight ↔ {experts}.gate_up_proj: 6 tensors",
        f"{experts}.*.down_proj.weight ↔ {experts}.down_proj: 3 tensors",
    }


@pytest.mark.parametrize("why", ["square", "expert missing", "transposed", "two dtypes"])
def test_what_does_not_fit_is_refused(why: str, tmp_path: Path) -> None:
    height, width = (4, 8) if why == "square" else (4, 5)
    one = split(3, height, width, 1)
    base = fused(split(3, height, width, 0), 3)
    if why == "expert missing":
        del one[f"{PARENT}.1.up_proj.weight"]
    if why == "transposed":
        base[f"{PARENT}.gate_up_proj"] = base[f"{PARENT}.gate_up_proj"].transpose(0, 2, 1).copy()
    if why == "two dtypes":
        one[f"{PARENT}.1.up_proj.weight"] = one[f"{PARENT}.1.up_proj.weight"].astype(np.float32)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "one", one)
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "one lacks 1 tensor that base has" in said and "gate_up_proj" in said


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), data=st.data())
def test_parts_read_as_one(sizes: list[int], data: st.DataObject) -> None:
    raw = [np.arange(n, dtype=np.uint8) + 41 * i for i, n in enumerate(sizes)]
    with scratch() as folder:
        write_checkpoint(folder, {f"t{i}": array for i, array in enumerate(raw)})
        checkpoint = open_checkpoint(str(folder))
        parts = [checkpoint.tensors[f"t{i}"] for i in range(len(raw))]
        whole = joined(parts[0], (sum(sizes),), parts)
        begin = data.draw(st.integers(0, sum(sizes)))
        end = data.draw(st.integers(begin, sum(sizes)))
        view = memoryview(bytearray(end - begin))
        with Files(checkpoint.files) as files:
            files.read(whole, begin, view)
        assert bytes(view) == np.concatenate(raw).tobytes()[begin:end]
