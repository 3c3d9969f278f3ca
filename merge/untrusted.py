"""What comes from outside: JSON that may be hostile, and names that may hold anything a terminal obeys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000  # the limit that the safetensors library sets for a header
_LONGEST_NAME = 300  # characters of an untrusted name that are shown


def printable(text: str) -> str:
    """`text` as a terminal may show it: control and formatting characters escaped, very long names cut."""
    return escaped(text[:_LONGEST_NAME] + "…" if len(text) > _LONGEST_NAME else text)


def escaped(text: str) -> str:
    """`text` with whatever a terminal might obey written as Python would."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def strict_json(raw: bytes) -> Any:
    """JSON without the liberties that Python's parser takes; raises ValueError that says what is wrong.

    Duplicate keys (the last would win, silently), NaN and Infinity, lone surrogates, integers of thousands of
    digits and nesting deeper than the parser can follow are errors.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\u" in raw:  # only an escape can smuggle in half a surrogate pair, which no file name or UTF-8 can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate in a string") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {printable(key)!r}")
        seen[key] = value
    return seen


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_json_bytes(path: Path) -> bytes:
    """All bytes of a JSON file; raises ValueError beyond `MAX_JSON_BYTES`, OSError when it cannot be read."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    return raw


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more
