"""Weights in one tensor or in several: the same bytes, cut or put together without moving any.

Attention has its projections as `attn.qkv.weight`, or as `q_proj.weight`, `k_proj.weight` and `v_proj.weight`; an MLP
has `gate_up_proj.weight`, or `gate_proj.weight` and `up_proj.weight`; a layer's experts are `experts.gate_up_proj`
[E, 2·I, H] and `experts.down_proj` [E, H, I], or `experts.7.gate_proj.weight` [I, H] and its likes for each. Row-major,
the large tensor is the small ones one after the other, in the order that its name spells, and expert by expert. So a
small one is a span of the large one's file, and a large one a list of spans.

This is so for the names below, and for what transformers' tables call a concatenation and nothing more. Where rows may
go head by head, or a matrix may lie on its side, names and shapes cannot tell: it is left as it is, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ggez_merge.checkpoint import Tensor, joined, span
from ggez_merge.conversions import NOTHING, Conversions, Fusion
from ggez_merge.names import Rule

Tensors = Mapping[str, Tensor]

SPELLINGS = (".{}_proj", ".to_{}", ".{}")
FULL = {"q": "query", "k": "key", "v": "value"}

PARTS = {
    **dict.fromkeys(("qkv", "qkv_proj", "to_qkv", "Wqkv"), "qkv"),
    **dict.fromkeys(("kv", "kv_proj", "to_kv", "Wkv"), "kv"),
}
"""The last word of a fused tensor and what it spells, first rows first."""

DOUBTFUL = {
    "query_key_value": "its rows go head by head in some models (GPT-NeoX, BLOOM, Falcon), by parts in others",
    "wqkv": "its rows go by groups of heads in some models (InternLM2), by parts in others",
    "linear_qkv": "its rows go by groups of heads (Megatron)",
    "c_attn": "it lies on its side in some models (GPT-2), and its rows go head by head in others (GPT-BigCode)",
}
"""Last words of tensors that hold q, k and v in an order that no name tells."""

ON_ITS_SIDE = "its matrices may lie on their sides, [in, out] for [out, in]"
NOT_BY_ROWS = "its rows are not theirs one after the other"
SEVERAL_DTYPES = "its parts have several dtypes"


def _attention(parts: str) -> list[tuple[str, ...]]:
    """What the parts are called where each is a tensor of its own."""
    return [tuple(way.format(part) for part in parts) for way in SPELLINGS] + [
        tuple(f".{FULL[part]}" for part in parts)
    ]


CONVENTIONS = (
    *(Fusion(f".{word}", small) for word, parts in PARTS.items() for small in _attention(parts)),
    # torch.nn.MultiheadAttention; `in_proj.weight` may be anything
    *(
        Fusion(f".in_proj_{kind}", tuple(f"{part}.{kind}" for part in small))
        for kind in ("weight", "bias")
        for small in _attention("qkv")
    ),
    Fusion(".gate_up_proj", (".gate_proj", ".up_proj")),
    *(Fusion(f".{word}", small, doubt) for word, doubt in DOUBTFUL.items() for small in _attention("qkv")),
)


@dataclass(frozen=True)
class Unclear:
    """`n` fused tensors that hold the same weights as others' parts, in a form that `reason` leaves open."""

    theirs: str
    ours: str
    reason: str
    n: int


@dataclass(frozen=True)
class Refitted:
    """Their tensors, cut or put together where ours are, the rules of that, and what could not be told."""

    tensors: dict[str, Tensor]
    rules: tuple[Rule, ...]
    unclear: tuple[Unclear, ...]


def refit(ours: Tensors, theirs: Tensors, known: Conversions = NOTHING) -> Refitted:
    """Bring their weights to our form, where only that is different. Names are ours already, as far as they go."""
    only_ours = {known.renamed(name): name for name in ours if name not in theirs}
    only_theirs = {known.renamed(name): name for name in theirs if name not in ours}
    tensors = dict(theirs)
    counted: Counter[tuple[str, str]] = Counter()
    doubts: Counter[tuple[str, str, str]] = Counter()
    for fused, pieces, reason in _matches(_of(theirs, only_theirs), _of(ours, only_ours), known):
        own, names = only_theirs[fused], [only_ours[piece] for piece in pieces]
        if reason:
            doubts[folded([own]), folded(names), reason] += 1
            continue
        large = tensors.pop(own)
        at = 0
        for name in names:
            tensors[name] = span(large, at, ours[name].shape)
            at += ours[name].numel
        counted[folded([own]), folded(names)] += len(names)
    for fused, pieces, reason in _matches(_of(ours, only_ours), _of(theirs, only_theirs), known):
        name, own_names = only_ours[fused], [only_theirs[piece] for piece in pieces]
        parts = [theirs[own] for own in own_names]
        reason = reason or (SEVERAL_DTYPES if len({part.dtype for part in parts}) > 1 else "")
        if reason:
            doubts[folded(own_names), folded([name]), reason] += 1
            continue
        for own in own_names:
            del tensors[own]
        tensors[name] = joined(parts[0], ours[name].shape, parts)
        counted[folded(own_names), folded([name])] += len(parts)
    return Refitted(
        tensors,
        tuple(Rule(a, b, n, whole=True) for (a, b), n in counted.items()),
        tuple(Unclear(*said, n) for said, n in doubts.items()),
    )


