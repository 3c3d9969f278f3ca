"""The first step of a merge: the reductions a method asks for, over tiles that fit the memory budget.

A tensor whose inputs fit a worker's arena is read once, however many sweeps its measurement takes, and different
tensors are measured by different workers. A larger one (or the whole model, when the method measures all of it
together) is swept tile by tile, its tiles shared by all workers. Either way the sums are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ggez_merge.methods.method import Job, Kernels, Measurement, Method, Sweep, Tile
from ggez_merge.outputs import Output
from ggez_merge.read import NUMPY_DTYPE, Arena, Files

CHUNK = 1 << 16  # elements; tiles start at its multiples, so that sums of floats do not depend on the tiling


@dataclass(frozen=True)
class Piece:
    """Where one tile is: elements [start, start + n) of the group's output `job`."""

    job: int
    start: int
    n: int


@dataclass(frozen=True)
class Bench:
    """What measuring needs from the run: kernels, files, workers, arenas, and somebody to tell about progress."""

    kernels: Kernels
    files: Files
    executor: Executor
    lend_arena: Callable[[], Any]  # a context manager that gives an Arena
    arena_bytes: int
    advance: Callable[[int], None]
    wait: Callable[[Sequence[Future[Any]]], list[Any]]  # results in order; raises what went wrong


def measure(method: Method, outputs: Sequence[Output], bench: Bench) -> list[Any]:
    """What the method measured for each merged output (None for the others)."""
    merged = [(index, output, output.job) for index, output in enumerate(outputs) if output.job is not None]
    together = [entry for entry in merged if method.measures_together(entry[2])]
    alone = [[entry] for entry in merged if not method.measures_together(entry[2])]
    measured: list[Any] = [None] * len(outputs)
    small: list[tuple[list[tuple[int, Output, Job]], Future[list[Any]]]] = []
    large = []
    for group in [together, *alone] if together else alone:
        measurement = method.measure(bench.kernels, [job for _, _, job in group])
        if measurement is None:
            continue
        pieces = _pieces([output for _, output, _ in group], bench.arena_bytes)
        if len(pieces) == 1:
            small.append((group, bench.executor.submit(_measure_resident, group[0][1], measurement, pieces[0], bench)))
        else:
            large.append((group, measurement, pieces))
    for group, measurement, pieces in large:
        _store(measured, group, _measure_swept([output for _, output, _ in group], measurement, pieces, bench))
    results = bench.wait([future for _, future in small])
    for (group, _), result in zip(small, results, strict=True):
        _store(measured, group, result)
    return measured


def _store(measured: list[Any], group: Sequence[tuple[int, Output, Job]], results: Sequence[Any]) -> None:
    for (index, _, _), result in zip(group, results, strict=True):
        measured[index] = result


def _pieces(outputs: Sequence[Output], arena_bytes: int) -> list[Piece]:
    pieces = []
    for job, output in enumerate(outputs):
        n = output.job.n if output.job else 0
        width = sum(NUMPY_DTYPE[tensor.dtype].itemsize for tensor in output.inputs)
        room = max(1, (arena_bytes - (len(output.inputs) + 1) * 4096) // (width * CHUNK)) * CHUNK
        pieces += [Piece(job, start, min(room, n - start)) for start in range(0, n, room)] or [Piece(job, 0, 0)]
    return pieces


def _load(output: Output, piece: Piece, arena: Arena, files: Files) -> Tile:
    widths = [NUMPY_DTYPE[tensor.dtype].itemsize for tensor in output.inputs]
    views = arena.carve([piece.n * width for width in widths])
    for tensor, width, view in zip(output.inputs, widths, views, strict=True):
        files.read(tensor, piece.start * width, view)
    arrays = [np.frombuffer(view, NUMPY_DTYPE[x.dtype]) for x, view in zip(output.inputs, views, strict=True)]
    return Tile(piece.job, piece.start, arrays[0] if output.base else None, arrays[1:] if output.base else arrays)


def _measure_resident(output: Output, measurement: Measurement, piece: Piece, bench: Bench) -> list[Any]:
    """All sweeps over a single tile, read when the first sweep wants it."""
    with bench.lend_arena() as arena:
        tile: Tile | None = None
        answer: Any = None
        while True:
            try:
                sweep = measurement.send(answer)
            except StopIteration as done:
                bench.advance(sum(tensor.nbytes for tensor in output.inputs))
                return list(done.value)
            if tile is None:
                tile = _load(output, piece, arena, bench.files)
            answer = sweep.function(tile)


def _measure_swept(
    outputs: Sequence[Output], measurement: Measurement, pieces: Sequence[Piece], bench: Bench
) -> list[Any]:
    """Sweeps over many tiles, each sweep's tiles shared by all workers. Only the first sweep counts as progress."""
    answer: Any = None
    for number in itertools.count():
        try:
            sweep = measurement.send(answer)
        except StopIteration as done:
            if number == 0:
                bench.advance(sum(tensor.nbytes for output in outputs for tensor in output.inputs))
            return list(done.value)
        chosen = [p for p in pieces if sweep.only in (None, (p.job, p.start))]
        answer = _swept(outputs, sweep, chosen, bench, counts=number == 0)
    raise AssertionError("unreachable")


def _swept(outputs: Sequence[Output], sweep: Sweep, pieces: Sequence[Piece], bench: Bench, counts: bool) -> Any:
    """The sum of one sweep over its tiles: each worker adds up its own share, then the shares are added."""
    waiting: Iterator[Piece] = iter(pieces)

    def share() -> Any:
        total = None
        with bench.lend_arena() as arena:
            for piece in waiting_safely():
                tile = _load(outputs[piece.job], piece, arena, bench.files)
                part = sweep.function(tile)
                total = part if total is None else total + part
                if counts:
                    bench.advance(piece.n * sum(NUMPY_DTYPE[x.dtype].itemsize for x in outputs[piece.job].inputs))
        return total

    def waiting_safely() -> Iterator[Piece]:
        # next() on a list's iterator is atomic, so workers may share it
        while (piece := next(waiting, None)) is not None:
            yield piece

    workers = getattr(bench.executor, "_max_workers", 1)
    shares = bench.wait([bench.executor.submit(share) for _ in range(min(workers, len(pieces)))])
    kept = [share for share in shares if share is not None]
    total = kept[0]
    for other in kept[1:]:
        total = total + other
    return total
