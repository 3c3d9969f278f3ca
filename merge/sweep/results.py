"""results.jsonl: what has been measured, a line for each candidate and task, only ever added to.

A line is known by content: the fingerprint of the candidate's plan, or the hash of its weights, and the fingerprint of
the task. So finished work is recognised whatever the recipe around it has become, and a line that an interruption cut
off is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggez_merge.errors import Failed
from ggez_merge.evaluate.measured import Measured


@dataclass(frozen=True)
class Line:
    """One task's result for one candidate. plan, weights: of the candidate; task: the task's key.

    candidate: its values and its role, for people; seconds: what measuring took.
    """

    plan: str
    weights: str
    task: str
    candidate: Mapping[str, Any]
    seconds: float
    measured: Measured


class Results:
    """The file and what is in it."""

    def __init__(self, path: Path) -> None:
        """Raises Failed if the file cannot be read or written."""
        self.path = path
        self._by_plan: dict[tuple[str, str], Line] = {}
        self._by_weights: dict[tuple[str, str], Line] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes() if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if whole != raw:
                os.truncate(path, len(whole))
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}") from error
        for number, text in enumerate(whole.decode(errors="replace").splitlines(), 1):
            try:
                self._know(_line(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                remedy = "remove the line, or the file to measure all of it again"
                raise Failed(f"{path}:{number}: this is not a result: {error}\n    remedy:   {remedy}") from None

    def of_plan(self, plan: str, task: str) -> Line | None:
        return self._by_plan.get((plan, task))

    def of_weights(self, weights: str, task: str) -> Line | None:
        """A result of the same weights, whatever made them."""
        return self._by_weights.get((weights, task))

    def add(self, line: Line) -> None:
        """Write a result to the disk before anything else happens."""
        said = {
            "plan": line.plan,
            "weights": line.weights,
            "task": line.task,
            "candidate": dict(line.candidate),
            "seconds": round(line.seconds, 3),
            "measured": line.measured.to_json(),
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Failed(f"{self.path}: {error.strerror}") from error
        self._know(line)

    def _know(self, line: Line) -> None:
        self._by_plan[line.plan, line.task] = line
        self._by_weights.setdefault((line.weights, line.task), line)


def _line(said: Mapping[str, Any]) -> Line:
    return Line(
        plan=str(said["plan"]),
        weights=str(said["weights"]),
        task=str(said["task"]),
        candidate=dict(said["candidate"]),
        seconds=float(said["seconds"]),
        measured=Measured.from_json(said["measured"]),
    )
