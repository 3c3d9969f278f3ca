"""Scores in a file: CSV, a row for each score of each candidate.

    ratio,benchmark,tag,score,n,scale,split
    0,CVQA,global,67.2,1000,100,validation
    0.1,CVQA,global,68.8,1000,100,validation

Needed are `benchmark`, `tag`, `score`. Known besides: `n`, `chance`, `scale`, `higher_is_better` (true), `aggregator`
(mean), `split`; `group`, a country or a language, for a row that is a part of its benchmark's score; `role` (base,
regional, candidate) and `model`, for endpoints. Every other column is an axis of the sweep, such as `ratio`, and holds
numbers. Without a column `role`, ratio 0 is the base and ratio 1 the regional model, if `ratio` is the only axis.
Outcomes by item are kept elsewhere.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggez_merge.check import listed, nearest
from ggez_merge.errors import Failed, Problem, Refused
from ggez_merge.sweep.candidate import ROLES, Candidate, Role
from ggez_merge.sweep.decision import Rule
from ggez_merge.sweep.front import Point
from ggez_merge.sweep.scores import TAGS, Benchmark, faults, summarise
from ggez_merge.untrusted import printable

NEEDED = ("benchmark", "tag", "score")
COLUMNS = ("role", "model", *NEEDED, "n", "chance", "scale", "higher_is_better", "aggregator", "group", "split")
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Scored:
    """One candidate with its scores, of all splits."""

    candidate: Candidate
    benchmarks: tuple[Benchmark, ...]


@dataclass(frozen=True)
class ScoreTable:
    """Candidates in the order of the file, each with the same benchmarks; axes: the columns of their values."""

    axes: tuple[str, ...]
    scored: tuple[Scored, ...]
    name: str = "the scores"

    @property
    def splits(self) -> list[str | None]:
        """In the order of the file; None: rows that name none."""
        return [*dict.fromkeys(each.split for scored in self.scored for each in scored.benchmarks)]

    @property
    def missing_endpoints(self) -> list[Role]:
        """Which of base and regional model has no scores."""
        ends: tuple[Role, Role] = ("base", "regional")
        return [role for role in ends if all(each.candidate.role != role for each in self.scored)]


def points(table: ScoreTable, split: str | None = None, alpha: float | None = None) -> list[Point]:
    """Every candidate beside the base, on one split; split None: the only one that there is.

    Raises Refused if the split is not there or not clear, or if the base has no scores.
    """
    known = ", ".join(each or "none" for each in table.splits)
    if split is None and len(table.splits) > 1:
        what, remedy = "the scores are of several splits", "say which one decides: `split` in `select:`"
        raise Refused(Problem(what, table.name, found=known, remedy=remedy))
    if split is not None and split not in table.splits:
        near = nearest(split, [each for each in table.splits if each])
        raise Refused(Problem("there are no scores of this split", table.name, None, known, split, near))
    wanted = table.splits[0] if split is None else split
    rows = [(each.candidate, [b for b in each.benchmarks if b.split == wanted]) for each in table.scored]
    base = next((benchmarks for candidate, benchmarks in rows if candidate.role == "base"), None)
    if base is None:
        remedy = "add the rows of ratio 0, or a column `role` that says `base`"
        raise Refused(Problem("the base has no scores, so nothing can be set beside it", table.name, remedy=remedy))
    return [Point(candidate, summarise(benchmarks, base, alpha)) for candidate, benchmarks in rows]


def same_split(table: ScoreTable, rule: Rule) -> str | None:
    """A warning if the split that decides is the one that is reported: its scores are then too good to be true."""
    decides = rule.split or table.splits[0]
    reported = rule.report or decides
    if decides != reported:
        return None
    where = f"the split {printable(decides)}" if decides else "the same data"
    return (
        f"selected and reported on {where}: the best of several candidates looks better there than it is; "
        "select on a validation split and report on a test split"
    )


def load_scores(path: Path) -> ScoreTable:
    """Reads a scores file. Raises Refused with everything that is wrong in it, by line and column."""
    problems: list[Problem] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(f"{path}:{reader.line_num}", line) for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise Refused(Problem("the scores cannot be read", str(path), expected="CSV in UTF-8", found=said)) from None
    header = [name.strip() for name in lines[0][1]] if lines else []
    problems += _header_faults(header, lines[0][0] if lines else str(path))
    if problems:
        raise Refused(problems)
    rows = [_Row(place, header, cells, problems) for place, cells in lines[1:]]
    if not rows:
        problems.append(Problem("there are no scores in the file", str(path)))
    table = _table(str(path), header, rows, problems)
    if problems:
        raise Refused(problems)
    return table


def dump_scores(table: ScoreTable) -> str:
    """The table as CSV, which reads back as the same; outcomes by item are left out, and columns that say nothing."""
    rows: list[dict[str, str]] = []
    for scored in table.scored:
        for each in scored.benchmarks:
            row = {axis: _number(scored.candidate.values.get(axis)) for axis in table.axes}
            row |= {"role": scored.candidate.role, "model": scored.candidate.model or "", "benchmark": each.name}
            row |= {"tag": each.tag, "score": _number(each.score), "n": _number(each.n), "chance": _number(each.chance)}
            row |= {"scale": _number(each.scale), "higher_is_better": "" if each.higher_is_better else "false"}
            row |= {"aggregator": "" if each.aggregator == "mean" else each.aggregator, "group": ""}
            row |= {"split": each.split or ""}
            rows += [row, *({**row, "score": _number(part), "group": name} for name, part in each.groups.items())]
    inferred = all(_inferred_role(scored.candidate.values) == scored.candidate.role for scored in table.scored)
    used = {column for row in rows for column, cell in row.items() if cell} - ({"role"} if inferred else set())
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*table.axes, *(c for c in COLUMNS if c in used)], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_scores(table: ScoreTable, path: Path) -> None:
    """Writes the table in place of the file, at once. Raises Failed where that cannot be done."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(dump_scores(table), encoding="utf-8", newline="")
        os.replace(partial, path)
    except OSError as error:
        raise Failed(f"{path}: the scores cannot be written: {error.strerror}") from None


