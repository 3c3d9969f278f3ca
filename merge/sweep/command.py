"""What `ggez-merge sweep` does: sweep, table, decision, checkpoints."""

from __future__ import annotations

from pathlib import Path

from ggez_merge.errors import Problem, Refused
from ggez_merge.merge import merge
from ggez_merge.progress import Silent
from ggez_merge.recipe import Recipe
from ggez_merge.sweep.decision import decide
from ggez_merge.sweep.keep import Keep, kept
from ggez_merge.sweep.models import plan_of
from ggez_merge.sweep.run import Swept, Tell, run_sweep
from ggez_merge.sweep.scores_file import save_scores
from ggez_merge.write import REPORT, check_output

SUFFIX = ".sweep"  # of the folder beside the output


def sweep(recipe: Recipe, out: Path | None, keep: Keep, overwrite: bool, tell: Tell) -> None:
    """Measure, decide, and write what is to be kept. `<output>.sweep` has results.jsonl and sweep.csv.

    Raises Infeasible where no candidate satisfies the rule: results are there, and no checkpoint is written.
    """
    output = _output(recipe, out)
    folder = output.with_name(output.name + SUFFIX)
    if keep != "none" and not (output / REPORT).exists():  # what an earlier sweep chose may be chosen again
        check_output(output, resume=True, overwrite=overwrite)
    swept = run_sweep(recipe, folder, tell)
    save_scores(swept.table, folder / "sweep.csv")
    tell(f"{folder}: {swept.measured} results measured, {swept.reused} known already")
    print("\n".join(table(swept)))
    decision = decide(swept.points, swept.rule)
    print(f"chosen by {swept.rule.name}: {decision.point.candidate}")
    for note in decision.notes:
        tell(f"note: {note}")
    for candidate, path in kept(swept.points, decision.point, keep, output, folder / "checkpoints"):
        merge(plan_of(recipe, candidate, path), resume=not overwrite, overwrite=overwrite, progress=Silent())
        print(f"{path}: {candidate}")


def table(swept: Swept) -> list[str]:
    """A line for each candidate."""
    header = f"{'candidate':24}{'regional':>10}{'global':>10}{'gain %':>9}{'kept %':>9}"
    lines = [header]
    for point in swept.points:
        of = point.summary
        gain = f"{of.gain_percent:+.1f}" if of.gain_percent is not None else "-"
        retention = f"{of.retention_percent:.1f}" if of.retention_percent is not None else "-"
        scores = f"{of.regional.value:>10.4g}{of.global_.value:>10.4g}"
        lines.append(f"{point.candidate!s:24}{scores}{gain:>9}{retention:>9}")
    return lines


def _output(recipe: Recipe, out: Path | None) -> Path:
    if out is not None:
        return out.absolute()
    if recipe.output.path is None:
        remedy = "add `output: {path: ./merged}` or give `--out DIR`"
        raise Refused(Problem("the recipe names no output folder", recipe.place(), remedy=remedy))
    return ((recipe.path.parent if recipe.path else Path(".")) / recipe.output.path).absolute()
