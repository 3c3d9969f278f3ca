"""NVIDIA and AMD GPUs through torch.cuda: pinned memory, device memory, and a stream for each direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ggez_merge.errors import Failed
from ggez_merge.read import ALIGNMENT
from ggez_merge.slots import Stream


@dataclass(frozen=True)
class _Work:
    event: torch.cuda.Event
    value: Any

    def result(self) -> Any:
        self.event.synchronize()
        return self.value


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def do(self, work: Callable[[], Any], after: Any = None) -> _Work:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after.event)
            value = work()
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _Work(event, value)


class Cuda:
    """One GPU."""

    copy_in: Stream
    compute: Stream
    copy_out: Stream

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self.name = f"cuda:{index}, {torch.cuda.get_device_name(index)}"
        self.copy_in, self.compute, self.copy_out = (_Stream(self._device) for _ in range(3))

    def host_memory(self, n_bytes: int) -> torch.Tensor:
        raw = torch.empty(n_bytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
        begin = -raw.data_ptr() % ALIGNMENT
        return raw[begin : begin + n_bytes]

    def memory(self, n_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise Failed(f"{self.name}: no room for {n_bytes:,} bytes: lower --memory. {error}") from error

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)


def count() -> int:
    """How many GPUs torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