def _header_faults(header: Sequence[str], place: str) -> Iterator[Problem]:
    found = printable(", ".join(header)) or "nothing"
    for name in NEEDED:
        if name not in header:
            remedy = nearest(name, [column for column in header if column not in COLUMNS])
            yield Problem(f"the column `{name}` is missing", place, None, listed(COLUMNS), found, remedy)
    for name in {name for name in header if header.count(name) > 1}:
        yield Problem(f"the column `{printable(name)}` is there twice", place, found=found)
    if "" in header:
        yield Problem("a column has no name", place, found=found)


class _Row:
    """One line: its cells by column, and what they say. What is wrong is noted, and read as absent."""

    def __init__(self, place: str, header: Sequence[str], cells: Sequence[str], problems: list[Problem]) -> None:
        self.place = place
        self.problems = problems
        before = len(problems)
        if len(cells) != len(header):
            remedy = "put names with a comma in quotes" if len(cells) > len(header) else None
            self.refuse("the line has another number of cells than the header", len(header), str(len(cells)), remedy)
        self.cells = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        role = self.cells.get("role", "")
        if role and role not in ROLES:
            self.refuse("`role` is none that there is", ", ".join(ROLES), role, nearest(role, ROLES))
        values = {axis: self.number(axis, role in ("", "candidate")) for axis in header if axis not in COLUMNS}
        self.values = {axis: value for axis, value in values.items() if value is not None}
        given: Role = role if role in ROLES else _inferred_role(self.values)
        self.candidate = Candidate(self.values, given, self.cells.get("model") or None)
        self.group = self.cells.get("group", "")
        self.benchmark = self._benchmark()
        if len(problems) > before:
            self.benchmark = None

    def refuse(self, what: str, expected: Any = None, found: str = "", remedy: str | None = None) -> None:
        shown = None if expected is None else str(expected)
        self.problems.append(Problem(what, self.place, None, shown, printable(found) or "nothing", remedy))

    def number(self, column: str, needed: bool = False) -> float | None:
        text = self.cells.get(column, "")
        if not text and not needed:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        remedy = "write a point, and no thousands: 59.8" if "," in text else None
        remedy = "write the number alone, and 100 as the scale" if "%" in text else remedy
        remedy = remedy or (None if column in COLUMNS else nearest(column, COLUMNS))
        self.refuse(f"`{printable(column)}` is not a number", "a finite number", text, remedy)
        return None

    def _benchmark(self) -> Benchmark | None:
        before = len(self.problems)
        name, tag = self.cells.get("benchmark", ""), self.cells.get("tag", "")
        if not name:
            self.refuse("`benchmark` is empty", "the benchmark's name")
        if tag not in TAGS:
            self.refuse("`tag` is none that there is", ", ".join(TAGS), tag, nearest(tag, TAGS))
        flag = _FLAGS.get((self.cells.get("higher_is_better") or "true").lower())
        if flag is None:
            self.refuse("`higher_is_better` is neither", "true or false", self.cells["higher_is_better"])
        score, n = self.number("score", needed=True), self.number("n")
        if n is not None and n != int(n):
            self.refuse("`n` is not a whole number", "the number of items", self.cells["n"])
        chance, scale = self.number("chance"), self.number("scale")
        if len(self.problems) > before or score is None or flag is None:
            return None
        benchmark = Benchmark(
            name=name,
            tag=tag,  # type: ignore[arg-type]
            score=score,
            n=None if n is None else int(n),
            higher_is_better=flag,
            chance=chance,
            scale=scale,
            aggregator=self.cells.get("aggregator") or "mean",
            split=self.cells.get("split") or None,
        )
        self.problems += faults(benchmark, self.place)
        return benchmark


