"""One name for one tensor: how a model's names read in the base's layout, found from the two tables of tensors alone.

Checkpoints of one architecture differ in where its parts hang, not in what is inside them: transformers < 4.52 and
the hub have `visual.*` and `language_model.model.*` where later versions hold `model.visual.*` and
`model.language_model.*`, DDP puts `module.` before everything, torch.compile `_orig_mod.`, FSDP a wrapper around every
layer, and a part may have been saved alone. So names are compared from their ends: two names that end alike differ by
a *rule*, "this prefix here is that prefix there", and one true rule explains many tensors of equal shapes, where a
false one, such as a text layer taken for a vision layer, explains few. Nothing here knows any architecture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""A checkpoint as this file sees it: name -> shape, in the checkpoint's order."""

Words = tuple[str, ...]
Numbers = tuple[str, ...]

Prefixes = tuple[Words, Words]
Patterns = Mapping[Words, Mapping[Numbers, Shape]]
"""A table folded: the words of a name, numbers as *, and by those numbers the shapes."""

Part = Callable[[str], str | None]
"""A second opinion: which part of the model a name surely belongs to, None if the name alone does not tell."""

SURE = 3
"""This many patterns (`layers.*.mlp.up_proj.weight` is one) make a rule credible without a look at its words."""


@dataclass(frozen=True)
class Rule:
    """`theirs.X` is called `ours.X` for `n` tensors; an empty prefix is none, and * stands for a layer's number.

    A rule of one pattern has the `whole` of it, with nothing to follow.
    """

    theirs: str
    ours: str
    n: int
    whole: bool = False

    def __str__(self) -> str:
        tensors = "tensor" if self.n == 1 else "tensors"
        if self.theirs == self.ours:
            return f"{self.n} {tensors} of the same name"
        rest = "" if self.whole else ".*"
        return f"{(self.theirs + rest).lstrip('.')} ↔ {(self.ours + rest).lstrip('.')}: {self.n} {tensors}"


@dataclass(frozen=True)
class Match:
    """What was found.

    `canonical` has each of their names, in their order, with what it is in our layout; a name that no rule reaches
    stays as it is. `ambiguous` are pairs of rules that fit equally well, where nothing was decided, and `doubled`
    our names that two of theirs stand for: with either, `canonical` must not be used.
    """

    canonical: dict[str, str]
    rules: tuple[Rule, ...] = ()
    ambiguous: tuple[tuple[Rule, Rule], ...] = ()
    doubled: dict[str, list[str]] = field(default_factory=dict)


def match(ours: Shapes, theirs: Shapes, part: Part) -> Match:
    """Their names in our layout."""
    if all(name in ours for name in theirs) or all(name in theirs for name in ours):
        return Match({name: name for name in theirs})
    search = _Search(_patterns(ours), _patterns(theirs), part)
    search.run(exact=True)
    search.run(exact=False)  # a vocabulary that was resized is a problem of its shape, not of its name
    rules = search.rules()
    renamed: dict[str, str] = {}
    for name in theirs:
        words, numbers = _pattern(name)
        renamed[name] = _filled(search.taken.get(words) or _by_prefix(words, rules), numbers)
    wrappers = {".".join((*words, "")) for words in search.wrappers if words}
    for rule, names in _sequences(ours, theirs, renamed, lambda name: part(_unwrapped(name, wrappers))):
        rules.append(rule)
        renamed.update(names)
    doubles = {name for name, count in Counter(renamed.values()).items() if count > 1}
    doubled = {name: [own for own in theirs if renamed[own] == name] for name in doubles}
    return Match(renamed, tuple(rules), tuple(search.ambiguous), doubled)


