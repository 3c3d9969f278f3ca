"""One name for one tensor: how a model's names read in the base's layout, found from the two tables of tensors alone.

Checkpoints of one architecture differ in where its parts hang, not in what is inside them: transformers < 4.52 and
the hub have `visual.*` and `language_model.model.*` where later versions hold `model.visual.*` and
`model.language_model.*`, DDP puts `module.` before everything, torch.compile `_orig_mod.`, FSDP a wrapper around every
layer, and a part may have been saved alone. So names are compared from their ends: two names that end alike differ by
a *rule*, "this prefix here is that prefix there", and one true rule explains many tensors of equal shapes, where a
false one, such as a text layer taken for a vision layer, explains few. Nothing here knows any architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ggez_merge.components import component

Shapes = Mapping[str, tuple[int, ...]]
"""A checkpoint as this file sees it: name -> shape, in the checkpoint's order."""

Words = tuple[str, ...]
Numbers = tuple[str, ...]

Patterns = Mapping[Words, Mapping[Numbers, tuple[int, ...]]]
"""A table folded: the words of a name, numbers as *, and by those numbers the shapes."""

SURE = 3
"""This many patterns (`layers.*.mlp.up_proj.weight` is one) make a rule credible without a look at its words."""


@dataclass(frozen=True)
class Rule:
    """`theirs.X` is called `ours.X` for `n` tensors; an empty prefix is none, and * stands for a layer's number."""

    theirs: str
    ours: str
    n: int

    def __str__(self) -> str:
        tensors = "tensor" if self.n == 1 else "tensors"
        if self.theirs == self.ours:
            return f"{self.n} {tensors} of the same name"
        return f"{_starred(self.theirs)} ↔ {_starred(self.ours)}: {self.n} {tensors}"


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


def match(ours: Shapes, theirs: Shapes) -> Match:
    """Their names in our layout."""
    if all(name in ours for name in theirs) or all(name in theirs for name in ours):
        return Match({name: name for name in theirs})
    search = _Search(_patterns(ours), _patterns(theirs))
    search.run(exact=True)
    search.run(exact=False)  # a vocabulary that was resized is a problem of its shape, not of its name
    rules = [rule for prefixes in search.found for rule in search.rules(*prefixes)]
    renamed: dict[str, str] = {}
    for name in theirs:
        words, numbers = _pattern(name)
        target = search.taken.get(words)
        renamed[name] = _filled(target, numbers) if target else _by_prefix(name, words, numbers, rules)
    doubles = {name for name, count in Counter(renamed.values()).items() if count > 1}
    doubled = {name: [own for own in theirs if renamed[own] == name] for name in doubles}
    return Match(renamed, tuple(rules), tuple(search.ambiguous), doubled)


def grouped(names: Iterable[str], most: int = 6) -> str:
    """Names by what they have in common, for people: "model.visual.blocks.* (384), model.visual.merger.* (6)"."""
    found: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        number = next((at for at, word in enumerate(words) if word.isdecimal()), None)
        found.setdefault(".".join(words[: max(1, len(words) - 2) if number is None else number]), []).append(name)
    said = [own[0] if len(own) == 1 else f"{stem}.* ({len(own)})" for stem, own in found.items()]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more groups" if len(said) > most else "")


