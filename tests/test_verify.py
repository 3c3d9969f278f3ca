"""Verifying a merged checkpoint: intact, each kind of damage, and reports that lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, carry_out, command_line, models, plan_of

from ggez_merge.errors import Refused
from ggez_merge.verify import verify
from ggez_merge.write import REPORT

FILES = {
    "config.json": '{"hidden_size": 4}',
    "tokenizer.json": "{}",
    "LICENSE": "do as you like",
    "additional_chat_templates/tools.jinja": "{{ x }}",
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    models(folder, ["base", "one"], {"x": (3000,), "y": (500,), "z": (9,)})
    for name, text in FILES.items():
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text(text)
    carry_out(plan_of(folder, INTERPOLATE, overrides=["output.shard_size=4KB"]))
    return folder / "out"


@pytest.fixture
def merged(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "merged"))


def written(folder: Path) -> list[str]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name not in ("README.md", REPORT))


def test_an_intact_folder(intact: Path) -> None:
    verdict = verify(intact)
    assert verdict.problems == ()
    assert list(verdict.intact) == written(intact)
    assert {*FILES, "model.safetensors.index.json", "model-00001-of-00002.safetensors"} <= {*verdict.intact}
    assert verdict.n_bytes == sum((intact / name).stat().st_size for name in verdict.intact)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "a file has other content"),
    "missing": (os.unlink, "a file is missing"),
    "shorter": (lambda path: os.truncate(path, path.stat().st_size - 1), "a file has another size"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "a file has another size"),
    "empty": (lambda path: os.truncate(path, 0), "a file has another size"),
    "a folder": (into_folder, "a file is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "LICENSE"])
def test_damage_is_found_where_it_is(name: str, damage: str, merged: Path) -> None:
    act, what = DAMAGES[damage]
    act(merged / name)
    verdict = verify(merged)
    assert [(problem.what, problem.place) for problem in verdict.problems] == [(what, str(merged / name))]
    assert list(verdict.intact) == [other for other in written(merged) if other != name] or damage == "a folder"


def test_all_damage_is_listed(merged: Path) -> None:
    names = written(merged)
    for name in names:
        (merged / name).unlink()
    assert [problem.place for problem in verify(merged).problems] == [str(merged / name) for name in names]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_of_the_weights_is_found(intact: Path, data: st.DataObject) -> None:
    path = intact / "model-00001-of-00002.safetensors"
    raw = path.read_bytes()
    position = data.draw(st.integers(0, len(raw) - 1))
    try:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ data.draw(st.integers(1, 255))]) + raw[position + 1 :])
        assert [problem.place for problem in verify(intact).problems] == [str(path)]
    finally:
        path.write_bytes(raw)


@pytest.mark.parametrize("make", ["nothing", "folder", "checkpoint", "file"])
def test_what_is_no_merge(make: str, tmp_path: Path) -> None:
    target = tmp_path / "it"
    if make == "folder":
        target.mkdir()
    elif make == "checkpoint":
        models(tmp_path, ["it"], {"x": (3,)})
    elif make == "file":
        target.write_text("")
    with pytest.raises(Refused, match="no readable merge report"):
        verify(target)


def said(**outputs: Any) -> str:
    return json.dumps({"outputs": {name.replace("__", "/"): entry for name, entry in outputs.items()}})


FINE = {"bytes": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}
LIES = {
    "no JSON": "{",
    "no text": "\udcff",
    "too deep": "[" * 100_000,
    "a list": "[]",
    "no outputs": "{}",
    "outputs a list": '{"outputs": []}',
    "outputs a word": '{"outputs": "all"}',
    "a size in words": said(x={**FINE, "bytes": "many"}),
    "a size of null": said(x={**FINE, "bytes": None}),
    "no hash": said(x={"bytes": 0}),
    "a hash of null": said(x={**FINE, "xxh3_128": None}),
    "an entry that is a list": said(x=[0, "af"]),
    "above": json.dumps({"outputs": {"../secret": FINE}}),
    "above, later": json.dumps({"outputs": {"a/../../secret": FINE}}),
    "absolute": json.dumps({"outputs": {"/etc/passwd": FINE}}),
    "no name": json.dumps({"outputs": {"": FINE}}),
    "itself": json.dumps({"outputs": {".": FINE}}),
}


@pytest.mark.parametrize("report", LIES.values(), ids=LIES)
def test_reports_that_are_none(report: str, merged: Path) -> None:
    (merged.parent / "secret").write_text("")
    (merged / REPORT).write_text(report, errors="surrogateescape")
    with pytest.raises(Refused, match="no readable merge report"):
        verify(merged)


def test_names_in_a_report_do_not_reach_the_terminal_raw(merged: Path) -> None:
    (merged / REPORT).write_text(json.dumps({"outputs": {"\x1b[2Jgone\0": FINE}}))
    result = command_line("verify", merged, cwd=merged)
    assert result.returncode in (1, 2)
    assert "\x1b" not in result.stderr
    assert "\0" not in result.stderr


def test_a_report_of_nothing_is_not_intact(merged: Path) -> None:
    (merged / REPORT).write_text('{"outputs": {}}')
    for path in merged.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(Refused):
        verify(merged)


def test_a_further_shard_that_the_index_does_not_know_is_not_loaded_nor_minded(merged: Path) -> None:
    shutil.copy(merged / "model-00001-of-00002.safetensors", merged / "other.safetensors")
    assert verify(merged).problems == ()
