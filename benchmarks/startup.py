"""What everything costs besides the weights: help, a dry run, a merge of 1 M parameters with a warm and a cold cache.

    python -m ggez_merge.benchmarks.startup --csv benchmarks/results/startup.csv

Whole processes, from start to exit. Cold means that numba has compiled nothing yet, as on the first merge after
installation: it compiles what the method needs and keeps it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .models import make
from .table import processor, save, versions

SHAPES = [(f"model.layers.{i}.weight", (256, 512)) for i in range(8)]  # 2**20 parameters
RECIPES = {
    "linear": "merge_method: linear\nbase_model: base\nmodels: [{model: sea}]\nparameters: {ratio: 0.3}\n",
    "ties": "merge_method: ties\nbase_model: base\nmodels: [{model: sea}, {model: latam}]\n"
    "parameters: {weight: 0.5, density: 0.5}\n",
}


def seconds(arguments: Sequence[str], folder: Path, cache: str) -> float:
    """One run of ggez-merge in `folder`, with numba's cache in a folder there."""
    began = time.perf_counter()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / cache)}
    command = [sys.executable, "-m", "ggez_merge", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for model, name in enumerate(("base", "sea", "latam")):
            make(folder / name, SHAPES, model)
        for method, recipe in RECIPES.items():
            (folder / f"{method}.yaml").write_text(recipe)
            merging = [f"{method}.yaml", "--out", "out", "--overwrite", "--quiet"]
            caches = [f"cache-{method}-{number}" for number in range(3)]
            cold = [seconds(merging, folder, cache) for cache in caches]
            measured[f"{method}, 1 M parameters, cold cache"] = cold
            warm = [seconds(merging, folder, caches[0]) for _ in range(arguments.repeats)]
            measured[f"{method}, 1 M parameters"] = warm
        for words in (["--help"], ["--dry-run", "linear.yaml", "--out", "new"]):
            measured[words[0]] = [seconds(words, folder, caches[0]) for _ in range(arguments.repeats)]
    rows = [
        {
            "command": name,
            "median_s": f"{statistics.median(times):.2f}",
            "min_s": f"{min(times):.2f}",
            "max_s": f"{max(times):.2f}",
            "runs": len(times),
            "machine": processor(),
            "versions": versions("ggez-merge", "numba", "numpy"),
            "date": time.strftime("%Y-%m-%d"),
        }
        for name, times in measured.items()
    ]
    for row in rows:
        print(f"{row['command']:>32} {row['median_s']} s ({row['min_s']} to {row['max_s']})")
    if arguments.csv:
        save(rows, arguments.csv)


if __name__ == "__main__":
    main()
