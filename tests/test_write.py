"""Where a merge writes: what it may replace, what it takes up again, how shards are written and hashed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, carry_out, contents, merged, models, plan_of, scratch, tensors
from xxhash import xxh3_128

from ggez_merge.errors import Failed, Interrupted, Refused
from ggez_merge.progress import Silent
from ggez_merge.read import Arena
from ggez_merge.run import Stop
from ggez_merge.shards import Entry, split
from ggez_merge.write import O_DIRECT, REPORT, ShardWriter, finished_before, latest, prefers_direct, stage

OTHER = INTERPOLATE.replace("0.3", "0.4")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    models(tmp_path, ["base", "one"], {"x": (200_000,), "y": (7, 9)})
    return tmp_path


class StopAfter(Silent):
    """Asks to stop once so many bytes are merged (0: before the first of them)."""

    def __init__(self, n_bytes: int, stop: Stop) -> None:
        self.left, self.stop, self.merging = n_bytes, stop, False

    def phase(self, name: str, total_bytes: int) -> None:
        self.merging = name == "merging"

    def advance(self, n_bytes: int) -> None:
        self.left -= n_bytes * self.merging
        if self.merging and self.left <= 0:
            self.stop.ask(2)


def interrupt(folder: Path, recipe: str = INTERPOLATE, n_bytes: int = 150_000, **options: Any) -> Path:
    """A merge stopped in its middle; its .partial folder."""
    stop = Stop()
    with pytest.raises(Interrupted):
        carry_out(plan_of(folder, recipe), StopAfter(n_bytes, stop), stop, threads=1, memory_bytes=2 << 20, **options)
    return folder / "out.partial"


class TestWhatIsInTheWay:
    def test_an_output_is_replaced_only_if_asked_for(self, pair: Path) -> None:
        merged(pair, INTERPOLATE)
        before = contents(pair / "out")
        with pytest.raises(Refused, match="--overwrite"):
            merged(pair, OTHER)
        assert contents(pair / "out") == before
        merged(pair, OTHER, overwrite=True)
        assert contents(pair / "out") != before
        assert sorted(path.name for path in pair.iterdir()) == ["base", "one", "out"]

    @pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=str)
    @pytest.mark.parametrize("kind", ["folder", "checkpoint", "file", "link"])
    def test_what_ggez_merge_did_not_write_is_never_touched(self, kind: str, options: Any, pair: Path) -> None:
        if kind == "folder":
            (pair / "out").mkdir()
            (pair / "out" / "thesis.txt").write_text("ten years of work")
        elif kind == "checkpoint":
            shutil.copytree(pair / "one", pair / "out")
        elif kind == "file":
            (pair / "out").write_text("ten years of work")
        else:
            shutil.copytree(pair / "one", pair / "elsewhere")
            (pair / "out").symlink_to(pair / "elsewhere")
        before = contents(pair)
        with pytest.raises(Refused, match="not made by ggez-merge"):
            merged(pair, INTERPOLATE, **options)
        assert contents(pair) == before

    def test_an_empty_folder_is_no_obstacle(self, pair: Path) -> None:
        (pair / "out").mkdir()
        assert merged(pair, INTERPOLATE)

    def test_a_link_to_nowhere_is_refused(self, pair: Path) -> None:
        (pair / "out").symlink_to(pair / "nowhere")
        with pytest.raises((Refused, Failed)):
            merged(pair, INTERPOLATE)
        assert (pair / "out").is_symlink()

    def test_an_unfinished_merge_is_neither_continued_nor_removed_silently(self, pair: Path) -> None:
        partial = interrupt(pair)
        with pytest.raises(Refused, match=r"--resume.*--overwrite"):
            merged(pair, INTERPOLATE)
        assert partial.is_dir()
        merged(pair, INTERPOLATE, overwrite=True)
        assert not partial.exists()

    def test_a_second_process_is_refused(self, pair: Path) -> None:
        staging = stage(pair / "out", "print", resume=False, overwrite=False)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(Refused, match="another process"):
                merged(pair, INTERPOLATE, **options)
        staging.close()
        assert merged(pair, INTERPOLATE, overwrite=True)

    @pytest.mark.parametrize("out", ["base/model.safetensors/out", "x" * 300])
    def test_a_folder_that_cannot_be_made(self, out: str, pair: Path) -> None:
        with pytest.raises((Failed, Refused)):
            merged(pair, INTERPOLATE, out)

    def test_a_missing_parent_is_made(self, pair: Path) -> None:
        assert merged(pair, INTERPOLATE, "a/b/c")


class TestResume:
    def test_nothing_there_or_finished_already(self, pair: Path) -> None:
        plan = plan_of(pair, INTERPOLATE)
        assert carry_out(plan, resume=True) is not None
        before = contents(pair)
        assert carry_out(plan, resume=True) is None
        assert contents(pair) == before
        with pytest.raises(Refused, match="exists already"):
            carry_out(plan_of(pair, OTHER), resume=True)

    def test_takes_over_what_is_there(self, pair: Path) -> None:
        whole = merged(pair, INTERPOLATE, "whole")
        interrupt(pair)
        outcome = carry_out(plan_of(pair, INTERPOLATE), resume=True)
        assert outcome is not None
        assert 100_000 < outcome.resumed_bytes < 400_000
        assert tensors(pair / "out") == whole
        assert {*contents(pair / "out")} == {*contents(pair / "whole")}

    @pytest.mark.parametrize("change", ["ratio", "dtype", "shards", "nonfinite", "content", "time", "header"])
    def test_another_merge_is_not_continued(self, change: str, pair: Path) -> None:
        partial = interrupt(pair)
        before = contents(partial)
        path = pair / "one" / "model.safetensors"
        overrides = {
            "ratio": ["parameters.ratio=0.30000001"],
            "dtype": ["dtype=float32"],
            "shards": ["output.shard_size=200KB"],
            "nonfinite": ["nonfinite=allow"],
        }.get(change, [])
        status = os.stat(path)
        if change == "content":
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        elif change == "time":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        elif change == "header":
            path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tf"').replace(b'"pt"', b'"tf"'))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(Refused, match="has changed since"):
            carry_out(plan_of(pair, INTERPOLATE, overrides=overrides), resume=True)
        assert contents(partial) == before

    def test_a_finished_merge_of_another_chat_template_is_not_taken_for_this_one(self, pair: Path) -> None:
        merged(pair, INTERPOLATE)
        with pytest.raises(Refused, match="exists already"):
            carry_out(plan_of(pair, INTERPOLATE, overrides=["chat_template='{{ hello }}'"]), resume=True)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**9), st.integers(0, 7))
    def test_a_damaged_byte_of_a_partial_shard_is_found(self, position: int, bit: int) -> None:
        with scratch() as folder:
            models(folder, ["base", "one"], {"x": (200_000,)})
            whole = merged(folder, INTERPOLATE, "whole")
            partial = interrupt(folder)
            done = journal(partial)[-1]["bytes"]
            shard = partial / "checkpoint" / "model.safetensors"
            raw = bytearray(shard.read_bytes())
            raw[4096 + position % (done - 4096)] ^= 1 << bit  # behind the header's place
            shard.write_bytes(raw)
            outcome = carry_out(plan_of(folder, INTERPOLATE), resume=True)
            assert outcome is not None
            assert outcome.resumed_bytes == 0
            assert tensors(folder / "out") == whole

    def test_a_lost_or_shortened_partial_shard_is_begun_anew(self, pair: Path) -> None:
        whole = merged(pair, INTERPOLATE, "whole")
        for damage in (os.unlink, lambda path: os.truncate(path, 5000), lambda path: os.truncate(path, 0)):
            partial = interrupt(pair)
            damage(partial / "checkpoint" / "model.safetensors")
            carry_out(plan_of(pair, INTERPOLATE), resume=True)
            assert tensors(pair / "out") == whole
            shutil.rmtree(pair / "out")

    def test_the_journal_may_be_cut_anywhere(self, pair: Path) -> None:
        whole = merged(pair, INTERPOLATE, "whole")
        interrupt(pair)
        shutil.copytree(pair / "out.partial", pair / "kept")
        text = (pair / "kept" / "journal.jsonl").read_bytes()
        first = text.index(b"\n") + 1
        for length in [0, 1, first - 1, first, first + 1, *range(first + 2, len(text), 97), len(text) - 1]:
            shutil.rmtree(pair / "out.partial", ignore_errors=True)
            shutil.copytree(pair / "kept", pair / "out.partial")
            os.truncate(pair / "out.partial" / "journal.jsonl", length)
            outcome = carry_out(plan_of(pair, INTERPOLATE), resume=True)
            assert tensors(pair / "out") == whole
            assert outcome is not None
            assert (outcome.resumed_bytes > 0) == (text[:length].count(b"\n") > 1)
            shutil.rmtree(pair / "out")

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_a_garbled_journal_never_gives_other_bytes(self, data: st.DataObject) -> None:
        with scratch() as folder:
            models(folder, ["base", "one"], {"x": (200_000,)})
            whole = merged(folder, INTERPOLATE, "whole")
            path = interrupt(folder) / "journal.jsonl"
            raw = bytearray(path.read_bytes())
            for _ in range(data.draw(st.integers(1, 4))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'0123456789[]{},:"\n a\xff'))
            path.write_bytes(raw)
            try:
                carry_out(plan_of(folder, INTERPOLATE), resume=True)
            except Refused as refused:
                assert "has changed since" in str(refused)
            else:
                assert tensors(folder / "out") == whole

    def test_delta_norms_are_those_of_an_uninterrupted_merge(self, pair: Path) -> None:
        merged(pair, INTERPOLATE, "whole")
        expected = norms(pair / "whole")
        partial = interrupt(pair)
        interrupt(pair, n_bytes=250_000, resume=True)
        carry_out(plan_of(pair, INTERPOLATE), resume=True)
        assert norms(pair / "out") == pytest.approx(expected, rel=1e-5)
        shutil.rmtree(pair / "out")
        # begun anew after damage, interrupted again: what the first run saw must not be counted twice
        interrupt(pair)
        shard = partial / "checkpoint" / "model.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[5000] ^= 1
        shard.write_bytes(raw)
        stop = Stop()
        with pytest.raises(Interrupted):  # larger blocks: the first one ends behind all that the first run wrote
            carry_out(plan_of(pair, INTERPOLATE), StopAfter(1, stop), stop, threads=1, resume=True)
        carry_out(plan_of(pair, INTERPOLATE), resume=True)
        assert norms(pair / "out") == pytest.approx(expected, rel=1e-5)

    def test_an_interrupted_replacement_can_be_resumed(self, pair: Path) -> None:
        merged(pair, OTHER)
        before = contents(pair / "out")
        partial = interrupt(pair, overwrite=True)
        assert contents(pair / "out") == before
        outcome = carry_out(plan_of(pair, INTERPOLATE), resume=True)
        assert outcome is not None
        assert outcome.resumed_bytes > 0
        assert contents(pair / "out") != before
        assert not partial.exists()


def journal(partial: Path) -> list[dict[str, Any]]:
    return [json.loads(line[17:]) for line in (partial / "journal.jsonl").read_text().splitlines()]


def norms(folder: Path) -> list[float]:
    report = json.loads((folder / REPORT).read_text())
    return [norm for said in report["tensors"].values() for norm in said.get("delta_norms", [])]


class TestCommit:
    """Killed between the steps that give the checkpoint its final name; each state is made as the kill leaves it."""

    @pytest.fixture
    def old(self, pair: Path) -> dict[str, bytes]:
        merged(pair, OTHER)
        return contents(pair / "out")

    def between_the_renames(self, pair: Path) -> None:
        interrupt(pair, overwrite=True)
        (pair / "out").rename(pair / "out.partial" / "replaced")

    @pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
    def test_between_the_renames(self, pair: Path, old: dict[str, bytes], options: Any) -> None:
        self.between_the_renames(pair)
        found = merged(pair, INTERPOLATE, **options)
        assert found == merged(pair, INTERPOLATE, "whole")
        assert not (pair / "out.partial").exists()

    def test_between_the_renames_the_old_output_comes_back_whatever_is_asked_next(
        self, pair: Path, old: dict[str, bytes]
    ) -> None:
        self.between_the_renames(pair)
        with pytest.raises(Refused):
            merged(pair, INTERPOLATE)
        assert contents(pair / "out") == old

    @pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=str)
    def test_before_the_replaced_output_was_removed(self, pair: Path, old: dict[str, bytes], options: Any) -> None:
        self.between_the_renames(pair)
        merged(pair, INTERPOLATE, "new")
        (pair / "new").rename(pair / "out")
        shutil.rmtree(pair / "out.partial" / "checkpoint")
        whole = merged(pair, INTERPOLATE, "whole")
        assert merged(pair, INTERPOLATE, **options) == whole
        assert not (pair / "out.partial").exists()
        assert merged(pair, OTHER, overwrite=True) != whole


ENTRIES = [Entry("x", "BF16", (300_001,), 600_002), Entry("y", "F32", (7,), 28)]


class TestShardWriter:
    @pytest.mark.parametrize("direct", [False, True])
    def test_blocks_in_any_order_give_the_file_and_its_hash(self, direct: bool, tmp_path: Path) -> None:
        (shard,) = split(ENTRIES, 1 << 30)
        content = os.urandom(shard.size - len(shard.header))
        writer = ShardWriter(tmp_path / "x", shard, direct and bool(O_DIRECT))
        stop = threading.Event()
        arena = Arena(4 << 20)
        begin = len(shard.header)
        starts = list(range(begin, shard.size, 65_536))
        digests: list[str] = []

        def one(at: int) -> None:
            writer.hash_in_turn(memoryview(content)[at - begin : at - begin + 65_536], at, stop, digests.append)

        threads = [threading.Thread(target=one, args=(at,)) for at in reversed(starts)]
        for thread in threads:
            thread.start()
        for at in reversed(starts):
            n = min(65_536, shard.size - at)
            (view,) = arena.carve([65_536])
            view[:n] = content[at - begin : at - begin + n]
            writer.write(view if direct else view[:n], at)
        for thread in threads:
            thread.join()
        assert len(digests) == len(starts)
        assert (tmp_path / "x").read_bytes()[:8] == bytes(8)  # no header yet: nothing loads it
        digest = writer.finish(arena)
        writer.close()
        assert (tmp_path / "x").read_bytes() == shard.header + content
        assert digest == xxh3_128(shard.header + content).hexdigest() == digests[-1]

    def test_waiting_for_a_turn_ends_with_a_stop(self, tmp_path: Path) -> None:
        (shard,) = split(ENTRIES, 1 << 30)
        writer = ShardWriter(tmp_path / "x", shard, False)
        stop = threading.Event()
        stop.set()
        writer.hash_in_turn(memoryview(b"late"), shard.size - 4, stop, pytest.fail)
        assert writer.hashed == len(shard.header)
        writer.close()

    def test_the_probe_leaves_nothing_behind(self, tmp_path: Path) -> None:
        assert prefers_direct(tmp_path, 1 << 20) is False
        assert prefers_direct(tmp_path, 1 << 40) in (True, False)
        assert not list(tmp_path.iterdir())
        assert list(tmp_path.iterdir()) == []


def test_latest_follows_the_chain_of_the_last_beginning() -> None:
    def entry(begin: int, end: int, shard: int = 0) -> dict[str, Any]:
        return {"shard": shard, "from": begin, "bytes": end}

    chain = [entry(4, 20), entry(20, 30), entry(4, 50, shard=1)]
    assert latest(chain, 0, 4) == chain[:2]
    anew = [*chain, entry(4, 90), entry(90, 95)]
    assert latest(anew, 0, 4) == anew[3:]
    assert latest(anew, 1, 4) == chain[2:]
    assert latest(anew, 2, 4) == []
    assert latest([entry(8, 20), *chain, entry(40, 50)], 0, 4) == chain[:2]  # links are missing


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", '{"fingerprint": 3}', '{"fingerprint": "other"}', "[" * 9999]
)
def test_only_a_report_of_this_very_merge_counts_as_finished(content: str, tmp_path: Path) -> None:
    assert not finished_before(tmp_path, "print")
    (tmp_path / REPORT).write_text(content)
    assert not finished_before(tmp_path, "print")
    (tmp_path / REPORT).write_text('{"fingerprint": "print"}')
    assert finished_before(tmp_path, "print")
