"""Whole merges, whole processes: ggez-merge, the same engine that only copies, and mergekit.

    python benchmarks/make_models.py /data/models
    python benchmarks/bench_merge.py /data/models --mergekit /other/venv/bin/mergekit-yaml \\
        --csv benchmarks/results/merge.csv

Every tool runs the same recipe file on the same inputs, in turn, so that a noisy moment meets all of them. Wall time is
that of the whole process from start to exit, peak memory the kernel's own account of it (VmHWM). ggez-merge brings its
output to the disk (fsync) and hashes all inputs and outputs; mergekit does neither. Warm: the inputs were just
read and are in the page cache; cold: the page cache was dropped (needs root).
"""

from __future__ import annotations

import argparse
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

from table import processor, save

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


@dataclass(frozen=True)
class Run:
    """One process: seconds from start to exit, and its peak resident memory."""

    seconds: float
    peak_bytes: int


def command(tool: str, mergekit: Path, recipe: Path, out: Path) -> list[str]:
    """How a tool is called."""
    if tool == "mergekit":
        # the models have no tokenizer, and its model card asks the hub about each of them
        return [str(mergekit), str(recipe), str(out), "--no-copy-tokenizer", "--no-write-model-card"]
    program = [str(Path(__file__).with_name("copy_limit.py"))] if tool.startswith("copy") else ["-m", "ggez_merge"]
    program += ["--bare"] if tool == "copy-bare" else []
    return [sys.executable, *program, str(recipe), "--out", str(out), "--quiet"]


def timed(arguments: Sequence[str], folder: Path) -> Run:
    """Run a command in `folder`; its time and memory. Raises if it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(arguments, cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(arguments)} exited {process.returncode}:\n{said.read().decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def prepare(models: Path, cold: bool) -> None:
    """Bring the inputs into the page cache, or everything out of it."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for path in sorted(models.glob("*/*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


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


def installed(program: Path) -> str:
    """The versions in the environment that a program belongs to, of the packages that matter."""
    listing = [str(program.with_name("python")), "-m", "pip", "list", "--format=freeze"]
    lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = ("ggez-merge", "mergekit", "numba", "numpy", "torch")
    return " ".join(line.replace("==", " ") for line in lines if line.partition("==")[0] in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder that make_models.py wrote")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic", "ties"], choices=list(RECIPES))
    parser.add_argument("--tools", nargs="+", default=["ggez-merge", "copy", "mergekit"])
    beside = Path(sys.executable).with_name("mergekit-yaml")
    parser.add_argument("--mergekit", type=Path, default=beside, help="its command, in an environment of its own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit-repeats", type=int, default=3, help="fewer where it takes minutes")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run")
    parser.add_argument("--csv", type=Path, help="append the results here")
    arguments = parser.parse_args()
    models = arguments.models.absolute()
    size = sum(path.stat().st_size for path in (models / "base").glob("*.safetensors"))
    rows = []
    for method in arguments.methods:
        runs = measure(
            models,
            method,
            arguments.tools,
            arguments.mergekit,
            arguments.repeats,
            arguments.mergekit_repeats,
            arguments.cold,
        )
        ours = statistics.median(run.seconds for run in runs["ggez-merge"]) if "ggez-merge" in runs else None
        for tool, of_tool in runs.items():
            seconds = [run.seconds for run in of_tool]
            rows.append(
                {
                    "method": method,
                    "tool": tool,
                    "median_s": f"{statistics.median(seconds):.2f}",
                    "min_s": f"{min(seconds):.2f}",
                    "max_s": f"{max(seconds):.2f}",
                    "runs": len(seconds),
                    "times_ggez_merge": f"{statistics.median(seconds) / ours:.2f}" if ours else "",
                    "peak_rss_MiB": f"{max(run.peak_bytes for run in of_tool) / 2**20:.0f}",
                    "input_bytes_per_model": size,
                    "cache": "cold" if arguments.cold else "warm",
                    "machine": processor(),
                    "system": platform.platform(),
                    "versions": installed(arguments.mergekit if tool == "mergekit" else Path(sys.executable)),
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
    for row in rows:
        print(f"{row['method']:>16} {row['tool']:>10} {row['median_s']:>7} s {row['peak_rss_MiB']:>6} MiB")
    if arguments.csv:
        save(rows, arguments.csv, append=True)


if __name__ == "__main__":
    main()
