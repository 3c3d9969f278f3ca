"""Benchmarks: the gate, what the tables hold, what the plots are made of, and the arithmetic of the roofline."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merging import command_line

from ggez_merge.benchmarks import roofline, table
from ggez_merge.benchmarks.inputs import DTYPES, make
from ggez_merge.benchmarks.kernels import COLUMNS, Case, bench, faster, gate, measure
from ggez_merge.benchmarks.models import make as make_model
from ggez_merge.benchmarks.ops import OPS, Op
from ggez_merge.benchmarks.places import Cpu
from ggez_merge.errors import Failed, Refused

ELEMENTS = 3 * 65536 + 1001
GIGA = 1_000_000_000


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestKernels:
    def test_every_kernel_passes_the_gate_and_is_timed_beside_its_baselines(self, tmp_path: Path) -> None:
        options = ["--sizes", str(ELEMENTS), "--dtypes", "bfloat16", "--threads", "1,2", "--repeats", "2"]
        command = ["bench", "kernels", "--device", "cpu", *options, "--against", "eager,mergekit", "--csv", "new/k.csv"]
        result = command_line(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows = rows_of(tmp_path / "new" / "k.csv")
        assert list(rows[0]) == COLUMNS
        runs = {(row["op"], row["dtype"], row["threads"]) for row in rows}
        assert runs == {(op, "bfloat16", threads) for op in OPS for threads in "12"}
        for row in rows:
            timed = row["median_ms"] != ""
            assert timed == (row["note"] == ""), row
            assert timed or (row["tool"] == "mergekit" and OPS[row["op"]].mergekit is None), row
            if timed:
                assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
                assert float(row["gb_per_s"]) > 0
                assert int(row["runs"]) >= 2
            if row["tool"] == "copy":
                assert float(row["share_of_copy"]) == 1
            assert (row["elements"], row["device"]) == (str(ELEMENTS), "cpu")
            assert table.processor() == row["machine"]
            assert "numba " in row["versions"]
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert {row["op"] for row in rows if row["tool"] == "apart"} == {"many"}
        for words in (*OPS, "bfloat16, 197,609 elements, cpu, 2 threads", "GB/s", "% copy"):
            assert words in result.stdout

    def test_figures_follow_from_the_times(self) -> None:
        case = Case("task_arithmetic", "bfloat16", ELEMENTS)
        rows = measure(case, Cpu(1), make(ELEMENTS, DTYPES["bfloat16"], 1), (), repeats=3)
        copy, ours = rows
        assert (copy["tool"], ours["tool"]) == ("copy", "ggez-merge")
        moved = {"copy": 2 * 2 * ELEMENTS, "ggez-merge": 4 * 2 * ELEMENTS}  # arrays of two bytes an element
        for row in rows:
            speed = moved[row["tool"]] / float(row["median_ms"]) / 1e6
            assert float(row["gb_per_s"]) == pytest.approx(speed, rel=0.01)
            assert float(row["share_of_copy"]) == pytest.approx(speed / float(copy["gb_per_s"]), rel=0.02)
            times = float(row["median_ms"]) / float(ours["median_ms"])
            assert float(row["times_ggez_merge"]) == pytest.approx(times, rel=0.01)

    def test_torch_compile_is_timed_or_its_failure_told(self, tmp_path: Path) -> None:
        bench("cpu", "linear,gram", "70000", "bfloat16", "1", 2, "compile,stats", tmp_path / "k.csv")
        rows = {(row["op"], row["tool"]): row for row in rows_of(tmp_path / "k.csv")}
        for op, tool in (("linear", "compile"), ("linear", "stats"), ("gram", "compile")):
            row = rows[op, tool]
            assert row["median_ms"] or re.match(r"\w+: .", row["note"]), row
        assert rows["gram", "stats"]["note"]

    @pytest.mark.parametrize(
        ("compile_s", "stats_s", "copy_s", "noted"),
        [
            (2.0, 3.0, 0.1, {}),
            (0.5, 3.0, 0.1, {"compile": "without the statistics"}),
            (0.5, None, 0.1, {"compile": "faster$"}),
            (0.5, 0.6, 0.1, {"compile": "faster$", "stats": "faster$"}),
            (0.9, None, 0.6, {"compile": "wait for memory"}),
            (0.9, 0.95, 0.6, {"compile": "wait for memory", "stats": "wait for memory"}),
        ],
    )
    def test_where_torch_compile_wins_the_reason_is_told(
        self, compile_s: float, stats_s: float | None, copy_s: float, noted: dict[str, str]
    ) -> None:
        medians = {"copy": copy_s, "ggez-merge": 1.0, "compile": compile_s, **({"stats": stats_s} if stats_s else {})}
        notes = faster(medians, 3)
        assert notes.keys() == noted.keys()
        assert all(re.search(pattern, notes[name]) for name, pattern in noted.items())

    def test_what_differs_from_the_definition_is_not_timed_as_a_baseline(
        self, monkeypatch: Any, tmp_path: Path
    ) -> None:
        def nearly(data: Any) -> None:
            data.outs[0].copy_(data.base * 1.05)

        def broken(data: Any) -> None:
            raise RuntimeError("no such\nluck")

        monkeypatch.setitem(OPS, "linear", dataclasses.replace(OPS["linear"], textbook=nearly, mergekit=broken))
        bench("cpu", "linear", "70000", "float32", "1", 2, "eager,mergekit", tmp_path / "k.csv")
        notes = {row["tool"]: (row["median_ms"], row["note"]) for row in rows_of(tmp_path / "k.csv")}
        assert notes["eager"][0] == notes["mergekit"][0] == ""
        assert re.fullmatch(r"\d+% from the definition, so not timed", notes["eager"][1])
        assert notes["mergekit"][1] == "RuntimeError: no such"

    def test_runs_are_appended_but_not_to_another_table(self, tmp_path: Path) -> None:
        path = tmp_path / "k.csv"
        for _ in range(2):
            bench("cpu", "count_ties", "4097", "float32", "1", 1, "", path)
        assert [row["tool"] for row in rows_of(path)] == ["copy", "ggez-merge"] * 2
        path.write_text("kernel,gb_per_s\nlinear,33\n")
        with pytest.raises(Refused, match="other columns"):
            bench("cpu", "count_ties", "4097", "float32", "1", 1, "", path)
        assert path.read_text() == "kernel,gb_per_s\nlinear,33\n"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--ops", "linaer"], "did you mean `linear`"),
            (["--dtypes", "float64"], "float64"),
            (["--sizes", "many"], "`many` is no number for --sizes"),
            (["--threads", "1,0"], "`0` is no number for --threads"),
            (["--against", "numpy"], "mergekit"),
            (["--device", "gpu"], "`gpu` is no device"),
            (["--device", "cuda:x"], "`cuda:x` is no device"),
            (["--device", "cuda:99"], "there is no device cuda:99 here"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes_are_answered(self, options: list[str], said: str, tmp_path: Path) -> None:
        result = command_line("bench", "kernels", *options, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr
        assert "Traceback" not in result.stderr


def last_element(out: Any) -> None:
    out[-1] = out[-1] + out.dtype.type(1)


class TestGate:
    """A kernel that is wrong in one place, and what calls it: exit code 1, and not a single figure."""

    @pytest.mark.parametrize("op", OPS)
    def test_right_kernels_pass_for_any_number_of_threads(self, op: str) -> None:
        host = make(ELEMENTS, DTYPES["float16"], max(1, OPS[op].outputs))
        assert gate(Case(op, "float16", ELEMENTS), [Cpu(1), Cpu(3)], host) == []

    @pytest.mark.parametrize(
        ("stem", "function", "ops"),
        [
            ("linear", "linear", ["linear", "ratio_0.3", "ratio_0.7", "task_arithmetic", "dare"]),
            ("linear", "linear_many", ["many"]),
            ("vote", "vote", ["vote", "ties"]),
        ],
    )
    def test_one_wrong_element(self, stem: str, function: str, ops: list[str], monkeypatch: Any) -> None:
        module = import_module(f"ggez_kernels.cpu.{stem}")
        right = getattr(module, function)

        def wrong(outs: Any, *arguments: Any, **options: Any) -> Any:
            answer = right(outs, *arguments, **options)
            last_element(outs[-1] if isinstance(outs, Sequence) else outs)
            return answer

        monkeypatch.setattr(module, function, wrong)
        for op in ops:
            self.refuses(op, f"output {len(range(OPS[op].outputs)) - 1}")

    @pytest.mark.parametrize(
        ("function", "ops", "wrong"),
        [
            ("gram.gram", ["gram"], lambda answer: np.nextafter(answer, 9)),
            ("threshold.histogram", ["histogram_coarse", "histogram_fine"], lambda answer: np.roll(answer, 1)),
            ("threshold.ties", ["count_ties"], lambda answer: answer + 1),
            ("drop.l1", ["l1"], lambda answer: (answer[0], answer[0])),
            ("linear.linear", ["linear"], lambda s: dataclasses.replace(s, nonfinite_out=1)),
        ],
    )
    def test_a_wrong_answer(self, function: str, ops: list[str], wrong: Callable[[Any], Any], monkeypatch: Any) -> None:
        stem, name = function.split(".")
        module = import_module(f"ggez_kernels.cpu.{stem}")
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, **options: wrong(right(*arguments, **options)))
        for op in ops:
            self.refuses(op, "the answer")

    def test_wrong_sums_of_squares(self, monkeypatch: Any) -> None:
        module = import_module("ggez_kernels.cpu.vote")
        right = module.vote

        def wrong(*arguments: Any, **options: Any) -> Any:
            answer = right(*arguments, **options)
            return dataclasses.replace(answer, delta_squares=(answer.delta_squares[0], 0.0))

        monkeypatch.setattr(module, "vote", wrong)
        self.refuses("vote", "the sum of squares")

    def test_an_element_that_nobody_writes(self, monkeypatch: Any) -> None:
        module = import_module("ggez_kernels.cpu.linear")
        right = module.linear

        def lazy(out: Any, base: Any, models: Any, weights: Any, **options: Any) -> Any:
            answer = right(out[:-1], base, [model[:-1] for model in models], weights, **options)
            return right(out[:1], base, [model[:1] for model in models], weights, **options) and answer

        monkeypatch.setattr(module, "linear", lazy)
        self.refuses("linear", "output 0")

    def refuses(self, op: str, what: str) -> None:
        with pytest.raises(Failed, match="nothing was timed") as caught:
            bench("cpu", op, str(ELEMENTS), "bfloat16", "2", 1, "", None)
        assert caught.value.exit_code == 1
        assert f"{op}, bfloat16, {ELEMENTS} elements, cpu, 2 threads: {what}" in str(caught.value)

    def test_ends_the_command(self, tmp_path: Path) -> None:
        code = (
            "import sys, ggez_kernels.cpu.threshold as module\n"
            "module.ties = lambda *arguments: 1\n"
            "from ggez_merge.cli import main\n"
            "main()"
        )
        arguments = ["bench", "kernels", "--ops", "linear,count_ties", "--sizes", "70000", "--csv", "k.csv"]
        command = [sys.executable, "-c", code, *arguments, "--device", "cpu", "--dtypes", "float32"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (1, "")
        assert "nothing was timed" in result.stderr
        assert "count_ties" in result.stderr
        assert "linear," not in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "k.csv").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small models."""
    folder = tmp_path_factory.mktemp("models")
    for model, name in enumerate(("base", "sea", "latam")):
        make_model(folder / name, [("model.layers.0.weight", (256, 512)), ("model.norm.weight", (512,))], model)
    return folder


