"""The loop: measure, then combine block by block into the output's shards, with progress, resume and a report.

Workers take blocks in order, each as soon as it has a slot. A worker reads the block's tiles into its slot, has one
kernel call per tile fill the output buffer, writes the block at its offset, and adds it to the shard's hash when its
turn comes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ggez_kernels.sparsify import Stats
from ggez_merge.arithmetic import load_kernels
from ggez_merge.backend import Device
from ggez_merge.checkpoint import FLOATS
from ggez_merge.errors import Failed, Interrupted, Problem, Refused
from ggez_merge.measure import CHUNK, Bench, measure
from ggez_merge.methods.method import Apply, Kernels
from ggez_merge.nonfinite import nonfinite_problems, unequal_problem
from ggez_merge.plan import Plan
from ggez_merge.read import NUMPY_DTYPE, Arena, Files, align
from ggez_merge.shards import LEAST_BLOCK_BYTES, Block, Span, block_bytes, blocks
from ggez_merge.slots import Slot
from ggez_merge.stages import home, home_of
from ggez_merge.write import ShardWriter, Staging, latest, prefers_direct

HASH_BUFFER_BYTES = 1 << 20


class Progress(Protocol):
    """Told how a merge comes along; called from worker threads."""

    def phase(self, name: str, total_bytes: int) -> None: ...
    def advance(self, n_bytes: int) -> None: ...


@dataclass
class Stop:
    """Asked for by a signal handler, looked at between blocks."""

    event: threading.Event = field(default_factory=threading.Event)
    signal_number: int = 0

    def ask(self, signal_number: int) -> None:
        self.signal_number = signal_number
        self.event.set()


@dataclass
class Tally:
    """What the kernels saw of one output tensor."""

    delta_squares: list[float]  # per model, sum of (x - base)^2; empty where the method does not look at deltas
    nonfinite: list[int]  # NaN and Inf per input, base first
    nonfinite_out: int = 0
    unequal: bool = False

    def add(self, stats: Stats) -> None:
        self.delta_squares = [a + b for a, b in zip(self.delta_squares, stats.delta_squares, strict=False)]
        self.nonfinite = [a + b for a, b in zip(self.nonfinite, stats.nonfinite, strict=True)]
        self.nonfinite_out += stats.nonfinite_out


@dataclass(frozen=True)
class Outcome:
    """A merge that ran to its end: what it saw of every tensor, and hashes of everything read and written."""

    tallies: Sequence[Tally]
    input_hashes: dict[str, str]
    output_hashes: dict[str, str]
    device: str
    threads: int
    memory_bytes: int
    resumed_bytes: int
    direct: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class Sizing:
    """How a memory budget is shared out."""

    threads: int
    arena_bytes: int  # one worker's
    block_bytes: int
    chunk_bytes: int = 0  # what a worker computes stages in, besides


def sizing(plan: Plan, threads: int | None, memory_bytes: int, device: Device) -> Sizing:
    """Workers, their slots' arenas and the block size for a budget; Refused if it is too small for a single block.

    As many workers as the device wants by default; fewer if that is what the budget allows.
    """
    wanted = threads or device.slots
    for workers in range(min(wanted, max(1, plan.write_bytes // LEAST_BLOCK_BYTES + 1)), 0, -1):
        arena = (memory_bytes - HASH_BUFFER_BYTES) // workers - plan.chunk_bytes
        block = block_bytes(arena, plan.n_inputs, plan.widening, device.most_block_bytes)
        if block and arena >= least_arena(plan):
            return Sizing(workers, arena, block, plan.chunk_bytes)
    needed = (
        HASH_BUFFER_BYTES
        + plan.chunk_bytes
        + max(
            least_arena(plan), int(LEAST_BLOCK_BYTES * (1 + plan.n_inputs * plan.widening)) + (plan.n_inputs + 2) * 4096
        )
    )
    raise Refused(
        Problem(
            "the memory budget is too small for this merge",
            place="--memory",
            expected=f"at least {needed:,} bytes for {plan.n_inputs} inputs",
            found=f"{memory_bytes:,} bytes",
        )
    )


def least_arena(plan: Plan) -> int:
    """What measuring needs at least: one chunk of every input, and the largest header."""
    measured = [output for each in (*plan.stages, plan) for output in each.outputs if output.job]
    widths = [sum(8 if t.dtype == "F64" else 4 for t in output.inputs) for output in measured]
    n_inputs = max((len(output.inputs) for output in measured), default=plan.n_inputs)
    return max(
        max(widths, default=0) * CHUNK + (n_inputs + 1) * 4096,
        max(align(len(shard.header)) for shard in plan.shards),
    )


def run(
    plan: Plan, staging: Staging, device: Device, size: Sizing, memory_bytes: int, progress: Progress, stop: Stop
) -> Outcome:
    """Compute every shard into the staging folder. Raises Refused for bad weights, Failed, or Interrupted."""
    return _Run(plan, staging, size, progress, stop).run(device, memory_bytes)


class _Run:
    def __init__(self, plan: Plan, staging: Staging, size: Sizing, progress: Progress, stop: Stop) -> None:
        self.plan = plan
        self.staging = staging
        self.size = size
        self.progress = progress
        self.stop = stop
        self.tallies = [Tally([0.0] * len(output.models), [0] * len(output.inputs)) for output in plan.outputs]
        self.lock = threading.Lock()
        self.free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self.spoilt = False  # a weight that must not be merged was seen: read on to find them all, write no more

    def run(self, device: Device, memory_bytes: int) -> Outcome:
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        with (
            Files(self.plan.weight_files) as self.files,
            ThreadPoolExecutor(self.size.threads) as executor,
            ThreadPoolExecutor(1) as hashing,
        ):
            self.executor = executor
            try:
                input_hashes = hashing.submit(self._hash_inputs)  # meanwhile the kernels are loaded
                probe = executor.submit(prefers_direct, self.staging.checkpoint, self.plan.write_bytes)
                backend = device.load()
                self.kernels = backend.kernels
                for number in range(self.size.threads):
                    self.free.put(backend.slot(number, self.size.arena_bytes))
                direct = probe.result()
                unequal = self._begin_stages()
                self.applies = self._measure(self.plan, self.kernels)
                seconds["measure"] = time.perf_counter() - began
                output_hashes, resumed = self._combine(direct)
                seconds["combine"] = time.perf_counter() - began - seconds["measure"]
                self._refuse_bad_weights(unequal)
                hashes = self._wait([input_hashes])[0]
                self.files.check_unchanged()
            except BaseException:
                self.stop.event.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        seconds["total"] = time.perf_counter() - began
        return Outcome(
            tallies=self.tallies,
            input_hashes=hashes,
            output_hashes=output_hashes,
            device=backend.name,
            threads=self.size.threads,
            memory_bytes=memory_bytes,
            resumed_bytes=resumed,
            direct=direct,
            seconds=seconds,
        )

    # --- measure ------------------------------------------------------------------------------------------------

    def _begin_stages(self) -> list[Problem]:
        """Make the stages ready to be read, each after those that it needs itself; what their integers are wrong in."""
        kernels, _ = load_kernels()
        for plan in self.plan.stages:
            if plan.stage:
                plan.stage.begin(kernels, self._measure(plan, kernels))
        stages = [plan.stage for plan in self.plan.stages if plan.stage]
        found = self._wait([self.executor.submit(stage.differing, self.files.read) for stage in stages])
        problems = [problem for problems in found for problem in problems]
        self.spoilt = bool(problems)
        return problems

    def _measure(self, plan: Plan, kernels: Kernels) -> list[Apply | None]:
        """How the outputs of a plan are combined, by these kernels."""
        method = plan.method
        self.progress.phase("measuring", plan.measure_bytes)
        bench = Bench(
            kernels=self.kernels,
            files=self.files,
            executor=self.executor,
            n_workers=self.size.threads,
            arena_bytes=self.size.arena_bytes,
            lend=self._lend,
            advance=self._advance,
            wait=self._wait,
        )
        measured = measure(method, plan.outputs, bench)
        return [
            method.combine(kernels, output.job, result) if output.job else None
            for output, result in zip(plan.outputs, measured, strict=True)
        ]

    # --- combine ------------------------------------------------------------------------------------------------

    def _combine(self, direct: bool) -> tuple[dict[str, str], int]:
        plan = self.plan
        self.progress.phase("merging", plan.write_bytes)
        self.writers: list[ShardWriter] = []
        try:
            for shard in plan.shards:
                self.writers.append(ShardWriter(self.staging.checkpoint / shard.name, shard, direct))
            self._resume()
            resumed = sum(writer.hashed - len(writer.shard.header) for writer in self.writers)
            self._advance(sum(writer.hashed for writer in self.writers))
            done = [writer.hashed for writer in self.writers]
            waiting = blocks(plan.shards, plan.entries, self.size.block_bytes, done)
            self._wait([self.executor.submit(self._work, waiting) for _ in range(self.size.threads)])
            hashes: dict[str, str] = {}
            if not self.spoilt:
                with self._lend() as slot:
                    hashes = {writer.shard.name: writer.finish(slot.arena) for writer in self.writers}
        finally:
            for writer in self.writers:
                writer.close()
        return hashes, resumed

    def _resume(self) -> None:
        """Take over what an interrupted run finished, with what it saw, after reading it back."""
        with self._lend() as slot:
            (view,) = slot.arena.carve([self.size.block_bytes])
            for number, writer in enumerate(self.writers):
                records = latest(self.staging.records, number, len(writer.shard.header))
                if records and writer.resume(records[-1]["bytes"], records[-1]["xxh3_128"], view):
                    for record in records:
                        for index, squares in record["deltas"]:
                            tally = self.tallies[index]
                            tally.delta_squares = [a + b for a, b in zip(tally.delta_squares, squares, strict=True)]

    def _work(self, waiting: Iterator[Block]) -> None:
        with self._lend() as slot:
            while not self.stop.event.is_set():
                with self.lock:
                    block = next(waiting, None)
                if block is None:
                    return
                self._block(block, slot)

    def _block(self, block: Block, slot: Slot) -> None:
        writer = self.writers[block.shard]
        room = align(block.nbytes)
        (out,) = slot.arena.carve([room])
        seen: list[tuple[int, list[float]]] = []
        for span in block.spans:
            stats = self._tile(span, out[span.at : span.at + span.nbytes], slot, room)
            if stats is not None and any(stats.delta_squares):
                seen.append((span.output, list(stats.delta_squares)))
        if not self.spoilt:
            writer.write(out if writer.direct else out[: block.nbytes], block.offset)

        def note(digest: str) -> None:
            if not self.spoilt:
                end = block.offset + block.nbytes
                entry = {"shard": block.shard, "from": block.offset, "bytes": end, "xxh3_128": digest, "deltas": seen}
                self.staging.record(entry)

        writer.hash_in_turn(out[: block.nbytes], block.offset, self.stop.event, note)
        self._advance(block.nbytes)

    def _tile(self, span: Span, out: memoryview, slot: Slot, taken: int) -> Stats | None:
        output = self.plan.outputs[span.output]
        tally = self.tallies[span.output]
        if output.entry.dtype not in FLOATS:
            self._copy_bytes(span, out, slot.arena, taken)
            return None
        out_dtype = NUMPY_DTYPE[output.entry.dtype]
        first, n = span.start // out_dtype.itemsize, span.nbytes // out_dtype.itemsize
        dtypes = [NUMPY_DTYPE[tensor.dtype] for tensor in output.inputs]
        views = slot.arena.carve([taken, *(n * dtype.itemsize for dtype in dtypes)])[1:]
        for tensor, dtype, view in zip(output.inputs, dtypes, views, strict=True):
            self.files.read(tensor, first * dtype.itemsize, view)
        arrays = slot.arrays(views, dtypes)
        apply = self.applies[span.output] or self._convert
        base = arrays[0] if output.base and self.applies[span.output] else None
        stats = slot.combine(apply, out, out_dtype, base, arrays if base is None else arrays[1:], first)
        with self.lock:
            tally.add(stats)
            if self.plan.recipe.nonfinite == "error" and (any(stats.nonfinite) or stats.nonfinite_out):
                self.spoilt = True
            self.spoilt = self.spoilt or any(plan.stage and plan.stage.spoilt for plan in self.plan.stages)
        return stats

    def _convert(self, out: Any, base: Any, models: Any, start: int) -> Stats:
        """A tensor that is copied, perhaps into another dtype."""
        return self.kernels.linear(out, None, models, [1.0])

    def _copy_bytes(self, span: Span, out: memoryview, arena: Arena, taken: int) -> None:
        """A tensor that is no float: the first input's bytes, after a look whether the others have the same."""
        first, *others = self.plan.outputs[span.output].inputs
        self.files.read(first, span.start, out)
        for tensor in others:
            (view,) = arena.carve([taken, span.nbytes])[1:]
            self.files.read(tensor, span.start, view)
            if not np.array_equal(np.frombuffer(view, np.uint8), np.frombuffer(out, np.uint8)):
                with self.lock:
                    self.tallies[span.output].unequal = True
                    self.spoilt = True

    # --- around it ------------------------------------------------------------------------------------------------

    def _refuse_bad_weights(self, problems: list[Problem]) -> None:
        """Problems of a stage are told there, and not again where its weights go in."""
        if not self.spoilt:
            return
        stages = [plan.stage for plan in self.plan.stages if plan.stage]
        spoilt = {home(stage.name) for stage in stages if stage.spoilt}
        for stage in stages:
            problems += stage.problems(self.files.elements, lambda folder: folder in spoilt)
        for output, tally in zip(self.plan.outputs, self.tallies, strict=True):
            name = output.entry.name
            if tally.unequal:
                problems.append(unequal_problem(name, output.entry.dtype, [str(x.file) for x in output.inputs]))
            places = [(str(tensor.file), tensor.numel) for tensor in output.inputs]
            seen = [0 if home_of(x.file) in spoilt else n for x, n in zip(output.inputs, tally.nonfinite, strict=True)]
            overflows = tally.nonfinite_out * (not any(tally.nonfinite))
            problems += nonfinite_problems(name, output.entry.dtype, places, seen, overflows, "`nonfinite: allow`")
        raise Refused(problems)

    def _hash_inputs(self) -> dict[str, str]:
        view = Arena(HASH_BUFFER_BYTES).carve([HASH_BUFFER_BYTES])[0]
        hashes: dict[str, str] = {}
        for file in self.plan.weight_files:
            digest = self.files.hash(file, view, self.stop.event)
            if digest is not None:
                hashes[str(file.path)] = digest
        return hashes

    @contextlib.contextmanager
    def _lend(self) -> Iterator[Slot]:
        slot = self.free.get()
        try:
            yield slot
        finally:
            slot.settle()
            self.free.put(slot)

    def _advance(self, n_bytes: int) -> None:
        if self.stop.signal_number:
            raise Interrupted("stopped", self.stop.signal_number)
        self.progress.advance(n_bytes)

    def _wait(self, futures: Sequence[Future[Any]]) -> list[Any]:
        """Results in order. Looks up now and then, so that a signal is acted on; the first error stops all."""
        pending: set[Future[Any]] = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            errors = [future.exception() for future in finished if future.exception()]
            if errors:
                self.stop.event.set()
                for future in pending:
                    future.cancel()
                wait(pending)
                raise _first(errors)
        if self.stop.signal_number:
            raise Interrupted("stopped", self.stop.signal_number)
        return [future.result() for future in futures]


def _first(errors: Sequence[BaseException | None]) -> BaseException:
    """The error to report: a reason to refuse or to stop before its consequences."""
    for kind in (Interrupted, Refused, Failed):
        for error in errors:
            if isinstance(error, kind):
                return error
    return next(error for error in errors if error is not None)
