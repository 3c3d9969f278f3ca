"""numpy arrays to torch tensors in the work dtype, and back with one rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensor(array: Array) -> torch.Tensor:
    """The array's memory as a torch tensor; TypeError for a dtype that is no float of 16, 32 or 64 bits."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"the kernels take bfloat16, float16, float32, float64, found {array.dtype}")
    return torch.from_numpy(array)


def work_dtype(arrays: Sequence[Array | None]) -> torch.dtype:
    """float64 as soon as one array of the call is, else float32."""
    return torch.float64 if any(a is not None and a.dtype == np.float64 for a in arrays) else torch.float32


def widen(array: Array, work: torch.dtype) -> torch.Tensor:
    return tensor(array).to(work)


def narrow(value: torch.Tensor, out: Array) -> int:
    """out = value rounded once, to nearest even, every NaN the same; answers how many are NaN or infinite."""
    target = tensor(out)
    if value.dtype == torch.float64 and target.itemsize == 2:
        value = _to_odd(value)
    target.copy_(value)
    target[target.isnan()] = torch.nan
    return nonfinite(out)


def nonfinite(array: Array) -> int:
    return int((~tensor(array).isfinite()).sum())


def _to_odd(value: torch.Tensor) -> torch.Tensor:
    """float64 to float32 so that a further rounding to 16 bits is right (Boldo & Melquiond 2008).

    Truncated, and the last bit set if anything was cut off: nothing then lies on a 16-bit tie that was not there.
    """
    near = value.to(torch.float32)
    bits = near.view(torch.int32)
    truncated = torch.where(near.double().abs() > value.abs(), bits - 1, bits)
    exact = (near.double() == value) | value.isnan()
    return torch.where(exact, bits, truncated | 1).view(torch.float32)
