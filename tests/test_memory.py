"""A tensor far larger than the budget: the process stays within what it needs anyway, and the budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from merging import INTERPOLATE, TASK, TIES, models, sparse, tensors

BUDGET_MB = 16
TENSOR_MB = 192
SLACK_MB = 24  # counts of magnitudes, strips of the kernels, the allocator's reserve
RECIPES = {
    "interpolate": INTERPOLATE,
    "ties": TIES,
    "ties over all": TIES + "parameters: {scope: global}",
    "dare": TASK.replace("task_arithmetic", "dare_ties").replace("weight:", "density: 0.6, weight:"),
    "slerp": "{merge_method: slerp, base_model: base, models: [{model: one}], parameters: {t: 0.3}}",
}
# the process itself, not its children, and from its own start on, which getrusage cannot tell
SCRIPT = """
import atexit, re
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
from ggez_merge.cli import main
main()
"""


def peak_mb(folder: Path, recipe: str, out: str) -> float:
    """The most memory that a merge by the command line had resident."""
    (folder / "recipe.yaml").write_text(recipe)
    options = ["--out", out, "--memory", f"{BUDGET_MB}MB", "--threads", "2", "--quiet"]
    command = [sys.executable, "-c", SCRIPT, "recipe.yaml", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1]) / 1000


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_peak_is_bounded_by_the_budget(recipe: str, tmp_path: Path) -> None:
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    models(tiny, ["base", "one", "two"], {"x": (1000,)})
    for model in ("base", "one", "two"):
        sparse(large / model / "model.safetensors", {"x": ("BF16", (TENSOR_MB * 1000, 500))})
    needed_anyway = peak_mb(tiny, recipe, "out")
    peak = peak_mb(large, recipe, "out")
    print(
        f"{needed_anyway:.0f} MB without data, {peak:.0f} MB with {TENSOR_MB} MB tensors and {BUDGET_MB} MB of buffers"
    )
    assert peak < needed_anyway + BUDGET_MB + SLACK_MB
    written = (large / "out" / "model.safetensors").stat().st_size
    assert written > TENSOR_MB * 1_000_000
    (large / "out" / "model.safetensors").unlink()


def test_the_tiny_merge_is_a_merge(tmp_path: Path) -> None:
    models(tmp_path, ["base", "one"], {"x": (1000,)})
    peak_mb(tmp_path, INTERPOLATE, "out")
    assert tensors(tmp_path / "out").keys() == {"x"}
