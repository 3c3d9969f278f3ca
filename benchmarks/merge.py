"""Whole merges, whole processes: ggez-merge, the same engine that only copies, and mergekit.

    ggez-merge bench models /data/models
    ggez-merge bench merge /data/models --mergekit /other/venv/bin/mergekit-yaml --csv merge.csv

Every tool runs the same recipe file on the same inputs, in turn, so that a noisy moment meets all of them. Wall time is
that of the whole process from start to exit, peak memory the kernel's own account of it (VmHWM). ggez-merge brings its
output to the disk (fsync) and hashes all inputs and outputs; mergekit does neither. Warm: the inputs were just
read and are in the page cache; cold: the page cache was dropped (needs root).
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.errors import Failed, Problem, Refused

from .table import check_columns, chosen, processor, save

TUNED = ("sea", "latam")
RECIPES = {
    "linear": "merge_method: linear\nmodels:\n"
    "  - {model: base, parameters: {weight: 0.7}}\n  - {model: sea, parameters: {weight: 0.3}}\n",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    + "".join(f"  - {{model: {name}, parameters: {{weight: 0.5}}}}\n" for name in TUNED),
    "ties": "merge_method: ties\nbase_model: base\nparameters: {normalize: true}\nmodels:\n"
    + "".join(f"  - {{model: {name}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for name in TUNED),
    "dare_linear": "merge_method: dare_linear\nbase_model: base\nmodels:\n"
    + "".join(f"  - {{model: {name}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for name in TUNED),
    "dare_ties": "merge_method: dare_ties\nbase_model: base\nmodels:\n"
    + "".join(f"  - {{model: {name}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for name in TUNED),
    "slerp": "merge_method: slerp\nbase_model: base\nmodels:\n  - model: base\n  - model: sea\nparameters: {t: 0.3}\n",
}
TOOLS = ("ggez-merge", "copy", "copy-bare", "mergekit")
COLUMNS = [
    *("method", "tool", "median_s", "min_s", "max_s", "runs", "times_ggez_merge", "peak_rss_MiB"),
    *("input_bytes_per_model", "cache", "machine", "system", "versions", "date"),
]


@dataclass(frozen=True)
class Run:
    """One process: seconds from start to exit, and its peak resident memory."""

    seconds: float
    peak_bytes: int


def bench(
    models: Path,
    methods: str = "linear,task_arithmetic,ties",
    tools: str = "ggez-merge,copy,mergekit",
    mergekit: Path | None = None,
    repeats: int = 3,
    mergekit_repeats: int = 3,
    cold: bool = False,
    csv: Path | None = None,
) -> None:
    """Run, print and append. Lists are separated by commas; `mergekit` is its command, by default the one beside us."""
    models = models.absolute()
    method_names, tool_names = chosen(methods, list(RECIPES), "--methods"), chosen(tools, TOOLS, "--tools")
    theirs = mergekit or Path(sys.executable).with_name("mergekit-yaml")
    size = sum(path.stat().st_size for path in (models / "base").glob("*.safetensors"))
    if not size:
        remedy = f"ggez-merge bench models {models}"
        raise Refused(Problem("there are no models to measure with", place=str(models), remedy=remedy))
    if "mergekit" in tool_names and not theirs.exists():
        remedy = "--mergekit /other/venv/bin/mergekit-yaml, or leave it out of --tools"
        raise Refused(Problem("mergekit is not there", place=str(theirs), remedy=remedy))
    if csv is not None:
        check_columns(csv, COLUMNS)
    for method in method_names:
        runs = measure(models, method, tool_names, theirs, repeats, mergekit_repeats, cold)
        ours = statistics.median(run.seconds for run in runs["ggez-merge"]) if "ggez-merge" in runs else None
        rows: list[dict[str, Any]] = []
        for tool, of_tool in runs.items():
            seconds = [run.seconds for run in of_tool]
            values = (
                method,
                tool,
                f"{statistics.median(seconds):.2f}",
                f"{min(seconds):.2f}",
                f"{max(seconds):.2f}",
                len(seconds),
                f"{statistics.median(seconds) / ours:.2f}" if ours else "",
                f"{max(run.peak_bytes for run in of_tool) / 2**20:.0f}",
                size,
                "cold" if cold else "warm",
                processor(),
                platform.platform(),
                installed(theirs if tool == "mergekit" else Path(sys.executable)),
                time.strftime("%Y-%m-%d"),
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        for row in rows:
            print(
                f"{row['method']:>16} {row['tool']:>10} {row['median_s']:>7} s {row['peak_rss_MiB']:>6} MiB", flush=True
            )
        if csv is not None:
            save(rows, csv, append=True)


def measure(
    models: Path, method: str, tools: Sequence[str], mergekit: Path, repeats: int, slow_repeats: int, cold: bool
) -> dict[str, list[Run]]:
    """Every tool `repeats` times (mergekit `slow_repeats`), in turn. What one wrote is removed before the next."""
    recipe = models / f"{method}.yaml"
    recipe.write_text(RECIPES[method])
    runs: dict[str, list[Run]] = {tool: [] for tool in tools}
    for number in range(repeats):
        for tool in tools if number < slow_repeats else [tool for tool in tools if tool != "mergekit"]:
            out = models / "merged"
            shutil.rmtree(out, ignore_errors=True)
            prepare(models, cold)
            runs[tool].append(timed(command(tool, mergekit, recipe, out), models))
            print(f"{method} {tool}: {runs[tool][-1].seconds:.2f} s", file=sys.stderr, flush=True)
            shutil.rmtree(out)
    return runs


def command(tool: str, mergekit: Path, recipe: Path, out: Path) -> list[str]:
    """How a tool is called."""
    if tool == "mergekit":
        # the models have no tokenizer, and its model card asks the hub about each of them
        return [str(mergekit), str(recipe), str(out), "--no-copy-tokenizer", "--no-write-model-card"]
    module = f"{__package__}.copy_limit" if tool.startswith("copy") else "ggez_merge"
    options = ["--bare"] if tool == "copy-bare" else []
    return [sys.executable, "-m", module, *options, str(recipe), "--out", str(out), "--quiet"]


def timed(arguments: Sequence[str], folder: Path) -> Run:
    """Run a command in `folder`; its time and memory. Raises Failed if it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(arguments, cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise Failed(f"{' '.join(arguments)} exited {process.returncode}:\n{said.read().decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def prepare(models: Path, cold: bool) -> None:
    """Bring the inputs into the page cache, or everything out of it."""
    os.sync()
    if cold:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError as error:
            raise Failed(f"the page cache cannot be dropped: {error.strerror}; --cold needs root on Linux") from error
        return
    for path in sorted(models.glob("*/*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def installed(program: Path) -> str:
    """The versions in the environment that a program belongs to, of the packages that matter."""
    listing = [str(program.with_name("python")), "-m", "pip", "list", "--format=freeze"]
    lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = ("ggez-merge", "mergekit", "numba", "numpy", "torch")
    return " ".join(line.replace("==", " ") for line in lines if line.partition("==")[0] in wanted)
