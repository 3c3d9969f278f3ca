"""Where two checkpoints differ, per layer: relative L2, largest change, share of changed elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ggez_merge.align import counterpart
from ggez_merge.checkpoint import FLOAT8, FLOATS, Checkpoint, Tensor
from ggez_merge.components import COMPONENTS, component, layer
from ggez_merge.read import NUMPY_DTYPE, Files
from ggez_merge.untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

_FLOATS = FLOATS | FLOAT8
_INTEGERS = NUMPY_DTYPE.keys() - _FLOATS
_WORKING_BYTES = 64  # per element of a chunk: two inputs, both in float64, their difference, and masks


@dataclass(frozen=True)
class Change:
    """How far b is from a over `n_elements` elements; sums are over elements that are finite in both."""

    n_tensors: int = 0
    n_elements: int = 0
    n_changed: int = 0
    n_nonfinite: int = 0
    max_abs: float = 0.0
    delta_squares: float = 0.0
    base_squares: float = 0.0

    @property
    def relative_l2(self) -> float | None:
        """||b - a|| / ||a||; 0 without any change, None where a is all zeros and b is not, or out of range."""
        if self.delta_squares == 0:
            return 0.0
        in_range = self.base_squares > 0 and math.isfinite(self.delta_squares + self.base_squares)
        return math.sqrt(self.delta_squares / self.base_squares) if in_range else None

    @property
    def changed(self) -> float:
        """Share of elements whose value is not the same, 0 to 1."""
        return self.n_changed / self.n_elements if self.n_elements else 0.0


@dataclass(frozen=True)
class Group:
    """One layer of one component, or what lies outside its layers (`stack` and `number` None)."""

    component: str
    stack: str | None
    number: int | None
    change: Change


@dataclass(frozen=True)
class Count:
    """An integer tensor in which `n_changed` of `n_elements` differ: a counter or an index has no norm."""

    name: str
    n_changed: int
    n_elements: int


@dataclass(frozen=True)
class Mismatch:
    """A tensor that both hold, but not in the same shape or dtype: "BF16 [2, 3]"; codes are compared dequantised."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class Diff:
    """What separates checkpoint b from checkpoint a.

    `groups` hold the float tensors, in the order of COMPONENTS and depth; `integers` the integer tensors that
    differ. `other_dtype` are compared by value all the same; `not_compared` are those of another shape, float
    against integer, or of a dtype that has no arithmetic here (sub-byte floats, complex numbers). Tensors have a's
    names, but `only_b` has b's own; `names` says how b's became a's, one rule a line, or why they could not.
    """

    a: str
    b: str
    groups: tuple[Group, ...]
    integers: tuple[Count, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_dtype: tuple[Mismatch, ...]
    not_compared: tuple[Mismatch, ...]
    names: tuple[str, ...] = ()

    def components(self) -> dict[str, Change]:
        """The change of each component as a whole."""
        members: dict[str, list[Change]] = {}
        for group in self.groups:
            members.setdefault(group.component, []).append(group.change)
        return {name: total(changes) for name, changes in members.items()}


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    memory_bytes: int = 8_000_000,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Diff:
    """Compare all tensors that a and b have in common, in chunks that need at most about `memory_bytes`.

    b's tensors are found under a's names as a merge finds them, and as they stand where it is not clear which is which.
    Differences are taken in float64. A NaN equals a NaN, and 0 equals -0. `advance` is told the bytes compared,
    a's and b's together, after each chunk. Raises Failed, naming the file, if a file ends early or changes.
    """
    found = counterpart(a, b)
    names = tuple(str(rule) for rule in found.rules if rule.theirs != rule.ours)
    if found.problems:
        names = tuple(problem.what for problem in found.problems)
    theirs_by_name = b.tensors if found.problems else found.checkpoint.tensors
    chunk = max(memory_bytes // _WORKING_BYTES, 1024)
    buffers = memoryview(bytearray(8 * chunk)), memoryview(bytearray(8 * chunk))
    changes: dict[tuple[str, str | None, int | None], list[Change]] = {}
    integers, other_dtype, not_compared = [], [], []
    with Files([*a.files, *b.files]) as files:
        for name, ours in a.tensors.items():
            theirs = theirs_by_name.get(name)
            if theirs is None:
                continue
            mismatch = Mismatch(name, _form(ours), _form(theirs))
            pair = {ours.dtype, theirs.dtype}
            if ours.shape != theirs.shape or not (pair <= _FLOATS or pair <= _INTEGERS):
                not_compared.append(mismatch)
                continue
            if _held(ours) != _held(theirs):
                other_dtype.append(mismatch)
            change = _compare(files, ours, theirs, buffers, advance)
            if pair <= _FLOATS:
                stack, number = layer(name) or (None, None)
                changes.setdefault((component(name), stack, number), []).append(change)
            elif change.n_changed:
                integers.append(Count(name, change.n_changed, change.n_elements))
    groups = [Group(*key, total(members)) for key, members in changes.items()]
    compared = {at.name for name, tensor in theirs_by_name.items() if name in a.tensors for at in tensor.extents}
    return Diff(
        a.reference,
        b.reference,
        tuple(sorted(groups, key=lambda g: (COMPONENTS.index(g.component), g.stack or "", g.number or 0))),
        tuple(integers),
        tuple(sorted(a.tensors.keys() - theirs_by_name.keys())),
        tuple(sorted({tensor.name for tensor in b.tensors.values()} - compared)),
        tuple(other_dtype),
        tuple(not_compared),
        names,
    )


def total(changes: Sequence[Change]) -> Change:
    """The change over several disjoint sets of elements."""
    return Change(
        n_tensors=sum(change.n_tensors for change in changes),
        n_elements=sum(change.n_elements for change in changes),
        n_changed=sum(change.n_changed for change in changes),
        n_nonfinite=sum(change.n_nonfinite for change in changes),
        max_abs=max((change.max_abs for change in changes), default=0.0),
        delta_squares=math.fsum(change.delta_squares for change in changes),
        base_squares=math.fsum(change.base_squares for change in changes),
    )


def as_json(result: Diff) -> dict[str, Any]:
    """The diff as JSON values; a norm that is no finite number is None."""
    return {
        "a": result.a,
        "b": result.b,
        "names": list(result.names),
        "components": [{"component": n, **_numbers(c)} for n, c in result.components().items()],
        "groups": [
            {"component": g.component, "stack": g.stack, "layer": g.number, **_numbers(g.change)} for g in result.groups
        ],
        "integers": [vars(count) for count in result.integers],
        "only_a": list(result.only_a),
        "only_b": list(result.only_b),
        "other_dtype": [vars(mismatch) for mismatch in result.other_dtype],
        "not_compared": [vars(mismatch) for mismatch in result.not_compared],
    }


def show(result: Diff, console: Console) -> None:
    """Print the diff as a table by component and layer, then what is not in it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"a: {printable(result.a)}\nb: {printable(result.b)}"), soft_wrap=True)
    _list(console, "names in b ↔ in a", result.names)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("component")
    for label in ("tensors", "elements", "||b - a|| / ||a||", "max |b - a|", "changed"):
        table.add_column(label, justify="right", no_wrap=True)
    for name, change in result.components().items():
        members = [group for group in result.groups if group.component == name]
        table.add_row(name, *_columns(change), style="bold" if len(members) > 1 else None)
        for group in members if len(members) > 1 else []:
            place = f"{group.stack}.{group.number}" if group.stack is not None else "outside the layers"
            table.add_row(Text("  " + printable(place), overflow="fold"), *_columns(group.change))
    console.print(table)
    n_nonfinite = sum(group.change.n_nonfinite for group in result.groups)
    if n_nonfinite:
        note = "elements are NaN or infinite in a or b: they count as changed if they differ, but in no norm"
        console.print(Text(f"{n_nonfinite:,} {note}"), soft_wrap=True)
    counts = [f"{c.name}: {c.n_changed:,} of {c.n_elements:,} elements" for c in result.integers]
    _list(console, "integer tensors that differ", counts)
    _list(console, "only in a", result.only_a)
    _list(console, "only in b", result.only_b)
    _list(console, "another dtype", [f"{m.name}: {m.a}, {m.b}" for m in result.other_dtype])
    _list(console, "not compared", [f"{m.name}: {m.a}, {m.b}" for m in result.not_compared])


def _list(console: Console, label: str, lines: Sequence[str], limit: int = 10) -> None:
    from rich.text import Text

    if lines:
        more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
        shown = [f"{label}: {len(lines):,}", *(printable(line) for line in lines[:limit]), *more]
        console.print(Text("\n  ".join(shown)), soft_wrap=True)


def _compare(
    files: Files,
    a: Tensor,
    b: Tensor,
    buffers: tuple[memoryview, memoryview],
    advance: Callable[[int], None],
) -> Change:
    """One tensor, chunk by chunk; `buffers` hold as many 8-byte elements as a chunk may have."""
    parts = [Change(n_tensors=1)]
    step = len(buffers[0]) // 8
    for start in range(0, a.numel, step):
        x, y = (
            _read(files, tensor, start, min(step, tensor.numel - start), buffer)
            for tensor, buffer in zip((a, b), buffers, strict=True)
        )
        parts.append(_change(x, y))
        advance(x.nbytes + y.nbytes)
    return total(parts)


def _read(files: Files, tensor: Tensor, start: int, n: int, buffer: memoryview) -> np.ndarray[Any, Any]:
    dtype = NUMPY_DTYPE[tensor.dtype]
    view = buffer[: n * dtype.itemsize]
    files.read(tensor, start * dtype.itemsize, view)
    return np.frombuffer(view, dtype)


def _change(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Change:
    if x.dtype.kind in "iu":  # beyond 2**53, float64 would not tell them apart
        return Change(n_elements=x.size, n_changed=int(np.count_nonzero(x != y)))
    a, b = x.astype(np.float64), y.astype(np.float64)
    n_changed = np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))
    finite = np.isfinite(a) & np.isfinite(b)
    n_nonfinite = finite.size - np.count_nonzero(finite)
    if n_nonfinite:
        a, b = a[finite], b[finite]
    with np.errstate(over="ignore"):
        delta = b - a
        return Change(
            n_elements=x.size,
            n_changed=int(n_changed),
            n_nonfinite=int(n_nonfinite),
            max_abs=float(np.max(np.abs(delta), initial=0.0)),
            delta_squares=float(np.sum(np.square(delta))),
            base_squares=float(np.sum(np.square(a))),
        )


def _form(tensor: Tensor) -> str:
    return f"{_held(tensor)} {list(tensor.shape)}"


def _held(tensor: Tensor) -> str:
    """The dtype that its file holds it in: codes, where it is made of them."""
    while tensor.nominal and (tensor.parts or tensor.made):
        tensor = tensor.parts[0] if tensor.parts else tensor.made.sources[0] if tensor.made else tensor
    return tensor.dtype


def _numbers(change: Change) -> dict[str, Any]:
    return {
        "tensors": change.n_tensors,
        "elements": change.n_elements,
        "changed_elements": change.n_changed,
        "nonfinite_elements": change.n_nonfinite,
        "relative_l2": change.relative_l2,
        "max_abs": change.max_abs if math.isfinite(change.max_abs) else None,
        "changed": change.changed,
    }


def _columns(change: Change) -> tuple[str, str, str, str, str]:
    relative = change.relative_l2
    return (
        f"{change.n_tensors:,}",
        f"{change.n_elements:,}",
        "undefined" if relative is None else _percent(relative),
        f"{change.max_abs:.3g}",
        _percent(change.changed),
    )


def _percent(share: float) -> str:
    """Three digits, but never rounded to 0 % or 100 % when it is neither."""
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.3g} %"
