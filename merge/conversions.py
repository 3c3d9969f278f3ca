"""What transformers knows of a model's older names: its own conversion tables, called where it is installed.

Only asked when the tables of tensors leave something open on both sides, for its import takes seconds. transformers 5
renames and fuses weights on load by these tables (transformers/conversion_mapping.py); they are not a public interface,
so whatever is not as expected here means that nothing is known, and what is open stays open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHANGED = "transformers does more than put its parts one after the other"


@dataclass(frozen=True)
class Fusion:
    """A tensor whose name has `large`, up to the end of a word, holds what the names with `small` in its place hold.

    The bytes of the small ones follow each other, expert by expert where a * stands for an expert's number, unless
    there is a `doubt`. `sure`: whoever says so knows the model, so that shapes need not tell.
    """

    large: str
    small: tuple[str, ...]
    doubt: str = ""
    sure: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the parts of a tensor of this name; none if it is another name."""
        before, found, after = f".{name}.".rpartition(f"{self.large}.")
        return tuple(f"{before}{words}.{after}".strip(".") for words in self.small) if found else ()


@dataclass(frozen=True)
class Conversions:
    """`renamed` gives a name as it is in memory, `fusions` are by the names that are left then."""

    renamed: Callable[[str], str]
    fusions: tuple[Fusion, ...]


NOTHING = Conversions(lambda name: name, ())


def conversions(config: Mapping[str, Any] | None) -> Conversions:
    """What is known of a model with this config.json; NOTHING without transformers or an entry of its tables."""
    kinds = _kinds(config or {})
    if not kinds:
        return NOTHING
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        return _conversions([each for kind in kinds for each in get_checkpoint_conversion_mapping(kind) or []])
    except (ImportError, AttributeError, TypeError, ValueError):
        return NOTHING


def every_conversion() -> Iterable[Conversions]:
    """All of the tables, whatever model they are for; none without transformers."""
    try:
        from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

        tables = [_conversions(transforms) for transforms in _build_checkpoint_conversion_mapping().values()]
    except (ImportError, AttributeError, TypeError, ValueError):
        return
    yield from tables


def _conversions(transforms: Sequence[Any]) -> Conversions:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    fusions = [_fusion(each) for each in transforms if isinstance(each, WeightConverter)]

    def renamed(name: str) -> str:
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    return Conversions(renamed, tuple(fusion for fusion in fusions if fusion))


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """The model types of the config and of its parts."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return list(dict.fromkeys(part["model_type"] for part in parts if isinstance(part.get("model_type"), str)))


PLAIN = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)], [("Concatenate", 0)], [("Chunk", 0)])
"""The operations that move no bytes: experts stacked, their matrices on top of each other, rows joined or cut."""


def _fusion(converter: Any) -> Fusion | None:
    """`experts.*.w1.weight`, `experts.*.w3.weight` -> `experts.gate_up_proj`, or the way back."""
    sides = [
        tuple(pattern.replace("\\.", ".").strip("^$") for pattern in side)
        for side in (converter.source_patterns, converter.target_patterns)
    ]
    large, small = sorted(sides, key=lambda side: (len(side), "*" in side[0]))
    if len(large) > 1:
        return None
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    plain = done in PLAIN
    return Fusion(large[0], small, "" if plain else CHANGED, sure=plain)
