"""The layout of the output: shards, headers, and blocks that cover every byte once."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from ggez_merge.header import ITEM_BITS
from ggez_merge.shards import LEAST_BLOCK_BYTES, PAGE, Block, Entry, Shard, block_bytes, blocks, index_json, split

WHOLE = [tag for tag, bits in ITEM_BITS.items() if bits % 8 == 0]


def entry(name: str, dtype: str, n: int) -> Entry:
    return Entry(name, dtype, (n,), n * ITEM_BITS[dtype] // 8)


ENTRIES = st.lists(st.tuples(st.sampled_from(WHOLE), st.integers(0, 3000)), min_size=1, max_size=20).map(
    lambda drawn: [entry(f"t.{i}", dtype, n) for i, (dtype, n) in enumerate(drawn)]
)
SIZES = st.integers(1000, 40_000)


@given(ENTRIES, SIZES)
def test_shards_hold_every_tensor_once_aligned_and_without_holes(entries: list[Entry], size: int) -> None:
    shards = split(entries, size)
    assert sorted(index for shard in shards for index in shard.members) == list(range(len(entries)))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        assert shard.name == name
        (length,) = struct.unpack("<Q", shard.header[:8])
        assert len(shard.header) == 8 + length
        assert len(shard.header) % PAGE == 0
        at = len(shard.header)
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert list(header) == [entries[index].name for index in shard.members]
        for index, offset in zip(shard.members, shard.offsets, strict=True):
            item_bytes = ITEM_BITS[entries[index].dtype] // 8
            assert offset == at
            assert offset % item_bytes == 0
            begin, end = header[entries[index].name]["data_offsets"]
            assert (begin, end) == (at - len(shard.header), at - len(shard.header) + entries[index].nbytes)
            at += entries[index].nbytes
        assert at == shard.size
        data = sum(entries[index].nbytes for index in shard.members)
        assert data <= size or len([i for i in shard.members if entries[i].nbytes]) == 1


@given(ENTRIES, SIZES)
def test_shards_are_filled_greedily_in_order(entries: list[Entry], size: int) -> None:
    shards = split(entries, size)
    for before, after in pairwise(shards):
        assert max(before.members) < min(after.members)
        filled = sum(entries[index].nbytes for index in before.members)
        assert filled + entries[min(after.members)].nbytes > size


@given(ENTRIES)
def test_the_safetensors_library_reads_what_the_header_says(entries: list[Entry]) -> None:
    known = [e for e in entries if e.dtype in ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2")]
    (shard,) = split(known, 1 << 40)
    loaded = load(shard.header + bytes(shard.size - len(shard.header)))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {e.name: e.shape for e in known}


@given(ENTRIES, SIZES, st.integers(1, 5), st.data())
def test_blocks_cover_every_byte_once_and_whole_items(
    entries: list[Entry], size: int, pages: int, data: st.DataObject
) -> None:
    shards = split(entries, size)
    done = [data.draw(st.sampled_from([0, *range(len(s.header), s.size, PAGE), s.size])) for s in shards]
    found: dict[int, list[Block]] = {number: [] for number in range(len(shards))}
    order = []
    for block in blocks(shards, entries, pages * PAGE, done):
        found[block.shard].append(block)
        order.append((block.shard, block.offset))
    assert order == sorted(order)
    for number, shard in enumerate(shards):
        at = max(done[number], len(shard.header))
        for block in found[number]:
            assert block.offset == at
            assert 0 < block.nbytes <= pages * PAGE
            check_spans(block, shard, entries)
            at += block.nbytes
        assert at == shard.size


def check_spans(block: Block, shard: Shard, entries: list[Entry]) -> None:
    """The spans fill the block, one after the other, with the bytes that belong there."""
    at = 0
    offsets = dict(zip(shard.members, shard.offsets, strict=True))
    for span in block.spans:
        assert span.at == at
        assert offsets[span.output] + span.start == block.offset + at
        assert 0 < span.nbytes <= entries[span.output].nbytes - span.start
        item_bytes = ITEM_BITS[entries[span.output].dtype] // 8
        assert span.start % item_bytes == span.nbytes % item_bytes == 0
        at += span.nbytes
    assert at == block.nbytes


@given(
    st.integers(0, 1 << 28),
    st.integers(1, 9),
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([2 << 20, 16 << 20]),
)
def test_a_block_and_its_inputs_fit_the_arena(arena: int, n_inputs: int, widening: float, most: int) -> None:
    size = block_bytes(arena, n_inputs, widening, most)
    assert size == 0 or LEAST_BLOCK_BYTES <= size <= most
    assert size % PAGE == 0
    if size:
        carved = size + n_inputs * -(-int(size * widening) // PAGE) * PAGE
        assert carved <= arena
    assert size or arena < (LEAST_BLOCK_BYTES + PAGE) * (1 + n_inputs * max(widening, 1.0)) + (n_inputs + 1) * PAGE


def test_the_index_names_every_tensors_shard() -> None:
    entries = [entry("b", "F32", 300), entry("a", "BF16", 300), entry("c", "BF16", 300)]
    shards = split(entries, 2000)
    said = json.loads(index_json(shards, entries, 900))
    first, second = (shard.name for shard in shards)
    assert said == {
        "metadata": {"total_parameters": 900, "total_size": 2400},
        "weight_map": {"a": first, "b": first, "c": second},
    }
    assert list(said["weight_map"]) == ["a", "b", "c"]


def test_names_that_need_escapes() -> None:
    names = ['quote"d', "back\\slash", "ümläut", "tab\t", "\U0001f30d"]
    (shard,) = split([entry(name, "F32", 1) for name in names], 1 << 20, {"": "diffusion_pytorch_model"})
    assert shard.name == "diffusion_pytorch_model.safetensors"
    assert [*json.loads(shard.header[8:])][1:] == names


@pytest.mark.parametrize("n", [1, 2, 4096, 100_000])
def test_wider_dtypes_come_first_so_that_all_are_aligned(n: int) -> None:
    (shard,) = split([entry("flags", "U8", n), entry("half", "BF16", n), entry("double", "F64", n)], 1 << 40)
    assert shard.members == (2, 1, 0)
