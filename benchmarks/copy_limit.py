"""The engine's own limit: reads, hashes and writes what the recipe's method would, but its kernel only copies.

    python -m ggez_merge.benchmarks.copy_limit recipe.yaml --out OUT [--bare]

It is `ggez-merge` with another method put into the plan, so that the command line and all else is the same. Where the
method measures first, everything is read for that too, and nothing computed. What the output holds is the first input;
what the run costs is start-up, reading, hashing and writing. `--bare` is stricter: a plain memory copy, so that no
compiled kernel has to be loaded, and nothing read for measuring.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ggez_kernels.sparsify import Stats
from ggez_merge import plan
from ggez_merge.cli import main
from ggez_merge.methods.method import Apply, Job, Kernels, Measurement, Method, Sweep


def only_read(kernels: Kernels, jobs: Sequence[Job]) -> Measurement:
    """One sweep over all tiles that looks at none."""
    yield Sweep(lambda tile: 0)
    return [None] * len(jobs)


def copy_first(kernels: Kernels, job: Job, measured: None) -> Apply:
    """out = the first input, through the kernel that converts a single one."""

    def apply(out: Any, base: Any, models: Any, start: int) -> Stats:
        stats = kernels.linear(out, None, [models[0] if base is None else base], [1.0], start=start)
        others = len(models) - (base is None)
        return replace(stats, nonfinite=stats.nonfinite + (0,) * others, delta_squares=(0.0,) * len(models))

    return apply


def bare_copy(kernels: Kernels, job: Job, measured: None) -> Apply:
    """out = the first input, as bytes."""

    def apply(out: Any, base: Any, models: Any, start: int) -> Stats:
        np.copyto(out.view(np.uint8), (models[0] if base is None else base).view(np.uint8))
        return Stats((0,) * (len(models) + (base is not None)), 0, (0.0,) * len(models))

    return apply


if __name__ == "__main__":
    bare = "--bare" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--bare"]
    make_plan = plan.make_plan

    def copying_plan(*arguments: Any) -> plan.Plan:
        made = make_plan(*arguments)
        measure = only_read if made.method.measure and not bare else None
        method = Method(name=made.method.name, combine=bare_copy if bare else copy_first, measure=measure)
        return replace(made, method=method)

    plan.make_plan = copying_plan  # type: ignore[assignment]
    main()
