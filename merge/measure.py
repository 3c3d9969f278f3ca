"""The first step of a merge: the reductions a method asks for, over tiles that fit the memory budget.

A tensor whose inputs fit a worker's slot is read once, however many sweeps its measurement takes, and different
tensors are measured by different workers. One that fits all slots together is read once too, spread over all
workers. A larger one (or the whole model, when the method measures all of it together) is read anew for every
sweep, tile by tile. The sums are the same in all three cases.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from ggez_merge.methods.method import Job, Kernels, Measurement, Method, Sweep, Tile, answered
from ggez_merge.outputs import Output
from ggez_merge.read import ALIGNMENT, NUMPY_DTYPE, Files
from ggez_merge.slots import Slot

CHUNK = 1 << 16  # elements; tiles start at its multiples, so that sums of floats do not depend on the tiling


@dataclass(frozen=True)
class Piece:
    """Where one tile is: elements [start, start + n) of the group's output `job`."""

    job: int
    start: int
    n: int


@dataclass(frozen=True)
class Bench:
    """What measuring needs from the run: kernels, files, workers with a slot each, and somebody to tell."""

    kernels: Kernels
    files: Files
    executor: Executor
    n_workers: int
    arena_bytes: int
    lend: Callable[[], AbstractContextManager[Slot]]
    advance: Callable[[int], None]
    wait: Callable[[Sequence[Future[Any]]], list[Any]]  # results in order; raises what went wrong


def measure(method: Method, outputs: Sequence[Output], bench: Bench) -> list[Any]:
    """What the method measured for each merged output (None for the others)."""
    if method.measure is None:
        return [None] * len(outputs)
    merged = [(index, output.job) for index, output in enumerate(outputs) if output.job is not None]
    groups = [[entry] for entry in merged if not method.measures_together(entry[1])]
    groups.append([entry for entry in merged if method.measures_together(entry[1])])
    measured: list[Any] = [None] * len(outputs)
    alone: list[tuple[list[int], Future[list[Any]]]] = []
    for by_itself in (False, True):  # the tensors that take all workers first: they take all slots too
        for group in filter(None, groups):
            members = [index for index, _ in group]
            pieces = _pieces([outputs[index] for index in members], bench)
            if (len(pieces) == 1) != by_itself:
                continue
            jobs = [job for _, job in group]
            if by_itself:
                alone.append(
                    (members, bench.executor.submit(_measure, method, jobs, [outputs[members[0]]], pieces, bench))
                )
            else:
                results = _measure(method, jobs, [outputs[index] for index in members], pieces, bench)
                _store(measured, members, results)
    for (members, _), results in zip(alone, bench.wait([future for _, future in alone]), strict=True):
        _store(measured, members, results)
    return measured


def _store(measured: list[Any], members: Sequence[int], results: Sequence[Any]) -> None:
    for index, result in zip(members, results, strict=True):
        measured[index] = result


def _pieces(outputs: Sequence[Output], bench: Bench) -> list[Piece]:
    """A group cut into tiles: one if it fits an arena, one a worker if it fits them all, else as large as fit."""
    pieces = []
    for job, output in enumerate(outputs):
        n = output.models[0].numel
        room = max(1, (bench.arena_bytes - (len(output.inputs) + 1) * ALIGNMENT) // (_width(output) * CHUNK)) * CHUNK
        fair = -(-n // (bench.n_workers * CHUNK)) * CHUNK
        size = fair if room < n <= bench.n_workers * room else room
        pieces += [Piece(job, start, min(size, n - start)) for start in range(0, n, size)] or [Piece(job, 0, 0)]
    return pieces


def _width(output: Output) -> int:
    """Bytes of one element of all inputs."""
    return sum(NUMPY_DTYPE[tensor.dtype].itemsize for tensor in output.inputs)


class _Desk:
    """One worker's place: a slot, the pieces it is responsible for, and the tile that lies there right now."""

    def __init__(self, slot: Slot, pieces: Sequence[Piece], outputs: Sequence[Output], bench: Bench) -> None:
        self._slot = slot
        self._pieces = pieces
        self._outputs = outputs
        self._bench = bench
        self._held: tuple[Piece, Tile] | None = None
        self._unread = set(pieces)  # progress counts every piece once

    def sweep(self, sweep: Sweep) -> Any:
        """The sum of the sweep over this worker's tiles; None if none of them is wanted."""
        total = None
        for piece in self._pieces:
            if sweep.only in (None, (piece.job, piece.start)):
                part = self._slot.run(functools.partial(sweep.function, self._tile(piece)))
                total = part if total is None else total + part
        return total

    def close(self) -> None:
        """Count what no sweep wanted as done."""
        self._bench.advance(sum(piece.n * _width(self._outputs[piece.job]) for piece in self._unread))

    def _tile(self, piece: Piece) -> Tile:
        if self._held is None or self._held[0] != piece:
            self._held = piece, self._load(piece)
            n_new = piece.n if piece in self._unread else 0
            self._unread.discard(piece)
            self._bench.advance(n_new * _width(self._outputs[piece.job]))  # in every sweep: it ends a stopped merge
        return self._held[1]

    def _load(self, piece: Piece) -> Tile:
        output = self._outputs[piece.job]
        dtypes = [NUMPY_DTYPE[tensor.dtype] for tensor in output.inputs]
        views = self._slot.arena.carve([piece.n * dtype.itemsize for dtype in dtypes])
        for tensor, dtype, view in zip(output.inputs, dtypes, views, strict=True):
            self._bench.files.read(tensor, piece.start * dtype.itemsize, view)
        arrays = self._slot.arrays(views, dtypes)
        return Tile(piece.job, piece.start, arrays[0] if output.base else None, arrays[1:] if output.base else arrays)


def _measure(
    method: Method, jobs: Sequence[Job], outputs: Sequence[Output], pieces: Sequence[Piece], bench: Bench
) -> list[Any]:
    """Answer the sweeps of one group's measurement: a single piece here and now, several by all workers."""
    measurement: Measurement | None = method.measure(bench.kernels, jobs) if method.measure else None
    if measurement is None:
        return [None] * len(jobs)
    n_desks = min(len(pieces), bench.n_workers)
    with ExitStack() as held:
        slots = [held.enter_context(bench.lend()) for _ in range(n_desks)]
        desks = [_Desk(slot, pieces[i::n_desks], outputs, bench) for i, slot in enumerate(slots)]

        def swept(sweep: Sweep) -> Any:
            if len(desks) == 1:
                return desks[0].sweep(sweep)
            parts = bench.wait([bench.executor.submit(desk.sweep, sweep) for desk in desks])
            return functools.reduce(operator.add, (part for part in parts if part is not None))

        results = answered(measurement, swept)
        for desk in desks:
            desk.close()
        return results
