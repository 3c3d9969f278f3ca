"""A driver for Triton that compiles for any target and writes launches down instead of making them.

The production launchers run unchanged: the processor's memory stands in for a device's, and what Triton concludes from
tensors and numbers is what it would conclude on a GPU. What a kernel would have written is not there afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from ggez_kernels.gpu.launch import OPTIONS, THREADS

# read by Triton at each use; what has been compiled once is not compiled again until a source changes
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build/triton"))

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = 65536  # of one program; gfx942 has no more

Effect = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Launch:
    kernel: CompiledKernel
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """What the kernel was called with, compile-time constants included."""

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name)


@dataclass
class Recorder:
    """Triton's driver: a device of its own per target, so that each kernel has a cache of binaries per target."""

    target: GPUTarget
    effects: Mapping[str, Effect]
    launches: list[Launch] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def utils(self) -> SimpleNamespace:
        return SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
            load_binary=lambda name, binary, shared, device: ("module", "function", 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls to launch a kernel. It keeps that for later recorders, whose turn it then is."""
        caches = source.fn.device_caches[self.get_current_device()]
        kernel = next(kernel for kernel in caches[0].values() if kernel.hash == metadata.hash)

        def launch(x: int, y: int, z: int, *call: Any) -> None:
            _stream, _function, _metadata, _launch_metadata, _enter_hook, _exit_hook, *values = call
            arguments = dict(zip(source.fn.arg_names, values, strict=True))
            recorder: Recorder = driver.active
            recorder.launches.append(Launch(kernel, (x, y, z), arguments))
            if source.fn.__name__ in recorder.effects:
                recorder.effects[source.fn.__name__](arguments)

        return launch


@contextmanager
def recording(target: str, effects: Mapping[str, Effect] | None = None) -> Iterator[list[Launch]]:
    """The launches made meanwhile, as they happen; `effects` does to a kernel's arguments what the kernel would."""
    recorder = Recorder(TARGETS[target], effects or {})
    warps = THREADS // recorder.target.warp_size  # what `launch` takes on such a device
    with patch.object(driver, "_active", recorder), patch.dict(OPTIONS, num_warps=warps):
        yield recorder.launches
