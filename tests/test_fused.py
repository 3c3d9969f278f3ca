"""Weights in one tensor merged with weights in several: q, k and v, gate and up, experts."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, LITTLE_MEMORY, TIES, arrays, merged, plan_of, refusals, scratch, tensors

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
    for name, parent in zip(("base", "one", "two"), parents, strict=True):
        write_checkpoint(tmp_path / name, fused(parent, n))
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


@pytest.mark.parametrize("why", ["square", "on its side", "expert missing", "one expert more"])
@pytest.mark.parametrize("base_is_fused", [True, False])
def test_experts_that_do_not_fit_are_refused(why: str, base_is_fused: bool, tmp_path: Path) -> None:
    height, width = (4, 8) if why == "square" else (4, 5)
    in_several, in_one = split(3, height, width, 1), fused(split(3, height, width, 0), 3)
    if why == "expert missing":
        del in_several[f"{PARENT}.1.up_proj.weight"]
    if why == "one expert more":
        in_several[f"{PARENT}.3.up_proj.weight"] = in_several[f"{PARENT}.1.up_proj.weight"]
    if why == "on its side":
        in_one[f"{PARENT}.gate_up_proj"] = in_one[f"{PARENT}.gate_up_proj"].transpose(0, 2, 1).copy()
    write_checkpoint(tmp_path / "base", in_one if base_is_fused else in_several)
    write_checkpoint(tmp_path / "one", in_several if base_is_fused else in_one)
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "lacks" in said and "gate_up_proj" in said
    if why in ("square", "on its side"):
        assert "its matrices may lie on their sides" in said


def test_parts_of_several_dtypes_are_not_one_tensor(tmp_path: Path) -> None:
    one = split(3, 4, 5, 1)
    one[f"{PARENT}.1.up_proj.weight"] = one[f"{PARENT}.1.up_proj.weight"].astype(np.float32)
    write_checkpoint(tmp_path / "base", fused(split(3, 4, 5, 0), 3))
    write_checkpoint(tmp_path / "one", one)
    assert any("its parts have several dtypes" in problem.what for problem in refusals(tmp_path, INTERPOLATE))


def test_experts_on_their_sides_are_another_shape(tmp_path: Path) -> None:
    """As transformers 4 and 5 hold those of Qwen3-VL-MoE: under one name, but [in, out] and [out, in]."""
    base = fused(split(3, 4, 5, 0), 3)
    write_checkpoint(tmp_path / "base", base)
    turned = {name: array.transpose(0, 2, 1).copy() if array.ndim == 3 else array for name, array in base.items()}
    write_checkpoint(tmp_path / "one", turned)
    problems = refusals(tmp_path, INTERPOLATE)
    assert [problem.what for problem in problems] == ["the inputs disagree on a tensor's shape"] * 2
    assert all(problem.remedy and "on its side" in problem.remedy for problem in problems)


# --- q, k and v, gate and up -----------------------------------------------------------------------------------------

WAYS = {  # a fused tensor -> its parts
    "attn.qkv.{}": ("attn.q_proj.{}", "attn.k_proj.{}", "attn.v_proj.{}"),
    "self_attn.qkv_proj.{}": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
    "self_attn.in_proj_{}": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
    "attn1.to_qkv.{}": ("attn1.to_q.{}", "attn1.to_k.{}", "attn1.to_v.{}"),
    "attn2.to_kv.{}": ("attn2.to_k.{}", "attn2.to_v.{}"),
    "attention.self.Wqkv.{}": ("attention.self.query.{}", "attention.self.key.{}", "attention.self.value.{}"),
    "crossattention.kv.{}": ("crossattention.key.{}", "crossattention.value.{}"),
    "mlp.gate_up_proj.{}": ("mlp.gate_proj.{}", "mlp.up_proj.{}"),
}


def rows(way: str, heights: tuple[int, ...], width: int, seed: int) -> tuple[Arrays, Arrays]:
    """The weights and biases of two layers, in several tensors and in one each."""
    random = np.random.default_rng(seed)
    large: Arrays = {}
    small: Arrays = {}
    for layer, kind in ((layer, kind) for layer in range(2) for kind in ("weight", "bias")):
        place = f"model.layers.{layer}."
        parts = [random.normal(size=(n, width)[: 2 if kind == "weight" else 1]).astype(BF16) for n in heights]
        stems = WAYS[way]
        small |= {place + stem.format(kind): part for stem, part in zip(stems, parts, strict=False)}
        large[place + way.format(kind)] = np.concatenate(parts[: len(stems)])
        for others in (large, small):
            others[f"{place}norm.{kind}"] = np.full(width, seed, BF16)
    return large, dict(sorted(small.items(), reverse=True))


@settings(deadline=None)
@given(
    way=st.sampled_from(list(WAYS)),
    query=st.integers(1, 9),
    rest=st.integers(1, 9),
    width=st.integers(1, 9),
    base_is_fused=st.booleans(),
)
def test_rows_of_any_sizes_are_merged_as_in_one_form(
    way: str, query: int, rest: int, width: int, base_is_fused: bool
) -> None:
    """Grouped queries too: as many rows of keys as of values, more or fewer of queries."""
    heights = (query, rest, rest)
    pairs = [rows(way, heights, width, seed) for seed in (0, 1)]
    with scratch() as folder:
        for form in (0, 1):
            write_checkpoint(folder / "base", pairs[0][form])
            write_checkpoint(folder / "one", pairs[1][form])
            merged(folder, INTERPOLATE, f"form {form}")
        write_checkpoint(folder / "base", pairs[0][0 if base_is_fused else 1])
        write_checkpoint(folder / "one", pairs[1][1 if base_is_fused else 0], shards=2)
        (folder / "one" / "model.safetensors").unlink()
        assert merged(folder, INTERPOLATE, "mixed") == tensors(folder / f"form {0 if base_is_fused else 1}")


def test_the_rules_name_the_parts_in_their_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", rows("attn.qkv.{}", (4, 2, 2), 3, 0)[0])
    write_checkpoint(tmp_path / "one", rows("attn.qkv.{}", (4, 2, 2), 3, 1)[1])
    (renaming,) = plan_of(tmp_path, INTERPOLATE).renamings
    place = "model.layers.*.attn"
    assert {str(rule) for rule in renaming.rules} == {
        "4 tensors of the same name",
        f"{place}.(q_proj, k_proj, v_proj).weight ↔ {place}.qkv.weight: 6 tensors",
        f"{place}.(q_proj, k_proj, v_proj).bias ↔ {place}.qkv.bias: 6 tensors",
    }


@pytest.mark.parametrize("word", ["query_key_value", "wqkv", "linear_qkv", "c_attn"])
@pytest.mark.parametrize("missing", ["error", "copy"])
@pytest.mark.parametrize("base_is_fused", [True, False])
def test_rows_in_an_order_that_no_name_tells_are_refused(
    word: str, missing: str, base_is_fused: bool, tmp_path: Path
) -> None:
    """`missing: copy` would write both forms, of which a loader takes one."""
    large, small = rows("attn.qkv.{}", (4, 4, 4), 3, 0)
    large = {name.replace("qkv", word): array for name, array in large.items()}
    write_checkpoint(tmp_path / "base", large if base_is_fused else small)
    write_checkpoint(tmp_path / "one", small if base_is_fused else large)
    problems = [x for x in refusals(tmp_path, INTERPOLATE, [f"missing={missing}"]) if "fused and split" in x.what]
    assert len(problems) == 2  # weights and biases, of all layers together
    for problem in problems:
        assert "some models" in problem.what or "Megatron" in problem.what
        seen = f"{problem.expected} {problem.found}"
        assert f"model.layers.*.attn.{word}." in seen and "attn.(q_proj, k_proj, v_proj)." in seen


@pytest.mark.parametrize("why", ["on its side", "a part missing", "two dtypes", "in_proj.weight", "other sizes"])
def test_rows_that_do_not_fit_are_refused(why: str, tmp_path: Path) -> None:
    large, small = rows("attn.qkv.{}", (4, 4, 4), 5, 0)
    place = "model.layers.0.attn"
    if why == "on its side":
        large = {name: array.T.copy() for name, array in large.items()}
    if why == "a part missing":
        del small[f"{place}.k_proj.weight"]
    if why == "two dtypes":
        small[f"{place}.k_proj.weight"] = small[f"{place}.k_proj.weight"].astype(np.float32)
    if why == "in_proj.weight":  # torch has no such name; one model's has rows in another order
        large = {name.replace("qkv", "in_proj"): array for name, array in large.items()}
    if why == "other sizes":
        small[f"{place}.k_proj.weight"] = small[f"{place}.k_proj.weight"][1:]
    write_checkpoint(tmp_path / "base", large)
    write_checkpoint(tmp_path / "one", small)
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "one lacks" in said
    reason = {"on its side": "rows are not theirs one after the other", "two dtypes": "several dtypes"}.get(why, "")
    assert reason in said


def test_what_transformers_changes_on_the_way_is_refused(tmp_path: Path) -> None:
    """Its table for this vision tower cuts torch's q, k and v and then reorders rows for rotary embeddings."""
    large, small = rows("self_attn.in_proj_{}", (4, 4, 4), 5, 0)
    large, small = ({name.replace("self_attn", "attn"): x for name, x in y.items()} for y in (large, small))
    config = {"model_type": "step3p5_vision"}
    write_checkpoint(tmp_path / "base", small, config=config)
    write_checkpoint(tmp_path / "one", large, config=config)
    said = " ".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
    assert "transformers does more than put its parts one after the other" in said


def test_experts_as_wide_as_high_are_told_by_the_table_of_their_model(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe"}
    base, one = split(3, 4, 8, 0), split(3, 4, 8, 1)
    write_checkpoint(tmp_path / "base", fused(base, 3), config=config)
    write_checkpoint(tmp_path / "one", fused(one, 3), config=config)
    expected = merged(tmp_path, INTERPOLATE, "fused")
    write_checkpoint(tmp_path / "one", one, config=config)
    assert merged(tmp_path, INTERPOLATE, "mixed") == expected


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