class _Search:
    """Takes the rule that explains most, then the one that explains most of what is left, and so on."""

    def __init__(self, ours: Patterns, theirs: Patterns) -> None:
        self.ours = ours
        self.theirs = theirs
        self.taken: dict[Words, Words] = {}  # their pattern -> ours
        self.given: set[Words] = set()  # our patterns that are some pattern's already
        self.found: dict[tuple[Words, Words], list[Words]] = {}  # rule -> their patterns
        self.ambiguous: list[tuple[Rule, Rule]] = []

    def run(self, exact: bool) -> None:
        """Add rules until no credible one is left; `exact` asks for equal shapes, else for as many axes."""
        candidates = self._candidates(exact)
        while not self.ambiguous:
            scores: dict[tuple[Words, Words], tuple[int, int]] = {}
            for rule, pairs in candidates.items():
                open_pairs = [pair for pair in pairs if pair[0] not in self.taken and pair[1] not in self.given]
                if open_pairs and self._credible(rule, open_pairs):
                    scores[rule] = (sum(self._common(*pair) for pair in open_pairs), _shared(*rule))
                candidates[rule] = open_pairs
            if not scores:
                return
            best = max(scores, key=scores.__getitem__)
            sides = [{pair[side] for pair in candidates[best]} for side in (0, 1)]
            for rival, score in scores.items():
                overlaps = any(pair[0] in sides[0] or pair[1] in sides[1] for pair in candidates[rival])
                if rival != best and score == scores[best] and overlaps:
                    both = (Rule(_text(theirs), _text(ours), scores[best][0]) for theirs, ours in (best, rival))
                    self.ambiguous.append((next(both), next(both)))
            if self.ambiguous:
                return
            for their_words, our_words in candidates[best]:
                self.taken[their_words] = our_words
                self.given.add(our_words)
                self.found.setdefault(best, []).append(their_words)

    def rules(self, theirs: Words, ours: Words) -> Iterable[Rule]:
        """The rule as people see it: with the words that all its tensors go on with, one for each part of the model
        if others under the same prefix follow another rule."""
        members = self.found[theirs, ours]
        shared = any(words not in members and words[: len(theirs)] == theirs for words in self.taken)
        parts: dict[Words, list[Words]] = {}
        for words in members:
            parts.setdefault(words[len(theirs) : len(theirs) + 1] if shared and theirs != ours else (), []).append(
                words
            )
        for members in parts.values():
            lead = _lead([words[len(theirs) : -1] for words in members])
            n = sum(self._common(words, self.taken[words]) for words in members)
            yield Rule(_text(theirs + lead), _text(ours + lead), n)

    def _candidates(self, exact: bool) -> dict[tuple[Words, Words], list[tuple[Words, Words]]]:
        ending: dict[tuple[str, int], list[Words]] = {}
        for words in self.ours:
            if words not in self.given:
                ending.setdefault((words[-1], words.count("*")), []).append(words)
        found: dict[tuple[Words, Words], list[tuple[Words, Words]]] = {}
        for their_words in self.theirs:
            if their_words in self.taken:
                continue
            for our_words in ending.get((their_words[-1], their_words.count("*")), ()):
                if self._agree(their_words, our_words, exact):
                    rule = _difference(their_words, our_words)
                    if _contained(*rule) or self._same_part(their_words, our_words):
                        found.setdefault(rule, []).append((their_words, our_words))
        return found

    def _agree(self, their_words: Words, our_words: Words, exact: bool) -> bool:
        """Whether the layers that both have are of one shape, and there is one."""
        theirs, ours = self.theirs[their_words], self.ours[our_words]
        common = [(shape, ours[numbers]) for numbers, shape in theirs.items() if numbers in ours]
        return bool(common) and all(a == b if exact else len(a) == len(b) for a, b in common)

    def _common(self, their_words: Words, our_words: Words) -> int:
        return len(self.theirs[their_words].keys() & self.ours[our_words].keys())

    def _same_part(self, their_words: Words, our_words: Words) -> bool:
        return component(_text(their_words).replace("*", "0")) == component(_text(our_words).replace("*", "0"))

    def _credible(self, rule: tuple[Words, Words], pairs: list[tuple[Words, Words]]) -> bool:
        """A rule of few patterns must only add or drop words, and leave each tensor in its part of the model."""
        return len(pairs) >= SURE or (_contained(*rule) and all(self._same_part(*pair) for pair in pairs))


def _pattern(name: str) -> tuple[Words, Numbers]:
    """`layers.7.norm.weight` -> (layers, *, norm, weight) and (7,)."""
    words = name.split(".")
    numbered = [word.isdecimal() for word in words]
    return (
        tuple("*" if number else word for word, number in zip(words, numbered, strict=True)),
        tuple(word for word, number in zip(words, numbered, strict=True) if number),
    )


def _patterns(shapes: Shapes) -> Patterns:
    found: dict[Words, dict[Numbers, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        words, numbers = _pattern(name)
        found.setdefault(words, {})[numbers] = shape
    return found


def _difference(theirs: Words, ours: Words) -> tuple[Words, Words]:
    """What is left of both when the longest common end is cut off."""
    n = 0
    while n < min(len(theirs), len(ours)) and theirs[-1 - n] == ours[-1 - n]:
        n += 1
    return theirs[: len(theirs) - n], ours[: len(ours) - n]


def _shared(theirs: Words, ours: Words) -> int:
    return (Counter(theirs) & Counter(ours)).total()


def _contained(theirs: Words, ours: Words) -> bool:
    """Whether one prefix only adds words to the other, or puts them in another order."""
    return _shared(theirs, ours) == min(len(theirs), len(ours))


def _lead(suffixes: list[Words]) -> Words:
    """The words that all begin with."""
    first, last = min(suffixes), max(suffixes)
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return first[:n]


def _by_prefix(name: str, words: Words, numbers: Numbers, rules: list[Rule]) -> str:
    """The name by the most specific rule whose prefix it has, for a tensor that only they have."""
    fitting = [rule for rule in rules if rule.theirs and words[: rule.theirs.count(".") + 1] == _words(rule.theirs)]
    if not fitting:
        return name
    rule = max(fitting, key=lambda rule: rule.theirs.count("."))
    return _filled(_words(rule.ours) + words[len(_words(rule.theirs)) :], numbers)


def _filled(words: Words, numbers: Numbers) -> str:
    """The pattern with its numbers put back."""
    left = iter(numbers)
    return ".".join(next(left) if word == "*" else word for word in words)


def _words(text: str) -> Words:
    return tuple(text.split(".")) if text else ()


def _text(words: Words) -> str:
    return ".".join(words)


def _starred(prefix: str) -> str:
    return f"{prefix}.*" if prefix else "*"