def of_another(fusions: Iterable[Fusion]) -> tuple[Fusion, ...]:
    """What one model's table says of fused tensors, for a model that may be another: where names tell, they do."""
    doubts = {fusion: [DOUBTFUL[word] for word in fusion.large.split(".") if word in DOUBTFUL] for fusion in fusions}
    return tuple(replace(fusion, sure=False, doubt=fusion.doubt or "".join(said)) for fusion, said in doubts.items())


def _of(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {known: tensors[name] for known, name in names.items()}


def _matches(large: Tensors, small: Tensors, known: Conversions) -> Iterable[tuple[str, list[str], str]]:
    """Each of the large tensors that small ones make up: these in the order of their bytes, and why that is unclear."""
    for name, tensor in large.items():
        for fusion in (*known.fusions, *CONVENTIONS, *_experts(name)):
            pieces = _pieces(fusion.parts(name), tensor.shape, small)
            if pieces and sum(small[piece].numel for piece in pieces) == tensor.numel:
                shapes = [small[piece].shape for piece in pieces]
                yield name, pieces, fusion.doubt or _misfit(tensor.shape, shapes, fusion)
                break


def _experts(name: str) -> Iterable[Fusion]:
    """`experts.down_proj` stacks `experts.*.down_proj.weight`, `gate_up_proj` gate_proj and up_proj on each other."""
    last = name.rpartition(".")[2]
    words = last.split("_")
    yield Fusion(f".{last}", (f".*.{last}.weight",))
    for at in range(1, len(words) - 1):
        pair = "_".join((*words[:at], words[-1])), "_".join(words[at:])
        yield Fusion(f".{last}", tuple(f".*.{word}.weight" for word in pair))


def _pieces(stems: Sequence[str], shape: tuple[int, ...], small: Tensors) -> list[str]:
    """The names of all parts, * being the number of an expert; none if one is missing or there are more experts."""
    if not any("*" in stem for stem in stems):
        return list(stems) if all(stem in small for stem in stems) else []
    n = shape[0] if len(shape) == 3 else 0
    if n * len(stems) > len(small) or any(stem.replace("*", str(n)) in small for stem in stems):
        return []
    names = [stem.replace("*", str(number)) for number in range(n) for stem in stems]
    return names if all(name in small for name in names) else []


def _misfit(large: tuple[int, ...], small: list[tuple[int, ...]], fusion: Fusion) -> str:
    """Why the small shapes on top of each other are not the large one, or could be it on their sides; else nothing."""
    if "*" not in fusion.small[0]:
        by_rows = all(shape[1:] == large[1:] for shape in small) and sum(shape[0] for shape in small) == large[0]
        return "" if by_rows else NOT_BY_ROWS
    n, rows, width = large
    of_one = small[: len(fusion.small)]
    fit = all(len(shape) == 2 and shape[1] == width for shape in of_one) and sum(shape[0] for shape in of_one) == rows
    return "" if fit and small == of_one * n and (rows != width or fusion.sure) else ON_ITS_SIDE


def folded(names: Iterable[str]) -> str:
    """One pattern for them all: numbers as *, and where they differ otherwise, what they have."""
    patterns = [["*" if word.isdecimal() else word for word in name.split(".")] for name in names]
    if len({len(pattern) for pattern in patterns}) > 1:
        return ", ".join(dict.fromkeys(".".join(pattern) for pattern in patterns))
    columns = [list(dict.fromkeys(column)) for column in zip(*patterns, strict=True)]
    return ".".join(words[0] if len(words) == 1 else f"({', '.join(words)})" for words in columns)
