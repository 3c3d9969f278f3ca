"""Merges in one line, for tests: recipes over tiny checkpoints, carried out here or by the command line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint

from ggez_merge.errors import Problem, Refused
from ggez_merge.merge import merge
from ggez_merge.plan import Plan, make_plan
from ggez_merge.progress import Silent
from ggez_merge.recipe import parse_recipe
from ggez_merge.run import Outcome, Stop

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"BF16": BF16, "F16": np.dtype("f2"), "F32": np.dtype("f4"), "F64": np.dtype("f8"), "I64": np.dtype("i8")}
LITTLE_MEMORY = 6 << 20  # hardly more than the least that three inputs need: blocks of some 100 KiB
INTERPOLATE = "{merge_method: linear, base_model: base, models: [{model: one}], parameters: {ratio: 0.3}}"
TASK = """
merge_method: task_arithmetic
base_model: base
models: [{model: one, parameters: {weight: 0.5}}, {model: two, parameters: {weight: 0.4}}]
"""
TIES = TASK.replace("task_arithmetic", "ties").replace("weight:", "density: 0.5, weight:")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the moment, in memory where that is possible: the tests need no disk to wait for."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def plan_of(folder: Path, recipe: str, out: str | Path = "out", overrides: Sequence[str] = ()) -> Plan:
    """The plan of a recipe (YAML) that lies in `folder`, to be written to `folder / out`."""
    return make_plan(parse_recipe(recipe, folder / "recipe.yaml", overrides), folder / out)


def carry_out(plan: Plan, progress: Any = None, stop: Stop | None = None, **options: Any) -> Outcome | None:
    options = {"threads": 2, **options}
    return merge(plan, progress=progress or Silent(), stop=stop, **options)


def merged(folder: Path, recipe: str, out: str = "out", **options: Any) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor that the recipe gives."""
    carry_out(plan_of(folder, recipe, out), **options)
    return tensors(folder / out)


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor in a folder's (or one file's) .safetensors, read without our code."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], raw[begin:end])
    return found


def arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor as a flat array."""
    return {name: np.frombuffer(raw, DTYPES[dtype]) for name, (dtype, raw) in tensors(folder).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "merge_report.json"
    }


def refusals(folder: Path, recipe: str, overrides: Sequence[str] = (), out: str = "out") -> list[Problem]:
    """The problems for which planning refuses the recipe."""
    with pytest.raises(Refused) as caught:
        plan_of(folder, recipe, out, overrides)
    return caught.value.problems


def models(
    folder: Path, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtype: Any = BF16, seed: int = 0
) -> None:
    """Checkpoints of these names: the first is random, the others are near it, with many equal deltas."""
    random = np.random.default_rng(seed)
    base = {name: np.asarray(random.normal(size=shape)) for name, shape in shapes.items()}
    for number, model in enumerate(names):
        steps = {name: random.integers(-8, 9, size=shape) / 256 * (number > 0) for name, shape in shapes.items()}
        write_checkpoint(folder / model, {name: np.asarray(base[name] + steps[name], dtype) for name in shapes})


def sparse(path: Path, tensors_: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A checkpoint of zeros that takes no disk: name -> (dtype tag, shape)."""
    header, at = {}, 0
    for name, (tag, shape) in tensors_.items():
        n_bytes = int(np.prod(shape)) * DTYPES[tag].itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    return path


COMMAND = [sys.executable, "-m", "ggez_merge"]


def command_line(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `ggez-merge`. Whatever happens, a user sees no traceback."""
    command = [*COMMAND, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **options)
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    return result


def read_all(terminal: int) -> str:
    """Everything that is shown until the other side is gone."""
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    return shown.decode(errors="replace")
