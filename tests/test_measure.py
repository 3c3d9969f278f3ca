"""Measuring: every tile once a sweep, the same sums whatever the arenas, and progress that adds up."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import plan_of, scratch

from ggez_merge.errors import Interrupted
from ggez_merge.measure import CHUNK, Bench, measure
from ggez_merge.methods.method import Job, Kernels, Measurement, Method, Sweep, Tile
from ggez_merge.plan import Plan
from ggez_merge.read import Files
from ggez_merge.slots import HostSlot

SIZES = {"a": 3 * CHUNK + 5, "b": 10, "c": 0, "d": CHUNK, "e": 2 * CHUNK + 1}
RECIPE = "{merge_method: task_arithmetic, base_model: base, models: [model: one], parameters: {weight: 1}}"
WIDTH = 8  # bytes of one element of the base (float32) and the model (float32)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tmp_path_factory.mktemp("measure")
    random = np.random.default_rng(0)
    for model in ("base", "one"):
        made = {name: random.integers(0, 100, size).astype("f4") for name, size in SIZES.items()}
        write_checkpoint(folder / model, made)
    yield plan_of(folder, RECIPE)


class Told:
    """What a bench is told about progress, and where it may be told to stop."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.n_bytes, self.calls, self.stop_at = 0, 0, stop_at

    def advance(self, n_bytes: int) -> None:
        self.calls += 1
        self.n_bytes += n_bytes
        if self.stop_at is not None and self.calls > self.stop_at:
            raise Interrupted("stopped", signal.SIGINT)


def measured(plan: Plan, method: Method, workers: int, arena_bytes: int, told: Told | None = None) -> list[Any]:
    told = told or Told()
    slots: queue.SimpleQueue[HostSlot] = queue.SimpleQueue()
    for _ in range(workers):
        slots.put(HostSlot(arena_bytes))

    @contextmanager
    def lend() -> Iterator[HostSlot]:
        slot = slots.get(timeout=60)
        try:
            yield slot
        finally:
            slots.put(slot)

    def wait(futures: Sequence[Future[Any]]) -> list[Any]:
        return [future.result(timeout=60) for future in futures]

    files = [file for checkpoint in plan.checkpoints for file in checkpoint.files]
    with Files(files) as opened, ThreadPoolExecutor(workers) as executor:
        bench = Bench(
            kernels=SimpleNamespace(),  # type: ignore[arg-type]
            files=opened,
            executor=executor,
            n_workers=workers,
            arena_bytes=arena_bytes,
            lend=lend,
            advance=told.advance,
            wait=wait,
        )
        return measure(method, plan.outputs, bench)


def counting(together: bool) -> Method:
    """Measures, in three sweeps: the sum of each job's model and base, then what tiles there are, then one of them."""

    def look(kernels: Kernels, jobs: Sequence[Job]) -> Measurement:
        def sums(tile: Tile) -> np.ndarray[Any, Any]:
            row = np.zeros((len(jobs), 2))
            row[tile.job] = tile.models[0].sum(dtype="f8"), tile.base.sum(dtype="f8")
            return row

        total = yield Sweep(sums)
        tiles = yield Sweep(lambda tile: [(tile.job, tile.start, tile.models[0].size)])
        job, start, _ = max(tiles)
        last = yield Sweep(lambda tile: [float(tile.models[0][-1]) if tile.models[0].size else None], only=(job, start))
        return [(total[i].tolist(), sorted(t for t in tiles if t[0] == i), last) for i in range(len(jobs))]

    return Method(
        name="counting",
        combine=lambda kernels, job, result: lambda out, base, models, start: None,  # type: ignore[arg-type,return-value]
        measure=look,
        measures_together=lambda job: together,
    )


def contents(plan: Plan) -> list[list[float]]:
    found = []
    for output in plan.outputs:
        base, model = (np.fromfile(x.file, np.float32, x.numel, offset=x.offset) for x in output.inputs)
        found.append([float(model.sum(dtype="f8")), float(base.sum(dtype="f8"))])
    return found


ARENAS = st.sampled_from([WIDTH * CHUNK + 3 * 4096, 3 * WIDTH * CHUNK, 1 << 24])


@settings(max_examples=40, deadline=None)
@given(workers=st.integers(1, 4), arena_bytes=ARENAS, together=st.booleans())
def test_each_sweep_sees_every_element_once(plan: Plan, workers: int, arena_bytes: int, together: bool) -> None:
    told = Told()
    results = measured(plan, counting(together), workers, arena_bytes, told)
    assert [result[0] for result in results] == contents(plan)
    for n, (_, tiles, last) in zip(SIZES.values(), results, strict=True):
        at = 0
        for _, start, size in tiles:
            assert start == at
            assert start % CHUNK == 0
            assert size * WIDTH <= arena_bytes
            at += size
        assert at == n
        assert len(last) == 1
    assert told.n_bytes == sum(SIZES.values()) * WIDTH


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_ends_any_sweep_not_only_the_first(plan: Plan, workers: int, together: bool) -> None:
    arena_bytes = WIDTH * CHUNK + 3 * 4096
    told = Told()
    measured(plan, counting(together), workers, arena_bytes, told)
    tiles = sum(max(1, -(-size // CHUNK)) for size in SIZES.values())
    assert told.calls > tiles
    for stop_at in range(told.calls):
        with pytest.raises(Interrupted):
            measured(plan, counting(together), workers, arena_bytes, Told(stop_at))


def test_a_method_that_measures_nothing(plan: Plan) -> None:
    nothing = Method(name="nothing", combine=plan.method.combine)
    assert measured(plan, nothing, 2, 1 << 24) == [None] * len(SIZES)


def test_tensors_that_are_not_merged_are_not_measured() -> None:
    with scratch() as folder:
        for model in ("base", "one"):
            write_checkpoint(folder / model, {"ids": np.arange(3), "w": np.ones(3, "f4")})
        results = measured(plan_of(folder, RECIPE), counting(False), 1, 1 << 24)
        assert [result is None for result in results] == [True, False]
        assert Path(folder, "base").exists()
