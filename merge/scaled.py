"""Quantised weights and their scales, as a table of plain weights: which belong together, by names and shapes.

A weight `w` has its scales in `w_scale` or `w_scale_inv` (what to multiply by, in spite of that name), its zero points
in `w_zero_point`; packed, it is `w_packed` and states its shape in `w_shape`. What is about activations is left out.
All of it has to fit a scheme that the config states: nothing is guessed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ggez_merge.dequantised import WORD_BITS, Dequantised, Grid
from ggez_merge.errors import Problem
from ggez_merge.formats import ORIGINAL
from ggez_merge.header import ITEM_BITS, SCALED, Tensor
from ggez_merge.schemes import COLUMNS, TENSOR, UNSTATED, Scheme
from ggez_merge.untrusted import printable

Shape = tuple[int, ...]
SCALES = ("scale", "scale_inv")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
REMEDY = f"download the checkpoint again; if its files are as they were made, {ORIGINAL}"
_MOST_INTEGERS = 8
_ACTIVATIONS = re.compile(r"(?:(.*)([._])|^)(?:input|output|activation|[kqv]|kv|prob)_(?:scale|zero_point|scale_ub)$")
_OF_WEIGHTS = re.compile(r"(.+)_scale_inv|((?:.*\.)?weight)_(?:scale|zero_point|packed|shape|g_idx)")


@dataclass(frozen=True)
class Scaled:
    """The table with plain weights, what to tell of it, and all that does not fit."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def scaled(held: Mapping[str, Tensor], schemes: Sequence[Scheme] | None, nominal: str) -> Scaled:
    """The weights that the files' tensors stand for, in float32; `nominal` is the dtype that the model has them in.

    schemes: those that the config states, None if it states nothing. Then 8-bit floats with scales are taken where it
    is clear how, and those without stay as they are.
    """
    if schemes is None and not any(tensor.dtype in SCALED for tensor in held.values()):
        return Scaled(dict(held))
    return _Pairing(held, schemes, nominal).run()


