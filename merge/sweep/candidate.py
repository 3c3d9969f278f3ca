"""One point of a sweep: the values that it puts in the recipe, or an endpoint that is no merge at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["base", "regional", "candidate"]
ROLES: tuple[Role, ...] = ("base", "regional", "candidate")


@dataclass(frozen=True)
class Candidate:
    """values: by the path of the parameter, in the order of the sweep's axes.

    role: "base" and "regional" are models as they were before merging, `model` says which. They have values where
    these stand for them (ratio 0 and 1), else none.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    role: Role = "candidate"
    model: str | None = None

    @property
    def order(self) -> tuple[int, tuple[float, ...], str]:
        """Smaller values first, axis by axis; before all the base, and at the end regional models, without values."""
        rank = 1 if self.values else {"base": 0, "candidate": 1, "regional": 2}[self.role]
        return rank, tuple(self.values.values()), self.model or ""

    def __str__(self) -> str:
        """ "ratio 0.1", "ratio 0 (base)", "regional ./sea"."""
        said = ", ".join(f"{path} {value:g}" for path, value in self.values.items())
        if self.role == "candidate":
            return said or "the recipe as it is"
        return f"{said} ({self.role})" if said else f"{self.role} {self.model}" if self.model else self.role
