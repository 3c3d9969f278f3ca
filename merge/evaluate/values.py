"""Numbers, truth values and lists of text from a recipe; what is wrong is noted and read as absent (see check.py)."""

from __future__ import annotations

import math
from typing import Any

from ggez_merge.check import Check
from ggez_merge.yaml_lines import Where


def count(check: Check, where: Where, value: Any, absent: int, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if value is None:
        return absent
    if type(value) is int and value >= least:
        return value
    check.refuse(where, f"`{where[-1]}` must be a whole number", f"at least {least}", value)
    return absent


def number(check: Check, where: Where, value: Any, least: float, most: float = math.inf) -> float | None:
    """A finite number from `least` to `most`, both included."""
    if value is None:
        return None
    if type(value) in (int, float) and math.isfinite(value) and least <= value <= most:
        return float(value)
    expected = f"from {least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
    check.refuse(where, f"`{where[-1]}` must be a number", expected if math.isfinite(least) else None, value)
    return None


def flag(check: Check, where: Where, value: Any, absent: bool) -> bool:
    if value is None or isinstance(value, bool):
        return absent if value is None else value
    check.refuse(where, f"`{where[-1]}` must be true or false", None, value)
    return absent


def texts(check: Check, where: Where, value: Any, absent: tuple[str, ...] = ()) -> tuple[str, ...]:
    """One text, or a list of different ones."""
    if value is None:
        return absent
    if not isinstance(value, list):
        text = check.text(where, value)
        return absent if text is None else (text,)
    found = [check.text(here, element) for here, element in check.elements(where, value)]
    given = [text for text in found if text is not None]
    if len(set(given)) < len(given):
        check.refuse(where, f"`{where[-1]}` has the same element twice", None, value)
    return tuple(dict.fromkeys(given)) or absent
