"""Kills, signals, full disks and inputs that change: nothing half-done looks finished, and all of it is resumed."""

from __future__ import annotations

import mmap
import os
import pty
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from merging import (
    COMMAND,
    INTERPOLATE,
    TIES,
    carry_out,
    command_line,
    contents,
    merged,
    models,
    plan_of,
    read_all,
    scratch,
    sparse,
    tensors,
)

from ggez_merge.errors import Failed, Refused
from ggez_merge.progress import Silent
from ggez_merge.verify import verify

KILLS = 110
LEAST_MEMORY = 2 << 20  # blocks of some 200 KB


class Shared(Silent):
    """Progress that another process can watch: bytes measured and merged so far."""

    def __init__(self) -> None:
        self.page, self.done = mmap.mmap(-1, 8), 0

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        self.page[:] = struct.pack("<q", self.done)
        time.sleep(0.001)  # so that the watcher can act before the next step

    def seen(self) -> int:
        (done,) = struct.unpack("<q", self.page[:])
        return int(done)


class During(Silent):
    """Lets something happen, once, when a share of the merging is done."""

    def __init__(self, act: Callable[[], object], share: float = 0.3) -> None:
        self.act, self.share, self.merging, self.happened = act, share, False, False

    def phase(self, name: str, total_bytes: int) -> None:
        self.merging, self.total, self.done = name == "merging", total_bytes, 0

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.merging and not self.happened and self.done >= self.share * self.total:
            self.happened = True
            self.act()


def fork(work: Callable[[], object]) -> int:
    """A child process that ends with 0, with 2 if it is refused, with 1 after any other error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except Refused:
        code = 2
    finally:
        os._exit(code)


class TestKill:
    """SIGKILL at random moments, by time and by progress, several in a row, with and without an output to replace."""

    def test_an_output_is_complete_or_absent_and_the_merge_resumes_to_the_same_bytes(self) -> None:
        dice = random.Random(1)
        kills = longest = in_measuring = in_merging = at_the_end = replacing = 0
        with scratch() as folder:
            models(folder, ["base", "one", "two"], {f"layers.{i}.w": (250_000,) for i in range(12)})
            plan = plan_of(folder, TIES)
            for _ in range(2):  # the second time, the kernels are loaded
                started = time.perf_counter()
                carry_out(plan, Shared(), threads=2, memory_bytes=LEAST_MEMORY, overwrite=True)
                usual_s = time.perf_counter() - started
            new = contents(plan.folder)
            shutil.rmtree(plan.folder)
            merged(folder, TIES + "parameters: {lambda: 0.5}", "old")
            old = contents(folder / "old")
            total = plan.read_bytes + plan.write_bytes
            while kills < KILLS:
                replace = dice.random() < 0.4
                if replace:
                    shutil.copytree(folder / "old", plan.folder)
                options = {"overwrite": True} if replace else {}
                in_a_row, spared = 0, False
                while True:
                    progress = Shared()
                    pid = fork(
                        lambda options=options, progress=progress: carry_out(
                            plan, progress, threads=dice.choice([1, 2]), memory_bytes=LEAST_MEMORY, **options
                        )
                    )
                    if spared:
                        status = os.waitpid(pid, 0)[1]
                    else:
                        status = kill_at_a_moment(pid, dice, progress, usual_s, plan.read_bytes, total)
                    if os.WIFSIGNALED(status):
                        kills += 1
                        in_a_row += 1
                        replacing += replace
                        done = progress.seen()
                        in_measuring += 0 < done < plan.read_bytes
                        in_merging += plan.read_bytes < done < total
                        at_the_end += done >= total
                    found = contents(plan.folder) if plan.folder.exists() else None
                    assert found in ([old, new] if replace else [None, new]) or (
                        found is None and (folder / "out.partial" / "replaced").exists()
                    )
                    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                    if code == 0:
                        break
                    # killed before the journal says what it is for, a replacement has to be asked for again
                    assert code is None or (code == 2 and replace and options == {"resume": True})
                    options = {"overwrite": True} if code == 2 else {"resume": True}
                    spared = in_a_row >= 8
                longest = max(longest, in_a_row)
                assert contents(plan.folder) == new
                assert not (folder / "out.partial").exists()
                shutil.rmtree(plan.folder)
        print(
            f"{kills} kills: {in_measuring} measuring, {in_merging} merging, {at_the_end} finishing, {longest} in a row"
        )
        assert longest >= 3
        assert min(in_measuring, in_merging, at_the_end, replacing) >= 5


def kill_at_a_moment(pid: int, dice: random.Random, progress: Shared, usual_s: float, read: int, total: int) -> int:
    """Kill the child at a random moment of its merge, which usually takes `usual_s`; its status."""
    way = dice.choice(["time", "measuring", "merging", "merging", "end"])
    target = {"time": 0, "measuring": dice.randrange(read), "merging": dice.randrange(read, total), "end": total}[way]
    delay_s = dice.random() * {"time": 1.2, "end": 0.1}.get(way, 0) * usual_s
    reached: float | None = None
    while reached is None or time.perf_counter() - reached < delay_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if reached is None and progress.seen() >= target:
            reached = time.perf_counter()
        time.sleep(0.0003)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that take long enough to be interrupted, and a recipe."""
    folder = tmp_path_factory.mktemp("large")
    random_ = np.random.default_rng(0)
    for model in ("base", "one"):
        made = {f"layers.{i}.w": random_.integers(0, 1 << 14, 4_000_000, np.uint16).view(np.float16) for i in range(8)}
        write_checkpoint(folder / model, made)
    (folder / "recipe.yaml").write_text(INTERPOLATE.replace("ratio: 0.3", "ratio: 0.3, normalize: true"))
    merged(folder, INTERPOLATE, "whole")
    return folder


