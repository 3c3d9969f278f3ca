"""What a merge report and a model card say of this machine's folders, cut to what others may read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ggez_merge.errors import Refused
from ggez_merge.yaml_lines import parse

# A path begins and ends where a name does: "/model" is no part of "encoder/model.safetensors" or "org/model-7b". What
# JSON spells as \\n ends with a letter and is none.
_BEFORE = rb"(?:(?<![\w.\-/\x80-\xff])|(?<=\\[ntr]))"
_AFTER = rb"(?![.\-]*[\w\x80-\xff])"


def short_names(report: Mapping[str, Any]) -> dict[str, str]:
    """Absolute path -> its last parts, for those among the inputs of a report and in the recipes that it quotes.

    As many parts as it takes to tell all of them apart, the same number for all.
    """
    parts = {text: found for text in _named(report) if is_absolute(text) and (found := re.findall(r"[^\\/]+", text))}
    n_parts, n_paths = 1, len(set(map(tuple, parts.values())))
    while len({tuple(found[-n_parts:]) for found in parts.values()}) < n_paths:
        n_parts += 1
    return {path: "/".join(found[-n_parts:]) for path, found in parts.items()}


def shortened(text: bytes, names: Mapping[str, str], *, as_json: bool) -> bytes:
    """The text with each path under its short name; in JSON, as JSON spells them."""
    spelt = {_spelt(path, as_json): _spelt(name, as_json) for path, name in names.items()}
    if not spelt:
        return text
    longest_first = sorted(spelt, key=len, reverse=True)  # one may begin another
    paths = b"|".join(map(re.escape, longest_first))
    return re.sub(_BEFORE + b"(?:" + paths + b")" + _AFTER, lambda match: spelt[match[0]], text)


def _spelt(text: str, as_json: bool) -> bytes:
    return (json.dumps(text, ensure_ascii=False)[1:-1] if as_json else text).encode()


def is_absolute(text: str) -> bool:
    """Whether it is an absolute path on any system."""
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _named(report: Any) -> Iterable[str]:
    """What a report, its stages and the earlier reports that it goes on from say of where models are."""
    for each in report if isinstance(report, list) else [report] if isinstance(report, dict) else ():
        if isinstance(each, dict):
            recipe = each.get("recipe")
            yield from _strings(_data(recipe) if isinstance(recipe, str) else None)
            yield from _strings(each.get("reference"))
            for key in ("inputs", "stages", "origin"):
                yield from _named(each.get(key))


def _data(recipe: str) -> Any:
    try:
        return [document.data for document in parse(recipe, "recipe", [])]
    except Refused:
        return None


def _strings(value: Any) -> Iterable[str]:
    """Every string; of those that name a model with its adapter (base+adapter), each by itself."""
    if isinstance(value, str):
        yield from value.split("+")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)