class TestMerge:
    def test_our_tools(self, folder: Path, tmp_path: Path) -> None:
        options = ["--tools", "ggez-merge,copy,copy-bare", "--methods", "linear,ties", "--repeats", "2"]
        result = command_line("bench", "merge", str(folder), *options, "--csv", str(tmp_path / "m.csv"), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows = rows_of(tmp_path / "m.csv")
        tools = ("ggez-merge", "copy", "copy-bare")
        assert [(row["method"], row["tool"]) for row in rows] == [(m, t) for m in ("linear", "ties") for t in tools]
        for row in rows:
            assert 0 < float(row["min_s"]) <= float(row["median_s"]) <= float(row["max_s"])
            assert (row["runs"], row["cache"]) == ("2", "warm")
            assert 20 < float(row["peak_rss_MiB"]) < 2000
            assert "ggez-merge" in row["versions"]
        assert not (folder / "merged").exists()

    @pytest.mark.parametrize("bare", [[], ["--bare"]], ids=["", "bare"])
    @pytest.mark.parametrize("method", ["linear", "ties"])
    def test_the_copy_limit_copies(self, method: str, bare: list[str], folder: Path, tmp_path: Path) -> None:
        from ggez_merge.benchmarks.merge import RECIPES

        (folder / f"{method}.yaml").write_text(RECIPES[method])
        module = "ggez_merge.benchmarks.copy_limit"
        out = tmp_path / "out"
        command = [sys.executable, "-m", module, *bare, f"{method}.yaml", "--out", str(out), "--quiet"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        (original,), (copied,) = folder.glob("base/*.safetensors"), out.glob("*.safetensors")
        payload = (256 * 512 + 512) * 2
        assert original.read_bytes()[-payload:] == copied.read_bytes()[-payload:]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["nowhere"], "ggez-merge bench models"),
            ([".", "--tools", "megrekit"], "did you mean `mergekit`"),
            ([".", "--methods", "tise"], "did you mean `ties`"),
            ([".", "--mergekit", "no/mergekit-yaml"], "mergekit is not there"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes_are_answered(self, options: list[str], said: str, folder: Path) -> None:
        result = command_line("bench", "merge", *options, cwd=folder)
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr


class TestReport:
    KERNELS = "op,dtype,elements,device,threads,tool,share_of_copy\n"
    ROW = "linear,bfloat16,50331648,cpu,1,ggez-merge,{}\nlinear,bfloat16,50331648,cpu,1,compile,0.5\n"
    MERGES = "method,tool,median_s,cache\nties,ggez-merge,3.59,warm\nties,mergekit,115.5,warm\n"

    def draw(self, folder: Path, *tables: str) -> subprocess.CompletedProcess[str]:
        return command_line("bench", "report", *tables, "--out", "plots", cwd=folder)

    def test_draws_what_the_tables_hold(self, tmp_path: Path) -> None:
        (tmp_path / "k.csv").write_text(self.KERNELS + self.ROW.format(0.25) + self.ROW.format(0.91))
        (tmp_path / "m.csv").write_text(self.MERGES)
        result = self.draw(tmp_path, "k.csv", "m.csv")
        assert result.returncode == 0, result.stderr
        names = ["k.png", "k.svg", "m.png", "m.svg"]
        assert result.stdout.split() == [f"plots/{name}" for name in names]
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
        for name in ("k.png", "m.png"):
            assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        kernels, merges = ((tmp_path / "plots" / name).read_text() for name in ("k.svg", "m.svg"))
        for words in ("linear", " 91%", "torch.compile", "bfloat16, 48 Mi elements, cpu, 1 thread"):
            assert f"<!-- {words} -->" in kernels
        assert "25%" not in kernels  # the last row counts
        for words in ("ties", " 3.6 s", " 115.5 s", "ggez-merge", "mergekit"):
            assert f"<!-- {words} -->" in merges

    def test_same_table_same_plot(self, tmp_path: Path) -> None:
        (tmp_path / "m.csv").write_text(self.MERGES)
        drawings = []
        for _ in range(2):
            assert self.draw(tmp_path, "m.csv").returncode == 0
            drawings.append((tmp_path / "plots" / "m.svg").read_bytes())
        assert drawings[0] == drawings[1]
        (tmp_path / "m.csv").write_text(self.MERGES.replace("3.59", "3.51"))
        self.draw(tmp_path, "m.csv")
        assert (tmp_path / "plots" / "m.svg").read_bytes() != drawings[0]

    def test_the_committed_merges(self, tmp_path: Path) -> None:
        committed = Path(roofline.__file__).parent / "results" / "merge.csv"
        assert self.draw(tmp_path, str(committed)).returncode == 0

    @pytest.mark.parametrize(
        "content", ["a,b\n1,2\n", "", "op,tool,share_of_copy\n"], ids=["other", "empty", "no rows"]
    )
    def test_other_tables_are_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "x.csv").write_text(content)
        for name in ("x.csv", "nowhere.csv"):
            result = self.draw(tmp_path, name)
            assert (result.returncode, result.stdout) == (2, "")
            assert name in result.stderr
        assert not (tmp_path / "plots").exists()


class TestRoofline:
    """Numbers worked out by hand, for 7 B parameters of two bytes: 14 GB an array."""

    @pytest.mark.parametrize(
        ("method", "machine", "storage", "disk_s", "bus_s", "memory_s", "binds"),
        [
            # linear: two arrays in, one out: 42 GB over 7 GB/s; 28 GB over the bus; in memory 28 + 42 + 14 = 84 GB
            ("linear", "H100 PCIe 5", "nvme 7", 6.0, 28 / 63, 84 / 3350, "disk"),
            ("linear", "server", "nvme 3", 14.0, 0.0, 84 / 460.8, "disk"),
            ("linear", "H100 PCIe 4", "warm", 2.0, 28 / 31.5, 84 / 3350, "disk"),
            ("linear", "H100 PCIe 4", "kept", 0.0, 0.0, 42 / 3350, "memory"),
            # eleven outputs: 28 GB in, 154 GB out, both at once on the bus
            ("11 ratios", "H100 PCIe 4", "nvme 7", 26.0, 154 / 31.5, (28 + 182 + 154) / 3350, "disk"),
            # TIES reads three arrays twice, and keys of two models from two arrays each: 4 or 2 1/16 times
            ("TIES", "H100 PCIe 4", "warm", 2.0, 84 / 31.5, (84 + 4 * 4 * 14 + 56 + 14) / 3350, "bus"),
            ("TIES", "desktop", "warm", 2.0, 0.0, (84 + 2.0625 * 4 * 14 + 56 + 14) / 76.8, "memory"),
            # SLERP: the Gram matrix reads both arrays, from the disk too
            ("SLERP", "H100 PCIe 5", "nvme 7", 10.0, 56 / 63, (56 + 28 + 42 + 14) / 3350, "disk"),
        ],
    )
    def test_arithmetic(
        self, method: str, machine: str, storage: str, disk_s: float, bus_s: float, memory_s: float, binds: str
    ) -> None:
        found = roofline.bound(roofline.METHODS[method], roofline.MACHINES[machine], storage, 7 * GIGA)
        assert (found.disk_s, found.bus_s, found.memory_s) == pytest.approx((disk_s, bus_s, memory_s))
        assert found.binds == binds
        assert found.seconds == pytest.approx(max(disk_s, bus_s, memory_s))

    def test_the_committed_table_is_this_one(self, tmp_path: Path) -> None:
        result = command_line("bench", "roofline", "--csv", "r.csv", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "least seconds for 27 B parameters" in result.stdout
        committed = Path(roofline.__file__).parent / "results" / "roofline.csv"
        assert rows_of(tmp_path / "r.csv") == rows_of(committed)


@pytest.mark.parametrize("what", [["--help"], ["kernels", "--help"], ["roofline"], ["report"]], ids=" ".join)
def test_only_what_times_kernels_loads_torch(what: list[str], tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(TestReport.MERGES)
    arguments = ["bench", *what, *(["m.csv"] if what == ["report"] else [])]
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('\\nloaded:', *sys.modules))\n"
        "from ggez_merge.cli import main\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.rpartition("loaded:")[2].split()}
    assert "ggez_merge" in loaded
    assert loaded & {"torch", "transformers", "triton", "numba"} == set()


def test_the_page_shows_lines_of_the_committed_tables() -> None:
    folder = Path(roofline.__file__).parent
    cells = [
        re.split(r" *\| *", line.strip("| \n"))
        for line in (folder / "README.md").read_text().splitlines()
        if "|" in line
    ]
    lines = {
        row["kernel"]: row
        for row in rows_of(folder / "results/codegen.csv")
        if (row["target"], row["dtype"]) == ("sm_90", "bfloat16")
    }
    shown = [row for row in cells if row[0] in lines and len(row) >= 4 and "x128" in row[3]]
    assert len(shown) == 8
    for kernel, *figures in shown:
        line = lines[kernel]
        assert figures == [line[name] for name in ("instructions", "registers", "loads", "stores")][: len(figures)], (
            kernel
        )


def test_operations_are_described_rightly() -> None:
    """What GB/s counts: inputs, base and outputs; TIES reads its inputs once more."""
    for name, op in OPS.items():
        assert isinstance(op, Op)
        once = op.models + op.based + op.outputs
        assert op.arrays == once + (op.models + 1 if name == "ties" else 0), name