def explained(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules that say of which of their names which is ours."""
    patterns: Counter[tuple[Words, Words]] = Counter()
    for theirs, ours in names.items():
        (left, numbers), (right, others) = _pattern(theirs), _pattern(ours)
        patterns[(left, right) if numbers == others else (_words(theirs), _words(ours))] += 1
    pairs: dict[Prefixes, list[_Pair]] = {}
    for (left, right), n in patterns.items():
        pairs.setdefault(_difference(left, right), []).append(_Pair(left, right, n))
    return tuple(_rule(prefixes, members) for prefixes, members in pairs.items())


def grouped(names: Iterable[str], most: int = 6) -> str:
    """Names by what they have in common, for people: "model.visual.blocks.* (384), model.visual.merger.* (6)"."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        number = next((at for at, word in enumerate(words) if word.isdecimal()), None)
        found.setdefault(".".join(words[: max(1, len(words) - 2) if number is None else number]), []).append(name)
    said = [own[0] if len(own) == 1 else f"{stem}.* ({len(own)})" for stem, own in found.items()]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more groups" if len(said) > most else "")


class _Pair(NamedTuple):
    """A pattern of theirs that may be one of ours, and how many tensors that pairs."""

    theirs: Words
    ours: Words
    n: int


class _Search:
    """Takes the rule that explains most, then the one that explains most of what is left, and so on."""

    def __init__(self, ours: Patterns, theirs: Patterns, part: Part) -> None:
        self.ours = ours
        self.theirs = theirs
        self.part = part
        self.wrappers = _wrapper(theirs, ours), _wrapper(ours, theirs)
        self.taken: dict[Words, Words] = {}  # their pattern -> ours
        self.given: set[Words] = set()  # our patterns that are some pattern's already
        self.found: dict[Prefixes, list[_Pair]] = {}
        self.ambiguous: list[tuple[Rule, Rule]] = []

    def run(self, exact: bool) -> None:
        """Add rules until no credible one is left; `exact` asks for equal shapes, else for as many axes."""
        candidates = self._candidates(exact)
        while True:
            candidates = {prefixes: self._open(pairs) for prefixes, pairs in candidates.items()}
            scores = {
                prefixes: (sum(pair.n for pair in pairs), _shared(*prefixes))
                for prefixes, pairs in candidates.items()
                if pairs and self._credible(prefixes, pairs)
            }
            if not scores:
                return
            best = max(scores, key=scores.__getitem__)
            rivals = [
                prefixes
                for prefixes, score in scores.items()
                if prefixes != best and score == scores[best] and _overlap(candidates[prefixes], candidates[best])
            ]
            if rivals:
                if exact:  # what has other shapes is refused anyhow
                    self.ambiguous += [(_rule(best, candidates[best]), _rule(x, candidates[x])) for x in rivals]
                return
            for pair in candidates[best]:
                self.taken[pair.theirs] = pair.ours
                self.given.add(pair.ours)
                self.found.setdefault(best, []).append(pair)

    def rules(self) -> list[Rule]:
        """The rules as people see them, in our order: one a subtree where others begin alike."""
        said: list[tuple[int, Rule]] = []
        order = {words: at for at, words in enumerate(self.ours)}
        for prefixes, pairs in self.found.items():
            depth = len(prefixes[0])
            members = {pair.theirs for pair in pairs}
            mixed = any(words[:depth] == prefixes[0] and words not in members for words in self.taken)
            subtrees: dict[Words, list[_Pair]] = {}
            for pair in pairs:
                split = mixed and prefixes[0] != prefixes[1]
                subtrees.setdefault(pair.theirs[depth : depth + 1] if split else (), []).append(pair)
            for subtree in subtrees.values():
                said.append((min(order[pair.ours] for pair in subtree), _rule(prefixes, subtree)))
        return [rule for _, rule in sorted(said, key=lambda at_and_rule: at_and_rule[0])]

    def _open(self, pairs: Iterable[_Pair]) -> list[_Pair]:
        return [pair for pair in pairs if pair.theirs not in self.taken and pair.ours not in self.given]

    def _candidates(self, exact: bool) -> dict[Prefixes, list[_Pair]]:
        ending: dict[tuple[str, int], list[Words]] = {}
        for ours in self.ours:
            if ours not in self.given:
                ending.setdefault((ours[-1], ours.count("*")), []).append(ours)
        found: dict[Prefixes, list[_Pair]] = {}
        for theirs in self.theirs:
            if theirs in self.taken:
                continue
            for ours in ending.get((theirs[-1], theirs.count("*")), ()):
                n = _agreeing(self.theirs[theirs], self.ours[ours], exact)
                prefixes = _difference(theirs, ours)
                if n and self._possible(theirs, ours, prefixes):
                    found.setdefault(prefixes, []).append(_Pair(theirs, ours, n))
        return found

    def _possible(self, theirs: Words, ours: Words, prefixes: Prefixes) -> bool:
        """One prefix only adds words to the other, or both names tell of the same part of the model."""
        return _contained(*prefixes) or (
            self._same_part(theirs, ours)
            and (_contained(*self._unwrapped(prefixes)) or self.part(_plain(ours)) is not None)
        )

    def _credible(self, prefixes: Prefixes, pairs: list[_Pair]) -> bool:
        """A rule of few patterns must only add or drop words, wrappers aside, and leave each tensor in its part."""
        return len(pairs) >= SURE or (
            _contained(*self._unwrapped(prefixes)) and all(self._same_part(pair.theirs, pair.ours) for pair in pairs)
        )

    def _same_part(self, theirs: Words, ours: Words) -> bool:
        return self.part(_plain(theirs)) == self.part(_plain(ours))

    def _unwrapped(self, prefixes: Prefixes) -> Prefixes:
        """Without the words that a wrapper around everything put there."""
        theirs, ours = (
            words[len(lead) :] if words[: len(lead)] == lead else words
            for words, lead in zip(prefixes, self.wrappers, strict=True)
        )
        return theirs, ours


class _Module(NamedTuple):
    """A module by its last number (0 in `mlp.0`, 1 in `linear_1`), with the shapes and names of its tensors."""

    number: int
    name: str
    shapes: dict[str, Shape]
    tensors: dict[str, str]


def _unwrapped(name: str, wrappers: Iterable[str]) -> str:
    for wrapper in wrappers:
        name = name.removeprefix(wrapper)
    return name


def _sequences(
    ours: Shapes, theirs: Shapes, renamed: Mapping[str, str], part: Part
) -> Iterable[tuple[Rule, dict[str, str]]]:
    """Modules of one part that only their numbers order: `mlp.0`, `mlp.2` here are `linear_1`, `linear_2` there.

    For that, everything of the part that is left must be modules side by side, of the same kinds and shapes, as many
    here as there and several of a kind, in the order of their numbers. With the same words in them it is no matter of
    numbers.
    """
    given = set(renamed.values())
    open_ours = _modules({name: name for name in ours if name not in given}, ours, part)
    open_theirs = _modules({name: own for own, name in renamed.items() if name not in ours}, theirs, part)
    for of in open_ours.keys() & open_theirs.keys():
        left, right = open_theirs[of], open_ours[of]
        sizes = [len(modules) for modules in left.values()]
        homes, words = zip(*(_homes(kinds) for kinds in (left, right)), strict=True)
        if left.keys() != right.keys() or max(sizes) == 1 or max(map(len, homes)) > 1 or words[0] & words[1]:
            continue
        pairs = [pair for kind in left for pair in _in_order(left[kind], right[kind])]
        if len(pairs) == sum(sizes) and all(a.shapes == b.shapes for a, b in pairs):
            for a, b in pairs:
                rule = Rule(a.name, b.name, len(a.tensors))
                yield rule, {own: b.tensors[last] for last, own in a.tensors.items()}


Kind = tuple[tuple[str, int], ...]


def _modules(names: Mapping[str, str], shapes: Shapes, part: Part) -> dict[str, dict[Kind, list[_Module]]]:
    """The modules of tensors (canonical name -> own) by part and kind; a kind is how many axes each tensor has."""
    found: dict[tuple[str, str], _Module] = {}
    for name, own in names.items():
        of, (place, _, last) = part(name), own.rpartition(".")
        if of is not None:
            digits = re.search(r"[0-9]{0,9}$", place)
            number = int((digits and digits[0]) or -1)
            module = found.setdefault((of, place), _Module(number, place, {}, {}))
            module.shapes[last], module.tensors[last] = shapes[own], own
    sorted_: dict[str, dict[Kind, list[_Module]]] = {}
    for (of, _), module in found.items():
        kind = tuple(sorted((last, len(shape)) for last, shape in module.shapes.items()))
        sorted_.setdefault(of, {}).setdefault(kind, []).append(module)
    return sorted_


def _homes(kinds: Mapping[Kind, list[_Module]]) -> tuple[set[str], set[str]]:
    """Where modules lie, and their own words there."""
    split = [module.name.rpartition(".") for modules in kinds.values() for module in modules]
    return {place for place, _, _ in split}, {word for _, _, word in split}


def _in_order(left: list[_Module], right: list[_Module]) -> list[tuple[_Module, _Module]]:
    """Paired by number, where each has its own on its side; one alone needs none."""
    several = len(left) > 1
    unordered = any(len({m.number for m in side if m.number >= 0}) < len(side) for side in (left, right))
    if len(left) != len(right) or (several and unordered):
        return []
    return list(zip(*(sorted(side, key=lambda module: module.number) for side in (left, right)), strict=True))


def _plain(words: Words) -> str:
    return ".".join("0" if word == "*" else word for word in words)


def _contained(theirs: Words, ours: Words) -> bool:
    """Whether one prefix only adds words to the other, or puts them in another order."""
    return _shared(theirs, ours) == min(len(theirs), len(ours))


def _rule(prefixes: Prefixes, pairs: list[_Pair]) -> Rule:
    """With the words that all its tensors go on with, up to a number."""
    theirs, ours = prefixes
    whole = len(pairs) == 1 and theirs != ours
    lead = _lead([pair.theirs[len(theirs) : None if whole else -1] for pair in pairs])
    if not whole and "*" in lead:
        lead = lead[: lead.index("*")]
    return Rule(".".join(theirs + lead), ".".join(ours + lead), sum(pair.n for pair in pairs), whole)


def _overlap(pairs: list[_Pair], others: list[_Pair]) -> bool:
    theirs, ours = {pair.theirs for pair in others}, {pair.ours for pair in others}
    return any(pair.theirs in theirs or pair.ours in ours for pair in pairs)


def _agreeing(theirs: Mapping[Numbers, Shape], ours: Mapping[Numbers, Shape], exact: bool) -> int:
    """How many layers both have, if every one of them has the same shape in both; else 0."""
    common = [(shape, ours[numbers]) for numbers, shape in theirs.items() if numbers in ours]
    return len(common) if all(a == b if exact else len(a) == len(b) for a, b in common) else 0


def _pattern(name: str) -> tuple[Words, Numbers]:
    """`layers.7.norm.weight` -> (layers, *, norm, weight) and (7,)."""
    words = name.split(".")
    numbered = [word.isdecimal() for word in words]
    return (
        tuple("*" if number else word for word, number in zip(words, numbered, strict=True)),
        tuple(word for word, number in zip(words, numbered, strict=True) if number),
    )


def _patterns(shapes: Shapes) -> Patterns:
    found: dict[Words, dict[Numbers, Shape]] = {}
    for name, shape in shapes.items():
        words, numbers = _pattern(name)
        found.setdefault(words, {})[numbers] = shape
    return found


def _difference(theirs: Words, ours: Words) -> Prefixes:
    """What is left of both when the longest common end is cut off."""
    n = 0
    while n < min(len(theirs), len(ours)) and theirs[-1 - n] == ours[-1 - n]:
        n += 1
    return theirs[: len(theirs) - n], ours[: len(ours) - n]


def _shared(theirs: Words, ours: Words) -> int:
    return sum((Counter(theirs) & Counter(ours)).values())


def _wrapper(patterns: Patterns, others: Patterns) -> Words:
    """The first words of all names, as far as the other table never says them."""
    lead = _lead([words[:-1] for words in patterns]) if len(patterns) >= SURE else ()
    said = {word for words in others for word in words}
    return lead[: next((at for at, word in enumerate(lead) if word in said), len(lead))]


def _lead(suffixes: list[Words]) -> Words:
    """The words that all begin with."""
    first, last = min(suffixes), max(suffixes)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return first[:n]


def _by_prefix(words: Words, rules: Iterable[Rule]) -> Words:
    """The pattern by the most specific rule whose prefix it has, for a tensor that only they have."""
    prefixes = [(_words(rule.theirs), _words(rule.ours)) for rule in rules if rule.theirs and not rule.whole]
    fitting = [(theirs, ours) for theirs, ours in prefixes if words[: len(theirs)] == theirs]
    theirs, ours = max(fitting, key=lambda prefixes: len(prefixes[0]), default=((), ()))
    return ours + words[len(theirs) :]


def _filled(words: Words, numbers: Numbers) -> str:
    """The pattern with its numbers put back."""
    left = iter(numbers)
    return ".".join(next(left) if word == "*" else word for word in words)


def _words(text: str) -> Words:
    return tuple(text.split(".")) if text else ()
