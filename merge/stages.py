"""A merge whose result is an input of another: no file holds it, every span of it is computed when it is read.

To the merge that needs it, a stage is a checkpoint as any other: the tensors that its own merge would write, in the
order in which they would lie there, with the dtype that they would be rounded to. They are computed by the processor's
kernels, whatever the device, so a chain gives the bytes that merging stage by stage through the disk gives. What a
method measures is measured of one stage after the other, before anything of the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128

from ggez_kernels.sparsify import Stats
from ggez_merge.checkpoint import FLOATS, ITEM_BITS, Checkpoint, Elements, ShardFile, Tensor, joined
from ggez_merge.errors import Problem
from ggez_merge.methods.method import Apply, Kernels
from ggez_merge.nonfinite import nonfinite_problems, unequal_problem
from ggez_merge.outputs import Output
from ggez_merge.read import NUMPY_DTYPE
from ggez_merge.shards import Shard

CHUNK = 1 << 16  # elements computed at a time: all that a worker needs besides its slot, at every stage of a chain

Read = Callable[[Tensor, int, memoryview], None]  # fills the view with the tensor's bytes from there on


class Stage:
    """What computes the outputs of a stage. Nothing of it can be read before a run has called `begin`."""

    def __init__(self, name: str, outputs: Sequence[Output], nonfinite: str) -> None:
        self.name = name
        self.outputs = outputs
        self.nonfinite = nonfinite
        self.spoilt: set[int] = set()  # outputs that must not be: of NaN, or too large for their dtype

    @property
    def chunk_bytes(self) -> int:
        """What computing a chunk takes: all inputs, each of which may be put together from others in passing."""
        widths = [sum(ITEM_BITS[x.dtype] for x in o.inputs) // 8 for o in self.outputs if o.entry.dtype in FLOATS]
        return 2 * CHUNK * max(widths, default=0)

    def begin(self, kernels: Kernels, applies: Sequence[Apply | None]) -> None:
        """Be told how outputs are combined; None: copied."""
        self._kernels = kernels
        self._applies = applies

    def fill(self, index: int, elements: Elements, first: int, out: Any) -> None:
        """Compute elements of an output from the flat index `first` on."""
        for at in range(0, len(out), CHUNK):
            stats = self._combine(index, elements, first + at, out[at : at + CHUNK])
            if self.nonfinite == "error" and (any(stats.nonfinite) or stats.nonfinite_out):
                self.spoilt.add(index)

    def _combine(self, index: int, elements: Elements, first: int, out: Any) -> Stats:
        output, apply = self.outputs[index], self._applies[index]
        inputs = [elements(tensor, first, len(out)) for tensor in output.inputs]
        if apply is None:
            return self._kernels.linear(out, None, inputs, [1.0])
        return apply(out, inputs[0], inputs[1:], first) if output.base else apply(out, None, inputs, first)

    def differing(self, read: Read) -> list[Problem]:
        """The tensors that are no floats, and not the same in all inputs."""
        return [
            unequal_problem(output.entry.name, output.entry.dtype, [str(tensor.file) for tensor in output.inputs])
            for output in self.outputs
            if output.action == "equal" and not _same(output.inputs, read)
        ]

    def problems(self, elements: Elements, consequences: Callable[[Path], bool]) -> Iterable[Problem]:
        """What made outputs spoilt, counted anew; `consequences`: of a spoilt stage, which has problems of its own."""
        for index in sorted(self.spoilt):
            output = self.outputs[index]
            out = np.empty(CHUNK, NUMPY_DTYPE[output.entry.dtype])
            n = output.models[0].numel
            counts, overflows = [0] * len(output.inputs), 0
            for first in range(0, n, CHUNK):
                stats = self._combine(index, elements, first, out[: n - first])
                counts = [a + b for a, b in zip(counts, stats.nonfinite, strict=True)]
                overflows += stats.nonfinite_out
            theirs = [consequences(home_of(tensor.file)) for tensor in output.inputs]
            seen = [0 if of_spoilt else count for of_spoilt, count in zip(theirs, counts, strict=True)]
            places = [(str(tensor.file), tensor.numel) for tensor in output.inputs]
            overflows *= not any(counts)
            allow = f"`nonfinite: allow` in {self.name}"
            for problem in nonfinite_problems(output.entry.name, output.entry.dtype, places, seen, overflows, allow):
                yield replace(problem, place=problem.place or str(home(self.name)))


@dataclass(frozen=True, eq=False)
class Merged:
    """An output of a stage. What it is made of is told once for the stage, not for every tensor that it goes into."""

    stage: Stage
    index: int
    sources: tuple[Tensor, ...] = ()

    @property
    def said(self) -> list[Any]:
        return [self.stage.name, self.stage.outputs[self.index].entry.name]

    def fill(self, elements: Elements, first: int, out: Any) -> None:
        self.stage.fill(self.index, elements, first, out)


def home(name: str) -> Path:
    """The folder that a stage is said to be in. There is no such folder."""
    return Path(f"stage {name}")


def home_of(file: Path) -> Path:
    """The same for one of its files; of a file that is there, it is no stage's."""
    return Path(*file.parts[:1])


def stage_checkpoint(
    stage: Stage,
    shards: Sequence[Shard],
    config: dict[str, Any] | None,
    parts: dict[str, dict[str, Any] | None],
    texts: Mapping[str, Path | bytes],
) -> Checkpoint:
    """What the stage would be if it were written: nobody can tell one from the other by its bytes."""
    files: list[ShardFile] = []
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        path = home(stage.name) / shard.name
        files.append(ShardFile(path, shard.size, 0, xxh3_128(shard.header).hexdigest()))
        for offset, index in zip(shard.offsets, shard.members, strict=True):
            output = stage.outputs[index]
            entry = output.entry
            tensor = Tensor(entry.name, entry.dtype, entry.shape, path, offset, entry.nbytes)
            if entry.dtype in FLOATS:
                tensors[entry.name] = replace(tensor, made=Merged(stage, index))
            else:  # read where the first input has it
                tensors[entry.name] = joined(tensor, entry.shape, output.models[0].extents)
    folder = home(stage.name)
    return Checkpoint(stage.name, folder, None, tuple(files), tensors, config, parts=parts, texts=texts)


def _same(tensors: Sequence[Tensor], read: Read) -> bool:
    """Whether all of them hold the same bytes."""
    first, *others = tensors
    views = [memoryview(bytearray(8 * CHUNK)) for _ in range(2)]
    for start in range(0, first.nbytes if others else 0, len(views[0])):
        ours, theirs = (view[: first.nbytes - start] for view in views)
        read(first, start, ours)
        for tensor in others:
            read(tensor, start, theirs)
            if not np.array_equal(np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)):
                return False
    return True
