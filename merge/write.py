"""Bytes out: preallocated shards written by position, a journal to resume from, and one rename at the end.

While a merge runs, everything lives in `<output>.partial/`:

    checkpoint/      becomes the output folder by a single rename, when complete
    journal.jsonl    first line: what is being merged; then, per finished span of a shard, how far it is and the
                     XXH3 of the file up to there

A shard's header is written last, so that a half-written shard is not a loadable file. A resumed merge trusts no
byte that it has not read back and found to have the journal's hash.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_128

from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.read import Arena, align, read_exactly
from ggez_merge.shards import Shard

REPORT = "merge_report.json"
JOURNAL = "journal.jsonl"
PROBE_BYTES = 32 << 20
WORTH_PROBING_BYTES = 1 << 30
O_DIRECT = getattr(os, "O_DIRECT", 0)


class ShardWriter:
    """One output shard: written at any position by any thread, hashed in order as its blocks complete."""

    def __init__(self, path: Path, shard: Shard, direct: bool) -> None:
        self.path = path
        self.shard = shard
        self._turn = threading.Condition()
        self._hasher = xxh3_128(shard.header)
        self.hashed = len(shard.header)
        self.direct = direct
        self._descriptor = _create(path, direct)
        try:
            _preallocate(self._descriptor, align(shard.size))
        except OSError as error:
            os.close(self._descriptor)
            raise _write_error(path, error) from error

    def resume(self, done: int, digest: str, view: memoryview) -> bool:
        """Hash what an earlier run wrote, up to byte `done`; False, and nothing changed, if it is not what it was."""
        hasher = xxh3_128(self.shard.header)
        with open(self.path, "rb") as file:
            for at in range(self.hashed, done, len(view)):
                part = view[: min(len(view), done - at)]
                read_exactly(file.fileno(), part, at, self.path)
                hasher.update(part)
        if hasher.hexdigest() != digest:
            return False
        self._hasher, self.hashed = hasher, done
        return True

    def write(self, view: memoryview, offset: int) -> None:
        """Write `view` at `offset`; with direct IO up to a page of slack behind it goes along, cut off in the end."""
        try:
            done = 0
            while done < len(view):
                done += _pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def hash_in_turn(self, view: memoryview, offset: int, stop: threading.Event, then: Callable[[str], None]) -> None:
        """Wait until everything before `offset` is hashed, add `view`, and call `then` with the digest so far.

        That still happens in turn: the journal names the spans of a shard in order. If stopped, nothing happens.
        """
        with self._turn:
            while self.hashed != offset:
                if stop.is_set():
                    return
                self._turn.wait(0.1)
            self._hasher.update(view)
            self.hashed += len(view)
            self._turn.notify_all()
            then(self._hasher.hexdigest())

    def finish(self, arena: Arena) -> str:
        """Write the header, cut the file to its size, bring it to the disk; the hash of the whole file."""
        header = self.shard.header
        (view,) = arena.carve([len(header)])
        view[:] = header
        self.write(view, 0)
        try:
            os.ftruncate(self._descriptor, self.shard.size)
            os.fsync(self._descriptor)
        except OSError as error:
            raise _write_error(self.path, error) from error
        return self._hasher.hexdigest()

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class Staging:
    """The folder a merge is made in, locked for this process."""

    folder: Path  # the final name
    partial: Path
    records: list[dict[str, Any]]  # what the journal of an interrupted run says, per shard the latest last
    journal: int  # its open file, which holds the lock
    _lock: threading.Lock

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint"

    @property
    def replaced(self) -> Path:
        """Where the output that is replaced waits for the new one to have its name."""
        return self.partial / "replaced"

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the journal."""
        line = _signed(json.dumps(entry).encode())
        with self._lock:
            try:
                while line:
                    line = line[os.write(self.journal, line) :]
            except OSError as error:
                raise _write_error(self.partial / JOURNAL, error) from error

    def write_file(self, name: str, content: bytes) -> None:
        """A small file of the checkpoint, on disk when this returns."""
        path = self.checkpoint / name
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(path.parent)
        except OSError as error:
            raise _write_error(path, error) from error

    def commit(self) -> None:
        """Give the checkpoint its final name. What it replaces is removed only afterwards."""
        for folder, _, _ in os.walk(self.checkpoint):
            _sync_folder(Path(folder))
        try:
            if self.folder.exists():
                os.rename(self.folder, self.replaced)
            os.rename(self.checkpoint, self.folder)
        except OSError as error:
            raise _write_error(self.folder, error) from error
        _sync_folder(self.folder.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything but the output."""
        shutil.rmtree(self.partial, ignore_errors=True)  # while the lock is held
        self.close()
        if os.name == "nt":  # Windows deletes no open file
            shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        if self.journal >= 0:
            os.close(self.journal)
            self.journal = -1


def stage(folder: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> Staging:
    """Make (or find again) the folder to work in; Refused if something is there that must not be touched."""
    partial = _partial(folder)
    waiting = os.path.exists(partial)
    if not waiting:
        _check_output(folder, overwrite)
    staging = Staging(folder, partial, [], _lock(partial), threading.Lock())
    try:
        _prepare(staging, fingerprint, resume=resume, overwrite=overwrite, waiting=waiting)
    except OSError as error:
        staging.close()
        raise _write_error(partial, error) from error
    except BaseException:
        staging.close()
        raise
    return staging


def _prepare(staging: Staging, fingerprint: str, *, resume: bool, overwrite: bool, waiting: bool) -> None:
    """Take up what an earlier run left, or clear it away."""
    if staging.replaced.exists() and not staging.folder.exists():  # killed between the two renames of a commit
        os.rename(staging.replaced, staging.folder)
    lines, whole_bytes = _journal_lines(staging.partial / JOURNAL)
    continued = resume and bool(lines)
    if continued and lines[0].get("fingerprint") != fingerprint:
        raise Refused(
            Problem(
                "the interrupted merge was another one: the recipe or an input has changed since",
                place=str(staging.partial),
                remedy="start again with --overwrite, or write elsewhere with --out",
            )
        )
    overwrite = overwrite or (continued and bool(lines[0].get("overwrite")))
    _check_output(staging.folder, overwrite)
    if waiting and not (resume or overwrite):
        raise Refused(_waiting(staging.partial))
    shutil.rmtree(staging.replaced, ignore_errors=True)
    if continued:
        os.ftruncate(staging.journal, whole_bytes)
        staging.records.extend(lines[1:])
    else:
        shutil.rmtree(staging.checkpoint, ignore_errors=True)
        os.ftruncate(staging.journal, 0)
        staging.record({"fingerprint": fingerprint, "overwrite": overwrite})
    staging.checkpoint.mkdir(exist_ok=True)


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refused if something in the way of this output can be seen before anything is touched."""
    if not os.path.exists(_partial(folder)):
        _check_output(folder, overwrite)
    elif not (resume or overwrite):
        raise Refused(_waiting(_partial(folder)))


def _waiting(partial: Path) -> Problem:
    return Problem(
        "an interrupted merge is waiting here",
        place=str(partial),
        remedy="continue it with --resume, or start again with --overwrite",
    )


def tidy(folder: Path) -> None:
    """Remove what a merge has left behind that was killed after it had given the output its name."""
    partial = _partial(folder)
    if partial.exists() and not unfinished(folder):
        Staging(folder, partial, [], _lock(partial), threading.Lock()).discard()


def unfinished(folder: Path) -> bool:
    """Whether an interrupted merge to this folder is waiting to be continued."""
    return (_partial(folder) / "checkpoint").exists()


def reserved_bytes(folder: Path) -> int:
    """What an interrupted merge holds on the disk: a merge to the same folder takes it over, or frees it first."""
    try:
        files = [path for path in (_partial(folder) / "checkpoint").rglob("*") if path.is_file()]
        # Windows does not say how much of a file is on the disk
        return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in files)
    except OSError:
        return 0


