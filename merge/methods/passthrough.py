"""Passthrough: one input as it is, or scaled.

    out = scale * x

Used with `slices` to stack layer ranges of several models.
"""

from __future__ import annotations

from ggez_merge.methods.method import Apply, Job, Kernels, Method, Parameter


def _combine(kernels: Kernels, job: Job, measured: None) -> Apply:
    weights = [float(job.models[0]["scale"])]
    return lambda out, base, models, start: kernels.linear(out, None, models, weights, start=start)


METHOD = Method(
    name="passthrough",
    combine=_combine,
    per_model={"scale": Parameter(default=1.0)},
    uses_base=lambda given: False,
    n_models=(1, 1),
)
