"""Machine code of every kernel for GPUs that are not here: wide accesses, no spills, exact arithmetic, bounded cost."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import triton
from calls import CALLS, figures, launches_of
from recording import TARGETS
from table import DTYPES, MEASURED, WITH_ENDS, committed, excesses, rows

import ggez_kernels.gpu

EVERYWHERE = pytest.mark.parametrize(("target", "dtype"), MEASURED)


@EVERYWHERE
def test_no_kernel_has_a_fault(target: str, dtype: str) -> None:
    found = figures(target, DTYPES[dtype], (target, dtype) in WITH_ENDS)
    faults = {name: what.faults(bulk) for name, (bulk, what) in found.items()}
    assert not {name: wrong for name, wrong in faults.items() if wrong}
    assert {name for name in CALLS if not found[name][0]} == {"nth tie", "dequantize e4m3 by blocks"}


@EVERYWHERE
def test_no_kernel_costs_more_than_the_table_says(target: str, dtype: str) -> None:
    bounds = {row["kernel"]: row for row in committed() if (row["target"], row["dtype"]) == (target, dtype)}
    found = {row["kernel"]: row for row in rows(target, dtype)}
    assert found.keys() == bounds.keys()
    if {row["triton"] for row in bounds.values()} != {triton.__version__}:
        pytest.skip(f"the table is of another Triton than {triton.__version__}: its bounds say nothing about this one")
    assert not [excess for kernel, bound in bounds.items() for excess in excesses(bound, found[kernel])]


def test_the_table_is_of_every_kernel() -> None:
    """Of every function that `launch.jit` compiles and that begins with an underscore: those are launched."""
    launched = {launch.name for call in CALLS.values() for launch in launches_of(call, "sm_90", DTYPES["bfloat16"])}
    folder = str(Path(str(ggez_kernels.gpu.__file__)).parent)
    modules = [importlib.import_module(f"ggez_kernels.gpu.{each.name}") for each in pkgutil.iter_modules([folder])]
    compiled = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.startswith("_")
    }
    assert launched == compiled
    assert {(row["target"], row["dtype"]) for row in committed()} == set(MEASURED)
    assert {target for target, _ in MEASURED} == TARGETS.keys()
