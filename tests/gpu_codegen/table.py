"""benchmarks/results/codegen.csv: what every kernel costs on every target, and the upper bounds of the test.

    python tests/gpu_codegen/table.py

writes it anew, after a change to the kernels or of Triton that is meant.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
import triton
from calls import figures
from figures import WIDE, Figures
from recording import TARGETS

PATH = Path(__file__).parents[2] / "benchmarks/results/codegen.csv"
COLUMNS = ("kernel", "target", "dtype", "instructions", "registers", "shared_bytes", "loads", "stores", "triton")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# float16 is compiled like bfloat16 but for the conversions, and the kernels for ends like those for the bulk
MEASURED = [(target, dtype) for target in TARGETS for dtype in ("bfloat16", "float32")] + [("sm_90", "float16")]
WITH_ENDS = (("sm_90", "bfloat16"), ("gfx942", "bfloat16"))

Row = dict[str, str]


def rows(target: str, dtype: str) -> list[Row]:
    """The table's lines of one target and dtype, as they are now."""
    found = figures(target, DTYPES[dtype], (target, dtype) in WITH_ENDS)
    return [_row(kernel, target, dtype, what) for kernel, (_, what) in found.items()]


def _row(kernel: str, target: str, dtype: str, what: Figures) -> Row:
    numbers = [what.instructions, what.registers, what.shared_bytes, _words(what.loads), _words(what.stores)]
    values = [kernel, target, dtype, *map(str, numbers), triton.__version__]
    return dict(zip(COLUMNS, values, strict=True))


def _words(accesses: dict[int, int]) -> str:
    """How many of how many bits."""
    return " ".join(f"{count}x{bits}" for bits, count in sorted(accesses.items(), reverse=True))


def committed() -> list[Row]:
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def excesses(bound: Row, found: Row) -> list[str]:
    """What of a kernel is more than the table allows."""
    most, now = _costs(bound), _costs(found)
    name = f"{bound['kernel']}, {bound['target']}, {bound['dtype']}"
    return [f"{name}: {now[cost]} {cost}, at most {most[cost]}" for cost in most if now[cost] > most[cost]]


def _costs(row: Row) -> dict[str, int]:
    costs = {column: int(row[column]) for column in ("instructions", "registers", "shared_bytes")}
    for column in ("loads", "stores"):
        accesses = [access.split("x") for access in row[column].split()]
        costs[f"narrow {column}"] = sum(int(count) for count, bits in accesses if int(bits) < WIDE)
    return costs


if __name__ == "__main__":
    lines = [row for target, dtype in MEASURED for row in rows(target, dtype)]
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
