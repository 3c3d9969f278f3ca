"""The engine's own limit: reads, writes and hashes what the recipe's method would, but only copies the first input.

python benchmarks/copy_limit.py recipe.yaml OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ggez_kernels.sparsify import Stats
from ggez_merge.merge import merge
from ggez_merge.methods.method import Apply, Job, Kernels, Method
from ggez_merge.plan import make_plan
from ggez_merge.progress import Silent
from ggez_merge.recipe import load_recipe


def copy_first(kernels: Kernels, job: Job, measured: Any) -> Apply:
    """out = the first input, as bytes."""

    def apply(out: Any, base: Any, models: Any, start: int) -> Stats:
        np.copyto(out.view(np.uint8), (models[0] if base is None else base).view(np.uint8))
        n_inputs = len(models) + (base is not None)
        return Stats((0,) * n_inputs, 0, (0.0,) * len(models))

    return apply


if __name__ == "__main__":
    plan = make_plan(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
    merge(replace(plan, method=Method(name=plan.method.name, combine=copy_first)), progress=Silent())
