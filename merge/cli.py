"""The command line: parse, call, print. No logic lives here, and nothing heavy is imported until a command needs it."""

from __future__ import annotations

import atexit
import gc
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ggez_merge import __version__
from ggez_merge.errors import Refused, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from ggez_merge.checkpoint import Checkpoint
    from ggez_merge.run import Stop


class _RecipeFirst(TyperGroup):
    """`ggez-merge recipe.yaml` is short for `ggez-merge merge recipe.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version"):
            args = ["merge", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RecipeFirst,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Merge a global model with its region-tuned copies: `ggez-merge recipe.yaml`.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(name="merge")
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; overrides the recipe's `output.path`.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, e.g. parameters.ratio=0.4 (of a stage: NAME:KEY=VALUE)."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, from headers alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the answer as JSON.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Workers; by default one a core, at most 16, or four a GPU.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Budget for all buffers, e.g. 512MB.")] = "192MiB",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (all GPUs) or cuda:1.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted merge.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge.")] = False,
    copy_code: Annotated[bool, typer.Option("--copy-code", help="Carry the base's custom code (*.py) along.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Merge the models of a recipe into one checkpoint."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:0, cuda:1 …", param_hint="--device")
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite contradict each other")
    if as_json and not dry_run:
        raise typer.BadParameter("--json goes with --dry-run", param_hint="--json")
    with _errors_for_people():
        from ggez_merge.merge import device_for, merge
        from ggez_merge.plan import make_plan
        from ggez_merge.progress import progress_for
        from ggez_merge.recipe import load_recipe
        from ggez_merge.run import Stop, sizing
        from ggez_merge.units import parse_bytes, readable_bytes

        memory_bytes = parse_bytes(memory)
        if memory_bytes is None:
            raise typer.BadParameter(f"{memory!r} is no size; write 512MB or 1GiB", param_hint="--memory")
        plan = make_plan(load_recipe(recipe, set_ or ()), out)
        computes_on = device_for(plan, device)
        if dry_run:
            from ggez_merge.dryrun import describe, show
            from ggez_merge.write import check_output

            said = describe(plan, computes_on, sizing(plan, threads, memory_bytes, computes_on), copy_code)
            _print_json(said) if as_json else show(said)
            for each in (*plan.written, plan):
                check_output(each.folder, resume=resume, overwrite=overwrite)
            return
        if not quiet:
            print(f"on {computes_on.name}: {computes_on.why}", file=sys.stderr)
        stop = Stop()
        began = time.perf_counter()
        with _signals_to(stop), progress_for(quiet) as progress:
            outcome = merge(
                plan,
                device=computes_on,
                threads=threads,
                memory_bytes=memory_bytes,
                resume=resume,
                overwrite=overwrite,
                copy_code=copy_code,
                progress=progress,
                stop=stop,
            )
        if quiet:
            return
        for note in (f"{stage.recipe.name}: {note}" for stage in plan.stages for note in stage.notes):
            print(f"note: {note}", file=sys.stderr)
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        for stage in plan.written:
            print(f"{stage.folder}: the stage {stage.recipe.name}, {len(stage.outputs)} tensors")
        seconds = time.perf_counter() - began
        done = f"{readable_bytes(plan.write_bytes)} in {seconds:.1f} s" if outcome else "finished before, nothing to do"
        print(f"{plan.folder}: {len(plan.outputs)} tensors, {done}")


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, with `evaluate:` and, if need be, `sweep:`, `select:`.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; overrides the recipe's `output.path`.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    keep: Annotated[str, typer.Option(help="Which candidates to write: none, best, pareto or all.")] = "best",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Make every candidate, evaluate it, and choose. The same call again goes on where an earlier one was stopped."""
    from ggez_merge.sweep.keep import KEEP

    if keep not in KEEP:
        raise typer.BadParameter(f"{keep!r} is none of {', '.join(KEEP)}", param_hint="--keep")
    with _errors_for_people():
        from ggez_merge.recipe import load_recipe
        from ggez_merge.sweep.command import sweep

        def tell(line: str) -> None:
            if not quiet:
                print(line, file=sys.stderr)

        sweep(load_recipe(recipe, set_ or ()), out, keep, overwrite, tell)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A merged checkpoint.")]) -> None:
    """Check a merged checkpoint against the hashes in its report."""
    with _errors_for_people():
        from ggez_merge.progress import progress_for
        from ggez_merge.units import readable_bytes
        from ggez_merge.verify import verify

        with progress_for(quiet=False) as progress:
            verdict = verify(folder, progress)
        if verdict.problems:
            print("\n".join(str(problem) for problem in verdict.problems), file=sys.stderr)
            raise typer.Exit(1)
        print(f"{folder}: intact ({len(verdict.intact)} files, {readable_bytes(verdict.n_bytes)})")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A merged checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if there is none.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; private if neither is given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that the repository holds.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Verify a merged checkpoint and upload it to Hugging Face. The same call again continues a broken upload."""
    with _errors_for_people():
        from ggez_merge.push import push
        from ggez_merge.units import readable_bytes
        from ggez_merge.untrusted import some

        pushed = push(folder, repo, private=private, overwrite=overwrite, quiet=quiet)
        if quiet:
            return
        if pushed.removed:
            print(f"note: removed from the repository: {some(pushed.removed, 6)}", file=sys.stderr)
        if pushed.left_out:
            print(f"note: left out, as the merge did not write it: {some(pushed.left_out, 6)}", file=sys.stderr)
        what = (
            f"{len(pushed.files)} files, {readable_bytes(pushed.n_bytes)}" if pushed.changed else "nothing has changed"
        )
        print(f"{pushed.url}: {what}, {'private' if pushed.private else 'public'}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a file, or a Hugging Face id (@revision), or BASE+ADAPTER.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a checkpoint: components, dtypes, shapes, bytes. Reads headers only."""
    with _errors_for_people():
        from ggez_merge import inspect

        summary = inspect.summarise(_open(model))
        if as_json:
            _print_json(inspect.as_json(summary, tensors))
        else:
            inspect.show(summary, _console(), tensors)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A checkpoint, usually the base.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png or .svg file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show where two checkpoints differ, by component and layer."""
    with _errors_for_people():
        from ggez_merge import diff, diff_plot
        from ggez_merge.progress import progress_for

        first, second = _open(a), _open(b)
        with progress_for(as_json) as progress:
            progress.phase("comparing", _read_bytes(first, second))
            result = diff.diff(first, second, advance=progress.advance)
        if plot is not None:
            diff_plot.plot(result, plot)
        if as_json:
            _print_json(diff.as_json(result))
        else:
            diff.show(result, _console())


@app.command()
def extract_lora(
    model: Annotated[str, typer.Argument(help="A tuned model.")],
    base: Annotated[str, typer.Option(help="What it was tuned from.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter, for each weight.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    rest: Annotated[str, typer.Option(help="Changes that LoRA cannot hold: error, save (whole) or leave.")] = "error",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Make a LoRA adapter of what a tuned model learnt, and say how near it comes."""
    if rest not in ("error", "save", "leave"):
        raise typer.BadParameter(f"{rest!r} is none of error, save, leave", param_hint="--rest")
    with _errors_for_people():
        from ggez_merge import extract_lora
        from ggez_merge.progress import progress_for
        from ggez_merge.units import readable_bytes

        tuned, origin = _open(model), _open(base)
        with progress_for(quiet) as progress:
            progress.phase("extracting", _read_bytes(tuned, origin))
            result = extract_lora.extract(tuned, origin, rank, out, rest, progress.advance)  # type: ignore[arg-type]
        if not quiet:
            extract_lora.show(result, _console())
            print(f"{out}: {readable_bytes(result.n_bytes)}")


