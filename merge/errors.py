"""What is wrong, said once and completely: the two exceptions a user ever sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ggez_merge.untrusted import escaped


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way.

    `what` says it in one sentence; the other fields answer *where* (`place`: "recipe.yaml:12", a file or a
    folder; `tensor`), *what was expected*, *what was found*, and *what to do about it*.
    """

    what: str
    place: str | None = None
    tensor: str | None = None
    expected: str | None = None
    found: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        lines = [escaped(self.what)]
        for label in ("place", "tensor", "expected", "found", "remedy"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"    {label + ':':<10}{escaped(str(value))}")
        return "\n".join(lines)


class UserError(Exception):
    """A failure with a message for people: printed without a traceback."""

    exit_code = 1


class Failed(UserError):
    """The work was right but could not be done: disk full, a write error, an input that changed (exit code 1)."""


class Refused(UserError):
    """The recipe or an input is not what it must be (exit code 2). Carries every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Interrupted(UserError):
    """Stopped by a signal; the exit code is the shell's convention, 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)
