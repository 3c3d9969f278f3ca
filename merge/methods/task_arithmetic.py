"""Task arithmetic: add up what each model learned.

    out = base + lambda * sum_k w_k (x_k - base)       (divided by sum_k w_k if normalize is true)

Ilharco et al. 2023 (arXiv 2212.04089). With one model and weight = ratio it *is* linear interpolation, byte for byte.
"""

from __future__ import annotations

from ggez_merge.methods.method import (
    INT8_MASK,
    LAMBDA,
    NORMALIZE_OFF,
    WEIGHT,
    Apply,
    Job,
    Kernels,
    Method,
    normalised,
)


def _combine(kernels: Kernels, job: Job, measured: None) -> Apply:
    scale = float(job.shared["lambda"])
    weights = [scale * weight for weight in normalised(job.numbers("weight"), bool(job.shared["normalize"]))]
    return lambda out, base, models, start: kernels.linear(out, base, models, weights, start=start)


METHOD = Method(
    name="task_arithmetic",
    combine=_combine,
    shared={"lambda": LAMBDA, "normalize": NORMALIZE_OFF, "int8_mask": INT8_MASK},
    per_model={"weight": WEIGHT},
)