def _inferred_role(values: Mapping[str, float]) -> Role:
    if len(values) == 1:
        ((axis, value),) = values.items()
        if axis in ("ratio", "parameters.ratio"):
            return "base" if value == 0 else "regional" if value == 1 else "candidate"
    return "candidate"


Key = tuple[Any, ...]


def _table(name: str, header: Sequence[str], rows: Sequence[_Row], problems: list[Problem]) -> ScoreTable:
    candidates: dict[Key, Candidate] = {}
    wholes: dict[Key, dict[Key, Benchmark]] = {}  # by candidate, and there by benchmark and split
    parts: dict[Key, dict[str, float]] = {}
    first: dict[Key, tuple[Benchmark, str]] = {}  # by benchmark and split
    seen: dict[Key, str] = {}
    orphans: dict[Key, str] = {}
    for row in rows:
        if row.benchmark is None:
            continue
        who = (tuple(row.values.items()), row.candidate.role, row.candidate.model)
        which = (row.benchmark.name, row.benchmark.split)
        candidates.setdefault(who, row.candidate)
        before = seen.setdefault((who, which, row.group), row.place)
        if before != row.place:
            what = f"{row.candidate}: {row.benchmark.name} has two scores"
            row.refuse(what, "one" + (" for each split" if row.benchmark.split else ""), f"the other at {before}")
        elif row.group:
            parts.setdefault((who, which), {})[row.group] = row.benchmark.score
            orphans[who, which] = row.place
        else:
            problems += _unlike(row.benchmark, row.place, *first.setdefault(which, (row.benchmark, row.place)))
            wholes.setdefault(who, {})[which] = row.benchmark
    for (who, which), place in orphans.items():
        if which not in wholes.get(who, {}):
            what, remedy = f"{which[0]} has scores of groups, but none of the whole", "add a row with an empty `group`"
            problems.append(Problem(f"{candidates[who]}: {what}", place, remedy=remedy))
    if all(row.benchmark for row in rows):  # else what is lacking may be in a line that cannot be read
        problems += _lacking(name, candidates, wholes, first)
    scored = []
    for who, candidate in candidates.items():
        own = wholes.get(who, {})
        benchmarks = [replace(own[key], groups=parts.get((who, key), {})) for key in first if key in own]
        scored.append(Scored(candidate, tuple(benchmarks)))
    return ScoreTable(tuple(column for column in header if column not in COLUMNS), tuple(scored), name)


def _lacking(
    name: str, candidates: Mapping[Key, Candidate], wholes: Mapping[Key, Mapping[Key, Benchmark]], wanted: Iterable[Key]
) -> Iterator[Problem]:
    """Candidates without a score of what another candidate has one of."""
    every = [*wanted]
    for who, candidate in candidates.items():
        lacking = [
            each + (f" ({split})" if split else "") for each, split in every if (each, split) not in wholes.get(who, {})
        ]
        if lacking:
            what, remedy = printable(", ".join(lacking)), "add it, or leave the benchmark out for all"
            yield Problem(f"{candidate} has no score of {what}", name, remedy=remedy)


def _unlike(benchmark: Benchmark, place: str, first: Benchmark, where: str) -> Iterator[Problem]:
    """What a benchmark must have in common for all candidates."""
    for key in ("tag", "scale", "chance", "higher_is_better", "aggregator", "n"):
        expected, found = getattr(first, key), getattr(benchmark, key)
        if expected != found and not (key == "n" and None in (expected, found)):
            what = f"`{key}` of {printable(benchmark.name)} is not what it is at {where}"
            yield Problem(what, place, expected=str(expected), found=str(found))


def _number(value: float | None) -> str:
    """The shortest text that reads back as the same number."""
    if value is None:
        return ""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
