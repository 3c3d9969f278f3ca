"""TIES: trim each delta, elect a sign per entry, average what agrees with it.

    d_k     = x_k - base, only the entries of largest magnitude kept (density_k of them)
    elected = sign(sum_k w_k d_k)                       (vote: count: sign(sum_k sign(w_k d_k)); zero counts as +)
    out     = base + lambda * sum_{k agrees} w_k d_k / sum_{k agrees} |w_k|    (no division if normalize is false)

Yadav et al. 2023 (arXiv 2306.01708). Defaults are mergekit's: magnitudes compared within each tensor (`scope: tensor`)
and exactly int(density n) entries kept (`ties: index`, the first of equals win). The paper trims over the whole model
and keeps all equals: `scope: global, ties: all`. Dividing by |w_k| rather than w_k matters only for negative weights,
which could otherwise turn the elected sign around.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ggez_kernels.sparsify import Sparsify, Stats
from ggez_merge.methods.method import (
    INT8_MASK,
    LAMBDA,
    NORMALIZE_ON,
    WEIGHT,
    Apply,
    Array,
    Job,
    Kernels,
    Measurement,
    Method,
    Parameter,
)
from ggez_merge.methods.trim import match_l1, n_kept, thresholds

VOTE = Parameter("choice", default="sum", choices=("sum", "count"))


def _measure(kernels: Kernels, jobs: Sequence[Job]) -> Measurement:
    keep = [_n_kept_together([(job.numbers("density")[m], job.n) for job in jobs]) for m in range(len(jobs[0].models))]
    trims = yield from thresholds(kernels, [job.n for job in jobs], keep, jobs[0].shared["ties"] == "all")
    if any(job.shared["rescale"] for job in jobs):
        scaled = yield from match_l1(kernels, trims)
        trims = [scaled[i] if job.shared["rescale"] else trims[i] for i, job in enumerate(jobs)]
    return trims


def _n_kept_together(parts: Sequence[tuple[float, int]]) -> int:
    """How many entries (density, n) parts keep in all; if densities differ, what their mean density keeps."""
    total = sum(n for _, n in parts)
    densities = {density for density, _ in parts}
    mean = densities.pop() if len(densities) == 1 else math.fsum(d * n for d, n in parts) / max(total, 1)
    return n_kept(mean, total)


def _check_together(jobs: Sequence[Job]) -> str | None:
    if len({job.shared["ties"] for job in jobs}) > 1:
        return "`ties` must be the same for all tensors that share one threshold (`scope: global`)"
    return None


def elect(kernels: Kernels, job: Job, sparsify: Sequence[Sparsify] | None) -> Apply:
    """The second half of TIES on deltas sparsified in whatever way."""
    weights = job.numbers("weight")
    count = job.shared["vote"] == "count"
    normalize = bool(job.shared["normalize"])
    scale = float(job.shared["lambda"])

    def apply(out: Array, base: Array | None, models: Sequence[Array], start: int) -> Stats:
        return kernels.vote(
            out,
            base,
            models,
            weights,
            sparsify=sparsify,
            start=start,
            count=count,
            normalize=normalize,
            scale=scale,
        )

    return apply


METHOD = Method(
    name="ties",
    combine=elect,
    shared={
        "lambda": LAMBDA,
        "normalize": NORMALIZE_ON,
        "rescale": Parameter("flag", default=False),
        "scope": Parameter("choice", default="tensor", choices=("tensor", "global")),
        "ties": Parameter("choice", default="index", choices=("index", "all")),
        "vote": VOTE,
        "int8_mask": INT8_MASK,
    },
    per_model={"weight": WEIGHT, "density": Parameter(default=1.0, low=0, high=1)},
    measure=_measure,
    measures_together=lambda job: job.shared["scope"] == "global",
    check_together=_check_together,
)
