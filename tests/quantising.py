"""Quantised weights for tests, made and unmade in plain numpy: codes at random, what they stand for in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint

from ggez_merge.checkpoint import Checkpoint, open_checkpoint
from ggez_merge.errors import Refused
from ggez_merge.read import Files

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]
W = "layers.0.q_proj.weight"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)


@dataclass(frozen=True)
class Stored:
    """One weight as files hold it, by the rest of its name ("", "_scale" …), and what it stands for, in float32."""

    config: dict[str, Any]
    tensors: Mapping[str, Array]
    weight: Array

    def named(self, name: str) -> dict[str, Array]:
        return {name + rest: array for rest, array in self.tensors.items()}


@dataclass(frozen=True)
class Way:
    """A way to quantise: `block` rows and columns share a scale, 0 for all."""

    method: str
    block: tuple[int, int] = (0, 0)
    kind: str = "float"
    bits: int = 8
    packed: bool = False
    zero: bool = False
    dtype: Any = E4M3
    scale: Any = np.float32
    suffix: str = "_scale"
    more: Mapping[str, Any] = field(default_factory=dict)

    def store(self, shape: Shape, seed: int = 0) -> Stored:
        random = np.random.default_rng(seed)
        *lead, rows, columns = shape if len(shape) > 1 else (1, *shape)
        height, width = min(self.block[0] or rows, rows), min(self.block[1] or columns, columns)
        table = (*lead, -(-rows // height), -(-columns // width))
        scale = (2.0 ** random.integers(-9, -2, table) * random.choice([1, 1.25, 1.5], table)).astype(self.scale)
        half = 1 << (self.bits - 1)
        zero = random.integers(-half, half, table) * self.zero
        if self.kind == "float":
            codes: Array = random.normal(size=shape).astype(self.dtype)
        else:
            codes = random.integers(-half, half, shape).astype(np.int8)
        spread = [np.repeat(np.repeat(each, height, -2), width, -1)[..., :rows, :columns] for each in (scale, zero)]
        weight = (codes.astype("f8").reshape(*lead, rows, columns) - spread[1]) * spread[0].astype("f8")
        tensors: dict[str, Array] = {
            "": codes,
            self.suffix: scale if self.block != (0, 0) or lead else scale.reshape(1),
        }
        if self.packed:
            tensors = {"_packed": words(codes, self.bits), "_scale": scale, "_shape": np.array(shape)}
        if self.zero:
            down = words(zero.swapaxes(-1, -2), self.bits).swapaxes(-1, -2)
            tensors["_zero_point"] = np.ascontiguousarray(down) if self.packed else zero.astype(np.int8)
        return Stored({"quantization_config": self.config()}, tensors, weight.astype("f4").reshape(shape))

    def config(self) -> dict[str, Any]:
        if self.method != "compressed-tensors":
            return {"quant_method": self.method, **self.more}
        weights = {"type": self.kind, "num_bits": self.bits, "symmetric": not self.zero, **self.more}
        names = {(0, 0): "tensor", (1, 0): "channel"}
        weights["strategy"] = names.get(self.block) or ("group" if self.block[0] == 1 else "block")
        weights |= {"group_size": self.block[1] or None, "block_structure": list(self.block)}
        form = "pack-quantized" if self.packed else f"{self.kind}-quantized"
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": self.method, "format": form, "config_groups": groups}


def words(codes: Array, bits: int) -> Array:
    """The last axis in words of 32 bits, the first code in the lowest bits, each made unsigned."""
    each = 32 // bits
    unsigned = codes.astype(np.int64) + (1 << (bits - 1))
    room = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // each) * each), np.int64)
    room[..., : codes.shape[-1]] = unsigned
    shifted = room.reshape(*codes.shape[:-1], -1, each) << (np.arange(each) * bits)
    return shifted.sum(-1).astype(np.uint32).view(np.int32)


def _compressed(block: tuple[int, int], **more: Any) -> Way:
    return Way("compressed-tensors", block, **more)


BLOCK = {"weight_block_size": [128, 128]}
WAYS = {
    "fp8 by blocks": Way("fp8", (128, 128), suffix="_scale_inv", more=BLOCK),
    "fp8 by small blocks": Way("fp8", (3, 5), suffix="_scale_inv", more={"weight_block_size": [3, 5]}),
    "fp8 in powers of two": Way(
        "fp8", (4, 8), suffix="_scale_inv", scale=ml_dtypes.float8_e8m0fnu, more={"weight_block_size": [4, 8]}
    ),
    "fp8 of another format": Way("fp8", (128, 128), dtype=E5M2, suffix="_scale_inv"),
    "fp8 with one scale": Way("fp8", more={"activation_scheme": "static"}),
    "fbgemm": Way("fbgemm_fp8", (1, 0)),
    "modelopt": Way("modelopt", more={"quant_algo": "FP8"}),
    "compressed fp8 with one scale": _compressed((0, 0), scale=ml_dtypes.bfloat16),
    "compressed fp8 by rows": _compressed((1, 0), scale=ml_dtypes.bfloat16),
    "compressed fp8 by blocks": _compressed((16, 24)),
    "compressed int8 by rows": _compressed((1, 0), kind="int", scale=np.float16),
    "compressed int8 with zeros": _compressed((1, 0), kind="int", zero=True),
    "packed int4 by groups": _compressed((1, 8), kind="int", bits=4, packed=True, scale=ml_dtypes.bfloat16),
    "packed int4 with zeros": _compressed((1, 8), kind="int", bits=4, packed=True, zero=True),
    "packed int4 by rows": _compressed((1, 0), kind="int", bits=4, packed=True, zero=True),
    "packed int8 by groups": _compressed((1, 8), kind="int", packed=True, zero=True),
    "packed int4 with one scale": _compressed((0, 0), kind="int", bits=4, packed=True),
}


def shapes_of(way: Way) -> tuple[Shape, ...]:
    """Shapes that its blocks do not divide, unless they have to."""
    wide = 8 * 17 if way.block == (1, 8) else 131
    return ((13, wide), (1, wide)) if way.method == "fbgemm_fp8" else ((13, wide), (1, wide), (3, 7, wide))


def refusal(folder: Path, arrays: Mapping[str, Array], config: dict[str, Any] | None) -> str:
    """What is said of the one problem for which a checkpoint is refused."""
    write_checkpoint(folder, arrays, config=config)
    with pytest.raises(Refused) as caught:
        open_checkpoint(str(folder))
    (problem,) = caught.value.problems
    assert problem.place is not None and problem.remedy is not None
    return str(problem)


def whole(checkpoint: Checkpoint, name: str) -> Array:
    """All elements of a tensor."""
    tensor = checkpoint.tensors[name]
    with Files(checkpoint.files) as files:
        found: Array = files.elements(tensor, 0, tensor.numel)
    return found.reshape(tensor.shape)
