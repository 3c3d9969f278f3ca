"""A task's key changes with what its result depends on, and with nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from dual_models import TEXTS, write_images, write_rows

from ggez_merge.evaluate import fingerprint as module
from ggez_merge.evaluate import rows_of
from ggez_merge.evaluate.fingerprint import fingerprint
from ggez_merge.evaluate.kinds import Command, Read, Retrieval
from ggez_merge.evaluate.source import Source
from ggez_merge.evaluate.tasks import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    files = write_images(tmp_path / "here/images", 3)
    rows = [{"image": name, "text": text} for name, text in zip(files, TEXTS, strict=False)]
    path = write_rows(tmp_path / "here/rows.jsonl", rows)
    return Task("x", "regional", Retrieval(), Source((path,), tmp_path / "here/images", place="a.yaml:3"), "a.yaml:3")


def key(task: Task, **options: str) -> str:
    return fingerprint(task, rows_of(task), **options)


def source_of(task: Task) -> Source:
    assert task.source
    return task.source


def test_the_same_task_has_the_same_key_wherever_it_lies(task: Task, tmp_path: Path) -> None:
    before = key(task)
    assert len(before) == 32
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there/rows.jsonl", (0, 0))
    moved = Source((tmp_path / "there/rows.jsonl",), tmp_path / "there/images", place="b.yaml:9")
    assert key(replace(task, source=moved, place="b.yaml:9")) == before
    assert key(task, device="cpu") == before
    assert key(task, device="cuda:0") == key(task, device="cuda:1") != before


def test_every_setting_counts(task: Task) -> None:
    keys = [key(task), key(task, dtype="bfloat16"), key(task, device="cuda")]
    for kind in (Retrieval(k=(5,)), Retrieval(within="text"), Retrieval(text=("image",))):
        keys.append(key(replace(task, kind=kind)))
    source = source_of(task)
    for changes in ({"group": ("text",)}, {"where": {"text": (TEXTS[0],)}}, {"limit": 2}, {"id": "text"}):
        keys.append(key(replace(task, source=replace(source, **changes))))
    keys += [key(replace(task, name="y")), key(replace(task, tag="global"))]
    assert len(set(keys)) == len(keys)


def test_every_byte_of_the_data_counts(task: Task, tmp_path: Path) -> None:
    keys = [key(task)]
    (tmp_path / "here/images/1.png").write_bytes((tmp_path / "here/images/0.png").read_bytes())
    keys.append(key(task))
    rows = tmp_path / "here/rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace(TEXTS[0], f"{TEXTS[0]}!"), encoding="utf-8")
    keys.append(key(task))
    (tmp_path / "here/images/2.png").unlink()
    lenient = replace(task, source=replace(source_of(task), max_broken=0.5))
    keys.append(key(lenient))
    assert len(set(keys)) == 4


def test_the_code_counts(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(task)
    folder = tmp_path / "evaluate"
    shutil.copytree(Path(module.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(folder / "fingerprint.py"))
    assert key(task) == before
    with open(folder / "dual.py", "a") as file:
        file.write("#\n")
    assert key(task) != before


def test_of_a_command_its_script_and_data_count(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.json").write_text("1")
    command = Command(("python", "eval.py", "--data=data", "{model}"), Read("o.json", metric="a"), folder=tmp_path)
    task = Task("x", "both", command)
    keys = [fingerprint(task)]
    (tmp_path / "eval.py").write_text("2")
    keys.append(fingerprint(task))
    (tmp_path / "data/a.json").write_text("2")
    keys.append(fingerprint(task))
    keys.append(fingerprint(replace(task, kind=replace(command, scale=1.0))))
    assert len(set(keys)) == 4
    assert fingerprint(replace(task, kind=replace(command, scale=1.0))) == keys[3]
