"""What the kernels are compared with: the torch expressions that a reader of the papers would write, and mergekit.

Each takes a `Data` of torch tensors. One that merges writes to `outs` or answers the result; one that measures answers
the measurement of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from ggez_merge.methods.trim import n_kept

from .inputs import COARSE, DENSITY, HIGH, KEYS, LOW, RATIOS, WEIGHTS, Data, around

Baseline = Callable[[Data], "torch.Tensor | None"]


def by_mergekit(
    method: str, inputs: Callable[[Data], Sequence[torch.Tensor]], base: int | None = None, **per_input: Sequence[float]
) -> Baseline:
    """mergekit's own function for a method, in the inputs' dtype as its command would use it.

    `base` is an index of the inputs; `per_input` holds the parameters of the others, in their order.
    """

    def merge(data: Data) -> torch.Tensor:
        methods = import_module("mergekit.merge_methods")
        states = [{"weight": tensor} for tensor in inputs(data)]
        merged: torch.Tensor = methods.merge_state_dicts(states, method, parameters=per_input, base=base)["weight"]
        return merged

    return merge


def with_statistics(expression: Baseline, n_deltas: int) -> Callable[[Data], list[torch.Tensor]]:
    """The expression, and what our kernels see on their way: `Stats`, without which a merge would read all again."""

    def merge(data: Data) -> list[torch.Tensor]:
        expression(data)
        squares = [(x.float() - data.base.float()).square().sum() for x in data.models[:n_deltas]]
        return [*squares, *((~out.isfinite()).sum() for out in data.outs)]

    return merge


def linear(data: Data) -> None:
    x, y = data.models
    data.outs[0].copy_(LOW * x.float() + HIGH * y.float())


def interpolate(ratio: float) -> Baseline:
    def lerp(data: Data) -> None:
        data.outs[0].copy_(torch.lerp(data.base.float(), data.models[0].float(), ratio))

    return lerp


def many(data: Data) -> None:
    base, x = data.base.float(), data.models[0].float()
    for out, ratio in zip(data.outs, RATIOS, strict=True):
        out.copy_(torch.lerp(base, x, ratio))


def task_arithmetic(data: Data) -> None:
    base, (d, e) = _deltas(data)
    data.outs[0].copy_(base + (WEIGHTS[0] * d + WEIGHTS[1] * e))


def dare(data: Data) -> None:
    base, deltas = _deltas(data)
    d, e = (delta * (torch.rand_like(delta) < DENSITY) / DENSITY for delta in deltas)
    data.outs[0].copy_(base + (WEIGHTS[0] * d + WEIGHTS[1] * e))


def ties(data: Data) -> None:
    base, deltas = _deltas(data)
    stacked = torch.stack(deltas)
    n = base.numel()
    kth = stacked.abs().kthvalue(n - n_kept(DENSITY, n) + 1, dim=1, keepdim=True).values
    _elect(data, base, torch.where(stacked.abs() >= kth, stacked, 0.0))


def vote(data: Data) -> None:
    base, deltas = _deltas(data)
    stacked = torch.stack(deltas)
    _elect(data, base, torch.where(_keys(stacked) >= data.key, stacked, 0.0))


def gram(data: Data) -> torch.Tensor:
    _, deltas = _deltas(data)
    stacked = torch.stack(deltas).double()
    return stacked @ stacked.T


def histogram_coarse(data: Data) -> torch.Tensor:
    _, (delta, _) = _deltas(data)
    return torch.bincount(_keys(delta) >> COARSE, minlength=(KEYS >> COARSE) + 1)


def histogram_fine(data: Data) -> torch.Tensor:
    _, (delta, _) = _deltas(data)
    low, high = around(data.key)
    key = _keys(delta)
    return torch.bincount((key[key >= low] - low).clamp(max=high - low), minlength=high - low + 1)


def count_ties(data: Data) -> torch.Tensor:
    _, (delta, _) = _deltas(data)
    return (_keys(delta) == data.key).sum()


def l1(data: Data) -> torch.Tensor:
    _, (delta, _) = _deltas(data)
    sizes = delta.abs().double()
    return torch.stack([sizes.sum(), (sizes * (torch.rand_like(delta) < DENSITY)).sum()])


def _deltas(data: Data) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = data.base.float()
    return base, [model.float() - base for model in data.models]


def _keys(delta: torch.Tensor) -> torch.Tensor:
    return delta.abs().view(torch.int32)


def _elect(data: Data, base: torch.Tensor, trimmed: torch.Tensor) -> None:
    weights = torch.tensor(WEIGHTS, device=base.device)[:, None]
    weighted = weights * trimmed
    agrees = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights * agrees).sum(0)
    data.outs[0].copy_(base + (weighted * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor))
