"""The benchmark's gate on the GPU's kernels: every operation is called rightly, and a wrong kernel is seen."""

from __future__ import annotations

import pytest
import torch

from ggez_kernels.gpu import threshold
from ggez_merge.benchmarks.inputs import DTYPES, make
from ggez_merge.benchmarks.kernels import Case, gate
from ggez_merge.benchmarks.ops import OPS
from ggez_merge.benchmarks.places import Gpu

ELEMENTS = 4097


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_gate_is_green(op: str, dtype: str) -> None:
    host = make(ELEMENTS, DTYPES[dtype], max(1, OPS[op].outputs))
    assert gate(Case(op, dtype, ELEMENTS), [Gpu("cpu")], host) == []


def test_a_wrong_count_turns_it_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = threshold.ties

    def wrong(base: torch.Tensor, model: torch.Tensor, key: int) -> int:
        return right(base, model, key) + 1

    monkeypatch.setattr(threshold, "ties", wrong)
    host = make(ELEMENTS, DTYPES["bfloat16"], 1)
    (fault,) = gate(Case("count_ties", "bfloat16", ELEMENTS), [Gpu("cpu")], host)
    assert "the answer" in fault
