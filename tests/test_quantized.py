"""8-bit weights with scales: what they stand for, and that no recipe merges them as they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, TASK, command_line, refusals
from state_dicts import raw

import ggez_merge
from ggez_merge.errors import Refused

README = Path(__file__).parents[1] / "README.md"
CODES = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every code in turn, NaN and infinities among them."""
    return torch.arange(int(np.prod(shape))).to(torch.uint8).view(dtype).view(shape)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(list(CODES)),
    out_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.sampled_from([1, 2, 16, 128]), st.sampled_from([1, 2, 16, 128])),
)
def test_every_block_is_multiplied_by_its_scale(
    dtype: torch.dtype, out_dtype: torch.dtype, rows: int, columns: int, block: tuple[int, int]
) -> None:
    quantized = codes(dtype, rows, columns)
    scale = torch.linspace(0.01, 3, -(-rows // block[0]) * -(-columns // block[1])).view(-(-rows // block[0]), -1)
    found = ggez_merge.dequantize(quantized, scale, out_dtype=out_dtype)
    values = quantized.view(torch.uint8).numpy().view(CODES[dtype]).astype(np.float32)
    spread = np.repeat(np.repeat(scale.numpy(), block[0], 0), block[1], 1)[:rows, :columns]
    expected = torch.from_numpy(values * spread).to(out_dtype)
    assert found.dtype == out_dtype
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_does_for_any_shape(shape: tuple[int, ...]) -> None:
    quantized = torch.nn.Parameter(torch.ones(2, 3, 4).to(torch.float8_e5m2), requires_grad=False)
    found = ggez_merge.dequantize(quantized, torch.full(shape, 0.5))
    assert (found.dtype, found.shape, found.requires_grad) == (torch.bfloat16, (2, 3, 4), False)
    assert bool((found == 0.5).all())


MATRIX = codes(torch.float8_e4m3fn, 4, 6)


@pytest.mark.parametrize(
    ("quantized", "scale", "error", "said"),
    [
        (MATRIX.float(), torch.ones(1), TypeError, "quantized has dtype torch.float32"),
        (MATRIX, torch.ones(1).bfloat16(), TypeError, "scale has dtype torch.bfloat16, expected float32"),
        (MATRIX, torch.ones(3, 6), Refused, r"\(3, 6\) does not cut \(4, 6\) into blocks(.|\n)*remedy"),
        (MATRIX, torch.ones(4), Refused, "needs a matrix"),
        (MATRIX.t(), torch.ones(1), Refused, "not contiguous(.|\n)*contiguous tensors"),
        (MATRIX, torch.ones(1, device="meta"), Refused, "scale is on meta"),
    ],
)
def test_what_does_not_go_together(
    quantized: torch.Tensor, scale: torch.Tensor, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ggez_merge.dequantize(quantized, scale)


def test_the_example_in_the_readme() -> None:
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "dequantize" in text]
    quantized = {"a.weight": MATRIX, "a.weight_scale_inv": torch.full((2, 3), 2.0)}
    state = {"b.weight": torch.ones(3), **quantized}
    exec(block, {"ggez_merge": ggez_merge, "state": state})
    assert list(state) == ["b.weight", "a.weight"]
    assert raw(state["a.weight"]) == raw(ggez_merge.dequantize(*quantized.values()))
    assert ggez_merge.linear(state, state, ratio=0.5).keys() == state.keys()


# --- in recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tag"), [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2")])
@pytest.mark.parametrize("where", [["base"], ["one"], ["base", "one"]])
def test_a_recipe_with_8_bit_weights_is_refused(where: list[str], dtype: Any, tag: str, tmp_path: Path) -> None:
    for model in ("base", "one"):
        made = {"norm": np.ones(3, "f4"), "w": np.ones(3, dtype if model in where else "f4")}
        write_checkpoint(tmp_path / model, made)
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    for options in ([], ["--dry-run"]):
        result = command_line("recipe.yaml", "--out", "out", *options, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.count("8-bit floats cannot be merged") == len(where)
        for words in (tag, "tensor:   w\n", "save them as bfloat16 (tensor.to(torch.bfloat16))"):
            assert words in result.stderr
        assert all(os.path.join(model, "model.safetensors") in result.stderr for model in where)
        assert not (tmp_path / "out").exists()


def test_8_bit_weights_are_named_once_a_file(tmp_path: Path) -> None:
    for model in ("base", "one", "two"):
        made = {f"w{i}": np.ones(3, ml_dtypes.float8_e4m3fn if model == "one" else "f4") for i in range(5)}
        write_checkpoint(tmp_path / model, made)
    (problem,) = refusals(tmp_path, TASK)
    assert problem.tensor == "w0, w1, w2 and 2 more"


def test_8_bit_weights_are_not_copied_where_others_lack_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"norm": np.ones(3, "f4"), "w": np.ones(3, ml_dtypes.float8_e4m3fn)})
    write_checkpoint(tmp_path / "one", {"norm": np.ones(3, "f4")})
    (problem,) = refusals(tmp_path, INTERPOLATE, ["missing=copy"])
    assert (problem.tensor, problem.found) == ("w", "F8_E4M3")


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", CODES)
def test_a_gpu_gives_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    quantized, scale = codes(dtype, 300, 200), torch.rand(3, 2)
    found = ggez_merge.dequantize(quantized.cuda(), scale.cuda())
    assert found.is_cuda
    expected = ggez_merge.dequantize(quantized, scale)
    assert raw(found.cpu().nan_to_num(nan=7.0)) == raw(expected.nan_to_num(nan=7.0))
