"""A sweep from recipe to decision: make every candidate, measure it, refine around the best, decide."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ggez_merge.errors import Failed
from ggez_merge.evaluate import evaluate, rows_of
from ggez_merge.evaluate.data import Rows
from ggez_merge.evaluate.fingerprint import fingerprint
from ggez_merge.evaluate.measured import Measured
from ggez_merge.evaluate.model import Live, load_model
from ggez_merge.evaluate.tasks import Evaluation, Task, evaluation_of
from ggez_merge.merge import merge
from ggez_merge.plan import Plan
from ggez_merge.progress import Silent
from ggez_merge.recipe import Recipe
from ggez_merge.sweep.bench import Bench, NoBench
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.decision import Infeasible, Rule, decide, read_rule
from ggez_merge.sweep.front import Point
from ggez_merge.sweep.models import plan_of
from ggez_merge.sweep.results import Line, Results
from ggez_merge.sweep.scores import Benchmark, Tag, summarise
from ggez_merge.sweep.scores_file import Scored, ScoreTable
from ggez_merge.sweep.space import candidates, read_space, refine

RESULTS = "results.jsonl"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Swept:
    """All that was measured, in the order of the candidates; measured, reused: how many results of each kind."""

    table: ScoreTable
    points: tuple[Point, ...]
    rule: Rule
    measured: int
    reused: int


def run_sweep(recipe: Recipe, folder: Path, tell: Tell = lambda line: None) -> Swept:
    """Measure all candidates of a recipe. `folder` holds results.jsonl, and for a while what commands are given.

    What results.jsonl has is not measured again, whether the sweep was interrupted or its recipe was changed since.
    Raises Refused with everything that is wrong before anything is measured, Failed if a task fails.
    """
    space, evaluation, rule = read_space(recipe), evaluation_of(recipe), read_rule(recipe)
    worker = _Worker(recipe, evaluation, folder, tell)
    first = candidates(space)
    plans = {id(candidate): plan_of(recipe, candidate, folder / "candidate") for candidate in first}
    scored: list[Scored] = []

    def points() -> list[Point]:
        base = next(each.benchmarks for each in scored if each.candidate.role == "base")
        alpha = rule.alpha.value if rule.alpha else None
        return [Point(each.candidate, summarise(each.benchmarks, base, alpha)) for each in scored]

    def measure(candidate: Candidate, plan: Plan) -> None:
        scored.append(Scored(candidate, tuple(benchmarks(worker.results(candidate, plan)))))

    for candidate in first:
        measure(candidate, plans[id(candidate)])
    for _ in range(space.refine):
        best = _best(points(), rule)
        more = refine(space, [each.candidate for each in scored], best.candidate) if best else []
        for candidate in more:
            measure(candidate, plan_of(recipe, candidate, folder / "candidate"))
        if not more:
            break
    scored.sort(key=lambda each: each.candidate.order)
    return Swept(ScoreTable(tuple(space.axes), tuple(scored)), tuple(points()), rule, worker.measured, worker.reused)


def _best(points: Sequence[Point], rule: Rule) -> Point | None:
    """Where a refinement begins: what the rule picks or, if it picks nothing, what misses it by least."""
    try:
        return decide(points, rule).point
    except Infeasible as infeasible:
        return infeasible.nearest


class _Worker:
    """Makes candidates and measures them, one after the other, in one live model if that can be."""

    def __init__(self, recipe: Recipe, evaluation: Evaluation, folder: Path, tell: Tell) -> None:
        self._evaluation = evaluation
        self._folder = folder
        self._tell = tell
        self._results = Results(folder / RESULTS)
        self._rows: Mapping[str, Rows] = {task.name: rows_of(task) for task in evaluation.tasks if not task.is_command}
        self._keys = {task.name: self._key(task) for task in evaluation.tasks}
        self._bench: Bench | None = None
        self._no_bench = False
        self.measured = self.reused = 0

    def results(self, candidate: Candidate, plan: Plan) -> list[Measured]:
        """One for each task, in their order; those that are there already are not measured again."""
        found = {
            task.name: line.measured
            for task in self._evaluation.tasks
            if (line := self._results.of_plan(plan.fingerprint, self._keys[task.name]))
        }
        self.reused += len(found)
        waiting = [task for task in self._evaluation.tasks if task.name not in found]
        if waiting:
            found |= self._measure(candidate, plan, waiting)
        results = [found[task.name] for task in self._evaluation.tasks]
        scores = ", ".join(f"{each.name} {each.score:.4g}" for each in results)
        self._tell(f"{candidate}: {scores}")
        return results

    def _measure(self, candidate: Candidate, plan: Plan, tasks: Sequence[Task]) -> dict[str, Measured]:
        on_model = not all(task.is_command for task in tasks)
        live, weights = self._in_place(plan) if on_model else (None, plan.fingerprint)
        here = self._folder / "candidate"
        if any(task.is_command for task in tasks) or (on_model and live is None):
            merge(plan, overwrite=here.exists(), progress=Silent())
        if on_model and live is None:
            live = load_model(here, self._evaluation.device, self._evaluation.dtype)
        found = {}
        said = {"values": dict(candidate.values), "role": candidate.role, "model": candidate.model}
        for task in tasks:
            key, began = self._keys[task.name], time.perf_counter()
            same = self._results.of_weights(weights, key)
            measured = same.measured if same else self._one(task, live, here)
            seconds = 0.0 if same else time.perf_counter() - began
            self._results.add(Line(plan.fingerprint, weights, key, said, seconds, measured))
            self.measured += not same
            self.reused += bool(same)
            found[task.name] = measured
        shutil.rmtree(here, ignore_errors=True)
        return found

    def _one(self, task: Task, live: Live | None, here: Path) -> Measured:
        if not task.is_command:
            return evaluate(task, live, rows=self._rows[task.name], batch_size=self._evaluation.batch_size)
        out = self._folder / "commands" / task.name
        shutil.rmtree(out, ignore_errors=True)
        return evaluate(task, folder=here, out=out)

    def _in_place(self, plan: Plan) -> tuple[Live | None, str]:
        """The live model as this candidate, and the hash of its weights; no model where that cannot be."""
        if self._no_bench:
            return None, plan.fingerprint
        try:
            if self._bench is None:
                live = load_model(plan.layout.folder, self._evaluation.device, self._evaluation.dtype)
                self._bench = Bench(live, plan)
            return self._bench.live, self._bench.write(plan)
        except NoBench as reason:
            self._tell(f"candidates go through the disk: {reason}")
            self._no_bench, self._bench = True, None
            return None, plan.fingerprint

    def _key(self, task: Task) -> str:
        rows = self._rows.get(task.name)
        try:
            return fingerprint(task, rows, dtype=self._evaluation.dtype, device=self._evaluation.device)
        except OSError as error:
            raise Failed(f"{task.name}: {error}") from error


def benchmarks(results: Sequence[Measured]) -> Iterator[Benchmark]:
    """The results that count, as the scores see them: outcomes of items as shares of the scale."""
    for each in results:
        if each.tag in ("regional", "global", "both"):
            yield Benchmark(
                name=each.name,
                tag=cast(Tag, each.tag),
                score=each.score,
                n=each.n,
                higher_is_better=each.higher_is_better,
                chance=each.chance,
                scale=each.scale,
                groups={name: part.score for name, part in each.groups.items()},
                items={item.id: item.outcome / (each.scale or 1.0) for item in each.items} if each.items else None,
            )
