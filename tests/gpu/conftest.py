"""Tests of the kernels' numbers, in a process of their own: Triton interprets them, and no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np
import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None

if "triton" in sys.modules:
    raise pytest.UsageError("tests/gpu interprets kernels: run it alone, before anything imports triton")
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_configure() -> None:
    if HAS_TRITON:
        np.seterr(all="ignore")  # as on a GPU, what overflows or is no number does so silently
        round_like_hardware()
        patch_the_language_once()


def pytest_pycollect_makemodule() -> None:
    if not HAS_TRITON:
        pytest.skip("triton has no wheel for this platform", allow_module_level=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not HAS_TRITON and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def round_like_hardware() -> None:
    """Mend what the interpreter does to bfloat16: it truncates what it narrows, and widens subnormals wrongly."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = values.view(np.uint32).astype(np.uint64)
            nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            nan = np.isnan(values.view(np.float32))
            return np.where(nan, 0x7FFF, nearest_even).astype(np.uint16)  # the NaN that NVIDIA's conversion gives
        return stock(values, source, target, rounding_mode)

    interpreter._convert_float = convert


def patch_the_language_once() -> None:
    """The interpreter patches the language again at every call of a helper, which takes most of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._patch_lang
    patched: set[int] = set()

    def patch(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if not languages <= patched:
            stock(function)
            patched.update(languages)
        return interpreter._LangPatchScope()  # nothing to undo: this process only interprets

    interpreter._patch_lang = patch
