"""DARE: drop entries of each delta at random, scale the rest up, then add (dare_linear) or vote (dare_ties).

    d_k kept with probability density_k, independently for every entry, then multiplied by
        exact: 1 / density_k                    Yu et al. 2023 (arXiv 2311.03099), unbiased
        l1:    sum|d_k| / sum|kept d_k|         mergekit's `rescale: true`, and the default

Which entries drop depends on the seed, the tensor's name, the model's place in the recipe and the entry's index alone
(Philox4x32-10), so the same recipe gives the same bytes whatever the machine, the block size or the number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ggez_kernels.sparsify import Sparsify
from ggez_merge.methods.method import (
    INT8_MASK,
    LAMBDA,
    NORMALIZE_OFF,
    WEIGHT,
    Apply,
    Job,
    Kernels,
    Measurement,
    Method,
    Parameter,
    normalised,
)
from ggez_merge.methods.ties import VOTE, elect
from ggez_merge.methods.trim import match_l1

SHARED = {
    "lambda": LAMBDA,
    "normalize": NORMALIZE_OFF,
    "rescale": Parameter("choice", default=True, choices=("exact", "l1", True, False)),
    "seed": Parameter("integer", default=0, low=0, high=2**63 - 1),
    "int8_mask": INT8_MASK,
}
PER_MODEL = {"weight": WEIGHT, "density": Parameter(default=1.0, low=0, high=1)}


def _drops(job: Job) -> list[Sparsify]:
    exact = job.shared["rescale"] == "exact"
    return [
        Sparsify(keep=density, seed=_key(job, m), rescale=1 / density if exact and density > 0 else 1.0)
        for m, density in enumerate(job.numbers("density"))
    ]


def _key(job: Job, model: int) -> int:
    words = f"{int(job.shared['seed'])}\0{job.name}\0{model}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def _measure(kernels: Kernels, jobs: Sequence[Job]) -> Measurement | None:
    if jobs[0].shared["rescale"] not in ("l1", True) or all(d >= 1 for job in jobs for d in job.numbers("density")):
        return None
    return match_l1(kernels, [_drops(job) for job in jobs])


def _add(kernels: Kernels, job: Job, measured: Sequence[Sparsify] | None) -> Apply:
    sparsify = measured or _drops(job)
    scale = float(job.shared["lambda"])
    weights = [scale * weight for weight in normalised(job.numbers("weight"), bool(job.shared["normalize"]))]
    return lambda out, base, models, start: kernels.linear(out, base, models, weights, sparsify=sparsify, start=start)


def _vote(kernels: Kernels, job: Job, measured: Sequence[Sparsify] | None) -> Apply:
    return elect(kernels, job, measured or _drops(job))


LINEAR = Method(name="dare_linear", combine=_add, shared=SHARED, per_model=PER_MODEL, measure=_measure)
TIES = Method(name="dare_ties", combine=_vote, shared={**SHARED, "vote": VOTE}, per_model=PER_MODEL, measure=_measure)
