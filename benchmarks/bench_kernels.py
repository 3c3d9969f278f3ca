"""How fast the kernels are: GB/s of bytes read and written, beside a memory copy measured in the same minute.

    python benchmarks/bench_kernels.py --out benchmarks/results/kernels.csv

Each kernel runs over arrays far larger than the last-level cache, in turns with `numpy.copyto` (the copy, counted as
bytes read plus bytes written) and with the plain torch expression of the same arithmetic. Before it is timed, its
output is compared with the definition in `ggez_kernels.reference`, so that no speed is reported for a wrong result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from table import processor, save, versions

from ggez_kernels.cpu.drop import l1
from ggez_kernels.cpu.gram import gram
from ggez_kernels.cpu.linear import linear
from ggez_kernels.cpu.threshold import histogram, ties
from ggez_kernels.cpu.vote import vote
from ggez_kernels.reference import drop, threshold
from ggez_kernels.reference import gram as gram_reference
from ggez_kernels.reference import linear as linear_reference
from ggez_kernels.reference import vote as vote_reference
from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import CHUNK, Sparsify

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("f2"), "float32": np.dtype("f4")}


@dataclass(frozen=True)
class Tensors:
    base: Array
    models: list[Array]
    out: Array

    def part(self, begin: int, end: int) -> Tensors:
        return Tensors(self.base[begin:end], [model[begin:end] for model in self.models], self.out[begin:end])


@dataclass(frozen=True)
class Kernel:
    name: str
    models: int
    arrays: int  # of full size, read or written
    run: Callable[[Tensors], Any]
    check: Callable[[Tensors], Any]  # the same by definition
    torch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any] | None  # of base and two models, to the dtype
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


def median_key(t: Tensors) -> int:
    delta = t.models[0][:CHUNK].astype(np.float32) - t.base[:CHUNK].astype(np.float32)
    return int(np.median(np.abs(delta)).astype(np.float32).view(np.uint32))


def half_of(t: Tensors) -> list[Sparsify]:
    """TIES with density 0.5."""
    return [Sparsify(median_key(t))] * 2


def around_median(t: Tensors) -> dict[str, int]:
    """The keys that a second sweep looks at: the coarse bin of the median and its neighbours."""
    coarse = median_key(t) >> 16
    return {"low": (coarse - 1) << 16, "high": (coarse + 2) << 16}


DARE = [Sparsify(keep=0.5, seed=1, rescale=2.0), Sparsify(keep=0.5, seed=2, rescale=2.0)]


def both(
    name: str, kernel: Callable[..., Any], definition: Callable[..., Any], models: int, arrays: int, **rest: Any
) -> Kernel:
    """A kernel called in one way, and its definition in the same."""
    call: Callable[[Callable[..., Any], Tensors], Any] = rest.pop("call")
    return Kernel(name, models, arrays, lambda t: call(kernel, t), lambda t: call(definition, t), **rest)


KERNELS = [
    both(
        "linear, no base",
        linear,
        linear_reference.linear,
        2,
        3,
        call=lambda f, t: f(t.out, None, t.models, [0.3, 0.7]),
        torch=lambda b, x, y: 0.3 * x.float() + 0.7 * y.float(),
        dtypes=("bfloat16", "float16", "float32"),
    ),
    both(
        "linear, ratio 0.3",
        linear,
        linear_reference.linear,
        1,
        3,
        call=lambda f, t: f(t.out, t.base, t.models[:1], [0.3]),
        torch=lambda b, x, y: torch.lerp(b.float(), x.float(), 0.3),
        dtypes=("bfloat16", "float16", "float32"),
    ),
    both(
        "linear, ratio 0.7",
        linear,
        linear_reference.linear,
        1,
        3,
        call=lambda f, t: f(t.out, t.base, t.models[:1], [0.7]),
        torch=lambda b, x, y: torch.lerp(b.float(), x.float(), 0.7),
        dtypes=("bfloat16",),
    ),
    both(
        "task arithmetic",
        linear,
        linear_reference.linear,
        2,
        4,
        call=lambda f, t: f(t.out, t.base, t.models, [0.4, 0.5]),
        torch=lambda b, x, y: b.float() + (0.4 * (x.float() - b.float()) + 0.5 * (y.float() - b.float())),
        dtypes=("bfloat16", "float16", "float32"),
    ),
    both(
        "dare_linear",
        linear,
        linear_reference.linear,
        2,
        4,
        call=lambda f, t: f(t.out, t.base, t.models, [0.4, 0.5], sparsify=DARE),
        torch=None,
    ),
    both(
        "ties, density 0.5",
        vote,
        vote_reference.vote,
        2,
        4,
        call=lambda f, t: f(t.out, t.base, t.models, [0.4, 0.5], sparsify=half_of(t)),
        torch=None,
    ),
    both(
        "gram, of deltas",
        gram,
        gram_reference.gram,
        2,
        3,
        call=lambda f, t: f(t.models, t.base, start=0),
        torch=None,
    ),
    both(
        "histogram, first sweep",
        histogram,
        threshold.histogram,
        1,
        2,
        call=lambda f, t: f(t.base, t.models[0], low=0, high=1 << 31, shift=16),
        torch=None,
    ),
    both(
        "histogram, second sweep",
        histogram,
        threshold.histogram,
        1,
        2,
        call=lambda f, t: f(t.base, t.models[0], **around_median(t)),
        torch=None,
    ),
    both(
        "ties count",
        ties,
        threshold.ties,
        1,
        2,
        call=lambda f, t: f(t.base, t.models[0], median_key(t)),
        torch=None,
    ),
    both(
        "l1 of a drop",
        l1,
        drop.l1,
        1,
        2,
        call=lambda f, t: f(t.base, t.models[0], DARE[0], start=0),
        torch=None,
    ),
]


def make(elements: int, dtype: np.dtype[Any]) -> Tensors:
    """Weights like a transformer's, and two fine-tunes of them."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(elements, np.float32) * np.float32(0.02)
    models = [base + rng.standard_normal(elements, np.float32) * np.float32(0.001) for _ in range(2)]
    return Tensors(base.astype(dtype), [model.astype(dtype) for model in models], np.zeros(elements, dtype))


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def agree(kernel: Kernel, tensors: Tensors) -> None:
    part = tensors.part(0, 3 * CHUNK + 1000)
    found = kernel.run(part)
    bytes_found = part.out.tobytes()
    expected = kernel.check(part)
    same = bytes_found == part.out.tobytes()
    if not isinstance(found, int) and not hasattr(found, "nonfinite"):
        same = same and np.array_equal(np.asarray(found), np.asarray(expected))
    if isinstance(found, int):
        same = same and found == expected
    if not same:
        sys.exit(f"{kernel.name}: the compiled kernel and its definition disagree; nothing was timed")


