"""Linear interpolation and weighted averages.

    with `ratio`:   out = (1 - ratio) * base + ratio * model
    with `weight`s: out = sum_k w_k x_k / sum_k w_k          (without the division if normalize is false)

The first is GG-EZ's merge (arXiv 2604.11490, section 4.2), also known as WiSE-FT and PAINT; the second is a model soup
(Wortsman et al. 2022). A normalised average is computed as x_0 + sum_k w_k (x_k - x_0), the same sum: so identical
models give identical bytes, and a weight of one gives that model's bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ggez_kernels.sparsify import Stats
from ggez_merge.methods.method import NORMALIZE_ON, Apply, Array, Job, Kernels, Method, Parameter


def _uses_base(given: Collection[str]) -> bool:
    return "ratio" in given


def _check_given(given: Collection[str]) -> str | None:
    if {"ratio", "weight"} <= set(given):
        return "`ratio` (base_model and one model) and `weight` (a list of models) contradict each other"
    return None


def _check(job: Job) -> str | None:
    if "ratio" in job.shared:
        return None if len(job.models) == 1 else f"`ratio` interpolates base_model and one model, not {len(job.models)}"
    missing = [k for k, model in enumerate(job.models) if "weight" not in model]
    if missing:
        return "needs either `ratio` (with base_model and one model) or a `weight` for every model"
    if job.shared["normalize"] and abs(sum(job.numbers("weight"))) < 1e-8:
        return "the weights add up to zero, so they cannot be normalised: set `normalize: false` or change them"
    return None


def _combine(kernels: Kernels, job: Job, measured: None) -> Apply:
    if "ratio" in job.shared:
        ratio = [float(job.shared["ratio"])]
        return lambda out, base, models, start: kernels.linear(out, base, models, ratio, start=start)
    weights = job.numbers("weight")
    if not job.shared["normalize"] or len(weights) == 1:
        weights = [1.0] if job.shared["normalize"] else weights
        return lambda out, base, models, start: kernels.linear(out, None, models, weights, start=start)
    total = sum(weights)
    shares = [weight / total for weight in weights[1:]]

    def average(out: Array, base: Array | None, models: Sequence[Array], start: int) -> Stats:
        stats = kernels.linear(out, models[0], models[1:], shares, start=start)
        return replace(stats, delta_squares=(0.0, *stats.delta_squares))

    return average


METHOD = Method(
    name="linear",
    combine=_combine,
    shared={"ratio": Parameter(), "normalize": NORMALIZE_ON},
    per_model={"weight": Parameter()},
    uses_base=_uses_base,
    check_given=_check_given,
    check=_check,
)
