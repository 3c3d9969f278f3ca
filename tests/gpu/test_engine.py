"""Whole merges with the Triton kernels: a checkpoint's bytes are the processor's."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_device import Hostile
from merging import INTERPOLATE, TASK, TIES, carry_out, plan_of, tensors

from ggez_merge.arithmetic import kernels_for

DARE = TASK.replace("task_arithmetic", "dare_linear").replace("weight:", "density: 0.6, weight:")
RECIPES = {
    "interpolate": INTERPOLATE,
    "soup": "{merge_method: linear, models: [{model: one}, {model: two}], parameters: {weight: 0.5}}",
    "task arithmetic": TASK,
    "ties": TIES,
    "ties of the paper": TIES + "parameters: {scope: global, ties: all, vote: count, normalize: false}",
    "dare exact": DARE + "parameters: {rescale: exact, seed: 7}",
    "dare ties, l1": DARE.replace("dare_linear", "dare_ties") + "parameters: {rescale: l1}",
    "slerp": "{merge_method: slerp, base_model: base, models: [{model: one}], parameters: {t: 0.3}}",
    "passthrough": "{merge_method: passthrough, dtype: float32, models: [{model: one, parameters: {scale: 0.7}}]}",
}
DTYPES = {"a": ml_dtypes.bfloat16, "b": np.float16, "c": np.float32, "mixed": None}
SHAPES = {"a": (3001,), "b": (3, 5), "c": (2, 130), "mixed": (33,), "scalar": (), "none": (0,)}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    luck = np.random.default_rng(0)
    base = {name: luck.normal(size=shape) for name, shape in SHAPES.items()}
    for number, model in enumerate(("base", "one", "two")):
        made = {}
        for name, value in base.items():
            step = luck.integers(-8, 9, size=value.shape) / 64 * (number > 0)
            dtype = DTYPES.get(name, ml_dtypes.bfloat16) or (ml_dtypes.bfloat16, np.float32, np.float16)[number]
            made[name] = np.asarray(value + step, dtype)
        write_checkpoint(folder / model, made)
    return folder


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_bytes_are_the_processors(recipe: str, trio: Path, tmp_path: Path) -> None:
    plan = plan_of(trio, recipe, tmp_path / "here")
    carry_out(plan)
    with Hostile(0, in_order=True) as hostile:  # the interpreter is not made for several threads
        there = plan_of(trio, recipe, tmp_path / "there")
        carry_out(there, device=hostile.device(2, kernels=kernels_for("cuda")), threads=None)
    assert tensors(tmp_path / "there") == tensors(tmp_path / "here")
