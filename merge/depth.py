"""How many layers a stack has, and what the config must say when that changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ggez_merge.components import layer
from ggez_merge.errors import Problem

COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Number of layers by the prefix of their stack: {"model.layers": 32}."""
    counts: dict[str, int] = {}
    for name in names:
        where = layer(name)
        if where:
            counts[where[0]] = max(counts.get(where[0], 0), where[1] + 1)
    return counts


def restate_depth(config: dict[str, Any], path: str, prefix: str, old: int, order: Sequence[int]) -> list[Problem]:
    """Write the new number of layers into `config`, where it states the old one; `layer_types` follows.

    order: for each new layer, the old one it comes from. A problem if the config does not state the number exactly
    once: then nobody knows which of its numbers belongs to the stack.
    """
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    stated = [(section, key) for section in sections for key in COUNT_KEYS if section.get(key) == old]
    if len(stated) != 1:
        return [
            Problem(
                f"config.json does not say once and clearly how many layers {prefix} has",
                place=path,
                expected=f"one of {', '.join(COUNT_KEYS)} with the value {old}",
                found=f"{len(stated)} such keys",
            )
        ]
    section, key = stated[0]
    section[key] = len(order)
    types = section.get("layer_types")
    if isinstance(types, list) and len(types) == old:
        section["layer_types"] = [types[i] for i in order]
    return []
