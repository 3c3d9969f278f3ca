"""Every lie that a header can tell is refused, and every honest header is read as the library reads it."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import TAGS, write_file, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from xxhash import xxh3_128

from ggez_merge.errors import Refused
from ggez_merge.header import FLOAT8, FLOATS, ITEM_BITS, read_shard_header


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def refusal(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        read_shard_header(path)
    assert all(problem.place == str(path) for problem in caught.value.problems)
    assert all(problem.remedy for problem in caught.value.problems)
    return str(caught.value)


# (header, data, words that the refusal must hold)
MALFORMED: dict[str, tuple[object, bytes, list[str]]] = {
    "not an object": (b"[1, 2]", b"", ["does not begin with {"]),
    "leading space": (b' {"a": 1}', b"", ["does not begin with {"]),
    "not JSON": (b"{nonsense}", b"", ["not a valid safetensors header"]),
    "JSON then more": (b"{} {}", b"", ["Extra data"]),
    "empty header": (b"", b"", ["does not begin with {"]),
    "only spaces": (b"    ", b"", ["does not begin with {"]),
    "invalid UTF-8": (b'{"\xff\xfe": 1}', b"", ["invalid UTF-8 at byte 2"]),
    "lone surrogate": (b'{"a\\ud800": {}}', b"", ["lone surrogate"]),
    "control character in a string": (b'{"a\x01": {}}', b"", ["control character"]),
    "NaN": (
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        bytes(8),
        ["NaN is not JSON"],
    ),
    "Infinity": (b'{"a": Infinity}', b"", ["Infinity is not JSON"]),
    "negative Infinity": (b'{"a": -Infinity}', b"", ["-Infinity is not JSON"]),
    "deep nesting": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", ["nested too deeply"]),
    "deep objects": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, b"", ["nested too deeply"]),
    "integer of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", ["not a valid safetensors header"]),
    "duplicate tensor": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"1",
        ["duplicate key 'a'"],
    ),
    "duplicate key inside an entry": (
        b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}',
        b"1",
        ["duplicate key 'dtype'"],
    ),
    "duplicate metadata": (
        b'{"__metadata__": {"format": "pt", "format": "np"}}',
        b"",
        ["duplicate key 'format'"],
    ),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', b"", ["duplicate key '__metadata__'"]),
    "metadata not an object": ({"__metadata__": "pt"}, b"", ["__metadata__ must map strings to strings"]),
    "metadata null": ({"__metadata__": None}, b"", ["__metadata__ must map strings to strings", "null"]),
    "metadata value not a string": (
        {"__metadata__": {"n": 1}},
        b"",
        ["__metadata__ must map strings to strings"],
    ),
    "entry not an object": ({"a": [1]}, b"", ["wrong header entry", "[1]"]),
    "entry null": ({"a": None}, b"", ["wrong header entry", "null"]),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), ["wrong header entry"]),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), ["wrong header entry"]),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), ["wrong header entry", "data_offsets"]),
    "unknown key": ({"a": entry(scale=2)}, bytes(8), ["wrong header entry", "scale"]),
    "no name": ({"": entry()}, bytes(8), ["a tensor has no name"]),
    "unknown dtype": ({"a": entry("F128")}, bytes(8), ["unknown dtype", '"F128"']),
    "dtype in lower case": ({"a": entry("f32")}, bytes(8), ["unknown dtype", '"f32"']),
    "dtype a number": ({"a": entry(32)}, bytes(8), ["unknown dtype", "32"]),
    "dtype a list": ({"a": entry(["F32"])}, bytes(8), ["unknown dtype", '["F32"]']),
    "dtype null": ({"a": entry(None)}, bytes(8), ["unknown dtype", "null"]),
    "shape a number": ({"a": entry(shape=2)}, bytes(8), ["the shape is not a list of sizes"]),
    "shape an object": ({"a": entry(shape={"0": 2})}, bytes(8), ["the shape is not a list of sizes"]),
    "shape a string": ({"a": entry(shape="2")}, bytes(8), ["the shape is not a list of sizes"]),
    "shape null": ({"a": entry(shape=None)}, bytes(8), ["the shape is not a list of sizes"]),
    "size a float": ({"a": entry(shape=[2.0])}, bytes(8), ["the shape is not a list of sizes", "[2.0]"]),
    "size a string": ({"a": entry(shape=["2"])}, bytes(8), ["the shape is not a list of sizes"]),
    "size a boolean": ({"a": entry(shape=[2, True])}, bytes(8), ["the shape is not a list of sizes", "true"]),
    "size negative": ({"a": entry(shape=[-1, -2])}, bytes(8), ["the shape is not a list of sizes", "-1"]),
    "size beyond 64 bits": ({"a": entry(shape=[2**64])}, bytes(8), ["the shape is not a list of sizes"]),
    "huge size beside zero": ({"a": entry(shape=[0, 2**63], offsets=(0, 0))}, b"", ["not a list of sizes"]),
    "product overflows": ({"a": entry(shape=[2**32, 2**32])}, bytes(8), ["larger than any file"]),
    "product overflows to fit": (
        {"a": entry(shape=[2**62, 4, 2**62, 2])},
        bytes(8),
        ["larger than any file"],
    ),
    "bytes overflow": ({"a": entry("F64", [2**60])}, bytes(8), ["larger than any file"]),
    "a million sizes": ({"a": entry(shape=[3] * 1_000_000)}, bytes(8), ["larger than any file"]),
    "offsets a number": ({"a": entry(offsets=8)}, bytes(8), ["not a start and an end"]),
    "one offset": ({"a": entry(offsets=[8])}, bytes(8), ["not a start and an end", "[8]"]),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), ["not a start and an end"]),
    "offset a float": ({"a": entry(offsets=[0, 8.0])}, bytes(8), ["not a start and an end"]),
    "offset a boolean": ({"a": entry(offsets=[False, 8])}, bytes(8), ["not a start and an end"]),
    "offset negative": ({"a": entry(offsets=[-8, 0])}, bytes(8), ["not a start and an end"]),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, bytes(8), ["not a start and an end", "[8, 0]"]),
    "offset beyond 64 bits": ({"a": entry(offsets=[2**64, 2**64 + 8])}, bytes(8), ["not a start and an end"]),
    "too few bytes": ({"a": entry(offsets=[0, 7])}, bytes(7), ["does not fit shape and dtype", "8", "7"]),
    "too many bytes": ({"a": entry(offsets=[0, 9])}, bytes(9), ["does not fit shape and dtype", "8", "9"]),
    "empty tensor with bytes": ({"a": entry(shape=[0])}, bytes(8), ["does not fit shape and dtype"]),
    "half a byte": ({"a": entry("F4", [3], [0, 2])}, bytes(2), ["does not end at a whole byte"]),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), ["leaves a hole before it"]),
    "hole between": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), ["a hole before it", "b"]),
    "overlap": (
        {"a": entry(), "b": entry(offsets=[4, 12])},
        bytes(12),
        ["overlaps the tensor before it", "b"],
    ),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), ["overlaps the tensor before it"]),
    "empty tensor inside another": (
        {"a": entry(), "b": entry(shape=[0], offsets=[4, 4])},
        bytes(8),
        ["overlaps the tensor before it"],
    ),
    "data cut off": ({"a": entry()}, bytes(7), ["the file is cut off"]),
    "data goes on": ({"a": entry()}, bytes(9), ["the file goes on after the last tensor"]),
    "no tensors but data": ({}, b"1", ["the file goes on after the last tensor"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, words = MALFORMED[case]
    message = refusal(write_raw(tmp_path / "x.safetensors", header, data))
    for word in words:
        assert word in message
    assert len(message) < 2000  # however much the header holds


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (3, "does not begin with {"),
        (12, "is cut off"),
        (100_000_001, "is the most"),
        (2**64 - 1, "is the most"),
    ],
)
def test_wrong_header_length_is_refused(length: int, words: str, tmp_path: Path) -> None:
    header = b"  {" if length == 3 else b"{}"
    assert words in refusal(write_raw(tmp_path / "x.safetensors", header, length=length))


@pytest.mark.parametrize("size", range(8))
def test_file_too_short_for_a_length_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    assert f"the file has {size} bytes" in refusal(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros(0, np.int8),
        "b": np.float16(1),
    }
    whole = write_file(tmp_path / "whole.safetensors", {k: np.asarray(v) for k, v in arrays.items()}).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        message = refusal(cut)
        assert "cut off" in message or "too few for a header length" in message
    cut.write_bytes(whole)
    assert len(read_shard_header(cut)[0]) == 3


def test_all_problems_of_a_header_are_told_at_once(tmp_path: Path) -> None:
    header = {"a": entry("F31"), "good": entry(), "b": entry(shape=[-1]), "c": entry(offsets=[1])}
    with pytest.raises(Refused) as caught:
        read_shard_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))
    assert [problem.tensor for problem in caught.value.problems] == ["a", "b", "c"]


def test_a_hole_is_told_once(tmp_path: Path) -> None:
    header = {name: entry(offsets=[8 * at + 4, 8 * at + 12]) for at, name in enumerate("abc")}
    with pytest.raises(Refused) as caught:
        read_shard_header(write_raw(tmp_path / "x.safetensors", header, bytes(28)))
    assert [problem.tensor for problem in caught.value.problems] == ["a"]


def test_names_are_escaped_in_messages(tmp_path: Path) -> None:
    message = refusal(write_raw(tmp_path / "x.safetensors", {"\x1b[2J\u202eevil\n": entry("\x07")}, bytes(8)))
    assert "\\x1b[2J\\u202eevil\\n" in message
    assert not {"\x1b", "\u202e", "\x07"} & set(message)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "absent.safetensors")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    assert "cannot be read" in refusal(loop)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "not a regular file" in refusal(pipe)  # and does not wait for a writer


def test_empty_tensors_are_allowed_wherever_they_are_consistent(tmp_path: Path) -> None:
    header = {
        "late": entry(shape=[0], offsets=[12, 12]),
        "scalar": entry(shape=[], offsets=[8, 12]),
        "between": entry(shape=[3, 0], offsets=[8, 8]),
        "first": entry(shape=[0, 2**62], offsets=[0, 0]),
        "data": entry(),
    }
    tensors, metadata, _ = read_shard_header(write_raw(tmp_path / "x.safetensors", header, bytes(12)))
    assert [tensor.name for tensor in tensors] == ["first", "data", "between", "scalar", "late"]
    assert [tensor.numel for tensor in tensors] == [0, 2, 0, 1, 0]
    assert metadata == {}


def test_file_record(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)}, {"format": "pt"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    _, metadata, file = read_shard_header(path)
    assert metadata == {"format": "pt"}
    assert (file.path, file.size, file.mtime_ns) == (path, len(raw), path.stat().st_mtime_ns)
    assert file.header_hash == xxh3_128(raw[8 : 8 + length]).hexdigest()


def test_header_padding_is_allowed(tmp_path: Path) -> None:
    padded = json.dumps({"a": entry()}).encode().ljust(4088)
    (tensor,), _, _ = read_shard_header(write_raw(tmp_path / "x.safetensors", padded, bytes(8)))
    assert tensor.offset == 4096


@pytest.mark.parametrize("dtype", ITEM_BITS)
def test_every_dtype_is_as_wide_as_the_library_says(dtype: str, tmp_path: Path) -> None:
    nbytes = ITEM_BITS[dtype]  # 8 elements
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(dtype, [8], [0, nbytes])}, bytes(nbytes))
    with safe_open(path, "numpy") as file:
        assert file.get_slice("a").get_dtype() == dtype
    (tensor,), _, _ = read_shard_header(path)
    assert (tensor.dtype, tensor.nbytes) == (dtype, nbytes)
    assert ITEM_BITS.keys() >= FLOATS | FLOAT8


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
dtypes = st.sampled_from([np.dtype(d) for d in (np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_)])


@settings(max_examples=60, deadline=None)
@given(table=st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=8))
def test_files_of_the_library_are_read_as_the_library_reads_them(
    table: dict[str, tuple[np.dtype[Any], tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("library") / "x.safetensors"
    random = np.random.default_rng(0)
    save_file({n: random.integers(0, 2, s).astype(d) for n, (d, s) in table.items()}, path, {"format": "np"})
    tensors, metadata, _ = read_shard_header(path)
    raw = path.read_bytes()
    with safe_open(path, "numpy") as file:
        assert {tensor.name for tensor in tensors} == set(file.keys())
        assert metadata == file.metadata()
        for tensor in tensors:
            theirs = file.get_tensor(tensor.name)
            assert (tensor.dtype, tensor.shape) == (TAGS[theirs.dtype], theirs.shape)
            assert (tensor.numel, tensor.nbytes) == (theirs.size, theirs.nbytes)
            assert raw[tensor.offset : tensor.offset + tensor.nbytes] == theirs.tobytes()


def test_bfloat16_written_here_is_read_by_the_library(tmp_path: Path) -> None:
    array = np.arange(7, dtype=np.float32).astype(ml_dtypes.bfloat16)
    path = write_file(tmp_path / "x.safetensors", {"a": array})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").float().tolist() == list(range(7))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
near_entries = st.fixed_dictionaries({
    "dtype": st.sampled_from([*ITEM_BITS, "X"]) | json_values,
    "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
    "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | json_values,
})  # fmt: skip


def survives(path: Path) -> None:
    """Refuses, or gives a table that lies wholly inside the file; raises nothing else."""
    try:
        tensors, metadata, file = read_shard_header(path)
    except Refused:
        return
    assert all(type(key) is str and type(value) is str for key, value in metadata.items())
    assert sum(tensor.nbytes for tensor in tensors) <= file.size
    assert all(8 <= tensor.offset <= tensor.offset + tensor.nbytes <= file.size for tensor in tensors)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(raw)
    survives(path)
    write_raw(path, b"{" + raw)
    survives(path)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(names, near_entries, max_size=3), data=st.binary(max_size=40))
def test_random_headers_raise_nothing_but_refused(
    header: dict[str, Any], data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    survives(write_raw(tmp_path_factory.getbasetemp() / "header.safetensors", header, data))


VALID = json.dumps({"__metadata__": {"f": "pt"}, "a": entry("U8", [2], [0, 2]), "b": entry("F16", [1], [2, 4])})


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(VALID) + 11), byte=st.integers(0, 255), drop=st.booleans())
def test_a_valid_file_with_one_byte_wrong(
    at: int, byte: int, drop: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(struct.pack("<Q", len(VALID)) + VALID.encode() + bytes(4))
    raw[at : at + 1] = b"" if drop else bytes([byte])
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    survives(path)
    if drop:
        refusal(path)
