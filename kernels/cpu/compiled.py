"""How the loops are compiled: ahead of nothing, cached on disk, in IEEE arithmetic."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import binding, ir
from numba import config, njit
from numba.core import types as numba_types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def _digest_of_sources() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


SOURCES = _digest_of_sources()


def compiled(function: Function) -> Function:
    """Compile at the first call, or load what an earlier process compiled.

    numba finds a stale cache by the time stamp of the function's own file only; a change in a helper of another
    file would go unnoticed and yesterday's arithmetic would run. But numba does key its cache on what a function
    closes over, so every function here is made to close over the digest of all the sources.
    No `fastmath`: neither reassociation nor fused multiply-add, so that every processor gives the same bytes.
    """
    code = function.__code__.replace(co_freevars=(*function.__code__.co_freevars, "SOURCES"))
    closure = (*(function.__closure__ or ()), types.CellType(SOURCES))
    keyed = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    keyed.__module__, keyed.__qualname__, keyed.__doc__ = (
        function.__module__,
        function.__qualname__,
        function.__doc__,
    )
    result: Function = njit(nogil=True, cache=True, error_model="numpy")(keyed)
    return result


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:
    """An integer address as a pointer, for `numba.carray`.

    Handing over addresses instead of arrays is what lets one compiled function serve any number of models
    of any mix of dtypes.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return numba_types.voidptr(address), generate


def processor_has(*features: str) -> bool:
    """Whether the code may use one of these instructions of this processor: not where numba was told of another."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return False
    here = binding.get_host_cpu_features()
    return any(here.get(feature, False) for feature in features)


@intrinsic  # type: ignore[untyped-decorator]
def f32_of_f16(typing_context: Any, bits: Any) -> Any:
    """The float32 that a half stands for, by one instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return numba_types.float32(numba_types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def f16_of_f32(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 rounded to a half, to nearest even, by one instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return numba_types.uint16(numba_types.float32), generate


LINE = 64


@intrinsic  # type: ignore[untyped-decorator]
def stream_line(typing_context: Any, target: Any, source: Any) -> Any:
    """Copy LINE bytes between addresses, past the caches; `target` is a multiple of LINE.

    An ordinary store first reads the line that it is about to overwrite, this one does not: a third less traffic
    for what is far larger than the caches, and a loss for what is read again soon. `drain` has to come after.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), LINE // 4).as_pointer()
        value = builder.load(builder.inttoptr(arguments[1], line), align=4)
        store = builder.store(value, builder.inttoptr(arguments[0], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return numba_types.void(target, source), generate


@intrinsic  # type: ignore[untyped-decorator]
def drain(typing_context: Any) -> Any:
    """Make what was streamed visible to other threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return numba_types.void(), generate
