"""Experts in one tensor or in one each: the same bytes, cut or put together without moving any.

transformers 5 holds a layer's experts as `experts.gate_up_proj` [E, 2·I, H] and `experts.down_proj` [E, H, I], files
of the hub have `experts.7.gate_proj.weight` [I, H], `up_proj` and `down_proj` for each. Row-major, the large tensor is
the small ones one after the other: expert by expert and, in each, in the order in which its name says them. So a small
one is a span of the large one's file, and a large one a list of spans. What may be transposed as well (a matrix as wide
as it is high) cannot be told from its shape, and is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ggez_merge.checkpoint import Tensor, joined, span
from ggez_merge.conversions import NOTHING, Conversions
from ggez_merge.names import Rule

Split = dict[str, dict[str, dict[int, Tensor]]]  # "layers.0.mlp.experts" -> "gate_proj.weight" -> number -> tensor


@dataclass(frozen=True)
class Refitted:
    """Their tensors, cut or put together where ours are, and the rules of that."""

    tensors: dict[str, Tensor]
    rules: tuple[Rule, ...]


def refit(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], known: Conversions = NOTHING) -> Refitted:
    """Bring their experts to our form, where only that is different. Names are ours already, as far as they go."""
    only_ours = {known.renamed(name): name for name in ours if name not in theirs}
    only_theirs = {known.renamed(name): name for name in theirs if name not in ours}
    tensors = dict(theirs)
    counted: Counter[tuple[str, str]] = Counter()
    for fused, pieces in _matches(_of(theirs, only_theirs), _of(ours, only_ours), known.fused):
        large = tensors.pop(only_theirs[fused])
        at = 0
        for name, piece in pieces.items():
            tensors[only_ours[name]] = span(large, at, piece.shape)
            at += piece.numel
        counted[folded([only_theirs[fused]]), folded(only_ours[name] for name in pieces)] += len(pieces)
    for fused, pieces in _matches(_of(ours, only_ours), _of(theirs, only_theirs), known.fused):
        if len({piece.dtype for piece in pieces.values()}) > 1:
            continue
        for name in pieces:
            del tensors[only_theirs[name]]
        first, *_ = parts = list(pieces.values())
        tensors[only_ours[fused]] = joined(first, ours[only_ours[fused]].shape, parts)
        counted[folded(only_theirs[name] for name in pieces), folded([only_ours[fused]])] += len(pieces)
    return Refitted(tensors, tuple(Rule(a, b, n, whole=True) for (a, b), n in counted.items()))


def _of(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {known: tensors[name] for known, name in names.items()}


def _matches(
    large: Mapping[str, Tensor], small: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """Each of the large tensors that small ones make up, with these in the order of their bytes."""
    split: Split = {}
    for name, tensor in small.items():
        words = name.rsplit(".", 3)
        if len(words) == 4 and words[1].isdecimal():
            split.setdefault(words[0], {}).setdefault(".".join(words[2:]), {})[int(words[1])] = tensor
    names = {id(tensor): name for name, tensor in small.items()}
    for name, tensor in large.items():
        parent, _, leaf = name.rpartition(".")
        columns = [split[parent][stem] for stem in _stems(leaf, split.get(parent, {}), fused.get(leaf, ()))]
        if columns and _fit(tensor, columns):
            yield name, {names[id(column[e])]: column[e] for e in range(tensor.shape[0]) for column in columns}


def _stems(leaf: str, stems: Iterable[str], order: Sequence[str]) -> list[str]:
    """`gate_up_proj` -> gate_proj.weight, up_proj.weight; else in a known order; for anything else nothing."""
    known = {stem.removesuffix(".weight"): stem for stem in stems if stem.endswith(".weight")}
    if leaf in known:
        return [known[leaf]]
    for first, stem in known.items():
        word, _, kind = first.rpartition("_")
        for second in known:
            if word and second.endswith(f"_{kind}") and f"{word}_{second}" == leaf:
                return [stem, known[second]]
    return [known[word] for word in order] if all(word in known for word in order) else []


def _fit(large: Tensor, columns: list[dict[int, Tensor]]) -> bool:
    """Whether [E, rows, width] is E times the matrices on top of each other, and could not be them on their sides."""
    if len(large.shape) != 3 or large.shape[1] == large.shape[2]:
        return False
    n, rows, width = large.shape
    if any(column.keys() != set(range(n)) for column in columns):
        return False
    shapes = [{tensor.shape for tensor in column.values()} for column in columns]
    if any(len(of) > 1 or len(next(iter(of), ())) != 2 for of in shapes):
        return False
    matrices = [next(iter(of)) for of in shapes]
    return all(shape[1] == width for shape in matrices) and sum(shape[0] for shape in matrices) == rows


def folded(names: Iterable[str]) -> str:
    """One pattern for them all: numbers as *, and where they differ otherwise, what they have."""
    patterns = [["*" if word.isdecimal() else word for word in name.split(".")] for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*patterns, strict=True)]
    return ".".join(words[0] if len(words) == 1 else f"({', '.join(words)})" for words in columns)
