"""Bytes in: positioned reads of whole spans into reusable, aligned buffers."""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from xxhash import xxh3_128

from ggez_merge.checkpoint import ShardFile, Tensor
from ggez_merge.errors import Failed

ALIGNMENT = 4096  # what direct IO needs, and more than any vector unit asks for
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.uint8),
}
"""How elements lie in memory; dtypes of less than a byte, and complex ones, have no arithmetic here."""


def align(n_bytes: int) -> int:
    """The smallest multiple of ALIGNMENT that holds `n_bytes`."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """One worker's memory: a page-aligned buffer, allocated once and carved anew for every piece of work.

    Pages cost memory only once touched, so an arena is a bound, not a cost. `memory`, page-aligned bytes that are there
    already, is used instead of new pages if given.
    """

    def __init__(self, n_bytes: int, memory: memoryview | None = None) -> None:
        self.n_bytes = n_bytes
        self._view = memoryview(mmap.mmap(-1, max(align(n_bytes), ALIGNMENT))) if memory is None else memory

    def carve(self, sizes: Sequence[int]) -> list[memoryview]:
        """Aligned, disjoint parts of the given sizes, from the start of the arena; ValueError if they don't fit."""
        parts, at = [], 0
        for size in sizes:
            parts.append(self._view[at : at + size])
            at += align(size)
        if at > len(self._view):
            raise ValueError(f"an arena of {self.n_bytes} bytes cannot hold {at}")
        return parts


class Files:
    """Input files, each opened once and read by offset from any thread.

    A file whose size or modification time is no longer what the plan saw is refused: half of an old checkpoint
    merged with half of a new one would be nobody's model.
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self._planned = {file.path: file for file in files}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        _allow_open_files(len(files) + 256)

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, tensor: Tensor, start_byte: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from `start_byte` on."""
        first = max(bisect_right(tensor.starts, start_byte) - 1, 0)
        at = start_byte - (tensor.starts[first] if tensor.starts else 0)
        for part in islice(tensor.extents, first, None):
            n = min(part.nbytes - at, len(view))
            if n > 0 and part.made:
                dtype = NUMPY_DTYPE[part.dtype]
                part.made.fill(self.elements, at // dtype.itemsize, np.frombuffer(view[:n], dtype))
            elif n > 0:
                read_exactly(self._descriptor(part.file), view[:n], part.offset + at, part.file)
            view = view[max(n, 0) :]
            at = 0
            if not view:
                return

    def elements(self, tensor: Tensor, first: int, n: int) -> Any:
        """`n` elements of a tensor from the flat index `first` on, in memory of their own."""
        out = np.empty(n, NUMPY_DTYPE[tensor.dtype])
        self.read(tensor, first * out.itemsize, out.view(np.uint8).data)
        return out

    def check_unchanged(self) -> None:
        """Raise Failed if any file changed since the plan was made."""
        for path in self._planned:
            try:
                status = os.stat(path)
            except OSError as error:
                raise Failed(f"{path}: gone while it was being merged: {error.strerror}") from error
            self._check(path, status)

    def hash(self, file: ShardFile, view: memoryview, stop: threading.Event) -> str | None:
        """XXH3 of the file's content in hex, read through `view`; None if `stop` was set meanwhile."""
        hasher = xxh3_128()
        descriptor = self._descriptor(file.path)
        for at in range(0, file.size, len(view)):
            if stop.is_set():
                return None
            part = view[: min(len(view), file.size - at)]
            read_exactly(descriptor, part, at, file.path)
            hasher.update(part)
        return hasher.hexdigest()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    raise Failed(f"{path}: cannot be opened: {error.strerror}") from error
                try:
                    self._check(path, os.fstat(descriptor))
                except Failed:
                    os.close(descriptor)
                    raise
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def _check(self, path: Path, now: os.stat_result) -> None:
        planned = self._planned[path]
        if (now.st_size, now.st_mtime_ns) != (planned.size, planned.mtime_ns):
            raise Failed(
                f"{path}: changed while it was being merged ({planned.size} bytes when planned, {now.st_size} now). "
                "Wait until whatever writes it is done, then merge again."
            )


_seek_lock = threading.Lock()


def read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset` of an open file, whatever the system call's limits; Failed if the file ends first."""
    done = 0
    while done < len(view):
        try:
            if hasattr(os, "preadv"):
                n = os.preadv(descriptor, [view[done:]], offset + done)
            else:  # Windows has no positioned read
                with _seek_lock:
                    os.lseek(descriptor, offset + done, os.SEEK_SET)
                    part = os.read(descriptor, min(len(view) - done, 1 << 24))
                view[done : done + len(part)] = part
                n = len(part)
        except OSError as error:
            raise Failed(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from error
        if n == 0:
            raise Failed(f"{path}: ends at byte {offset + done}, {len(view) - done} bytes too early: it was truncated")
        done += n


def _allow_open_files(wanted: int) -> None:
    """Raise the soft limit on open files where the system lets us: checkpoints come in hundreds of shards."""
    try:
        import resource
    except ImportError:  # Windows, where no such limit is in the way
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, ceiling), hard))
