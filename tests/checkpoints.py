"""Tiny checkpoints for tests, written byte by byte from numpy arrays, with no library in between."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TAGS = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "F8_E4M3FNUZ",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.float64): "F64",
    np.dtype(np.complex64): "C64",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint16): "U16",
    np.dtype(np.int16): "I16",
    np.dtype(np.uint32): "U32",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint64): "U64",
    np.dtype(np.int64): "I64",
}

Arrays = Mapping[str, np.ndarray[Any, Any]]


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with exactly this header (bytes as they are, else as JSON) and this data, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write_file(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    """One .safetensors file with the arrays in the given order, any shape (0-d and empty included)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    data = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": TAGS[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return write_raw(path, header, data)


def write_checkpoint(
    folder: Path,
    arrays: Arrays,
    *,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    base: str = "model",
    index: bool = True,
) -> Path:
    """A folder as transformers saves it: one file, or `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / f"{base}.safetensors", arrays, metadata)
        return folder
    weight_map = {}
    for number, names in enumerate(_split(list(arrays), shards), start=1):
        file = f"{base}-{number:05d}-of-{shards:05d}.safetensors"
        write_file(folder / file, {name: arrays[name] for name in names}, metadata)
        weight_map.update(dict.fromkeys(names, file))
    if index:
        total = sum(array.nbytes for array in arrays.values())
        write_index(folder, weight_map, base=base, metadata={"total_size": total})
    return folder


def write_index(
    folder: Path, weight_map: object, *, base: str = "model", metadata: dict[str, Any] | None = None
) -> Path:
    path = folder / f"{base}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))
    return path


def _split(names: Sequence[str], parts: int) -> list[Sequence[str]]:
    return [names[len(names) * part // parts : len(names) * (part + 1) // parts] for part in range(parts)]
