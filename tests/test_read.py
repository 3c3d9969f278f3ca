"""Reading by position: exactly what was asked for, from files that are what the plan saw."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_file
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from ggez_merge.errors import Failed
from ggez_merge.header import ShardFile, Tensor, read_shard_header
from ggez_merge.read import ALIGNMENT, Arena, Files, align, read_exactly


@pytest.fixture
def opened(tmp_path: Path) -> tuple[list[Tensor], ShardFile]:
    arrays = {"x": np.arange(5000, dtype=np.float32), "y": np.arange(7, dtype=np.uint8)}
    tensors, _, file = read_shard_header(write_file(tmp_path / "model.safetensors", arrays))
    return tensors, file


class TestArena:
    @given(st.lists(st.integers(0, 10_000), max_size=6))
    def test_parts_are_aligned_disjoint_and_writable(self, sizes: list[int]) -> None:
        arena = Arena(sum(align(size) for size in sizes))
        parts = arena.carve(sizes)
        assert [len(part) for part in parts] == sizes
        for number, part in enumerate(parts, start=1):
            part[:] = bytes([number]) * len(part)
        for number, part in enumerate(parts, start=1):
            assert bytes(part) == bytes([number]) * len(part)
            assert not len(part) or np.frombuffer(part, np.uint8).ctypes.data % ALIGNMENT == 0

    def test_more_than_there_is(self) -> None:
        with pytest.raises(ValueError, match="cannot hold"):
            Arena(8192).carve([4096, 4097])

    @given(st.integers(0, 1 << 40))
    def test_align(self, n_bytes: int) -> None:
        assert n_bytes <= align(n_bytes) < n_bytes + ALIGNMENT
        assert align(n_bytes) % ALIGNMENT == 0


class TestFiles:
    def test_spans_of_tensors(self, opened: tuple[list[Tensor], ShardFile]) -> None:
        (x, y), file = opened
        with Files([file]) as files:
            view = memoryview(bytearray(40))
            files.read(x, 400, view)
            assert np.frombuffer(view, np.float32).tolist() == list(range(100, 110))
            files.read(y, 3, view[:4])
            assert list(view[:4]) == [3, 4, 5, 6]

    def test_hashes(self, opened: tuple[list[Tensor], ShardFile]) -> None:
        _, file = opened
        stop = threading.Event()
        with Files([file]) as files:
            for size in (1, 1000, 1 << 20):
                found = files.hash(file, memoryview(bytearray(size)), stop)
                assert found == xxh3_128(file.path.read_bytes()).hexdigest()
            stop.set()
            assert files.hash(file, memoryview(bytearray(100)), stop) is None

    def test_a_file_cut_off_while_it_is_open(self, opened: tuple[list[Tensor], ShardFile]) -> None:
        (x, _), file = opened
        with Files([file]) as files:
            view = memoryview(bytearray(400))
            files.read(x, 0, view)
            os.truncate(file.path, x.offset + 100)
            with pytest.raises(Failed, match=rf"{file.path}: ends at byte {x.offset + 100}, 300 bytes too early"):
                files.read(x, 0, view)
            with pytest.raises(Failed, match="changed while"):
                files.check_unchanged()

    @pytest.mark.parametrize("change", ["size", "time", "gone"])
    def test_a_file_that_is_not_what_was_planned_is_never_read(
        self, change: str, opened: tuple[list[Tensor], ShardFile]
    ) -> None:
        (x, _), file = opened
        if change == "size":
            with open(file.path, "ab") as grown:
                grown.write(b"!")
        elif change == "time":
            os.utime(file.path, ns=(0, file.mtime_ns + 1))
        else:
            file.path.unlink()
        with Files([file]) as files:
            for _ in range(2):  # nor the second time
                with pytest.raises(Failed, match=str(file.path)):
                    files.read(x, 0, memoryview(bytearray(4)))
            with pytest.raises(Failed, match=str(file.path)):
                files.check_unchanged()

    def test_descriptors_are_closed(self, opened: tuple[list[Tensor], ShardFile]) -> None:
        (x, _), file = opened
        before = len(os.listdir("/proc/self/fd"))
        with Files([file]) as files:
            files.read(x, 0, memoryview(bytearray(4)))
            assert len(os.listdir("/proc/self/fd")) == before + 1
        assert len(os.listdir("/proc/self/fd")) == before

    def test_threads_share_one_descriptor(self, opened: tuple[list[Tensor], ShardFile]) -> None:
        (x, _), file = opened
        wrong = []
        with Files([file]) as files:

            def look(first: int) -> None:
                view = memoryview(bytearray(4))
                for i in range(first, 5000, 4):
                    files.read(x, 4 * i, view)
                    if np.frombuffer(view, np.float32)[0] != i:
                        wrong.append(i)

            threads = [threading.Thread(target=look, args=(first,)) for first in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []


def test_more_shards_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        headers = [
            read_shard_header(write_file(tmp_path / f"{i}.safetensors", {f"x{i}": np.array([i], np.uint8)}))
            for i in range(60)
        ]
        view = memoryview(bytearray(1))
        with Files([file for _, _, file in headers]) as files:
            for i, ((tensor,), _, _) in enumerate(headers):
                files.read(tensor, 0, view)
                assert view[0] == i
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@given(st.integers(0, 99), st.integers(0, 120))
def test_read_exactly(offset: int, length: int) -> None:
    content = bytes(range(100))
    descriptor = os.memfd_create("file")
    try:
        os.write(descriptor, content)
        view = memoryview(bytearray(length))
        if offset + length <= 100:
            read_exactly(descriptor, view, offset, Path("file"))
            assert bytes(view) == content[offset : offset + length]
        else:
            with pytest.raises(Failed, match="ends at byte 100"):
                read_exactly(descriptor, view, offset, Path("file"))
    finally:
        os.close(descriptor)
