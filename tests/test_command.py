"""Programs that measure a candidate: how they are run, and how their results are read."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ggez_merge.errors import Failed
from ggez_merge.evaluate import evaluate
from ggez_merge.evaluate.kinds import Command, Read
from ggez_merge.evaluate.measured import Measured
from ggez_merge.evaluate.tasks import Task

JSON = "import json, sys; json.dump({'results': {'acc': [0.25, 0.5]}, 'n': 40}, open(sys.argv[2] + '/out.json', 'w'))"
AT = Read("out.json", metric="results.acc[1]")


def task(code: str, read: Read = AT, **keys: Any) -> Task:
    arguments = (sys.executable, "-c", code, "{model}", "{out}")
    return Task("mine", "regional", Command(arguments, read, **keys))


def run(task: Task, tmp_path: Path, model: Path | None = None) -> Measured:
    return evaluate(task, folder=model or tmp_path, out=tmp_path / "out")


def fails(task: Task, tmp_path: Path) -> str:
    with pytest.raises(Failed) as caught:
        run(task, tmp_path)
    return str(caught.value)


def test_a_score_is_read_from_what_the_program_leaves(tmp_path: Path) -> None:
    read = Read("out.json", metric="results.acc[1]", n="n", stderr="results.acc.0")
    result = run(task(JSON, read, scale=1.0, chance=0.2), tmp_path)
    assert result == Measured("mine", "regional", 0.5, n=40, chance=0.2, scale=1.0, stderr=0.25)
    assert run(task(JSON, n=7, higher_is_better=False), tmp_path / "b").n == 7
    assert not run(task(JSON, higher_is_better=False), tmp_path / "c").higher_is_better


def test_placeholders_are_whole_paths_and_no_shell_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "my {out} $HOME; model"
    model.mkdir()
    code = "import json, sys; json.dump({'a': 1, 'seen': sys.argv[1:]}, open(sys.argv[2] + '/out.json', 'w'))"
    command = Command((sys.executable, "-c", code, "x={model}", "{out}", "*", "$HOME"), Read("out.json", metric="a"))
    here = Task("mine", "both", command)
    monkeypatch.chdir(tmp_path)
    evaluate(here, folder=Path(model.name), out=Path("out"))
    seen = json.loads((tmp_path / "out/out.json").read_text())["seen"]
    assert seen == [f"x={model}", str(tmp_path / "out"), "*", "$HOME"]


def test_a_program_runs_in_the_recipes_folder_and_its_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    code = f"import os, sys; print('here:', os.getcwd()); print('ข้อผิดพลาด', file=sys.stderr); {JSON}"
    run(task(code, folder=tmp_path / "recipes"), tmp_path)
    log = (tmp_path / "out/mine.log").read_text(encoding="utf-8")
    assert f"here: {tmp_path / 'recipes'}" in log
    assert "ข้อผิดพลาด" in log


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    text = fails(
        task("import sys; [print('line', i) for i in range(99)]; print('\\x1b[31mred'); sys.exit(3)"), tmp_path
    )
    assert "exit code 3" in text and "line 98" in text and "line 5\n" not in text and "mine.log" in text
    assert "\x1b" not in text
    text = fails(task("import os; os.kill(os.getpid(), 9)"), tmp_path / "b")
    assert "signal 9" in text
    lost = Task("mine", "both", Command(("no-such-program", "{model}"), AT))
    assert "cannot be started: no-such-program" in fails(lost, tmp_path / "c")


def test_a_timeout_ends_the_program_and_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', flush=True); open(sys.argv[2] + '/pid', 'w').write(str(p.pid)); time.sleep(600)"
    )
    text = fails(task(code, timeout_s=3.0), tmp_path)
    assert "longer than 3 s" in text and "started" in text
    pid = int((tmp_path / "out/pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended; nobody has asked how
            break
        time.sleep(0.05)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_an_older_result_is_never_read(tmp_path: Path) -> None:
    run(task(JSON), tmp_path)
    assert "is not empty" in fails(task("pass"), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "left no file out.json"),
        ("{", "is not JSON"),
        ('{"results": 1}', "no results.acc[1]"),
        ('{"results": {"acc": [1, "n/a"]}}', "not a finite number"),
        ('{"results": {"acc": [1, NaN]}}', "not a finite number"),
        ('{"results": {"acc": [1, true]}}', "not a finite number"),
    ],
)
def test_what_is_no_score_is_told(content: str | None, message: str, tmp_path: Path) -> None:
    code = "print('was here')"
    if content is not None:
        code += f"; import sys; open(sys.argv[2] + '/out.json', 'w').write({content!r})"
    text = fails(task(code), tmp_path)
    assert message in text and "was here" in text


def left(tmp_path: Path, name: str, content: Any, command: Command) -> Measured:
    """The result of a program that leaves this file."""
    file = tmp_path / "source" / Path(name).name
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".csv":
        with open(file, "w", newline="") as opened:
            csv.writer(opened).writerows(content)
    else:
        file.write_text(json.dumps(content))
    code = "import shutil, sys, pathlib; p = pathlib.Path(sys.argv[3]); p.parent.mkdir(parents=True, exist_ok=True); "
    code += "shutil.copy(sys.argv[2], p)"
    arguments = shlex.split(
        f"{sys.executable} -c {shlex.quote(code)} {{model}} {shlex.quote(str(file))} {{out}}/{name}"
    )
    changed = Command(tuple(arguments), command.read, command.adapter, None, command.scale)
    return evaluate(Task("mine", "both", changed), folder=tmp_path, out=tmp_path / "out")


CSV = [["split", "model", "acc", "n"], ["val", "a", "0.5", "10"], ["test", "a", "62.5%", "20"]]


def test_csv_is_read_by_column_and_row(tmp_path: Path) -> None:
    read = Read("*.csv", column="acc", row={"split": "test"}, n="n")
    result = left(tmp_path, "scores.csv", CSV, Command((), read, scale=100.0))
    assert (result.score, result.n, result.scale) == (62.5, 20, 100.0)
    for row, message in (({}, "say which one under `row`"), ({"split": "dev"}, "with split: dev; it has 0 of 2")):
        (tmp_path / message[:3]).mkdir()
        with pytest.raises(Failed, match=message):
            left(tmp_path / message[:3], "scores.csv", CSV, Command((), Read("scores.csv", column="acc", row=row)))


HARNESS = {
    "results": {
        "cvqa": {"alias": "cvqa", "acc,none": 0.625, "acc_stderr,none": 0.05, "acc_norm,none": 0.5},
        "gen": {"exact_match,strict": 0.1, "exact_match,loose": 0.2, "exact_match_stderr,loose": "N/A"},
        "ppl": {"word_perplexity,none": 12.5},
    },
    "n-samples": {"cvqa": {"original": 100, "effective": 90}},
    "higher_is_better": {"cvqa": {"acc": True}, "ppl": {"word_perplexity": False}},
}


@pytest.mark.parametrize(
    ("adapter", "name"),
    [("lm-evaluation-harness", "my__model/results_2025-01-01.json"), ("lmms-eval", "m/20250101_results.json")],
)
def test_harnesses_are_read(adapter: str, name: str, tmp_path: Path) -> None:
    def read(folder: str, **keys: Any) -> Measured:
        (tmp_path / folder).mkdir()
        return left(tmp_path / folder, name, HARNESS, Command((), Read(**keys), adapter))

    result = read("a", task="cvqa", metric="acc")
    assert result == Measured("mine", "both", 0.625, n=90, stderr=0.05, scale=1.0)
    result = read("b", task="gen", metric="exact_match", filter="loose")
    assert (result.score, result.stderr, result.n) == (0.2, None, None)
    result = read("c", task="ppl", metric="word_perplexity")
    assert (result.score, result.scale, result.higher_is_better) == (12.5, None, False)
    with pytest.raises(Failed, match="has no results of the task mmlu; it has cvqa, gen, ppl"):
        read("d", task="mmlu", metric="acc")
    with pytest.raises(Failed, match="no exact_match,none of gen"):
        read("e", task="gen", metric="exact_match")


def test_vlmevalkit_is_read(tmp_path: Path) -> None:
    table = [["split", "Overall", "AR"], ["dev", "0.75", "0.5"]]
    for folder, read, score in (
        ("a", Read(task="MMBench_DEV_EN"), 0.75),
        ("b", Read(task="MMBench_DEV_EN", column="AR", row={"split": "dev"}), 0.5),
    ):
        (tmp_path / folder).mkdir()
        command = Command((), read, "vlmevalkit", scale=1.0)
        result = left(tmp_path / folder, "My-Model/My-Model_MMBench_DEV_EN_acc.csv", table, command)
        assert (result.score, result.scale) == (score, 1.0)
    (tmp_path / "c").mkdir()
    command = Command((), Read(task="OCRBench", metric="Final Score"), "vlmevalkit", scale=1000.0)
    result = left(tmp_path / "c", "m/m_OCRBench_score.json", {"Final Score": 512, "Final Score Norm": 51.2}, command)
    assert (result.score, result.percent) == (512, 51.2)
