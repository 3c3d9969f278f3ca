"""One .safetensors header, read and checked in full: nothing is believed that the file does not bear out."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128

from ggez_merge.errors import Problem, Refused
from ggez_merge.untrusted import MAX_JSON_BYTES, printable, strict_json

ITEM_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
"""Bits per element of every dtype of the safetensors format."""

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
"""The dtypes that weight arithmetic is defined on."""

FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

SCALED = frozenset({"F8_E4M3", "F8_E5M2"})
"""Those of them that weights are quantised to: they mean nothing without scales, which are tensors of their own."""

_LARGEST = 2**63 - 1
_DOWNLOAD_AGAIN = "download or copy the file again"
_WRITE_AGAIN = "write the file again with the safetensors library"


Array = Any  # a 1-D numpy array


class Making(Protocol):
    """How a tensor comes about that no file holds: its elements are computed from those of its `sources`."""

    @property
    def sources(self) -> Sequence[Tensor]: ...

    @property
    def said(self) -> list[Any]:
        """Whatever else decides its elements, as JSON can hold it."""

    def fill(self, elements: Elements, first: int, out: Array) -> None:
        """Write elements from the flat index `first` on to `out`: the same ones, wherever a span begins and ends."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in a file, row-major and little-endian; `offset` is in bytes from the start of the file.

    A tensor that was put together from others has them as its `parts`, whose bytes follow each other; `starts` is the
    first byte of each. One that is `made` lies nowhere. `nominal` is the dtype that the model has it in, where it is
    made in a wider one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    parts: tuple[Tensor, ...] = ()
    starts: tuple[int, ...] = ()
    made: Making | None = None
    nominal: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return _numel(self.shape)

    @property
    def extents(self) -> tuple[Tensor, ...]:
        """What its bytes are, one after the other: itself, unless it has parts."""
        return self.parts or (self,)

    @property
    def stored_bytes(self) -> int:
        """Bytes of files that its elements come from, at most as many as it has itself."""
        if self.parts:
            return sum(part.stored_bytes for part in self.parts)
        if self.made is None:
            return self.nbytes
        return min(self.nbytes, sum(source.stored_bytes for source in self.made.sources))

    @property
    def places(self) -> list[Any]:
        """All that says which bytes it is made of, as JSON can hold it."""
        if self.parts:
            return [place for part in self.parts for place in part.places]
        if self.made is None:
            return [[str(self.file), self.offset]]
        sources = [source.places for source in self.made.sources]
        return [[type(self.made).__name__, self.dtype, self.nbytes, self.made.said, sources]]


Elements = Callable[[Tensor, int, int], Array]  # (tensor, first, n) -> n elements of it, from flat index `first` on


@dataclass(frozen=True)
class Span:
    """Elements of another tensor, from its flat index `first` on."""

    whole: Tensor
    first: int

    @property
    def sources(self) -> Sequence[Tensor]:
        return (self.whole,)

    @property
    def said(self) -> list[Any]:
        return [self.first]

    def fill(self, elements: Elements, first: int, out: Array) -> None:
        if self.whole.made is not None:
            self.whole.made.fill(elements, self.first + first, out)
        else:
            out[:] = elements(self.whole, self.first + first, len(out))


