"""A worker's place: the memory that the disk reads into and writes from, and the arrays that kernels work on.

On the processor these are the same bytes. On a device a slot has as much memory there as here: a tile is copied in,
computed and copied out, each in a stream of its own, so that one slot's copies go on while another's kernel runs.
Nobody waits for anything but a free slot, and memory is the slots' size times two, however large a tensor is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ggez_kernels.sparsify import Stats
from ggez_merge.errors import Failed
from ggez_merge.methods.method import Apply, Array
from ggez_merge.read import Arena, align

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DType = np.dtype[Any]


class Slot(Protocol):
    """What a worker borrows. Only the worker that has it touches it, until it is settled and given back."""

    arena: Arena

    def arrays(self, views: Sequence[memoryview], dtypes: Sequence[DType]) -> list[Array]:
        """What was just read into `views` of the arena, as arrays for the kernels."""

    def run(self, function: Callable[[], T]) -> T:
        """The answer of a function that calls kernels on the latest `arrays`."""

    def combine(
        self, apply: Apply, out: memoryview, dtype: DType, base: Array | None, models: Sequence[Array], start: int
    ) -> Stats:
        """Have the latest `arrays` combined into `out`, a view of the arena. It is there when this returns."""

    def settle(self) -> None:
        """Wait until nothing reads or writes this slot's memory any more."""


class HostSlot:
    """On the processor: computes in place."""

    def __init__(self, n_bytes: int) -> None:
        self.arena = Arena(n_bytes)

    def arrays(self, views: Sequence[memoryview], dtypes: Sequence[DType]) -> list[Array]:
        return [np.frombuffer(view, dtype) for view, dtype in zip(views, dtypes, strict=True)]

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def combine(
        self, apply: Apply, out: memoryview, dtype: DType, base: Array | None, models: Sequence[Array], start: int
    ) -> Stats:
        return apply(np.frombuffer(out, dtype), base, models, start)

    def settle(self) -> None:
        pass


class Work(Protocol):
    """Something a stream was told to do."""

    def result(self) -> Any:
        """Wait for it; its value, or the error it raised."""


class Stream(Protocol):
    """Does what it is told, later."""

    def do(self, work: Callable[[], Any], after: Work | None = None) -> Work:
        """Have `work` done once `after` is."""


class Accelerator(Protocol):
    """A device: memory here that it can copy from and to, memory there, and three streams."""

    name: str
    copy_in: Stream
    compute: Stream
    copy_out: Stream

    def host_memory(self, n_bytes: int) -> torch.Tensor:
        """uint8[n_bytes], page-aligned."""

    def memory(self, n_bytes: int) -> torch.Tensor:
        """uint8[n_bytes] on the device."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """In the stream that does this: from memory here to memory there, or back."""


class DeviceSlot:
    """On a device: the arena's twin there has everything at the same offsets."""

    def __init__(self, accelerator: Accelerator, n_bytes: int) -> None:
        self._accelerator = accelerator
        self._host = accelerator.host_memory(align(n_bytes))
        self._twin = accelerator.memory(align(n_bytes))
        self.arena = Arena(n_bytes, self._host.numpy().data)
        self._under_way: list[Work] = []

    def arrays(self, views: Sequence[memoryview], dtypes: Sequence[DType]) -> list[Array]:
        places = [self._place(view) for view in views]

        def copy() -> None:
            for place in places:
                self._accelerator.copy(self._twin[place], self._host[place])

        self._under_way = [self._accelerator.copy_in.do(copy)]
        return [self._there(place, dtype) for place, dtype in zip(places, dtypes, strict=True)]

    def run(self, function: Callable[[], T]) -> T:
        with self._errors():
            answer: T = self._then(self._accelerator.compute, function).result()
            return answer

    def combine(
        self, apply: Apply, out: memoryview, dtype: DType, base: Array | None, models: Sequence[Array], start: int
    ) -> Stats:
        place = self._place(out)
        target = self._there(place, dtype)

        def copy() -> None:
            self._accelerator.copy(self._host[place], self._twin[place])

        with self._errors():
            combined = self._then(self._accelerator.compute, lambda: apply(target, base, models, start))
            self._then(self._accelerator.copy_out, copy).result()
            stats: Stats = combined.result()
            return replace(
                stats,
                nonfinite=tuple(int(count) for count in stats.nonfinite),
                nonfinite_out=int(stats.nonfinite_out),
                delta_squares=tuple(float(squares) for squares in stats.delta_squares),
            )

    def settle(self) -> None:
        for work in self._under_way:
            with contextlib.suppress(Exception):  # whoever asked for it was told
                work.result()

    def _then(self, stream: Stream, work: Callable[[], Any]) -> Work:
        """Have it done after what this slot asked for last."""
        self._under_way.append(stream.do(work, after=self._under_way[-1]))
        return self._under_way[-1]

    def _place(self, view: memoryview) -> slice:
        """Where a view of the arena is in it, and so in its twin."""
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0] if len(view) else self._host.data_ptr()
        begin = int(address) - self._host.data_ptr()
        return slice(begin, begin + len(view))

    def _there(self, place: slice, dtype: DType) -> torch.Tensor:
        import torch

        return self._twin[place].view(getattr(torch, dtype.name))

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except RuntimeError as error:  # torch's, of which out-of-memory is one
            raise Failed(f"{self._accelerator.name}: {error}") from error
