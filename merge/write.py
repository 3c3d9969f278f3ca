"""Bytes out: preallocated shards written by position, a journal to resume from, and one rename at the end.

While a merge runs, everything lives in `<output>.partial/`:

    checkpoint/      becomes the output folder by a single rename, when complete
    journal.jsonl    first line: what is being merged; then, per finished span of a shard, how far it is and the
                     BLAKE3 of the file up to there

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.read import Arena, align, read_exactly
from ggez_merge.shards import Shard

REPORT = "merge_report.json"
PROBE_BYTES = 64 << 20
WORTH_PROBING_BYTES = 1 << 30
O_DIRECT = getattr(os, "O_DIRECT", 0)


class ShardWriter:
    """One output shard: written at any position by any thread, hashed in order as its blocks complete."""

    def __init__(self, path: Path, shard: Shard, direct: bool) -> None:
        self.path = path
        self.shard = shard
        self._turn = threading.Condition()
        self._hasher = blake3(shard.header)
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
        hasher = blake3(self.shard.header)
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

    def hash_in_turn(self, view: memoryview, offset: int, stop: threading.Event) -> str | None:
        """Wait until everything before `offset` is hashed, then add `view`; the digest so far, or None if stopped."""
        with self._turn:
            while self.hashed != offset:
                if stop.is_set():
                    return None
                self._turn.wait(0.1)
            self._hasher.update(view)
            self.hashed += len(view)
            self._turn.notify_all()
            return self._hasher.hexdigest()

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
    _journal: int
    _lock: threading.Lock

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint"

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the journal."""
        with self._lock:
            os.write(self._journal, (json.dumps(entry) + "\n").encode())

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
        replaced = self.partial / "replaced"
        _sync_folder(self.checkpoint)
        if self.folder.exists():
            os.rename(self.folder, replaced)
        os.rename(self.checkpoint, self.folder)
        _sync_folder(self.folder.parent)
        self.close()
        shutil.rmtree(self.partial)

    def discard(self) -> None:
        """Remove everything: this merge cannot be completed as it is."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def stage(folder: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> Staging:
    """Make (or find again) the folder to work in; Refused if something is there that must not be touched."""
    partial = folder.with_name(folder.name + ".partial")
    journal = partial / "journal.jsonl"
    if not folder.exists() and (partial / "replaced").exists():  # killed between the two renames of a commit
        os.rename(partial / "replaced", folder)
    _check_output(folder, overwrite)
    if partial.exists() and not (resume or overwrite):
        raise Refused(
            Problem(
                "an interrupted merge is waiting here",
                place=str(partial),
                remedy="continue it with --resume, or start again with --overwrite",
            )
        )
    records: list[dict[str, Any]] = []
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise _write_error(partial, error) from error
    _lock_or_refuse(descriptor, partial)
    staging = Staging(folder, partial, records, descriptor, threading.Lock())
    lines, whole_bytes = _journal_lines(journal)
    if resume and lines:
        if lines[0].get("fingerprint") != fingerprint:
            staging.close()
            raise Refused(
                Problem(
                    "the interrupted merge was another one: the recipe or an input has changed since",
                    place=str(partial),
                    remedy="start again with --overwrite, or write elsewhere with --out",
                )
            )
        os.ftruncate(descriptor, whole_bytes)
        records.extend(lines[1:])
    else:
        shutil.rmtree(staging.checkpoint, ignore_errors=True)
        os.ftruncate(descriptor, 0)
        staging.record({"fingerprint": fingerprint})
    staging.checkpoint.mkdir(exist_ok=True)
    return staging


def finished_before(folder: Path, fingerprint: str) -> bool:
    """Whether the output folder already holds the complete result of exactly this merge."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("fingerprint") == fingerprint


def prefers_direct(folder: Path, total_bytes: int) -> bool:
    """Whether large writes to this folder are faster past the page cache: measured where it matters.

    Both ways write PROBE_BYTES to a scratch file until they are on the disk. Small outputs are not worth the probe.
    """
    if not O_DIRECT or total_bytes < WORTH_PROBING_BYTES:
        return False
    (view,) = Arena(8 << 20).carve([8 << 20])
    seconds = {}
    for direct in (False, True):
        path = folder / "probe"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (O_DIRECT if direct else 0), 0o666)
        except OSError:
            return False
        try:
            _preallocate(descriptor, PROBE_BYTES)
            began = time.perf_counter()
            for at in range(0, PROBE_BYTES, len(view)):
                os.pwrite(descriptor, view, at)
            os.fsync(descriptor)
            seconds[direct] = time.perf_counter() - began
        except OSError:
            return False
        finally:
            os.close(descriptor)
            path.unlink()
    return seconds[True] < seconds[False]


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
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


def _journal_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's whole lines and the bytes they take: a killed run may have cut the last one."""
    entries: list[dict[str, Any]] = []
    taken = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or not line.endswith(b"\n"):
            break
        entries.append(entry)
        taken += len(line)
    return entries, taken


def _lock_or_refuse(descriptor: int, partial: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: the open file itself keeps others from deleting it
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise Refused(
            Problem("another process is writing this output", place=str(partial), remedy="wait for it, or stop it")
        ) from None


def _create(path: Path, direct: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
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


def latest(records: Sequence[dict[str, Any]], shard: int) -> list[dict[str, Any]]:
    """The records of one shard in order, restarting where the shard was begun anew."""
    own: list[dict[str, Any]] = []
    for entry in records:
        if entry.get("shard") == shard:
            if own and entry["bytes"] <= own[-1]["bytes"]:
                own = []
            own.append(entry)
    return own