recipes = typer.Typer(invoke_without_command=True)
app.add_typer(recipes, name="recipes")


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """List the ready recipes; `recipes copy NAME` gives one to edit."""
    if context.invoked_subcommand is None:
        from ggez_merge.ready import titles

        table = titles()
        width = max(map(len, table))
        print("\n".join(f"{name:<{width}}  {title}" for name, title in table.items()))


@recipes.command(name="copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="As `ggez-merge recipes` lists it.")],
    dest: Annotated[Path | None, typer.Argument(help="A new file, or a folder; by default ./NAME.yaml.")] = None,
) -> None:
    """Copy a ready recipe to a new file."""
    with _errors_for_people():
        from ggez_merge.ready import copy

        print(copy(name, dest))


bench = typer.Typer(no_args_is_help=True, help="Measure how fast kernels and whole merges are on this machine.")
app.add_typer(bench, name="bench")
_CSV = typer.Option("--csv", help="Append the results to this file.")


@bench.command(name="kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    ops: Annotated[str | None, typer.Option(help="Which kernels, e.g. linear,ties; by default all.")] = None,
    sizes: Annotated[str, typer.Option(help="Elements of an array, e.g. 1Mi,48Mi.")] = "48Mi",
    dtypes: Annotated[str, typer.Option(help="Of the arrays.")] = "bfloat16,float16,float32",
    threads: Annotated[str, typer.Option(help="On a CPU, e.g. 1,8; by default one, and all.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing, on a CPU.")] = 15,
    against: Annotated[str, typer.Option(help="Baselines.")] = "eager,compile,stats,mergekit",
    csv: Annotated[Path | None, _CSV] = None,
) -> None:
    """Check every kernel against its definition, then time it beside a memory copy and what others would run."""
    with _errors_for_people():
        from ggez_merge.benchmarks.kernels import bench

        bench(device, ops, sizes, dtypes, threads, repeats, against, csv)