def measure(kernel: Kernel, tensors: Tensors, threads: int, repeats: int) -> dict[str, Any]:
    elements = tensors.base.size
    size = tensors.base.nbytes
    tile = -(-elements // threads // CHUNK) * CHUNK
    parts = [tensors.part(begin, min(begin + tile, elements)) for begin in range(0, elements, tile)]
    torch.set_num_threads(threads)
    views = [tensor(array) for array in (tensors.base, *tensors.models)]
    target = tensor(tensors.out)
    raw = [(part.base.view(np.uint8), part.out.view(np.uint8)) for part in parts]
    with ThreadPoolExecutor(threads) as pool:

        def spread(action: Callable[[Any], Any], over: list[Any]) -> None:
            list(pool.map(action, over))

        spread(kernel.run, parts)
        ours, copies, theirs = [], [], []
        for _ in range(repeats):
            copies.append(seconds(lambda: spread(lambda pair: np.copyto(pair[1], pair[0]), raw)))
            ours.append(seconds(lambda: spread(kernel.run, parts)))
        if kernel.torch is not None:
            expression = kernel.torch
            theirs = [seconds(lambda: target.copy_(expression(*views))) for _ in range(max(2, repeats // 4))]
    moved = kernel.arrays * size / 1e9
    copy = 2 * size / 1e9 / statistics.median(copies)
    speed = moved / statistics.median(ours)
    return {
        "kernel": kernel.name,
        "dtype": str(tensors.base.dtype),
        "models": kernel.models,
        "elements": elements,
        "threads": threads,
        "gb_per_s": f"{speed:.1f}",
        "gb_per_s_lowest": f"{moved / max(ours):.1f}",
        "gb_per_s_highest": f"{moved / min(ours):.1f}",
        "gigaelements_per_s": f"{elements / 1e9 / statistics.median(ours):.2f}",
        "copy_gb_per_s": f"{copy:.1f}",
        "ratio_to_copy": f"{speed / copy:.2f}",
        "torch_gb_per_s": f"{moved / statistics.median(theirs):.1f}" if theirs else "",
        "repeats": repeats,
        "machine": processor(),
        "versions": versions("numba", "numpy", "torch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this CSV file")
    parser.add_argument("--elements", type=int, default=48 << 20, help="per array (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of each timing; the median counts")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    rows = []
    for name, dtype in DTYPES.items():
        tensors = make(arguments.elements // (dtype.itemsize // 2), dtype)
        for kernel in KERNELS:
            if name not in kernel.dtypes:
                continue
            agree(kernel, tensors)
            for threads in arguments.threads:
                row = measure(kernel, tensors, threads, arguments.repeats)
                rows.append(row)
                print(
                    f"{row['kernel']:<24} {row['dtype']:<9} {threads} thread{'s' if threads > 1 else ' '} "
                    f"{row['gb_per_s']:>6} GB/s ({row['gb_per_s_lowest']} to {row['gb_per_s_highest']}), "
                    f"{row['ratio_to_copy']} of a copy ({row['copy_gb_per_s']}), torch {row['torch_gb_per_s'] or '-'}",
                    flush=True,
                )
    if arguments.out is not None:
        save(rows, arguments.out)


if __name__ == "__main__":
    main()