def span(tensor: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    """The elements of `tensor` from its flat index `first` on, as a tensor of this shape: read where they lie."""
    width = ITEM_BITS[tensor.dtype] // 8
    cut = replace(tensor, shape=shape, nbytes=_numel(shape) * width, parts=(), starts=())
    if tensor.parts or tensor.made:
        return replace(cut, made=Span(tensor, first))
    return replace(cut, offset=tensor.offset + first * width)


def joined(like: Tensor, shape: tuple[int, ...], parts: Sequence[Tensor]) -> Tensor:
    """The tensor that `parts` are when their bytes follow each other, named as `like`."""
    *starts, nbytes = accumulate((part.nbytes for part in parts), initial=0)
    of = parts[0]
    cut = replace(like, dtype=of.dtype, shape=shape, nbytes=nbytes, made=None, nominal=of.nominal)
    return replace(cut, parts=tuple(parts), starts=tuple(starts))


@dataclass(frozen=True)
class ShardFile:
    """One file as it was when its header was read; `header_hash` is the hex XXH3 of what its header says."""

    path: Path
    size: int
    mtime_ns: int
    header_hash: str


def promoted(tensors: Sequence[Tensor]) -> str:
    """The dtype that holds all of these: theirs if they agree, F32 for a mix of 16-bit floats, else the widest."""
    dtypes = {tensor.nominal or tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "F64" if "F64" in dtypes else "F32"


def read_shard_header(path: Path) -> tuple[list[Tensor], dict[str, str], ShardFile]:
    """Tensors by offset, the `__metadata__` strings, and the file itself, from one .safetensors file.

    The layout is 8 bytes of little-endian header length, the JSON header, then data with neither holes nor
    overlaps up to the last byte of the file. Raises Refused with all problems of this header.
    """
    try:
        header, size, mtime_ns = _read_header(path)
        entries = strict_json(header)
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise Refused(
            Problem(
                f"the shard cannot be read: {error.strerror}",
                place=str(path),
                remedy=_DOWNLOAD_AGAIN,
            )
        ) from None
    except ValueError as error:
        raise Refused(
            Problem(
                f"not a valid safetensors header: {error}",
                place=str(path),
                remedy=_WRITE_AGAIN,
            )
        ) from None
    problems: list[Problem] = []

    def complain(what: str, tensor: str | None = None, expected: object = None, found: object = None) -> None:
        said = [None if value is None else printable(str(value)) for value in (expected, found)]
        name = None if tensor is None else printable(tensor) or "(empty name)"
        problems.append(Problem(what, str(path), name, said[0], said[1], _WRITE_AGAIN))

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        complain("__metadata__ must map strings to strings", found=_shown(metadata))
    start = 8 + len(header)
    tensors: list[Tensor] = []
    for name, entry in entries.items():
        fault = _fault(entry) if name else ("a tensor has no name", None, None)
        if fault is not None:
            complain(fault[0], name, *fault[1:])
            continue
        first, end = entry["data_offsets"]
        tensors.append(Tensor(name, entry["dtype"], tuple(entry["shape"]), path, start + first, end - first))
    if problems:  # the offsets of the others cannot be judged
        raise Refused(problems)
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    at = start
    for tensor in tensors:
        if tensor.offset != at:
            what = "leaves a hole before" if tensor.offset > at else "overlaps the tensor before"
            complain(f"the data {what} it", tensor.name, f"data at byte {at}", f"byte {tensor.offset}")
        at = tensor.offset + tensor.nbytes
    if at != size:
        what = "the file is cut off" if at > size else "the file goes on after the last tensor"
        problems.append(Problem(what, str(path), None, f"{at} bytes", f"{size} bytes", _DOWNLOAD_AGAIN))
    if problems:
        raise Refused(problems)
    return tensors, metadata, ShardFile(path, size, mtime_ns, xxh3_128(header).hexdigest())


def _read_header(path: Path) -> tuple[bytes, int, int]:
    """The header's JSON, the file's size and its mtime; raises OSError or an explaining ValueError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would block
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"the file has {status.st_size} bytes, too few for a header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_JSON_BYTES:
            raise ValueError(f"a header of {length} bytes; {MAX_JSON_BYTES} is the most the format allows")
        if 8 + length > status.st_size:
            raise ValueError(f"a header of {length} bytes in a file of {status.st_size} bytes: the file is cut off")
        header = file.read(length)
    if len(header) != length:
        raise ValueError("the file became shorter while it was read")
    if not header.startswith(b"{"):
        raise ValueError("it does not begin with {")
    return header, status.st_size, status.st_mtime_ns


def _fault(entry: object) -> tuple[str, object, object] | None:
    """What is wrong with one tensor's entry: what, expected, found; None when it is consistent in itself."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        return "wrong header entry", f"exactly {sorted(keys)}", _shown(entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        return "unknown dtype", ", ".join(ITEM_BITS), _shown(dtype)
    if not _are_sizes(shape):
        return "the shape is not a list of sizes", "integers from 0 to 2**63 - 1", _shown(shape)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return (
            "the data offsets are not a start and an end",
            "two integers, start <= end",
            _shown(offsets),
        )
    bits = _numel(shape) * ITEM_BITS[dtype]
    if bits > 8 * _LARGEST:
        return "the shape is larger than any file", "less than 2**63 bytes", _shown(shape)
    if bits % 8:
        return (
            "the tensor does not end at a whole byte",
            f"a multiple of 8 bits for {dtype}",
            _shown(shape),
        )
    if offsets[1] - offsets[0] != bits // 8:
        return "the byte length does not fit shape and dtype", bits // 8, offsets[1] - offsets[0]
    return None


def _shown(value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:  # the writer gives up at a lower depth than the parser
        return "deeply nested JSON"


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST for size in value)


def _numel(shape: Sequence[int]) -> int:
    """The product of the sizes. Beyond any file's size it stops: a hostile header may list millions."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product *= size
        if product > 8 * _LARGEST:
            break
    return product
