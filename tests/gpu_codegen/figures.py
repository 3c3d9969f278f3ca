"""What a compiled kernel costs and does, read from its machine code: no GPU is needed for that."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.compiler import CompiledKernel

WIDE = 128  # bits of the widest access of a thread
# AMD's divisions are spelt out. They start from an approximate reciprocal, and make of it, by so many fused operations:
IN_EXACT_DIVISION = 5  # a float rounded once
IN_WHOLE_DIVISION = 2  # an integer of 64 bits

# LDG.E.128, LDG.E.U16, LDG.E; global_load_dwordx4, buffer_load_ushort_d16
SASS_WIDTH = r"{}\.E(?:\.[US]?(8|16|64|128))?"
GCN_WIDTH = r"(?:global|buffer|flat)_{}_[us]?(byte|short|dword(?:x[234])?)"
BITS = {None: 32, "8": 8, "16": 16, "64": 64, "128": 128} | {"byte": 8, "short": 16}
BITS |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


@dataclass(frozen=True)
class Figures:
    instructions: int
    registers: int
    """Per thread: 32 bits each."""
    shared_bytes: int
    spill_bytes: int
    """Of thread-private memory, which registers are spilled to."""
    loads: dict[int, int]
    """Global loads by their width in bits per thread."""
    stores: dict[int, int]
    bulk_loads: int
    """Loads that the kernel's blocks take if all are as wide as can be; those of single numbers are not among them."""
    bulk_stores: int
    fused: int
    """Multiplications and additions of floats rounded together, other than in the course of an exact division."""
    approximate: int
    """Divisions and the like that are not correctly rounded."""
    flushing: int
    """Operations that take or give zero for a subnormal."""

    def faults(self, is_bulk: bool) -> list[str]:
        """What is wrong with any kernel of ours, and what with one whose accesses should be wide."""
        found = {
            "spills": self.spill_bytes > 0,
            "fused operations": self.fused > 0,
            "approximate operations": self.approximate > 0,
            "subnormals flushed": self.flushing > 0,
            "narrow loads": is_bulk and not _wide(self.loads, self.bulk_loads),
            "narrow stores": is_bulk and not _wide(self.stores, self.bulk_stores),
        }
        return [fault for fault, is_there in found.items() if is_there]


def _wide(accesses: dict[int, int], expected: int) -> bool:
    """Compilers may repeat accesses, as in an unrolled loop, but not split them."""
    return accesses.get(WIDE, 0) >= expected and min(accesses, default=WIDE) >= 32


def measure(kernel: CompiledKernel) -> Figures:
    bulk_loads, bulk_stores = (_bulk(kernel.asm["ttgir"], operation) for operation in ("load", "store"))
    if kernel.metadata.target.backend == "hip":
        return _of_amd(kernel, bulk_loads, bulk_stores)
    return _of_nvidia(kernel, bulk_loads, bulk_stores)


def _bulk(ttgir: str, operation: str) -> int:
    """How many accesses of WIDE bits per thread the loads or stores of whole blocks amount to."""
    threads = int(_search(r'"ttg\.num-warps" = (\d+)', ttgir)) * int(_search(r'"ttg\.threads-per-warp" = (\d+)', ttgir))
    found = re.findall(rf"tt\.{operation} .*: tensor<(\d+)x!tt\.ptr<[a-z]+(\d+)>", ttgir)
    return sum(max(1, int(elements) * int(bits) // threads // WIDE) for elements, bits in found)


def _of_nvidia(kernel: CompiledKernel, bulk_loads: int, bulk_stores: int) -> Figures:
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (_run(knobs.nvidia.cuobjdump.path, option, str(cubin)) for option in ("-res-usage", "-sass"))
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    return Figures(
        instructions=operations.total(),
        registers=int(_search(r"REG:(\d+)", usage)),
        shared_bytes=kernel.metadata.shared,
        spill_bytes=int(_search(r"STACK:(\d+)", usage)) + 4 * _count(operations, r"(LDL|STL)\b"),
        loads=_widths(operations, SASS_WIDTH.format("LDG")),
        stores=_widths(operations, SASS_WIDTH.format("STG")),
        bulk_loads=bulk_loads,
        bulk_stores=bulk_stores,
        # what has no rounding mode may be fused later on
        fused=len(re.findall(r"\bfma\.|\b(?:add|sub|mul)\.f(?:32|64)", ptx)),
        approximate=len(re.findall(r"\.(?:approx|full)\b", ptx)),
        flushing=len(re.findall(r"\.ftz\b", ptx)),
    )


def _of_amd(kernel: CompiledKernel, bulk_loads: int, bulk_stores: int) -> Figures:
    code = kernel.asm["amdgcn"]
    operations = Counter(re.findall(r"^\s+((?:[sv]|global|buffer|flat|scratch|ds)_\w+)", code, re.MULTILINE))
    exact, whole = _count(operations, r"v_div_fixup_f"), _count(operations, r"v_trunc_f32")
    fused = _count(operations, r"v_(pk_)?(fma|mad|mac)\w*_f(16|32|64)")
    return Figures(
        instructions=operations.total(),
        registers=int(_search(r"\.vgpr_count:\s+(\d+)", code)),
        shared_bytes=kernel.metadata.shared,
        spill_bytes=int(_search(r"\.private_segment_fixed_size:\s+(\d+)", code))
        + 4 * int(_search(r"\.vgpr_spill_count:\s+(\d+)", code)),
        loads=_widths(operations, GCN_WIDTH.format("load")),
        stores=_widths(operations, GCN_WIDTH.format("store")),
        bulk_loads=bulk_loads,
        bulk_stores=bulk_stores,
        fused=fused - IN_EXACT_DIVISION * exact - IN_WHOLE_DIVISION * whole,
        approximate=_count(operations, r"v_(rcp|sqrt|rsq)_f") - exact - whole,
        flushing=3 - int(_search(r"float_denorm_mode_32 (\d)", code)),
    )


def _widths(operations: Counter[str], pattern: str) -> dict[int, int]:
    """How many accesses of how many bits; `pattern` finds the word that tells."""
    found: Counter[int] = Counter()
    for operation, count in operations.items():
        if match := re.match(pattern, operation):
            found[BITS[match[1]]] += count
    return dict(sorted(found.items()))


def _count(operations: Counter[str], pattern: str) -> int:
    return sum(count for operation, count in operations.items() if re.match(pattern, operation))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in the compiler's output"
    return match[1]
