"""The pipeline to a device: whatever order things happen in there, the bytes are the processor's."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_device import FakeGpu, Hostile
from merging import INTERPOLATE, TASK, TIES, carry_out, plan_of, scratch, tensors

from ggez_merge.errors import Failed, Interrupted
from ggez_merge.progress import Silent
from ggez_merge.run import Stop
from ggez_merge.slots import DeviceSlot

DARE = TASK.replace("task_arithmetic", "dare_linear").replace("weight:", "density: 0.6, weight:")
SLERP = "{merge_method: slerp, base_model: base, models: [{model: one}], parameters: {t: 0.3}}"
RECIPES = {
    "interpolate": INTERPOLATE,
    "soup": "{merge_method: linear, models: [{model: one}, {model: two}], parameters: {weight: 0.5}}",
    "task arithmetic": TASK,
    "ties": TIES,
    "ties of the paper": TIES + "parameters: {scope: global, ties: all}",
    "dare exact": DARE + "parameters: {rescale: exact, seed: 7}",
    "slerp": SLERP,
    "passthrough": "{merge_method: passthrough, dtype: float32, models: [{model: one}]}",
}
SHAPES = {"a": (70_001,), "scalar": (), "b": (3, 5), "none": (0,), "wide": (2, 3, 20_000), "z": (131,)}
SCHEDULES = 1000
BATCHES = 20


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trio")
    luck = np.random.default_rng(0)
    base = {name: luck.normal(size=shape) for name, shape in SHAPES.items()}
    tags = {"a": ml_dtypes.bfloat16, "wide": np.float16, "b": np.float32}
    for number, model in enumerate(("base", "one", "two")):
        made: dict[str, Any] = {}
        for name, value in base.items():
            step = luck.integers(-8, 9, size=value.shape) / 64 * (number > 0)
            made[name] = np.asarray(value + step, tags.get(name, ml_dtypes.bfloat16))
        write_checkpoint(folder / model, {**made, "ids": np.arange(9)})
    return folder


@pytest.fixture(scope="module")
def expected(trio: Path) -> dict[str, dict[str, tuple[str, bytes]]]:
    """What the processor gives."""
    found = {}
    for name, recipe in RECIPES.items():
        with scratch() as folder:
            carry_out(plan_of(trio, recipe, folder / "out"))
            found[name] = tensors(folder / "out")
    return found


@pytest.mark.parametrize("batch", range(BATCHES))
def test_any_schedule_gives_the_processors_bytes(
    batch: int, trio: Path, expected: dict[str, dict[str, tuple[str, bytes]]]
) -> None:
    """Late, out of order, poisoned, some with failures, some interrupted: those end so, and are taken up again."""
    threads_before = threading.active_count()
    ends: Counter[str] = Counter()
    with ThreadPoolExecutor(1) as watched:
        for seed in range(batch, SCHEDULES, BATCHES):
            ends[watched.submit(one_schedule, seed, trio, expected).result(timeout=60)] += 1
    assert set(ends) == {"done", "failed", "interrupted"}
    assert threading.active_count() == threads_before


class StopsAt(Silent):
    """Asks for an end once so many bytes are done."""

    def __init__(self, stop: Stop, n_bytes: int) -> None:
        self.stop, self.left = stop, n_bytes

    def advance(self, n_bytes: int) -> None:
        self.left -= n_bytes
        if self.left < 0:
            self.stop.ask(signal.SIGINT)


def one_schedule(seed: int, trio: Path, expected: dict[str, dict[str, tuple[str, bytes]]]) -> str:
    """How it ended at first: done, failed, or interrupted."""
    luck = random.Random(seed)
    name = luck.choice(list(RECIPES))
    failures = luck.choice([0.0, 0.0, 0.05])
    memory_bytes = luck.choice([6 << 20, 9 << 20, 24 << 20])
    stop = Stop()
    progress = StopsAt(stop, luck.choice([0, 300_000, 1_000_000])) if luck.random() < 0.2 else Silent()
    end = "done"
    with scratch() as folder:
        plan = plan_of(trio, RECIPES[name], folder / "out")
        with Hostile(seed, failures) as hostile:
            device = hostile.device(luck.randint(1, 6), luck.choice([64 << 10, 200 << 10, 1 << 20]))
            try:
                carry_out(plan, progress, stop, device=device, threads=None, memory_bytes=memory_bytes)
            except (Failed, Interrupted) as error:
                end = "interrupted" if isinstance(error, Interrupted) else "failed"
                assert end == "interrupted" or (failures and "fake: the device fell off the bus" in str(error)), seed
                assert not (folder / "out").exists(), seed
            assert hostile.under_way == 0, seed
        if end != "done":
            with Hostile(seed + SCHEDULES) as recovered:
                device = recovered.device(2)
                carry_out(plan, device=device, threads=None, memory_bytes=memory_bytes, resume=True)
        assert tensors(folder / "out") == expected[name], (seed, name)
    return end


def test_a_slot_is_settled_once_its_copies_are_done() -> None:
    with Hostile(0, delay_s=0.5) as hostile:
        slot = DeviceSlot(FakeGpu(hostile), 1 << 16)
        (view,) = slot.arena.carve([4096])
        slot.arrays([view], [np.dtype("f4")])
        assert hostile.under_way == 1
        slot.settle()
        assert hostile.under_way == 0
