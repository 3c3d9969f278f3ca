"""Calls of the production launchers that between them launch every kernel, and what they cost on each target."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from figures import Figures, measure
from recording import Launch, recording

from ggez_kernels.gpu import dequantize, drop, gram, linear, threshold, vote
from ggez_kernels.sparsify import Sparsify

EVEN = 2**16 + 16  # a whole chunk or many blocks, and some more, all of it in accesses that are wide
ODD = EVEN + 1  # and one element that needs launches of its own
KEYS = 1 << 31

UNTOUCHED, TRIM, DROP = None, Sparsify(threshold=5, rescale=2.0), Sparsify(threshold=5, keep=0.5)
STEPS = {"": UNTOUCHED, ", trim": TRIM, ", drop": DROP}

Tensor = torch.Tensor
Call = Callable[[Tensor, Tensor, Tensor], object]  # of a base, a model and an output


def _linear(models: int, how: Sparsify | None, has_base: bool = True) -> Call:
    def call(base: Tensor, model: Tensor, out: Tensor) -> object:
        hows = [how] * models if has_base else None
        return linear.linear(out, base if has_base else None, [model] * models, [0.5] * models, sparsify=hows)

    return call


def _vote(how: Sparsify | None, count: bool = False, normalize: bool = True) -> Call:
    return lambda base, model, out: vote.vote(
        out, base, [model, model], [0.5, 0.5], sparsify=[how, how], count=count, normalize=normalize
    )


def _histogram(low: int, high: int, shift: int) -> Call:
    return lambda base, model, out: threshold.histogram(base, model, low=low, high=high, shift=shift)


def _l1(how: Sparsify | None) -> Call:
    return lambda base, model, out: drop.l1(base, model, how or Sparsify(), start=0)


def _dequantize(dtype: torch.dtype, block: int | None = None) -> Call:
    def call(base: Tensor, model: Tensor, out: Tensor) -> None:
        size = out.numel()
        quantized = model.view(torch.uint8)[:size].view(dtype).reshape(1, size)
        scales = torch.ones(1, -(-size // block) if block else 1)
        dequantize.dequantize(out.reshape(1, size), quantized, scales)

    return call


CALLS: dict[str, Call] = {
    "linear": _linear(2, UNTOUCHED, has_base=False),
    **{f"interpolation{step}": _linear(1, how) for step, how in STEPS.items()},
    **{f"task arithmetic{step}": _linear(2, how) for step, how in STEPS.items()},
    **{f"vote{step}": _vote(how) for step, how in STEPS.items()},
    "vote, trim, counted": _vote(TRIM, count=True),
    "vote, trim, summed": _vote(TRIM, normalize=False),
    "gram": lambda base, model, out: gram.gram([base, model], start=0),
    "gram of deltas": lambda base, model, out: gram.gram([model, model], base, start=0),
    "histogram, 2048 bins": _histogram(0, KEYS, 20),
    "histogram, 512 bins": _histogram(0, 512, 0),
    "histogram, 65536 bins": _histogram(0, KEYS, 15),
    "ties": lambda base, model, out: threshold.ties(base, model, 5),
    "nth tie": lambda base, model, out: threshold.nth_tie(base, model, 5, 0),
    **{f"l1{step}": _l1(how) for step, how in STEPS.items()},
    "dequantize e4m3": _dequantize(torch.float8_e4m3fn),
    "dequantize e5m2": _dequantize(torch.float8_e5m2),
    "dequantize e4m3 by blocks": _dequantize(torch.float8_e4m3fn, 128),
}

EFFECTS = {"_tie_counts": lambda arguments: arguments["counts"].fill_(1)}  # else `nth_tie` would look no further


def launches_of(call: Call, target: str, dtype: torch.dtype, size: int = EVEN) -> list[Launch]:
    with recording(target, EFFECTS) as launches:
        call(*(torch.zeros(size, dtype=dtype) for _ in range(3)))
    return launches


def is_bulk(launch: Launch) -> bool:
    """Whether all its accesses should be wide: not at the end, in the search of a single block, of scattered scales."""
    return bool(launch.arguments.get("ALIGNED", False)) and not launch.arguments.get("SCALES", False)


@cache
def figures(target: str, dtype: torch.dtype, ends: bool = False) -> dict[str, tuple[bool, Figures]]:
    """Of every kernel, by a name for it: whether it is bulk, and its figures. `ends`: of those for odd ends too."""
    found = {}
    for name, call in CALLS.items():
        launches = launches_of(call, target, dtype, ODD if ends else EVEN)
        for place, launch in enumerate(launches[-1:] if name == "nth tie" else launches):
            found[f"{name}, end" if place else name] = is_bulk(launch), measure(launch.kernel)
    return found
