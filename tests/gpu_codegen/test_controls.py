"""The checks of machine code find what they are there to find: the same kernel, right and then wrong in one way."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl
from calls import CALLS, launches_of
from figures import measure
from offsets import int32_offsets
from recording import TARGETS
from table import DTYPES, committed, excesses
from triton.compiler import ASTSource, CompiledKernel

EVERYWHERE = pytest.mark.parametrize("target", TARGETS)
DIVISIBLE = [["tt.divisibility", 16]]
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def mean(
    x: tl.tensor,
    y: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    DIVIDE: tl.constexpr,
    WIDE_OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = (x + 0.3 y) / 3, if it divides exactly"""
    program = tl.program_id(0)
    if WIDE_OFFSETS:
        program = program.to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < n
    total = tl.load(x + offsets, mask=exists).to(tl.float32) + 0.3 * tl.load(y + offsets, mask=exists).to(tl.float32)
    if DIVIDE == "exactly":
        result = tl.div_rn(total, 3.0)
    elif DIVIDE == "with /":
        result = total / (total + 2.0)
    else:
        result = total * tl.rsqrt(total + 2.0)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=exists)


def compiled(
    target: str,
    *,
    divisible: tuple[str, ...] = ("x", "y", "out", "n"),
    divide: str = "exactly",
    wide_offsets: bool = True,
    block: int = BLOCK,
    **options: Any,
) -> CompiledKernel:
    """`mean`, with those arguments `divisible` by 16."""
    place = mean.arg_names.index
    source = ASTSource(
        fn=mean,
        signature={"x": "*bf16", "y": "*bf16", "out": "*bf16", "n": "i64"}
        | dict.fromkeys(("DIVIDE", "WIDE_OFFSETS", "BLOCK"), "constexpr"),
        constexprs={"DIVIDE": divide, "WIDE_OFFSETS": wide_offsets, "BLOCK": block},
        attrs={(place(name),): DIVISIBLE for name in divisible},
    )
    warps = 128 // TARGETS[target].warp_size
    return triton.compile(
        source, target=TARGETS[target], options={"num_warps": warps, "enable_fp_fusion": False} | options
    )


def faults(target: str, **change: Any) -> list[str]:
    return measure(compiled(target, **change)).faults(is_bulk=True)


@EVERYWHERE
def test_the_right_kernel_has_no_fault(target: str) -> None:
    assert faults(target) == []


@EVERYWHERE
def test_a_number_of_elements_of_any_kind(target: str) -> None:
    assert faults(target, divisible=("x", "y", "out")) == ["narrow loads", "narrow stores"]


@EVERYWHERE
def test_unaligned_addresses(target: str) -> None:
    assert faults(target, divisible=()) == ["narrow loads", "narrow stores"]
    if TARGETS[target].backend == "cuda":  # AMD's can be wide at any address, and are as long as `n` allows it
        assert faults(target, divisible=("x", "out", "n")) == ["narrow loads"]
        assert faults(target, divisible=("x", "y", "n")) == ["narrow stores"]


@EVERYWHERE
def test_too_few_elements_per_thread(target: str) -> None:
    assert faults(target, block=BLOCK // 2) == ["narrow loads", "narrow stores"]


@EVERYWHERE
def test_fused_multiply_add(target: str) -> None:
    assert faults(target, enable_fp_fusion=True) == ["fused operations"]


@EVERYWHERE
def test_division_that_is_not_exact(target: str) -> None:
    exact_on_amd = [] if TARGETS[target].backend == "hip" else ["approximate operations"]
    assert faults(target, divide="with /") == exact_on_amd
    assert "approximate operations" in faults(target, divide="by a square root")


@EVERYWHERE
def test_flushed_subnormals(target: str) -> None:
    nvidia = TARGETS[target].backend == "cuda"
    flushing = {"divide": "by a square root"} if nvidia else {"allow_flush_denorm": True}
    assert "subnormals flushed" in faults(target, **flushing)


@EVERYWHERE
def test_spills(target: str) -> None:
    nvidia = TARGETS[target].backend == "cuda"
    few_registers = {"maxnreg": 24} if nvidia else {"waves_per_eu": 8, "num_warps": 1}
    assert faults(target, block=BLOCK * 8, **few_registers) == ["spills"]


@EVERYWHERE
def test_offsets_in_32_bits(target: str) -> None:
    assert not int32_offsets(compiled(target).asm["ttir"])
    assert int32_offsets(compiled(target, wide_offsets=False).asm["ttir"])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["task arithmetic", "vote", "gram of deltas"])
def test_the_options_of_the_launchers_matter(name: str, target: str) -> None:
    """What they launch, compiled without their options and without what they know of addresses."""
    (launch,) = launches_of(CALLS[name], target, DTYPES["bfloat16"])
    source, options = launch.kernel.src, {"num_warps": launch.kernel.metadata.num_warps}
    careless = triton.compile(source, target=TARGETS[target], options=options)
    assert "fused operations" in measure(careless).faults(is_bulk=True)


def test_a_cost_above_its_bound() -> None:
    row = next(row for row in committed() if row["kernel"] == "task arithmetic, trim")
    assert excesses(row, row) == []
    worse = {column: str(int(row[column]) + 1) for column in ("instructions", "registers", "shared_bytes")}
    worse |= {column: row[column] + " 1x16" for column in ("loads", "stores")}
    for column, cost in worse.items():
        (found,) = excesses(row, row | {column: cost})
        assert column in found
        assert excesses(row | {column: cost}, row) == []
