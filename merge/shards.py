"""How the merged checkpoint is laid out: shards, their headers, and the blocks they are computed in.

Everything here follows from names, dtypes and shapes alone, so the whole layout is known before a weight is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ggez_merge.checkpoint import ITEM_BITS

PAGE = 4096  # the header is padded to it, so that data starts page-aligned and direct IO can write it
LEAST_BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class Entry:
    """One tensor of the output: what its header entry says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file. `offsets[i]` is where the tensor `members[i]` (an index into the outputs) starts in the file.

    In a pipeline it lies in the sub-folder `folder`, and holds `unet.X` as `X`; `name` is its path in the output.
    """

    name: str
    header: bytes
    members: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int
    folder: str = ""

    def own_name(self, entry: Entry) -> str:
        """What the tensor is called in this file."""
        return entry.name[len(self.folder) + 1 :] if self.folder else entry.name


@dataclass(frozen=True)
class Span:
    """Part of one output tensor inside a block: bytes [start, start + nbytes) of it, at `at` in the block."""

    output: int
    start: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Block:
    """The unit of work: bytes [offset, offset + nbytes) of one shard."""

    shard: int
    offset: int
    nbytes: int
    spans: tuple[Span, ...]


def split(
    entries: Sequence[Entry], shard_size_bytes: float, stems: Mapping[str, str] = MappingProxyType({"": "model"})
) -> list[Shard]:
    """Hugging Face's greedy split: in the given order, a new shard when the next tensor would not fit.

    Inside a shard, wider dtypes come first: then every tensor is aligned to its own items without any holes, which
    the format forbids. stems: what the files are called, {"unet": "diffusion_pytorch_model"}, by the sub-folders of a
    pipeline, each of which is split for itself; without any, the only folder is "".
    """
    members: dict[str, list[int]] = {folder: [] for folder in stems}
    for index, entry in enumerate(entries):
        members["" if "" in stems else entry.name.partition(".")[0]].append(index)
    shards = []
    for folder, stem in stems.items():
        groups: list[list[int]] = []
        room = 0.0
        for index in members[folder]:
            if not groups or entries[index].nbytes > room:
                groups.append([])
                room = shard_size_bytes
            groups[-1].append(index)
            room -= entries[index].nbytes
        groups = groups or [[]]
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [f"{stem}.safetensors"]
        shards += [_shard(folder, name, entries, group) for name, group in zip(names, groups, strict=True)]
    return shards


def _shard(folder: str, name: str, entries: Sequence[Entry], group: list[int]) -> Shard:
    members = sorted(group, key=lambda index: -ITEM_BITS[entries[index].dtype])
    shard = Shard(f"{folder}/{name}" if folder else name, b"", tuple(members), (), 0, folder)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = [], 0
    for index in members:
        entry = entries[index]
        offsets.append(at)
        header[shard.own_name(entry)] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    raw = struct.pack("<Q", len(text)) + text
    return replace(shard, header=raw, offsets=tuple(len(raw) + offset for offset in offsets), size=len(raw) + at)


def indexes(shards: Sequence[Shard], entries: Sequence[Entry], n_elements: Sequence[int]) -> dict[str, str]:
    """Path and content of the index that goes with the shards of each folder that has several."""
    found = {}
    for folder in dict.fromkeys(shard.folder for shard in shards):
        own = [shard for shard in shards if shard.folder == folder]
        if len(own) > 1:
            path = own[0].name.split("-00001-of-")[0] + ".safetensors.index.json"
            found[path] = index_json(own, entries, sum(n_elements[index] for shard in own for index in shard.members))
    return found


def index_json(shards: Sequence[Shard], entries: Sequence[Entry], parameters: int) -> str:
    """The content of model.safetensors.index.json, for the shards of one folder."""
    weight_map = {
        shard.own_name(entries[index]): shard.name.rpartition("/")[2] for shard in shards for index in shard.members
    }
    total = sum(entries[index].nbytes for shard in shards for index in shard.members)
    metadata = {"total_parameters": parameters, "total_size": total}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def block_bytes(arena_bytes: int, n_inputs: int, widening: float, most: int) -> int:
    """The largest block (a multiple of PAGE) for which one worker's output and inputs fit in its arena; 0 if none does.

    widening: input bytes for each output byte, at the worst. most: what the device has any use for.
    """
    room = arena_bytes - (n_inputs + 1) * PAGE
    size = int(room / (1 + n_inputs * widening)) // PAGE * PAGE
    return min(size, most) if size >= LEAST_BLOCK_BYTES else 0


def blocks(shards: Sequence[Shard], entries: Sequence[Entry], block: int, done: Sequence[int]) -> Iterator[Block]:
    """Every block of every shard in order, from byte done[s] of shard s on (its header counts as done)."""
    for number, shard in enumerate(shards):
        at = max(done[number], len(shard.header))
        first = 0
        while at < shard.size:
            end = min(shard.size, at - at % PAGE + block)
            while shard.offsets[first] + entries[shard.members[first]].nbytes <= at:
                first += 1
            yield Block(number, at, end - at, tuple(_spans(shard, entries, first, at, end)))
            at = end


def _spans(shard: Shard, entries: Sequence[Entry], first: int, at: int, end: int) -> Iterator[Span]:
    for position in range(first, len(shard.members)):
        offset = shard.offsets[position]
        if offset >= end:
            return
        index = shard.members[position]
        begin, stop = max(at, offset), min(end, offset + entries[index].nbytes)
        if begin < stop:
            yield Span(index, begin - offset, stop - begin, begin - at)