SLOWLY = ["--threads", "1", "--memory", "1800KB"]


def wait_for_progress(partial: Path, lines: int = 3) -> None:
    """Until the journal tells of finished blocks."""
    journal = partial / "journal.jsonl"
    deadline = time.monotonic() + 100
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
    def test_exit_code_message_and_resume(self, number: int, large: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        command = [*COMMAND, str(large / "recipe.yaml"), "--out", str(out)]
        process = subprocess.Popen([*command, *SLOWLY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_progress(tmp_path / "out.partial")
        process.send_signal(number)
        said, complaint = process.communicate(timeout=100)
        assert process.returncode == 128 + number
        assert said == ""
        assert f"kept in {out}.partial: continue with --resume" in complaint
        assert "Traceback" not in complaint
        assert not out.exists()
        result = command_line(large / "recipe.yaml", "--out", out, "--resume", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert tensors(out) == tensors(large / "whole")
        assert not verify(out).problems
        shutil.rmtree(out)

    def test_ctrl_c_in_a_terminal(self, large: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv(COMMAND[0], [*COMMAND, str(large / "recipe.yaml"), "--out", str(out), *SLOWLY])
        wait_for_progress(tmp_path / "out.partial")
        os.write(terminal, b"\x03")
        shown = read_all(terminal)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 130
        assert "merging" in shown  # the bar
        assert "continue with --resume" in " ".join(shown.split())
        assert "Traceback" not in shown
        assert not out.exists()
        carry_out(plan_of(large, (large / "recipe.yaml").read_text(), str(out)), resume=True)
        assert tensors(out) == tensors(large / "whole")
        shutil.rmtree(out)


class TestTwoAtOnce:
    def test_the_second_is_refused_and_the_first_undisturbed(self, tmp_path: Path) -> None:
        models(tmp_path, ["base", "one"], {"x": (300_000,)})
        (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
        whole = merged(tmp_path, INTERPOLATE, "whole")
        ready, hold = os.pipe(), os.pipe()

        def wait() -> None:
            os.write(ready[1], b"!")
            os.read(hold[0], 1)

        pid = fork(lambda: carry_out(plan_of(tmp_path, INTERPOLATE), During(wait), memory_bytes=LEAST_MEMORY))
        os.read(ready[0], 1)
        for option in ("--resume", "--overwrite"):
            result = command_line("recipe.yaml", "--out", "out", option, cwd=tmp_path)
            assert result.returncode == 2
            assert "another process" in result.stderr
        os.write(hold[1], b"!")
        assert os.waitpid(pid, 0)[1] == 0
        assert tensors(tmp_path / "out") == whole


def fails(folder: Path, progress: Any = None, **options: Any) -> str:
    """The message of a merge that fails; no output may appear."""
    plan = plan_of(folder, INTERPOLATE)
    with pytest.raises(Failed) as caught:
        carry_out(plan, progress, memory_bytes=LEAST_MEMORY, **options)
    assert caught.value.exit_code == 1
    assert not plan.folder.exists()
    return str(caught.value)


class TestInputsThatChange:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> Path:
        models(tmp_path, ["base", "one"], {"x": (400_000,), "y": (5,)})
        return tmp_path

    def changes(self, path: Path) -> dict[str, Callable[[], object]]:
        def replaced() -> None:
            shutil.copyfile(path, path.with_name("new"))
            os.replace(path.with_name("new"), path)

        return {
            "truncated": lambda: os.truncate(path, 500_000),
            "emptied": lambda: os.truncate(path, 0),
            "grown": lambda: os.truncate(path, 900_000),
            "touched": lambda: os.utime(path),
            "replaced": replaced,
            "removed": path.unlink,
        }

    @pytest.mark.parametrize("model", ["base", "one"])
    @pytest.mark.parametrize("change", ["truncated", "emptied", "grown", "touched", "replaced", "removed"])
    @pytest.mark.parametrize("when", ["before", "during"])
    def test_the_merge_fails_and_names_the_file(self, when: str, change: str, model: str, pair: Path) -> None:
        path = pair / model / "model.safetensors"
        act = self.changes(path)[change]
        if when == "during":
            said = fails(pair, During(act), threads=1)
        else:
            plan = plan_of(pair, INTERPOLATE)
            act()
            with pytest.raises(Failed) as caught:
                carry_out(plan)
            said = str(caught.value)
            assert not plan.folder.exists()
        assert str(path) in said
        if change in ("truncated", "emptied", "grown", "touched", "replaced"):
            with pytest.raises(Refused):  # cut off; or another merge than the one that was begun
                carry_out(plan_of(pair, INTERPOLATE), resume=True)

    def test_every_length_a_small_shard_can_be_cut_to(self) -> None:
        with scratch() as folder:
            models(folder, ["base", "one"], {"x": (5,), "y": (2, 3)})
            path = folder / "one" / "model.safetensors"
            whole, status = path.read_bytes(), os.stat(path)
            plan = plan_of(folder, INTERPOLATE)
            for length in range(len(whole)):
                path.write_bytes(whole[:length])
                with pytest.raises(Refused, match=r"one/model\.safetensors"):
                    plan_of(folder, INTERPOLATE)
                with pytest.raises(Failed, match=rf"one/model\.safetensors.*{length} now"):
                    carry_out(plan, overwrite=True)
                assert not plan.folder.exists()
            path.write_bytes(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert len(whole) > 150
            assert carry_out(plan, resume=True)


class TestWriteErrors:
    """Without a small disk: limits on file size, and the device that is always full."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Path:
        models(tmp_path, ["base", "one"], {"x": (400_000,), "y": (5,)})
        return tmp_path

    def in_child(self, pair: Path, limit: int, progress: bool) -> str:
        """What a merge says that meets a limit on file size, from the start or in its middle."""

        def lower() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        def work() -> None:
            if not progress:
                lower()
            message = fails(pair, During(lower) if progress else None, threads=1)
            os.write(channel[1], message.encode())

        channel = os.pipe()
        assert os.waitpid(fork(work), 0)[1] == 0
        return os.read(channel[0], 65536).decode()

    @pytest.mark.parametrize("limit", [0, 10, 300, 100_000, 500_000])
    @pytest.mark.parametrize("midway", [False, True], ids=["from the start", "midway"])
    def test_a_file_that_cannot_grow(self, midway: bool, limit: int, pair: Path) -> None:
        message = self.in_child(pair, limit, midway)
        assert "cannot be written: File too large" in message
        assert str(pair / "out.partial") in message
        assert merged(pair, INTERPOLATE, resume=True) == merged(pair, INTERPOLATE, "whole")

    @pytest.mark.parametrize("name", ["README.md", "config.json", "merge_report.json"])
    def test_a_small_file_on_a_full_device(self, name: str, pair: Path) -> None:
        for model in ("base", "one"):
            (pair / model / "config.json").write_text("{}")
        checkpoint = pair / "out.partial" / "checkpoint"
        message = fails(pair, During(lambda: (checkpoint / name).symlink_to("/dev/full")))
        assert f"{checkpoint / name}: the disk is full" in message
        (checkpoint / name).unlink()
        assert merged(pair, INTERPOLATE, resume=True) == merged(pair, INTERPOLATE, "whole")

    def test_a_working_folder_that_is_removed(self, pair: Path) -> None:
        assert "cannot be written" in fails(pair, During(lambda: shutil.rmtree(pair / "out.partial")))


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; OSError where that is not allowed."""
    folder = tempfile.mkdtemp()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        os.rmdir(folder)
        raise OSError("mounting is not allowed")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        os.rmdir(folder)


def can_mount() -> bool:
    try:
        with small_disk(1):
            return True
    except OSError:
        return False


if can_mount():

    class TestSmallDisk:
        @pytest.fixture
        def disk(self, tmp_path: Path) -> Iterator[Path]:
            """Holds the output, of 8 MB, but not much more."""
            models(tmp_path, ["base", "one"], {"x": (2_000_000,), "y": (2_000_000,)})
            with small_disk(12) as folder:
                yield folder

        def plan(self, tmp_path: Path, disk: Path) -> Any:
            return plan_of(tmp_path, INTERPOLATE, str(disk / "out"))

        def fill(self, disk: Path) -> None:
            """Take all that is left."""
            with pytest.raises(OSError, match="No space"), open(disk / "filler", "ab", buffering=0) as file:
                for size in (65536, 4096, 1):
                    while file.write(bytes(size)) == size:
                        pass

        def test_too_small_for_the_output_is_refused_before_anything_is_written(
            self, tmp_path: Path, disk: Path
        ) -> None:
            (disk / "filler").write_bytes(bytes(5 << 20))
            with pytest.raises(Refused, match="not enough free space"):
                self.plan(tmp_path, disk)
            assert [path.name for path in disk.iterdir()] == ["filler"]

        @pytest.mark.parametrize("when", ["before", "at the start", "midway", "at the end"])
        def test_full_and_freed_again(self, when: str, tmp_path: Path, disk: Path) -> None:
            plan = self.plan(tmp_path, disk)
            if when == "before":
                self.fill(disk)
                progress: Any = None
            else:
                share = {"at the start": 0.0, "midway": 0.5, "at the end": 1.0}[when]
                progress = During(lambda: self.fill(disk), share)
            with pytest.raises(Failed, match="the disk is full"):
                carry_out(plan, progress, threads=1, memory_bytes=LEAST_MEMORY)
            assert not plan.folder.exists()
            (disk / "filler").unlink()
            assert carry_out(self.plan(tmp_path, disk), resume=True) is not None
            assert tensors(plan.folder) == merged(tmp_path, INTERPOLATE, "whole")

        def test_what_an_interrupted_merge_has_reserved_is_not_counted_against_it(
            self, tmp_path: Path, disk: Path
        ) -> None:
            def stumble() -> None:
                raise Failed("stumbled")

            for option in ("resume", "overwrite"):
                with pytest.raises(Failed, match="stumbled"):
                    carry_out(self.plan(tmp_path, disk), During(stumble), memory_bytes=LEAST_MEMORY, overwrite=True)
                assert shutil.disk_usage(disk).free < 8_000_000
                assert carry_out(self.plan(tmp_path, disk), **{option: True}) is not None
                shutil.rmtree(disk / "out")


def test_the_sparse_helper_is_a_checkpoint(tmp_path: Path) -> None:
    sparse(tmp_path / "x.safetensors", {"x": ("BF16", (1000, 1000))})
    assert tensors(tmp_path / "x.safetensors")["x"] == ("BF16", bytes(2_000_000))
