"""Where kernels run: on so many threads of this processor, or on a GPU. Both put data, split it, and time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import CHUNK
from ggez_merge.arithmetic import kernels_of
from ggez_merge.errors import Problem, Refused

from .inputs import Data
from .table import processor

SLOW_S = 2.0  # what takes longer than this in all has had its turns after the first few
FEW = 3


class Cpu:
    """Numpy arrays, one tile a thread."""

    device = "cpu"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.machine = processor()
        self.kernels = kernels_of("cpu")
        self._pool = ThreadPoolExecutor(threads)

    def put(self, host: Data) -> Data:
        return host

    def tiles(self, data: Data) -> list[Data]:
        return data.tiles(max(1, -(-len(data.base) // (self.threads * CHUNK))) * CHUNK)

    def each(self, function: Callable[[Data], Any], tiles: Sequence[Data]) -> list[Any]:
        return list(self._pool.map(function, tiles))

    def tensors(self, data: Data) -> Data:
        """The same memory for torch, which is told to use as many threads as we do."""
        torch.set_num_threads(self.threads)
        return data.map(tensor)

    def copy(self, tile: Data) -> None:
        np.copyto(tile.outs[0].view(np.uint8), tile.base.view(np.uint8))

    def time(self, actions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        """Seconds of each turn of each action: they take turns, so that a noisy moment meets all of them."""
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, action in actions.items():
                if len(seconds[name]) >= FEW and sum(seconds[name]) > SLOW_S:
                    continue
                began = time.perf_counter()
                action()
                seconds[name].append(time.perf_counter() - began)
        return seconds


class Gpu:
    """Torch tensors on a CUDA or ROCm device, one tile, timed by its own clock with a cold cache."""

    threads = ""

    def __init__(self, device: str) -> None:
        self.device = device
        self.kernels = kernels_of("gpu")

    @property
    def machine(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)} with {processor()}"

    def put(self, host: Data) -> Data:
        return host.map(lambda array: tensor(array).to(self.device))

    def tiles(self, data: Data) -> list[Data]:
        return [data]

    def each(self, function: Callable[[Data], Any], tiles: Sequence[Data]) -> list[Any]:
        return [function(tile) for tile in tiles]

    def tensors(self, data: Data) -> Data:
        return data

    def copy(self, tile: Data) -> None:
        tile.outs[0].copy_(tile.base)

    def time(self, actions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        """Seconds of each turn of each action; `repeats` is left to Triton, which fills 0.1 s with them."""
        from triton.testing import do_bench

        torch.cuda.set_device(self.device)
        return {name: [ms / 1000 for ms in do_bench(action, return_mode="all")] for name, action in actions.items()}


def places(device: str, threads: Sequence[int]) -> list[Cpu] | list[Gpu]:
    """Those that a device's name means: auto, cpu (with each of `threads`), cuda, cuda:1."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return [Cpu(n) for n in threads or sorted({1, os.cpu_count() or 1})]
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise Refused(Problem(f"`{device}` is no device", expected="auto, cpu, cuda or cuda:1"))
    n_gpus = torch.cuda.device_count()
    if int(index or 0) >= n_gpus:
        raise Refused(Problem(f"there is no device {device} here", found=f"{n_gpus} GPUs that torch can use"))
    return [Gpu(f"cuda:{index or torch.cuda.current_device()}")]
