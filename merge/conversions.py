"""What transformers knows of a model's older names: its own conversion tables, called where it is installed.

Only asked when the tables of tensors leave something open on both sides, for its import takes seconds. transformers 5
renames and fuses weights on load by these tables (transformers/conversion_mapping.py); they are not a public interface,
so whatever is not as expected here means that nothing is known, and what is open stays open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversions:
    """`renamed` gives a name as it is in memory, `fused` by the last word of a fused tensor its parts in order."""

    renamed: Callable[[str], str]
    fused: Mapping[str, tuple[str, ...]]


NOTHING = Conversions(lambda name: name, {})


def conversions(config: Mapping[str, Any] | None) -> Conversions:
    """What is known of a model with this config.json; NOTHING without transformers or an entry of its tables."""
    kinds = _kinds(config or {})
    if not kinds:
        return NOTHING
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = [each for kind in kinds for each in get_checkpoint_conversion_mapping(kind) or []]
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        fusions = [_fusion(each) for each in transforms if isinstance(each, WeightConverter)]
    except (ImportError, AttributeError, TypeError, ValueError):
        return NOTHING

    def renamed(name: str) -> str:
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    return Conversions(renamed, dict(fusion for fusion in fusions if fusion))


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """The model types of the config and of its parts."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return list(dict.fromkeys(part["model_type"] for part in parts if isinstance(part.get("model_type"), str)))


def _fusion(converter: Any) -> tuple[str, tuple[str, ...]] | None:
    """`experts.*.w1.weight`, `experts.*.w3.weight` -> `experts.gate_up_proj`: ("gate_up_proj", ("w1", "w3")).

    Only where experts are stacked and their matrices put on top of each other: what moves no bytes.
    """
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    if len(converter.target_patterns) > 1 or done not in (
        [("MergeModulelist", 0)],
        [("MergeModulelist", 0), ("Concatenate", 1)],
    ):
        return None
    sources = [source.rstrip("$").removesuffix(".weight") for source in converter.source_patterns]
    return converter.target_patterns[0].rpartition(".")[2], tuple(source.rpartition(".")[2] for source in sources)
