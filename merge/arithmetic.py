"""The one door to the arithmetic: loads the kernels of a backend, where and when they are asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from ggez_merge.errors import Failed
from ggez_merge.methods.method import Kernels

PACKAGES = {"cpu": "ggez_kernels.cpu", "gpu": "ggez_kernels.gpu", "reference": "ggez_kernels.reference"}
KERNELS = {
    "linear": ("linear", "linear_many"),
    "vote": ("vote",),
    "gram": ("gram",),
    "drop": ("l1",),
    "threshold": ("histogram", "ties", "nth_tie"),
}  # the same files, with the same functions, in every backend's folder


def load_kernels() -> tuple[Kernels, str]:
    """The CPU's kernels and a word for them: compiled by numba, or plain torch where numba has no wheel."""
    backend = _on_the_cpu()
    return kernels_of(backend), "cpu (numba)" if backend == "cpu" else "cpu (torch; numba would be faster)"


def kernels_for(tensor_device: str) -> Kernels:
    """The kernels for tensors that are on this device, named as torch does: on the CPU, their views as numpy arrays."""
    return kernels_of("gpu") if tensor_device.startswith("cuda") else load_kernels()[0]


def dequantizer(tensor_device: str) -> Callable[[Any, Any, Any], None]:
    """The kernel (out, quantized, scale) for tensors on this device; on the CPU torch's is the only one."""
    package = PACKAGES["gpu" if tensor_device.startswith("cuda") else "reference"]
    function: Callable[[Any, Any, Any], None] = importlib.import_module(f"{package}.dequantize").dequantize
    return function


@functools.cache
def decoder() -> Callable[..., None]:
    """The kernel that makes float32 of codes and scales: always on the CPU, for that is where files are read."""
    function: Callable[..., None] = importlib.import_module(f"{PACKAGES[_on_the_cpu()]}.decode").decode
    return function


@functools.cache
def low_rank() -> Any:
    """The kernels that apply adapters: always on the CPU as well."""
    return importlib.import_module(f"{PACKAGES[_on_the_cpu()]}.low_rank")


def kernels_of(backend: str) -> Kernels:
    """The kernels of one of PACKAGES."""
    modules = {stem: importlib.import_module(f"{PACKAGES[backend]}.{stem}") for stem in KERNELS}
    functions = {name: getattr(modules[stem], name) for stem, names in KERNELS.items() for name in names}
    return cast(Kernels, SimpleNamespace(**functions, counting=modules["threshold"].COUNTING))


def _on_the_cpu() -> str:
    if importlib.util.find_spec("numba") is not None:
        return "cpu"
    if importlib.util.find_spec("torch") is not None:
        return "reference"
    raise Failed("neither numba nor torch is installed: install one of them, numba is the faster")
