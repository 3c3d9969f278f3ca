"""How fast the kernels are, in GB/s and as a share of a memory copy measured in the same run.

    ggez-merge bench kernels [--device cuda] [--ops linear,ties] [--sizes 48Mi] [--dtypes bfloat16] [--csv FILE]

First the gate: what each kernel makes of the very arrays it is timed on is compared, to the bit, with the definition
in `ggez_kernels.reference`. If one differs, nothing is timed. Then, per kernel, the median time, with the 20th and 80th
percentile, in turns with a copy of one array and with baselines:

- apart: where many outputs are computed in one read, as many calls instead;
- eager: the textbook torch expression; compile: `torch.compile` of it (both: `textbook.py`);
- stats: `torch.compile` of the expression and of the statistics that our kernels take on their way (what is not finite,
  how long each delta is), which compile and eager do without;
- mergekit: its own function for the same method.

GB/s counts the bytes of the arrays that have to be read and written (`Op.arrays`), for the baselines too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ggez_merge.arithmetic import kernels_of
from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.units import parse_bytes

from .inputs import DTYPES, Data, make
from .ops import OPS, Answer, Op
from .places import Cpu, Gpu, places
from .table import check_columns, chosen, commit, save, versions
from .textbook import Baseline, with_statistics

BASELINES = ("eager", "compile", "stats", "mergekit")
COLUMNS = [
    *("op", "dtype", "models", "elements", "device", "threads", "tool"),
    *("median_ms", "p20_ms", "p80_ms", "gb_per_s", "share_of_copy", "times_ggez_merge", "runs"),
    *("note", "machine", "versions", "commit", "date"),
]
SLICE = 1 << 20  # elements of which the definition is computed at a time
NEAR_COPY = 0.8  # of the copy's speed: whatever is faster than that is another day's luck with the memory
NEAR = 1e-4  # relative: sums that depend on tiles, added up in float32
LIKE = 0.01  # relative: a baseline that is farther from our result computes something else

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str
    elements: int

    @property
    def op(self) -> Op:
        return OPS[self.name]

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {self.elements} elements"


def bench(
    device: str = "auto",
    ops: str | None = None,
    sizes: str = "48Mi",
    dtypes: str = ",".join(DTYPES),
    threads: str = "",
    repeats: int = 15,
    against: str = ",".join(BASELINES),
    csv: Path | None = None,
) -> None:
    """Gate, time, write and show. Lists are separated by commas. Raises Failed, and times nothing, on a red gate."""
    cases = [
        Case(name, dtype, elements)
        for dtype in chosen(dtypes, list(DTYPES), "--dtypes")
        for elements in _numbers(sizes, "--sizes")
        for name in (list(OPS) if ops is None else chosen(ops, list(OPS), "--ops"))
    ]
    baselines = chosen(against, BASELINES, "--against")
    where = places(device, _numbers(threads, "--threads"))
    if csv is not None:
        check_columns(csv, COLUMNS)
    with Console(stderr=True).status("") as status:
        red = []
        for case, host in _with_data(cases):
            status.update(f"checking {case}")
            red += gate(case, where, host)
        if red:
            raise Failed("\n".join(["not what the definition gives, so nothing was timed:", *red]))
        rows: list[Row] = []
        for case, host in _with_data(cases):
            for place in where:
                status.update(f"timing {case}")
                new = measure(case, place, host, baselines, repeats)
                rows += new
                if csv is not None:
                    save(new, csv, append=True)
    show(rows, Console(width=max(100, Console().width)))


def _numbers(text: str, option: str) -> list[int]:
    numbers = [(word, parse_bytes(word)) for word in text.split(",") if word.strip()]
    wrong = [Problem(f"`{word}` is no number for {option}", expected="4097, 48Mi") for word, n in numbers if not n]
    if wrong:
        raise Refused(wrong)
    return [n for _, n in numbers if n]


def _with_data(cases: Iterable[Case]) -> Iterable[tuple[Case, Data]]:
    """Each case with its arrays, which those of one dtype and size share."""
    for (dtype, elements), members in groupby(cases, lambda case: (case.dtype, case.elements)):
        group = list(members)
        host = make(elements, DTYPES[dtype], max(1, *(case.op.outputs for case in group)))
        yield from ((case, replace(host, outs=host.outs[: max(1, case.op.outputs)])) for case in group)


def gate(case: Case, where: Sequence[Cpu | Gpu], host: Data) -> list[str]:
    """What differs from the definition, in words; nothing if each output and answer is right."""
    op = case.op
    slices = host.tiles(SLICE)
    expected = op.join(op.run(kernels_of("reference"), slices, lambda f: [f(part) for part in slices]))
    outs = [_bits(out).copy() for out in host.outs[: op.outputs]]
    faults = []
    for place in where:
        data = place.put(host)
        _poison(data)
        found = op.join(_runner(op.run, place, data)())
        wrong = [f"output {i}" for i, out in enumerate(outs) if not np.array_equal(out, _bits(data.outs[i]))]
        wrong += ["the answer"] * (not np.array_equal(found.exact, expected.exact))
        wrong += ["the sum of squares"] * (not np.allclose(found.near, expected.near, rtol=NEAR))
        if wrong:
            faults.append(f"{case}, {_where(place.device, place.threads)}: {', '.join(wrong)}")
    return faults


def measure(case: Case, place: Cpu | Gpu, host: Data, baselines: Sequence[str], repeats: int) -> list[Row]:
    """One row per contender. A baseline that fails, or computes something else, leaves the reason instead of a time."""
    op = case.op
    data = place.put(host)
    tiles = place.tiles(data)
    ours = _runner(op.run, place, data)
    actions = {"copy": lambda: place.each(place.copy, tiles), "ggez-merge": ours}
    if op.apart is not None:
        actions["apart"] = _runner(op.apart, place, data)
        actions["apart"]()
    answer = op.join(ours())
    notes, others = _prepare(op, place.tensors(data), answer, baselines)
    seconds = {**place.time(actions, repeats), **place.time(others, repeats)}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    notes |= faster(medians, op.arrays)
    size = data.base.nbytes
    copy_speed = 2 * size / medians["copy"]
    fixed: Row = {
        "op": case.name,
        "dtype": case.dtype,
        "models": op.models,
        "elements": case.elements,
        "device": place.device,
        "threads": place.threads,
    }
    machine = {
        "machine": place.machine,
        "versions": versions("ggez-merge", "numba", "numpy", "torch", "triton", "mergekit"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    for tool in (*actions, *baselines):
        row: Row = {**dict.fromkeys(COLUMNS, ""), **fixed, **machine, "tool": tool, "note": notes.get(tool, "")}
        if tool in seconds:
            middle, p20, p80 = np.percentile(seconds[tool], (50, 20, 80))
            speed = (2 if tool == "copy" else op.arrays) * size / middle
            row["median_ms"], row["p20_ms"], row["p80_ms"] = (_digits(1e3 * s, 4) for s in (middle, p20, p80))
            row["gb_per_s"] = _digits(speed / 1e9)
            row["share_of_copy"] = _digits(speed / copy_speed)
            row["times_ggez_merge"] = _digits(middle / medians["ggez-merge"])
            row["runs"] = len(seconds[tool])
        rows.append(row)
    return rows


def _prepare(
    op: Op, tensors: Data, answer: Answer, baselines: Sequence[str]
) -> tuple[dict[str, str], dict[str, Callable[[], Any]]]:
    """The baselines that work, and why the others do not. `tensors.outs` hold our result, of which `answer` tells."""
    result = tensors.outs[0].clone()
    torch.compiler.reset()  # what was compiled for another number of threads would be used again
    known: dict[str, Baseline | None] = {
        "eager": op.textbook,
        "compile": torch.compile(op.textbook),
        "stats": _merging_only(torch.compile(with_statistics(op.textbook, op.models if op.based else 0))),
        "mergekit": op.mergekit,
    }
    notes: dict[str, str] = {}
    actions: dict[str, Callable[[], Any]] = {}
    for name in baselines:
        baseline = known[name]
        if baseline is None:
            notes[name] = "has no such function"
        elif name == "mergekit" and find_spec("mergekit") is None:
            notes[name] = "is not installed"
        elif name == "stats" and not op.outputs:
            notes[name] = "a measurement has none"
        if baseline is None or name in notes:
            continue
        try:
            with torch.no_grad():
                told = baseline(tensors)
                distance = _distance(tensors.outs[0] if told is None else told, result, answer, op.outputs > 0)
        except Exception as error:  # whatever goes wrong in somebody else's code is a result, not an end
            notes[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            continue
        if not (distance <= LIKE or op.random):
            notes[name] = f"{distance:.0%} from the definition, so not timed"
            continue
        actions[name] = torch.no_grad()(partial(baseline, tensors))
    return notes, actions


def faster(medians: Mapping[str, float], arrays: float) -> dict[str, str]:
    """Why torch.compile is faster, where it is; `arrays` are moved by the operation, two by the copy."""
    names = [name for name in ("compile", "stats") if medians.get(name, math.inf) < medians["ggez-merge"]]
    if names == ["compile"] and "stats" in medians:
        return {"compile": "faster, but without the statistics that a merge needs; with them (stats) it is not"}
    near = medians["copy"] * arrays / 2 > NEAR_COPY * medians["ggez-merge"]
    return dict.fromkeys(names, "faster, where both wait for memory" if near else "faster")


def _merging_only(compiled: Callable[[Data], Any]) -> Baseline:
    def merge(data: Data) -> None:
        compiled(data)

    return merge


def _distance(theirs: torch.Tensor, result: torch.Tensor, answer: Answer, merges: bool) -> float:
    """How far a baseline is from our result, relative to it."""
    if merges:
        return float((theirs.float() - result.float()).norm() / result.float().norm())
    exact = answer.exact.reshape(-1, *theirs.shape).sum(axis=0).astype(np.float64)  # of all chunks, if it has any
    return float(np.linalg.norm(theirs.double().cpu().numpy() - exact) / np.linalg.norm(exact))


def _runner(run: Any, place: Cpu | Gpu, data: Data) -> Callable[[], Any]:
    tiles = place.tiles(data)
    return lambda: run(place.kernels, tiles, lambda function: place.each(function, tiles))


def _poison(data: Data) -> None:
    """Outputs full of NaN, so that an element that nobody writes shows."""
    for out in data.outs:
        out[:] = np.nan


def _bits(array: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if isinstance(array, torch.Tensor):
        bits: np.ndarray[Any, np.dtype[np.uint8]] = array.cpu().view(torch.uint8).numpy()
        return bits
    return np.asarray(array).view(np.uint8)


def _digits(value: Any, n: int = 3) -> str:
    """A number with so many significant digits, and without an exponent."""
    return np.format_float_positional(value, precision=n, fractional=False, trim="-")


def _where(device: str, threads: int | str) -> str:
    return f"{device}, {threads} thread{'s' * (threads != 1)}" if threads else device


def show(rows: Sequence[Row], console: Console) -> None:
    """A table for each dtype, size and place: our figures, and how many times as long the baselines take."""
    tools = [tool for tool in ("apart", *BASELINES) if any(row["tool"] == tool for row in rows)]
    tables: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "elements", "device", "threads"))
        tables.setdefault(key, {}).setdefault(row["op"], {})[row["tool"]] = row
    for (dtype, elements, device, threads), ops in tables.items():
        title = f"{dtype}, {elements:,} elements, {_where(device, threads)}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("op", no_wrap=True)
        for name in ("ms", "p20 to p80", "GB/s", "% copy", *tools):
            table.add_column(name, justify="right", no_wrap=True)
        for op, by_tool in ops.items():
            ours = by_tool["ggez-merge"]
            ms, p20, p80 = (_digits(float(ours[name])) for name in ("median_ms", "p20_ms", "p80_ms"))
            share = f"{100 * float(ours['share_of_copy']):.0f}"
            times = [by_tool[tool]["times_ggez_merge"] or "-" if tool in by_tool else "" for tool in tools]
            table.add_row(op, ms, f"{p20} {p80}", ours["gb_per_s"], share, *times)
        console.print(table)
    if tools:
        console.print(f"{', '.join(tools)}: how many times as long as ggez-merge", highlight=False)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault(f"{row['tool']}: {row['note']}", []).append(row["op"])
    for reason, names in reasons.items():
        console.print(f"- {reason} ({', '.join(dict.fromkeys(names))})", markup=False, highlight=False)
