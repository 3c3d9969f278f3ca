"""Merging what is in memory already: torch tensors, checked and combined one by one, on whatever device they are.

A tensor is one tile, and its memory the array that a kernel gets: nothing is copied. Tensors on the CPU are shared out
among as many threads as torch uses; those on a GPU are computed in torch's current stream.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import torch

from ggez_kernels.sparsify import Stats
from ggez_merge.arithmetic import kernels_for
from ggez_merge.errors import Problem, Refused
from ggez_merge.methods.method import Array, Job, Measurement, Method, Sweep, Tile, answered
from ggez_merge.nonfinite import nonfinite_problems

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLAIN = (torch.Tensor, torch.nn.Parameter)

Each = Callable[..., Iterable[Any]]  # map, or a pool's


@dataclass(frozen=True)
class Work:
    """One output: what the method makes of the inputs or, if there is no job, a copy of the first of them.

    `inputs` are by the caller's words for where they are from; the base, if the job has one, is called "base".
    """

    name: str
    job: Job | None
    inputs: Mapping[str, torch.Tensor]
    out: torch.Tensor

    @property
    def base(self) -> Array | None:
        return array(self.inputs["base"]) if "base" in self.inputs else None

    @property
    def models(self) -> list[Array]:
        return [array(tensor) for label, tensor in self.inputs.items() if label != "base"]


def carry_out(method: Method, works: Sequence[Work], nonfinite: str) -> None:
    """Measure and combine; then Refused for NaN, infinities and overflows, unless `nonfinite` is "allow"."""
    for work in works:
        if work.job is None:
            work.out.detach().copy_(next(iter(work.inputs.values())).detach())
    merged = [work for work in works if work.job]
    stats = combine(method, merged)
    if nonfinite == "error":
        refuse_nonfinite(merged, counted(stats))


def combine(method: Method, works: Sequence[Work]) -> list[Stats]:
    """Measure and combine, on every device; what was seen of each work, not waited for."""
    by_size = sorted(works, key=lambda work: work.out.numel(), reverse=True)
    here = [work for work in by_size if work.out.device.type == "cpu"]
    there = [work for work in by_size if work.out.device.type != "cpu"]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        stats = [*_merge(method, there, map), *_merge(method, here, pool.map if len(here) > 1 else map)]
    for work in works:
        torch.autograd.graph.increment_version(work.out)  # autograd shall notice, should it still need what was there
    found = dict(zip(map(id, [*there, *here]), stats, strict=True))
    return [found[id(work)] for work in works]


def _merge(method: Method, works: Sequence[Work], each: Each) -> list[Stats]:
    if not works:
        return []
    kernels = kernels_for(str(works[0].out.device))
    together = [work for work in works if work.job and method.measures_together(work.job)]
    measured = dict(zip(map(id, together), _measure(method, together, each), strict=True))

    def combine(work: Work) -> Stats:
        assert work.job is not None
        result = measured[id(work)] if id(work) in measured else _measure(method, [work], map)[0]
        return method.combine(kernels, work.job, result)(array(work.out), work.base, work.models, 0)

    return list(each(combine, works))


def _measure(method: Method, works: Sequence[Work], each: Each) -> list[Any]:
    """What the method measures over these works together, one result for each."""
    if not works or method.measure is None:
        return [None] * len(works)
    kernels = kernels_for(str(works[0].out.device))
    measurement: Measurement | None = method.measure(kernels, [work.job for work in works if work.job])
    if measurement is None:
        return [None] * len(works)
    tiles = [Tile(index, 0, work.base, work.models) for index, work in enumerate(works)]

    def swept(sweep: Sweep) -> Any:
        wanted = [tile for tile in tiles if sweep.only in (None, (tile.job, tile.start))]
        return functools.reduce(operator.add, each(sweep.function, wanted))

    return answered(measurement, swept)


def array(tensor: torch.Tensor) -> Array:
    """The tensor's memory as the kernels of its device take it: on the CPU a numpy array, elsewhere a flat tensor."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type != "cpu":
        return flat
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return flat.numpy()


