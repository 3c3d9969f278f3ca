"""The command line: exit codes, what goes to which stream, options, and no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from merging import COMMAND, INTERPOLATE, command_line, merged, models, read_all, sparse, tensors

from ggez_merge import __version__


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    models(tmp_path, ["base", "one"], {"x": (1000,), "logit_scale": ()})
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    return tmp_path


class TestMerging:
    def test_a_recipe_without_a_subcommand(self, pair: Path) -> None:
        result = command_line("recipe.yaml", "--out", "out", cwd=pair)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(rf"{pair}/out: 2 tensors, 6\.10 kB in [0-9.]+ s\n", result.stdout)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout + result.stderr)
        assert tensors(pair / "out") == merged(pair, INTERPOLATE, "whole")

    @pytest.mark.parametrize("arguments", [["merge", "recipe.yaml"], ["--quiet", "recipe.yaml"]], ids=" ".join)
    @pytest.mark.parametrize("out", ["out", "merge", "verify"])
    def test_any_order_and_any_name_of_the_output(self, arguments: list[str], out: str, pair: Path) -> None:
        result = command_line(*arguments, "--out", out, "--set", "parameters.ratio=1", cwd=pair)
        assert result.returncode == 0, result.stderr
        assert tensors(pair / out) == tensors(pair / "one")

    def test_quiet_says_nothing(self, pair: Path) -> None:
        result = command_line("recipe.yaml", "--out", "out", "--quiet", cwd=pair)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_a_terminal_shows_a_bar(self, pair: Path) -> None:
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(pair)
            os.execv(COMMAND[0], [*COMMAND, "recipe.yaml", "--out", "out"])
        shown = read_all(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "merging" in shown
        assert "kB" in shown
        assert "2 tensors" in shown

    def test_paths_are_relative_to_the_recipe_then_to_the_working_folder(self, pair: Path, tmp_path: Path) -> None:
        work = tmp_path / "work"
        work.mkdir()
        (pair / "one").rename(work / "one")
        recipe = INTERPOLATE.rstrip("}\n") + "}, output: {path: beside}}"
        (pair / "recipe.yaml").write_text(recipe.replace("0.3}}", "0.3}"))
        result = command_line("../recipe.yaml", cwd=work)
        assert result.returncode == 0, result.stderr
        assert (pair / "beside" / "model.safetensors").exists()

    def test_threads_memory_and_resume(self, pair: Path) -> None:
        options = ["--out", "out", "--threads", "1", "--memory", "3MiB", "--device", "cpu"]
        assert command_line("recipe.yaml", *options, cwd=pair).returncode == 0
        report = json.loads((pair / "out" / "merge_report.json").read_text())
        assert (report["run"]["threads"], report["run"]["memory_bytes"]) == (1, 3 << 20)
        again = command_line("recipe.yaml", *options, "--resume", cwd=pair)
        assert (again.returncode, "nothing to do" in again.stdout) == (0, True)


class TestDryRun:
    def test_tells_the_plan_and_writes_nothing(self, pair: Path) -> None:
        before = sorted(pair.rglob("*"))
        result = command_line("recipe.yaml", "--out", "out", "--dry-run", cwd=pair)
        assert (result.returncode, result.stderr) == (0, "")
        for words in ("linear", "base", "one", "ratio 0.3", "logit_scale", "writes", "reads", "memory", "free disk"):
            assert words in result.stdout
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)
        assert sorted(pair.rglob("*")) == before

    def test_as_json_of_models_that_nobody_could_read_in_time(self, tmp_path: Path) -> None:
        for model in ("base", "one"):
            sparse(tmp_path / model / "model.safetensors", {"x": ("F32", (1 << 18, 1 << 14))})  # 16 GiB of holes
        (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
        options = ["--dry-run", "--json", "--out", "out", "--set", "dtype=bfloat16", "--memory", "100MB"]
        result = command_line("recipe.yaml", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        said = json.loads(result.stdout)
        assert said["method"] == "linear"
        assert said["output"] == str(tmp_path / "out")
        assert [entry["bytes"] for entry in said["inputs"]] == [1 << 34, 1 << 34]
        assert [entry["role"] for entry in said["inputs"]] == ["base", "model"]
        assert said["read_bytes"] == 1 << 35
        assert said["write_bytes"] > 1 << 33
        assert said["dtypes"] == ["BF16"]
        assert 100_000_000 < said["peak_memory_bytes"] < 400_000_000
        assert [entry["file"] for entry in said["shards"]] == ["model.safetensors"]

    def test_refuses_what_the_merge_would_refuse(self, pair: Path) -> None:
        write_checkpoint(pair / "one", {})
        for options in ([], ["--json"]):
            result = command_line("recipe.yaml", "--dry-run", "--out", "out", *options, cwd=pair)
            assert result.returncode == 2
            assert "one lacks 2 tensors that base has" in result.stderr
            assert result.stdout == ""


class TestMistakes:
    """Exit code 2, a message that says what to do on standard error, and nothing on the disk."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nowhere.yaml"], "nowhere.yaml"),
            (["base"], "base"),
            (["base/model.safetensors"], "recipe"),
            (["recipe.yaml"], "no output folder"),
            (["recipe.yaml", "--out", "base"], "is (or holds) an input"),
            (["recipe.yaml", "--out", "out", "--memory", "lots"], "is no size"),
            (["recipe.yaml", "--out", "out", "--memory", "-1"], "memory"),
            (["recipe.yaml", "--out", "out", "--memory", "0"], "too small"),
            (["recipe.yaml", "--out", "out", "--memory", "1MB"], "at least"),
            (["recipe.yaml", "--out", "out", "--threads", "0"], "threads"),
            (["recipe.yaml", "--out", "out", "--threads", "two"], "threads"),
            (["recipe.yaml", "--out", "out", "--device", "cuda"], "cpu"),
            (["recipe.yaml", "--out", "out", "--json"], "--dry-run"),
            (["recipe.yaml", "--out", "out", "--resume", "--overwrite"], "contradict"),
            (["recipe.yaml", "--out", "out", "--set", "parameters.ratoi=1"], "did you mean `ratio`"),
            (["recipe.yaml", "--out", "out", "--set", "ratio"], "--set"),
            (["recipe.yaml", "--out", "out", "--ouptut", "x"], "--ouptut"),
            (["recipe.yaml", "recipe.yaml", "--out", "out"], "recipe.yaml"),
            (["verify", "base"], "no readable merge report"),
            (["verify", "nowhere"], "no readable merge report"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_are_answered(self, arguments: list[str], said: str, pair: Path) -> None:
        before = sorted(pair.rglob("*"))
        result = command_line(*arguments, cwd=pair, env={**os.environ, "COLUMNS": "200"})
        assert result.returncode == 2
        assert said in result.stderr
        assert result.stdout == ""
        assert sorted(pair.rglob("*")) == before

    def test_several_problems_are_counted(self, pair: Path) -> None:
        options = ["--set", "parameters.ratoi=1", "--set", "components.x.y=1"]
        result = command_line("recipe.yaml", "--out", "out", *options, cwd=pair)
        assert result.returncode == 2
        assert re.match(r"\d problems:\n", result.stderr)

    def test_bad_weights_leave_nothing(self, pair: Path) -> None:
        raw = bytearray((pair / "one" / "model.safetensors").read_bytes())
        raw[-2:] = b"\xc0\x7f"  # the last bfloat16 becomes NaN
        (pair / "one" / "model.safetensors").write_bytes(raw)
        result = command_line("recipe.yaml", "--out", "out", cwd=pair)
        assert result.returncode == 2
        assert "NaN or Inf among the weights" in result.stderr
        assert "one/model.safetensors" in result.stderr
        assert not list(pair.glob("out*"))

    def test_what_fails_for_another_reason_ends_with_1(self, pair: Path) -> None:
        (pair / "file").write_text("")
        result = command_line("recipe.yaml", "--out", "file/out", cwd=pair)
        assert result.returncode == 1
        assert "cannot be written" in result.stderr


class TestVerify:
    def test_intact_and_damaged(self, pair: Path) -> None:
        merged(pair, INTERPOLATE)
        result = command_line("verify", "out", cwd=pair)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("out: intact (")
        os.truncate(pair / "out" / "model.safetensors", 10)
        result = command_line("verify", "out", cwd=pair)
        assert (result.returncode, result.stdout) == (1, "")
        assert "another size" in result.stderr


def test_version_and_help(tmp_path: Path) -> None:
    assert command_line("--version", cwd=tmp_path).stdout == f"{__version__}\n"
    for arguments in (["--help"], ["merge", "--help"], ["verify", "--help"]):
        result = command_line(*arguments, cwd=tmp_path)
        assert result.returncode == 0
        assert "Usage" in result.stdout


def test_a_reader_that_goes_away_is_no_error_worth_a_traceback(pair: Path) -> None:
    command = " ".join([*COMMAND, "recipe.yaml", "--out", "out", "--dry-run"])
    result = subprocess.run(f"{command} | true", shell=True, cwd=pair, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
