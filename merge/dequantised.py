"""A weight that is made of codes and scales, where and when its elements are read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ggez_merge.arithmetic import decoder
from ggez_merge.header import Array, Elements, Tensor

PIECE = 1 << 17  # elements at a time: codes and scales stay small beside a worker's buffers
WORD_BITS = 32
_BYTES = np.arange(256, dtype=np.uint8)
_DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8}


@dataclass(frozen=True)
class Grid:
    """Matrices of `rows` by `columns`, one after the other, each with a scale for `height` by `width` elements."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def lines(self) -> int:
        """Rows of the table of one matrix's scales."""
        return -(-self.rows // self.height)

    @property
    def parts(self) -> int:
        """Columns of it."""
        return -(-self.columns // self.width)


@dataclass(frozen=True)
class Dequantised:
    """weight = (code - zero point) * scale, in float32, each operation rounded.

    codes: a tensor of 8-bit floats or integers or, with `packed_bits`, rows of 32-bit words that hold as many unsigned
    integers as go in, the lowest bits first, half of their range too large. scale: one for each block of `grid`. zero,
    if there are any: of the scales' shape or, packed, columns of words of the same kind.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    packed_bits: int = 0

    @property
    def sources(self) -> Sequence[Tensor]:
        return (self.codes, self.scale, self.zero) if self.zero else (self.codes, self.scale)

    @property
    def said(self) -> list[Any]:
        return [self.grid.rows, self.grid.columns, self.grid.height, self.grid.width, self.packed_bits]

    def fill(self, elements: Elements, first: int, out: Array) -> None:
        rows, columns = self.grid.rows, self.grid.columns
        done = 0
        while done < len(out):
            row, column = divmod(first + done, columns)
            left = len(out) - done
            n, width = 1, min(columns - column, left, PIECE)
            if width == columns:
                n = min(left // columns, PIECE // columns, rows - row % rows)
            self._decode(elements, row, column, out[done : done + n * width].reshape(n, width))
            done += n * width

    def _decode(self, elements: Elements, row: int, column: int, out: Array) -> None:
        """Whole rows of one matrix, or a part of one row, from `row` of all matrices on."""
        grid = self.grid
        matrix, row_in = divmod(row, grid.rows)
        line, part = row_in // grid.height, column // grid.width
        end = (row_in + len(out) - 1) // grid.height + 1, (column + out.shape[1] - 1) // grid.width + 1

        def table(tensor: Tensor) -> Array:
            top = matrix * grid.lines
            found = _rectangle(elements, tensor, grid.parts, (top + line, part), (top + end[0], end[1]))
            return found.astype(np.float32)

        scale = table(self.scale)
        if self.zero is None:
            zero = np.zeros_like(scale)
        elif self.packed_bits:
            zero = self._zeros(elements, self.zero, matrix, (line, part), end)
        else:
            zero = table(self.zero)
        codes = self._codes(elements, row, column, out.shape)
        start = row_in - line * grid.height, column - part * grid.width
        decoder()(
            out, codes, _values(self.packed_bits or self.codes.dtype), scale, zero, *start, grid.height, grid.width
        )

    def _codes(self, elements: Elements, row: int, column: int, shape: tuple[int, int]) -> Array:
        """uint8 of this shape, whatever the file holds them in."""
        n, width = shape
        if not self.packed_bits:
            found = _rectangle(elements, self.codes, self.grid.columns, (row, column), (row + n, column + width))
            return found.view(np.uint8)
        each = WORD_BITS // self.packed_bits
        first, end = column // each, -(-(column + width) // each)
        words = _rectangle(elements, self.codes, -(-self.grid.columns // each), (row, first), (row + n, end))
        raw = words.view(np.uint8)
        if self.packed_bits == 4:
            raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(n, -1)
        return np.ascontiguousarray(raw[:, column - first * each :][:, :width])

    def _zeros(
        self, elements: Elements, zero: Tensor, matrix: int, start: tuple[int, int], end: tuple[int, int]
    ) -> Array:
        """Zero points that lie in words along the columns of their table."""
        each = WORD_BITS // self.packed_bits
        top = matrix * -(-self.grid.lines // each)
        first, last = start[0] // each, (end[0] - 1) // each
        words = _rectangle(elements, zero, self.grid.parts, (top + first, start[1]), (top + last + 1, end[1]))
        lines = np.arange(start[0], end[0])
        shifted = words[lines // each - first] >> (lines % each * self.packed_bits)[:, None].astype(np.int32)
        return _values(self.packed_bits)[shifted & (1 << self.packed_bits) - 1]


def _rectangle(elements: Elements, tensor: Tensor, width: int, start: tuple[int, int], end: tuple[int, int]) -> Array:
    """Rows and columns from `start` to before `end` of a table of this width: whole rows, or a part of one."""
    rows, columns = end[0] - start[0], end[1] - start[1]
    return elements(tensor, start[0] * width + start[1], rows * columns).reshape(rows, columns)


@functools.cache
def _values(codes: int | str) -> Array:
    """float32 [256]: what each code stands for, by dtype or, of packed ones, by bits."""
    if isinstance(codes, int):
        return _BYTES.astype(np.float32) - np.float32(1 << (codes - 1))
    return _BYTES.view(_DTYPES[codes]).astype(np.float32)
