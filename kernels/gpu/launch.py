"""How the kernels are launched: what they refuse, the table that describes a call, blocks and options.

A call is described by one small int64 table on the device, so that neither the number of models nor any weight is
compiled into a kernel, and a sweep compiles once. float32 numbers are in it by their bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from ggez_kernels.sparsify import KEEP_ALL_LAST, Sparsify

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

THREADS = 128
WARPS = 2 if torch.version.hip else 4  # of 64 threads, or of 32
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}  # every operation rounded by itself
WIDEST = 16  # bytes of the widest access of a thread, if addresses are multiples of it

# an input's row in the table
ADDRESS, THRESHOLD, LAST, LIMIT, SEED, RESCALE, FIELDS = (tl.constexpr(field) for field in range(7))
ALL = tl.constexpr(2**32)  # LIMIT that drops nothing

# what a kernel does to the deltas: nothing, trim and rescale them, or drop some at random too
UNTOUCHED, TRIM, DROP = (tl.constexpr(step) for step in range(3))


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles for types alone: what a kernel may assume of its numbers, it is told as constexpr."""
    parameters = inspect.signature(function).parameters.values()
    numbers = [parameter.name for parameter in parameters if "constexpr" not in str(parameter.annotation)]
    return triton.jit(function, do_not_specialize=numbers)


def check(tensors: Mapping[str, torch.Tensor]) -> None:
    """TypeError or ValueError by name for what the kernels do not take, or what does not go with the first tensor."""
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; the GPU kernels take bfloat16, float16, float32")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and one-dimensional, found shape {tuple(tensor.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {like.device}")
        if tensor.numel() != like.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, {first} has {like.numel()}")


def of_one_dtype(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors; if their dtypes differ, all as float32, which holds every 16-bit number exactly."""
    mixed = len({tensor.dtype for tensor in tensors}) > 1
    return [tensor.float() if mixed else tensor for tensor in tensors]


def aligned(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.data_ptr() % WIDEST == 0 for tensor in tensors)


def upload(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64[len(numbers)] on the device, by one copy that nothing waits for."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type != "cpu")
    return host.to(device, non_blocking=True)


def float_bits(values: torch.Tensor) -> list[int]:
    return values.to(torch.float32).view(torch.int32).tolist()


def row(tensor: torch.Tensor, how: Sparsify | None = None) -> list[int]:
    """An input's row in the table."""
    address = tensor.data_ptr()
    if how is None or not how.changes:
        return [address, 0, KEEP_ALL_LAST, ALL.value, 0, *float_bits(torch.ones(1))]
    seed = how.seed - 2**64 if how.seed >= 2**63 else how.seed
    return [address, how.threshold, how.last, how.keep_limit, seed, *float_bits(torch.tensor([how.rescale]))]


def step(sparsify: Sequence[Sparsify | None] | None) -> int:
    """UNTOUCHED, TRIM or DROP: the least that does all of them."""
    hows = [how for how in sparsify or () if how is not None and how.changes]
    kind = DROP if any(how.drops for how in hows) else TRIM if hows else UNTOUCHED
    return int(kind.value)


def block_size(dtype: torch.dtype) -> int:
    """Elements per program: as many as its threads load at once."""
    return THREADS * WIDEST // dtype.itemsize


def launches(size: int, block: int, is_aligned: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(begin, end, programs, ALIGNED) of the launches that cover `size` elements.

    Accesses are as wide as can be where a kernel knows that addresses and the number of elements are multiples of
    16. No tensor is padded for that: the few elements beyond such a number get a launch of their own.
    """
    body = size - size % 16 if is_aligned else 0
    for begin, end, wide in ((0, body, True), (body, size, False)):
        if begin < end:
            yield begin, end, triton.cdiv(end - begin, block), wide


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@jit
def elements(begin: tl.tensor, end: tl.tensor, ALIGNED: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """The first element of this program as an int64, the offsets of all from there, and which of them exist."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    limit = end.to(tl.int64)
    if ALIGNED:  # begin is 0, and end a multiple of 16: so is this, as the compiler sees
        limit = limit // 16 * 16
    else:
        first += begin
    lane = tl.arange(0, BLOCK)
    return first, lane, first + lane < limit