def finished_before(folder: Path, fingerprint: str) -> bool:
    """Whether the output folder already holds the complete result of exactly this merge."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and report.get("fingerprint") == fingerprint


def prefers_direct(folder: Path, total_bytes: int) -> bool:
    """Whether large writes to this folder should go past the page cache: measured where it matters.

    Both ways write PROBE_BYTES to a scratch file until they are on the disk, the better of two times each. Buffered
    writes must be faster by half to be chosen: they cost the processor a copy and push the inputs out of memory, which
    so short a probe does not show. Small outputs are not worth the probe.
    """
    if not O_DIRECT or total_bytes < WORTH_PROBING_BYTES:
        return False
    (view,) = Arena(8 << 20).carve([8 << 20])
    try:
        buffered, direct = (
            min(_seconds_to_write(folder / "probe", flag, view) for _ in range(2)) for flag in (0, O_DIRECT)
        )
    except OSError:  # not every file system knows direct IO
        return False
    return direct < 1.5 * buffered


def _seconds_to_write(path: Path, flag: int, view: memoryview) -> float:
    """How long PROBE_BYTES take to the disk. Leaves no file behind."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o666)
        try:
            _preallocate(descriptor, PROBE_BYTES)
            began = time.perf_counter()
            for at in range(0, PROBE_BYTES, len(view)):
                os.pwrite(descriptor, view, at)
            os.fsync(descriptor)
            return time.perf_counter() - began
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)  # some file systems make the file before they refuse to open it