def counted(stats: Sequence[Stats]) -> list[list[int]]:
    """How many elements are not finite, in each input and in the output. Waits for the device, once."""
    rows = [torch.stack([torch.as_tensor(n) for n in (*each.nonfinite, each.nonfinite_out)]) for each in stats]
    numbers = iter(torch.cat([row.to(rows[0].device) for row in rows]).tolist() if rows else [])
    return [[next(numbers) for _ in row] for row in rows]


def refuse_nonfinite(works: Sequence[Work], counts: Sequence[Sequence[int]]) -> None:
    """Refused for NaN, infinities and overflows, all that were counted."""
    problems: list[Problem] = []
    for work, (*of_inputs, of_out) in zip(works, counts, strict=True):
        places = [(label, tensor.numel()) for label, tensor in work.inputs.items()]
        allow = 'nonfinite="allow"'
        problems += nonfinite_problems(work.name or None, str(work.out.dtype), places, of_inputs, of_out, allow)
    if problems:
        raise Refused(problems)


# --- what is refused before -----------------------------------------------------------------------------------------


def check_alike(name: str, tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    """Why these tensors can neither be merged nor, if they are no floats, compared."""
    problems = [problem for label, tensor in tensors.items() for problem in _check_plain(name, label, tensor)]
    if problems:
        return problems
    (first_label, first), *others = tensors.items()
    for label, tensor in others:
        floats = tensor.dtype in FLOATS and first.dtype in FLOATS
        for what, found, expected in (
            ("shape of a tensor", str(list(tensor.shape)), str(list(first.shape))),
            ("device of a tensor", str(tensor.device), str(first.device)),
            ("dtype of a tensor that cannot be averaged", str(tensor.dtype), str((tensor if floats else first).dtype)),
        ):
            if found != expected:
                what = f"the inputs disagree on the {what}"
                problems.append(Problem(what, label, name or None, f"{expected} as in {first_label}", found))
    return problems


def _check_plain(name: str, label: str, tensor: torch.Tensor) -> Iterable[Problem]:
    """What keeps kernels from a tensor's memory."""
    what, found, remedy = None, None, None
    if type(tensor) not in PLAIN:
        what, found = "only plain torch tensors can be merged", type(tensor).__name__
    elif tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
        what, found = (
            "only dense tensors on a CPU or a CUDA device can be merged",
            f"{tensor.layout} on {tensor.device}",
        )
    elif not tensor.is_contiguous():
        what, found, remedy = "a tensor is not contiguous", f"strides {tensor.stride()}", "pass tensor.contiguous()"
    elif tensor.dtype == torch.float64 and tensor.device.type != "cpu":
        what, remedy = "float64 is merged on the CPU only", "pass tensor.cpu() or tensor.float()"
    if what:
        yield Problem(what, place=label, tensor=name or None, found=found, remedy=remedy)


def check_equal(work: Work) -> Iterable[Problem]:
    """Tensors that are no floats have to hold the same bytes."""
    (first_label, first), *others = work.inputs.items()
    for label, tensor in others:
        if not torch.equal(_bytes(first), _bytes(tensor)):
            yield Problem(
                f"{first.dtype} values cannot be averaged, and the inputs' differ",
                place=label,
                tensor=work.name or None,
                expected=f"the values in {first_label}",
                remedy="make bfloat16 of them first, with their scales: ggez_merge.dequantize"
                if first.dtype.is_floating_point
                else 'buffers="base" takes the base\'s integers',
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def check_overlaps(works: Iterable[Work]) -> Iterable[Problem]:
    """Outputs share no memory with an input or with each other."""
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor is work.out, f"{label} {work.name}".strip())
        for work in works
        for label, tensor in (*work.inputs.items(), ("output", work.out))
        if tensor.numel()
    ]
    reach = {True: (0, ""), False: (0, "")}  # how far the outputs and the inputs so far go, and which
    for begin, end, is_out, label in sorted(spans):
        for of_outs, (furthest, other) in reach.items():
            if begin < furthest and (is_out or of_outs):
                yield Problem(
                    "an output shares memory with another tensor",
                    place=label,
                    found=other,
                    remedy="clone one of them: outputs are written while inputs are still read",
                )
        reach[is_out] = max(reach[is_out], (end, label))