class _Pairing:
    def __init__(self, held: Mapping[str, Tensor], schemes: Sequence[Scheme] | None, nominal: str) -> None:
        self.held = held
        self.stated = schemes is not None
        self.schemes = UNSTATED if schemes is None else schemes
        self.nominal = nominal
        self.names = sorted(held)
        self.weights: dict[str, Tensor] = {}  # name of the codes -> the weight
        self.codes: set[str] = set()
        self.used: set[str] = set()  # what belongs to some weight's codes
        self.left: Counter[str] = Counter()
        self.counted: Counter[Scheme] = Counter()
        self.faults: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)

    def run(self) -> Scaled:
        for name, tensor in self.held.items():
            stem = self._stem(name, tensor)
            if stem is not None:
                self.codes.add(name)
                self._pair(stem, tensor)
        tensors: dict[str, Tensor] = {}
        for name, held in self.held.items():
            if not self._leave(name, held):
                tensor = self.weights.get(name, held)
                if tensors.setdefault(tensor.name, tensor) is not tensor:
                    self._complain("a weight is there twice, quantised and not", held, "one of them", tensor.name)
        return Scaled(tensors, (self._note(),) if self.weights or self.stated else (), tuple(self._problems()))

    def _complain(self, what: str, tensor: Tensor, expected: str, found: str) -> None:
        self.faults[what, str(tensor.file)].append((tensor.name, printable(expected), printable(found)))

    def _problems(self) -> list[Problem]:
        """One for each fault of a file, with the first tensor that has it."""
        problems = []
        for (what, file), [(name, expected, found), *others] in self.faults.items():
            more = f" and {len(others)} more" if others else ""
            problems.append(Problem(what, file, printable(name) + more, expected, found, REMEDY))
        return problems

    def _note(self) -> str:
        if not self.counted:
            return "config.json states quantised weights, but there are none"
        done = ", ".join(scheme.count(n) for scheme, n in self.counted.items())
        unsaid = "" if self.stated else " (config.json says nothing of them)"
        left = ", ".join(f"{n} {printable(word)}" for word, n in self.left.items())
        return f"dequantised: {done}{unsaid}; left out: {left}"

    # --- names ------------------------------------------------------------------------------------------------------

    def _stem(self, name: str, tensor: Tensor) -> str | None:
        """The name of the weight, if these are its codes."""
        if tensor.dtype in SCALED:
            return name
        if name.endswith("_packed") and any(scheme.packed for scheme in self.schemes):
            return name.removesuffix("_packed")
        integers = any(scheme.kind == "int" and not scheme.packed for scheme in self.schemes)
        named = name.endswith("weight") or f"{name}_scale" in self.held
        return name if tensor.dtype == "I8" and integers and named else None

    def _beside(self, stem: str, codes: Tensor) -> dict[str, Tensor]:
        """What is named after the weight, by the rest of its name."""
        after = chr(ord("_") + 1)
        names = self.names[bisect_left(self.names, f"{stem}_") : bisect_left(self.names, stem + after)]
        beside = {name[len(stem) + 1 :]: self.held[name] for name in names if name != codes.name}
        others = [word for word in beside if word != "bias" and "." not in word and not _ACTIVATIONS.search(word)]
        return {word: beside[word] for word in others}

    def _leave(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor means nothing to plain weights: scales, and what is about activations."""
        if not self.weights and not self.stated:
            return False
        about = _ACTIVATIONS.match(name)
        if about and about[2] == "_" and about[1] not in self.codes:
            about = None  # a weight that is called so, like Gemma 3n's correct_output_scale
        if name in self.used or about:
            self.left[name.rpartition(".")[2]] += 1
            return True
        orphan = _OF_WEIGHTS.fullmatch(name)
        if orphan and name not in self.codes:
            stem = orphan[1] or orphan[2]
            found = f"{stem} in {self.held[stem].dtype}" if stem in self.held else f"no {stem}"
            self._complain("this belongs to no quantised weight", tensor, "weights as config.json states them", found)
        return False

    # --- shapes -----------------------------------------------------------------------------------------------------

    def _pair(self, stem: str, codes: Tensor) -> None:
        beside = self._beside(stem, codes)
        scales = [beside.pop(word) for word in SCALES if word in beside]
        zero = beside.pop("zero_point", None)
        size = beside.pop("shape", None) if codes.name != stem else None
        if not scales and not self.stated:
            return
        self.used |= {tensor.name for tensor in (*scales, zero, size, *beside.values()) if tensor}
        if len(scales) != 1 or beside:
            others = ", ".join(tensor.name for tensor in (*scales, *beside.values())) or "none"
            wanted = f"{stem}_scale or {stem}_scale_inv, and no other"
            self._complain("a quantised weight needs scales, and nothing that is not understood", codes, wanted, others)
            return
        (scale,) = scales
        if scale.dtype not in SCALE_DTYPES:
            self._complain("scales of this dtype are not understood", scale, " or ".join(SCALE_DTYPES), scale.dtype)
            return
        shape = codes.shape if codes.name == stem else self._unpacked(codes, size)
        if shape is not None:
            self._fit(stem, shape, codes, scale, zero)

    def _unpacked(self, codes: Tensor, size: Tensor | None) -> Shape | None:
        """What a packed weight says of its shape, as far as it is the shape of its words."""
        found = "none"
        if size is not None:
            stated = _integers(size)
            if stated is not None and len(stated) > 1 and stated[:-1] == codes.shape[:-1] and stated[-1] >= 0:
                return stated
            found = f"{_form(size.dtype, size.shape)}, which says {stated and list(stated)}"
        wanted = f"{codes.name.removesuffix('_packed')}_shape, which says {[*codes.shape[:-1], 'n']}"
        self._complain("a packed weight has to state its shape", codes, wanted, found)
        return None

    def _fit(self, stem: str, shape: Shape, codes: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        kind = "float" if codes.dtype in SCALED else "int"
        possible = [each for each in self.schemes if (each.kind, each.packed) == (kind, codes.name != stem)]
        fits = [fit for scheme in possible for fit in _fits(scheme, stem, shape)]
        fitting = {(fit.grid, fit.packed_bits): fit for fit in fits if fit.agrees(codes, scale, zero)}
        if len(fitting) == 1:
            (fit,) = fitting.values()
            self.counted[fit.scheme] += 1
            made = Dequantised(codes, scale, zero, fit.grid, fit.packed_bits)
            nbytes = prod(shape) * ITEM_BITS["F32"] // 8
            weight = replace(codes, name=stem, dtype="F32", shape=shape, nbytes=nbytes, made=made, nominal=self.nominal)
            self.weights[codes.name] = weight
            return
        what = "several schemes fit a quantised weight" if fitting else "a quantised weight and its scales do not fit"
        wanted = "; ".join(dict.fromkeys(map(str, fits))) or "a scheme for such weights in config.json"
        found = f"{_form(codes.dtype, codes.shape)}, scales {list(scale.shape)}"
        found += f", zero points {_form(zero.dtype, zero.shape)}" if zero else ""
        self._complain(what, codes, wanted, found)


@dataclass(frozen=True)
class _Fit:
    """How a scheme may cut a weight into blocks, and what its tensors are then: `tables` are the scales' shapes."""

    scheme: Scheme
    grid: Grid
    tables: tuple[Shape, ...]
    words: Shape | None
    zeros: tuple[str, tuple[Shape, ...]] | None

    @property
    def packed_bits(self) -> int:
        return self.scheme.bits if self.scheme.packed else 0

    def agrees(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
        packed = self.words is None or (codes.dtype, codes.shape) == ("I32", self.words)
        if zero is None or self.zeros is None:
            zeros = zero is None and self.zeros is None
        else:
            zeros = zero.dtype == self.zeros[0] and zero.shape in self.zeros[1]
        return packed and zeros and scale.shape in self.tables

    def __str__(self) -> str:
        zeros = f", zero points {_form(self.zeros[0], self.zeros[1][0])}" if self.zeros else ""
        words = f", I32 {list(self.words)}" if self.words else ""
        return f"{self.scheme.count(1)}{words}, scales {list(self.tables[0])}{zeros}"


def _fits(scheme: Scheme, stem: str, shape: Shape) -> Iterator[_Fit]:
    *lead, rows, columns = shape if len(shape) > 1 else (1, prod(shape))
    if scheme.stacked and lead:
        scheme = replace(scheme, block=scheme.stacked, stacked=None)
    height, width = scheme.block[0] or rows, scheme.block[1] or columns
    if scheme.block[0] == 1 and columns % max(width, 1):
        return  # compressed-tensors knows no last group that is smaller
    heights = [height]
    if lead and stem.endswith("gate_up_proj") and rows % 2 == 0 and height >= rows:
        heights.append(rows // 2)  # transformers' stacked experts have a scale for each of the two at least
    for each in heights:
        grid = Grid(rows, columns, max(min(each, rows), 1), max(min(width, columns), 1))
        tables = [(*lead, grid.lines, grid.parts)]
        if scheme.block == COLUMNS:
            tables.append((*lead, grid.parts, 1))
        if grid.lines == grid.parts == 1:
            tables += [(*lead, 1), (*lead,)]
        words = (*shape[:-1], _n_words(columns, scheme.bits)) if scheme.packed else None
        zeros = ("I8", tuple(tables)) if scheme.zero else None
        if zeros and words:
            zeros = "I32", ((*lead, _n_words(grid.lines, scheme.bits), grid.parts),)
        yield _Fit(scheme, grid, tuple(tables), words, zeros)
    if lead and scheme == Scheme("float", 8, TENSOR):
        rows *= prod(lead)
        yield _Fit(scheme, Grid(rows, columns, max(rows, 1), max(columns, 1)), ((1,), ()), None, None)


def _n_words(n: int, bits: int) -> int:
    return -(-n * bits // WORD_BITS)


def _form(dtype: str, shape: Shape) -> str:
    return f"{dtype} {list(shape)}"


def _integers(tensor: Tensor) -> tuple[int, ...] | None:
    """A few numbers that a file states in a tensor; None if it is not that or cannot be read."""
    width = ITEM_BITS[tensor.dtype] // 8
    if tensor.dtype not in ("I32", "I64") or len(tensor.shape) != 1 or tensor.numel > _MOST_INTEGERS:
        return None
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            raw = file.read(tensor.nbytes)
    except OSError:
        return None
    return tuple(int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width))