@bench.command(name="models")
def bench_models(
    folder: Annotated[Path, typer.Argument(help="Where base, sea and latam are written.")],
    layers: Annotated[int, typer.Option(min=1, help="20 are 0.97 B parameters.")] = 20,
    huge: Annotated[bool, typer.Option("--huge", help="One tensor of 2 GiB instead.")] = False,
) -> None:
    """Make three models of random weights for `bench merge`."""
    with _errors_for_people():
        from ggez_merge.benchmarks.models import make_all

        print(f"{folder}: {make_all(folder, layers, huge):,} parameters in each of base, sea, latam")


@bench.command(name="merge")
def bench_merge(
    models: Annotated[Path, typer.Argument(help="The folder that `bench models` wrote.")],
    methods: Annotated[str, typer.Option(help="Also dare_linear, dare_ties, slerp.")] = "linear,task_arithmetic,ties",
    tools: Annotated[str, typer.Option(help="Also copy-bare.")] = "ggez-merge,copy,mergekit",
    mergekit: Annotated[Path | None, typer.Option(help="mergekit-yaml, in an environment of its own.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Of each merge.")] = 3,
    mergekit_repeats: Annotated[int, typer.Option(min=1, help="Fewer where it takes minutes.")] = 3,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the page cache before every run (root).")] = False,
    csv: Annotated[Path | None, _CSV] = None,
) -> None:
    """Time whole merges from start to exit: ggez-merge, the same engine only copying, mergekit."""
    with _errors_for_people():
        from ggez_merge.benchmarks.merge import bench

        bench(models, methods, tools, mergekit, repeats, mergekit_repeats, cold, csv)


@bench.command(name="report")
def bench_report(
    tables: Annotated[list[Path] | None, typer.Argument(metavar="[CSV]...", help="By default those shipped.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the plots.")] = Path(),
) -> None:
    """Draw plots (PNG and SVG) from tables of results."""
    with _errors_for_people():
        from ggez_merge.benchmarks.report import report

        print("\n".join(str(path) for path in report(tables or (), out)))


@bench.command(name="roofline")
def bench_roofline(csv: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None) -> None:
    """Show how fast merges of 7 B and 27 B parameters could be at best, and what limits them."""
    with _errors_for_people():
        from ggez_merge.benchmarks.roofline import bench

        bench(csv)


def _open(model: str) -> Checkpoint:
    from ggez_merge.opening import open_model
    from ggez_merge.reference import ModelReference, parse_reference

    return open_model(parse_reference(model) or ModelReference(model))


def _read_bytes(*models: Checkpoint) -> int:
    """What reading all of them comes to: more than their files hold, where weights are computed."""
    return sum(tensor.nbytes for model in models for tensor in model.tensors.values())


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_json(said: object) -> None:
    import json

    print(json.dumps(said, indent=1, ensure_ascii=False))


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """A user's mistake ends in a message and an exit code, never in a traceback."""
    try:
        yield
    except UserError as error:
        if isinstance(error, Refused) and len(error.problems) > 1:
            print(f"{len(error.problems)} problems:", file=sys.stderr)
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def _signals_to(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the merge to stop between blocks; a second one ends the process as usual."""

    def ask(number: int, frame: object) -> None:
        stop.ask(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    # a process makes a million objects at its start, and keeps them: looking for garbage among them costs 0.1 s there,
    # and 0.1 s more when it ends
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    app()
