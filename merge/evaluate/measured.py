"""What one task says about one model: a score, its parts by group, and the outcome of every item."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Item(NamedTuple):
    """One question put to the model. outcome: in units of the score, which is the mean of all outcomes.

    groups: what it belongs to, as "column=value". Two models are compared item by item, by `id`.
    """

    id: str
    outcome: float
    groups: tuple[str, ...] = ()


class Part(NamedTuple):
    """The score of a group: the mean outcome of its n items."""

    score: float
    n: int


@dataclass(frozen=True)
class Measured:
    """The result of one task for one model.

    score: in units of `scale`, the score of a perfect answer (100: percent); None: it has no such bound, as a loss.
    n: how many items; None: unknown. chance: the score of guessing, in the same units; None: unknown.
    stderr: the standard error that a foreign program reported. groups: "column=value" -> its part of the score.
    details: further figures by name, such as "R@5" or "unanswered".
    """

    name: str
    tag: str
    score: float
    n: int | None = None
    chance: float | None = None
    scale: float | None = None
    higher_is_better: bool = True
    stderr: float | None = None
    groups: Mapping[str, Part] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    items: tuple[Item, ...] = ()

    def __post_init__(self) -> None:
        numbers = [self.score, self.chance, self.scale, self.stderr, *self.details.values()]
        numbers += [item.outcome for item in self.items]
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"the results of {self.name} hold NaN or infinity")

    @property
    def percent(self) -> float | None:
        """100 * score / scale: what tasks of different scales share; None without a scale."""
        return 100 * self.score / self.scale if self.scale else None

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `from_json` makes the same result, to the last bit."""
        return {
            "name": self.name,
            "tag": self.tag,
            "score": self.score,
            "n": self.n,
            "chance": self.chance,
            "scale": self.scale,
            "higher_is_better": self.higher_is_better,
            "stderr": self.stderr,
            "groups": {name: list(part) for name, part in self.groups.items()},
            "details": dict(self.details),
            "items": [[item.id, item.outcome, list(item.groups)] for item in self.items],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measured:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for what it did not write."""
        rest = {
            key: data[key] for key in ("name", "tag", "score", "n", "chance", "scale", "higher_is_better", "stderr")
        }
        return Measured(
            **rest,
            groups={name: Part(float(score), int(n)) for name, (score, n) in data["groups"].items()},
            details=dict(data["details"]),
            items=tuple(Item(id, float(outcome), tuple(groups)) for id, outcome, groups in data["items"]),
        )

    def to_line(self) -> str:
        """One line of JSON, without its end."""
        return json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_line(line: str) -> Measured:
        return Measured.from_json(json.loads(line))


def of_items(
    name: str,
    tag: str,
    items: Sequence[Item],
    *,
    chance: float | None,
    scale: float | None,
    higher_is_better: bool = True,
    details: Mapping[str, float] | None = None,
) -> Measured:
    """The result that these items make: score = mean of outcomes, over all and in each group.

    Sums are exact before they are rounded once (`math.fsum`), so the order of items does not matter.
    """
    members: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for group in item.groups:
            members[group].append(item.outcome)
    return Measured(
        name=name,
        tag=tag,
        score=mean(item.outcome for item in items),
        n=len(items),
        chance=chance,
        scale=scale,
        higher_is_better=higher_is_better,
        groups={group: Part(mean(members[group]), len(members[group])) for group in sorted(members)},
        details=details or {},
        items=tuple(items),
    )


def mean(numbers: Iterable[float]) -> float:
    """The mean of at least one number, independent of their order."""
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def percent(shares: Iterable[float]) -> float:
    """The mean of shares from 0 to 1, in percent: the same number, to the last bit, as the mean of percentages."""
    return mean(100.0 * share for share in shares)
