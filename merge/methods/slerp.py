"""Spherical linear interpolation of two models, tensor by tensor.

    theta = angle between base and x (as flat vectors)
    out = sin((1 - t) theta) / sin(theta) * base + sin(t theta) / sin(theta) * x

Shoemake 1985; t = 0 gives the base, t = 1 the model. Where the two are nearly parallel (|cos theta| > 0.9995, the usual
case for fine-tunes of one base) the arc is a line and the result is (1 - t) base + t x, as in mergekit.
The angle comes from the Gram matrix of the two tensors, the result is a weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ggez_kernels.sparsify import Stats
from ggez_merge.methods.method import Apply, Array, Job, Kernels, Measurement, Method, Parameter, Sweep, Tile, summed

NEARLY_PARALLEL = 0.9995
NO_LENGTH = 1e-8


def _measure(kernels: Kernels, jobs: Sequence[Job]) -> Measurement:
    """cos theta of each job's two tensors; a tensor of (nearly) no length counts as one of length 1."""

    def dots(tile: Tile) -> list[tuple[int, Any]]:
        return [(tile.job, kernels.gram([tile.base, *tile.models], start=tile.start))]

    partials = yield Sweep(dots)
    cosines = []
    for index in range(len(jobs)):
        chunks = [chunk for job, gram in partials if job == index for chunk in gram]
        aa, ac, cc = (summed([chunk[i, j] for chunk in chunks]) for i, j in ((0, 0), (0, 1), (1, 1)))
        lengths = [length if length > NO_LENGTH else 1.0 for length in (math.sqrt(aa), math.sqrt(cc))]
        cosines.append(max(-1.0, min(1.0, ac / (lengths[0] * lengths[1]))))
    return cosines


def _combine(kernels: Kernels, job: Job, cosine: float) -> Apply:
    t = float(job.shared["t"])
    if abs(cosine) > NEARLY_PARALLEL or t in (0.0, 1.0):
        return lambda out, base, models, start: kernels.linear(out, base, models, [t], start=start)
    theta = math.acos(cosine)
    weights = [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]

    def arc(out: Array, base: Array | None, models: Sequence[Array], start: int) -> Stats:
        return replace(kernels.linear(out, None, [base, *models], weights, start=start), delta_squares=())

    return arc


METHOD = Method(
    name="slerp",
    combine=_combine,
    shared={"t": Parameter(required=True)},
    n_models=(1, 1),
    measure=_measure,
)
