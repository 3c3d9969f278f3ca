"""An image of a row: a file, a part of a tar file, or bytes. Read only when it is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """The encoded image: `data`, or `size` bytes of the file from `offset` on (None: all of it)."""

    path: Path | None = None
    data: bytes | None = None
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError when there are none."""
        if self.data is not None or self.path is None:
            return self.data or b""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def open(self) -> Any:
        """The image, decoded: PIL, RGB, turned as its EXIF data say. Raises OSError or ValueError if it is corrupt."""
        return decode(self.read())

    def check(self) -> str:
        """Decodes the image, and gives the hash of its bytes. Raises OSError or ValueError."""
        raw = self.read()
        decode(raw)
        return xxhash.xxh3_128_hexdigest(raw)


def decode(raw: bytes) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(raw)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow lets through
        raise ValueError(str(error)) from None


def picture_of(value: Any, folder: Path) -> Picture:
    """The picture that a value stands for: a path below `folder`, bytes, or {bytes, path} of Hugging Face datasets.

    Raises ValueError for anything else.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, bytes) and value:
        return Picture(data=value)
    if isinstance(value, Mapping) and value.get("bytes"):
        return Picture(data=bytes(value["bytes"]))
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(path, str) and path:
        return Picture(folder / path)
    raise ValueError("no path and no bytes")