def _check_output(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = (folder / REPORT).is_file()
    if overwrite and ours:
        return
    raise Refused(
        Problem(
            "the output exists already",
            place=str(folder),
            remedy="replace it with --overwrite, or write elsewhere with --out"
            if ours
            else "it was not made by ggez-merge, so --overwrite will not touch it: write elsewhere with --out",
        )
    )


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _signed(entry: bytes) -> bytes:
    """A line of the journal: it begins with a hash of itself, so that damage shows."""
    return xxh3_64(entry).hexdigest().encode() + b" " + entry + b"\n"


def _journal_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's intact lines up to the first that is not (a killed run may have cut it), and their bytes."""
    entries: list[dict[str, Any]] = []
    taken = 0
    for line in path.read_bytes().splitlines(keepends=True):
        entry = line[17:-1]
        if line != _signed(entry):
            break
        entries.append(json.loads(entry))
        taken += len(line)
    return entries, taken


def _lock(partial: Path) -> int:
    """The opened journal, made if need be; Refused if another process holds it."""
    journal = partial / JOURNAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise _write_error(partial, error) from error
    try:
        import fcntl
    except ImportError:  # Windows: the open file itself keeps others from deleting it
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(journal)  # gone if another process has just finished
    except OSError:
        os.close(descriptor)
        raise Refused(
            Problem("another process is writing this output", place=str(partial), remedy="wait for it, or stop it")
        ) from None
    return descriptor


def _create(path: Path, direct: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        path.parent.mkdir(exist_ok=True)
        return os.open(path, flags | (O_DIRECT if direct else 0), 0o666)
    except OSError as error:
        raise _write_error(path, error) from error


def _preallocate(descriptor: int, n_bytes: int) -> None:
    """Reserve the space now: a full disk shows at once, and the file is laid out in one piece."""
    if hasattr(os, "posix_fallocate") and n_bytes:
        try:
            os.posix_fallocate(descriptor, 0, n_bytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, n_bytes)


_seek_lock = threading.Lock()


def _pwrite(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _seek_lock:  # Windows has no positioned write
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def _write_error(path: Path, error: OSError) -> Failed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed(f"{path}: the disk is full")
    return Failed(f"{path}: cannot be written: {error.strerror}")


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def latest(records: Sequence[dict[str, Any]], shard: int, begin: int) -> list[dict[str, Any]]:
    """The records of one shard that follow each other from byte `begin` on, since it was last begun."""
    chain: list[dict[str, Any]] = []
    for entry in records:
        if entry["shard"] == shard:
            if entry["from"] == begin:
                chain = [entry]
            elif chain and entry["from"] == chain[-1]["bytes"]:
                chain.append(entry)
    return chain
