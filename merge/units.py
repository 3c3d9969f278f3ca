"""Bytes as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_bytes(text: str) -> int | None:
    """ "5GB" -> 5000000000, "500MiB" -> 524288000, "4096" -> 4096; None if it is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, prefix, binary = match.groups()
    unit: int = (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    return round(float(number) * unit)


def readable_bytes(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and Hugging Face count: 7 B, 1.50 kB, 5.00 GB."""
    size, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.995:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
