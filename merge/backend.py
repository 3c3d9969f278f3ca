"""What a merge computes on: the processor or GPUs, with kernels and the memory that they work on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggez_merge.arithmetic import kernels_of, load_kernels
from ggez_merge.errors import Problem, Refused
from ggez_merge.methods.method import Kernels
from ggez_merge.slots import DeviceSlot, HostSlot, Slot

MOST_THREADS = 16  # no disk keeps more busy
SLOTS_PER_GPU = 4  # one is read, one copied in, one computed or copied out, one written


@dataclass(frozen=True)
class Backend:
    """Kernels, and the memory they work on."""

    name: str
    kernels: Kernels
    slot: Callable[[int, int], Slot]
    """The n-th slot, of so many bytes."""


@dataclass(frozen=True)
class Device:
    """What a merge computes on, before any of it is loaded."""

    name: str
    why: str
    slots: int
    """Blocks under way at the same time, unless the user says otherwise."""
    most_block_bytes: int
    load: Callable[[], Backend]


def choose(wanted: str, *, method: str, measures: bool, doubles: bool) -> Device:
    """The device for a merge: `cpu`, `cuda` (all GPUs), `cuda:1` (that one), or `auto`.

    `auto` takes the GPUs for methods that read the weights several times, and the processor otherwise: it weighs and
    adds faster than a disk reads, and faster than weights travel to a GPU and back. doubles: whether there is float64
    among the weights, which is merged on the processor only. Refused for a device that is not there.
    """
    if wanted == "cpu":
        return _cpu("as asked for")
    if wanted != "auto":
        return _gpus(wanted, doubles)
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return _cpu("there is no GPU")
    if not measures:
        return _cpu(f"{method} reads everything once: a GPU would not be faster than the disk")
    if doubles:
        return _cpu("there is float64 among the weights")
    try:
        return _gpus("cuda", doubles, f"{method} reads everything several times")
    except Refused as error:
        return _cpu(f"{error.problems[0].found}")


def _cpu(why: str) -> Device:
    def load() -> Backend:
        kernels, name = load_kernels()
        return Backend(name, kernels, lambda number, n_bytes: HostSlot(n_bytes))

    # inputs and output of all workers then stay in the caches; disks want no more
    return Device("cpu", why, min(os.cpu_count() or 1, MOST_THREADS), 2 << 20, load)


def _gpus(wanted: str, doubles: bool, why: str = "as asked for") -> Device:
    n_gpus, found = 0, "torch is not installed"
    if importlib.util.find_spec("torch") is not None:
        from ggez_merge import cuda

        n_gpus = cuda.count()
        found = f"torch can use {n_gpus} GPUs"
    names = [name for name in (f"cuda:{index}" for index in range(n_gpus)) if wanted in ("cuda", name)]
    if not names:
        raise Refused(Problem(f"there is no device {wanted}", place="--device", found=found, remedy="use --device cpu"))
    if doubles:
        raise Refused(
            Problem(
                "float64 is merged on the processor only",
                place="--device",
                expected="weights in bfloat16, float16 or float32",
                remedy="use --device cpu",
            )
        )

    def load() -> Backend:
        from ggez_merge.cuda import Cuda

        gpus = [Cuda(int(name.partition(":")[2])) for name in names]
        kernels = kernels_of("gpu")
        label = "; ".join(gpu.name for gpu in gpus)
        return Backend(label, kernels, lambda number, n_bytes: DeviceSlot(gpus[number % len(gpus)], n_bytes))

    # large enough for a launch and a copy not to matter
    return Device(" ".join(names), why, SLOTS_PER_GPU * len(names), 16 << 20, load)
