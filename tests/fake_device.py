"""A device for tests: as asynchronous as a GPU, and hostile.

Its streams do things late and out of order, as far as nobody asked for one after another; what was copied is poisoned
at once, because from then on it may be reused; and now and then something fails. It computes with the processor's
kernels, so the bytes must be the processor's.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import torch

from ggez_kernels.sparsify import Counting, Stats
from ggez_merge.arithmetic import load_kernels
from ggez_merge.backend import Backend, Device
from ggez_merge.methods.method import Kernels
from ggez_merge.slots import DeviceSlot, Stream

POISON = 0xA5


class Hostile:
    """What all slots of a fake device share: streams, luck, and a count of what is under way."""

    def __init__(self, seed: int, failures: float = 0.0, delay_s: float = 0.0005, in_order: bool = False) -> None:
        self.luck = random.Random(seed)
        self.failures = failures
        self.delay_s = delay_s
        self.under_way = 0
        self.lock = threading.Lock()
        self.streams = [HostileStream(self, 1 if in_order else 3) for _ in range(3)]

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self.streams:
            stream.pool.shutdown()

    def device(self, slots: int, most_block_bytes: int = 1 << 20, kernels: Kernels | None = None) -> Device:
        def load() -> Backend:
            taken = kernels or kernels_on_tensors()
            return Backend("fake", taken, lambda number, n_bytes: DeviceSlot(FakeGpu(self), n_bytes))

        return Device("fake", "for a test", slots, most_block_bytes, load)


class HostileStream:
    def __init__(self, shared: Hostile, threads: int) -> None:
        self.shared = shared
        self.pool = ThreadPoolExecutor(threads)

    def do(self, work: Callable[[], Any], after: Any = None) -> Future[Any]:
        with self.shared.lock:
            self.shared.under_way += 1
            delay = self.shared.luck.random() * self.shared.delay_s
            fails = self.shared.luck.random() < self.shared.failures

        def late() -> Any:
            try:
                time.sleep(delay)
                if after is not None:
                    after.result()
                if fails:
                    raise RuntimeError("the device fell off the bus")
                return work()
            finally:
                with self.shared.lock:
                    self.shared.under_way -= 1

        return self.pool.submit(late)


class FakeGpu:
    """One slot's view of the device."""

    name = "fake"

    def __init__(self, shared: Hostile) -> None:
        self.copy_in, self.compute, self.copy_out = cast("list[Stream]", shared.streams)

    def host_memory(self, n_bytes: int) -> torch.Tensor:
        return torch.full((n_bytes,), POISON, dtype=torch.uint8)

    def memory(self, n_bytes: int) -> torch.Tensor:
        self.there = torch.full((n_bytes,), POISON, dtype=torch.uint8)
        return self.there

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)
        source.fill_(POISON)
        if source.untyped_storage().data_ptr() == self.there.untyped_storage().data_ptr():
            self.there.fill_(POISON)  # the result is out: the whole slot is free for the next tile


def kernels_on_tensors() -> Kernels:
    """The processor's kernels for torch tensors, answering as those of a GPU do."""
    kernels = vars(load_kernels()[0])
    wrapped = {name: on_tensors(function) for name, function in kernels.items() if callable(function)}
    return cast(Kernels, SimpleNamespace(**wrapped, counting=Counting(11, 1 << 11, 1)))


def on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        answer = function(*(as_array(argument) for argument in arguments), **options)
        if not isinstance(answer, Stats):
            return answer
        return replace(
            answer,
            nonfinite=tuple(torch.tensor(count) for count in answer.nonfinite),
            nonfinite_out=torch.tensor(answer.nonfinite_out),
            delta_squares=tuple(torch.tensor(squares, dtype=torch.float64) for squares in answer.delta_squares),
        )

    return call


def as_array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    return [as_array(part) for part in value] if isinstance(value, (list, tuple)) else value
