"""Scores out of files that other programs write: JSON, CSV, and those of three evaluation harnesses.

lm-evaluation-harness and lmms-eval write `results*.json`, or `*_results.json`, of the form

    {"results": {task: {"acc,none": 0.25, "acc_stderr,none": 0.01}}, "n-samples": {task: {"effective": 100}},
     "higher_is_better": {task: {"acc": true}}}

VLMEvalKit writes `<model>_<dataset>_acc.csv` (or `_score.csv`, `_score.json`), a row for each split, a column for each
category and `Overall`. None of them says what guessing would score.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.evaluate.fields import value_of
from ggez_merge.evaluate.kinds import Read
from ggez_merge.untrusted import printable

SHARES = ("acc", "acc_norm", "exact_match", "anls", "f1", "mc1", "mc2", "relaxed_overall")  # from 0 to 1, in harnesses


class Lacking(Exception):
    """What was looked for in a program's results and not found."""


@dataclass(frozen=True)
class Found:
    """A score as a file has it; None: the file does not say."""

    score: float
    n: int | None = None
    stderr: float | None = None
    scale: float | None = None
    higher_is_better: bool = True


def read_results(adapter: str | None, read: Read, out: Path, places: Mapping[str, str]) -> Found:
    """The score that a program has left below `out`. places: what {model} and {out} stand for in `read.file`."""
    if adapter in ("lmms-eval", "lm-evaluation-harness"):
        return read_harness(_file(read, out, places, ("**/results*.json", "**/*_results.json")), read)
    if adapter == "vlmevalkit":
        endings = ("acc.csv", "score.csv", "score.json", "acc.json")
        return read_vlmevalkit(_file(read, out, places, [f"**/*{read.task}_{end}" for end in endings]), read)
    return read_plain(_file(read, out, places, ()), read)


def _file(read: Read, out: Path, places: Mapping[str, str], patterns: Sequence[str]) -> Path:
    """The newest file that fits `read.file`, or else the first of the patterns that any file fits."""
    if read.file:
        name = read.file.replace("{model}", places["model"]).replace("{out}", places["out"])
        if Path(name).is_absolute():
            patterns = (Path(name).relative_to(Path(name).anchor).as_posix(),)
            out = Path(Path(name).anchor)
        else:
            patterns = (name,)
    for pattern in patterns:
        exact = [out / pattern] if (out / pattern).is_file() else []
        fits = exact or [file for file in sorted(out.glob(pattern)) if file.is_file()]
        if fits:
            return max(fits, key=lambda file: file.stat().st_mtime_ns)
    raise Lacking(f"the program left no file {' or '.join(patterns)} in {out}")


def read_plain(path: Path, read: Read) -> Found:
    """A number under a dotted path of JSON, or in a column of the one row of CSV that fits."""
    if read.column:
        row = _row(path, read.row)
        return Found(_cell(path, row, read.column), _whole(path, row, read.n), _maybe(path, row, read.stderr))
    data = _json(path)
    return Found(_cell(path, data, read.metric or ""), _whole(path, data, read.n), _maybe(path, data, read.stderr))


def read_harness(path: Path, read: Read) -> Found:
    """A metric of a task in the results of lm-evaluation-harness or lmms-eval."""
    data = _json(path)
    task, metric = str(read.task), str(read.metric)
    every = data.get("results") if isinstance(data, Mapping) else None
    if not isinstance(every, Mapping) or task not in every:
        known = ", ".join(every) if isinstance(every, Mapping) else "none"
        raise Lacking(f"{path} has no results of the task {task}; it has {known}")
    results = every[task]
    names = (f"{metric},{read.filter}", metric)
    name = next((name for name in names if name in results), None)
    if name is None:
        raise Lacking(f"{path} has no {names[0]} of {task}; it has {', '.join(results)}")
    spread = results.get(name.replace(metric, f"{metric}_stderr", 1))
    counts = (data.get("n-samples") or {}).get(task) or {}
    higher = ((data.get("higher_is_better") or {}).get(task) or {}).get(metric)
    return Found(
        score=_number(path, name, results[name]),
        n=counts.get("effective") if isinstance(counts, Mapping) else None,
        stderr=float(spread) if isinstance(spread, int | float) and math.isfinite(spread) else None,
        scale=1.0 if metric in SHARES else None,
        higher_is_better=higher is not False,
    )


def read_vlmevalkit(path: Path, read: Read) -> Found:
    """A column of a result file of VLMEvalKit, `Overall` if none is named; its scale depends on the data set."""
    column = read.column or read.metric or "Overall"
    if path.suffix == ".csv":
        row = _row(path, read.row)
        return Found(_cell(path, row, column), _whole(path, row, read.n), _maybe(path, row, read.stderr))
    data = _json(path)
    return Found(_cell(path, data, column), _whole(path, data, read.n), _maybe(path, data, read.stderr))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise Lacking(f"{path} is not JSON: {error}") from None


def _row(path: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """The one row that has these values."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Lacking(f"{path} cannot be read: {error}") from None
    fits = [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]
    if len(fits) != 1:
        said = ", ".join(f"{column}: {value}" for column, value in wanted.items())
        remedy = f"with {said}" if said else "(say which one under `row`)"
        raise Lacking(f"{path} must have one row {remedy}; it has {len(fits)} of {len(rows)}")
    return fits[0]


def _cell(path: Path, data: Any, name: str) -> float:
    try:
        value = value_of(data, name) if isinstance(data, Mapping) else value_of({"it": data}, f"it{name}")  # it[0].acc
    except KeyError:
        known = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise Lacking(f"{path} has no {name}; it has {printable(known)}") from None
    return _number(path, name, value)


def _maybe(path: Path, data: Any, name: str | None) -> float | None:
    return None if name is None else _cell(path, data, name)


def _whole(path: Path, data: Any, name: str | None) -> int | None:
    return None if name is None else int(_cell(path, data, name))


def _number(path: Path, name: str, value: Any) -> float:
    """A finite number, perhaps written as text, with a percent sign or without."""
    if isinstance(value, str):
        value = value.strip().removesuffix("%")
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Lacking(f"{path}: {name} is {value!r}, which is not a finite number")
    return number
