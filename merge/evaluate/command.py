"""A task that a program carries out: run without a shell, its output kept, its score read from a file it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from ggez_merge.errors import Failed
from ggez_merge.evaluate.kinds import Command
from ggez_merge.evaluate.measured import Measured
from ggez_merge.evaluate.results_files import Found, Lacking, read_results
from ggez_merge.evaluate.tasks import Task
from ggez_merge.untrusted import printable

TAIL = 15  # lines of the log that an error shows
GRACE_S = 10.0  # from the polite signal to the other one


def run_command(task: Task, command: Command, model: Path, out: Path) -> Measured:
    """Run the program on the model's folder, and read the score that it leaves.

    {model} and {out} in its arguments become absolute paths, each within one argument. out: a folder that is new or
    empty, so that no older result is read; the log is `<task>.log` in it. The program runs in the recipe's folder.
    Raises Failed, with the log's last lines, if the program cannot start, fails, takes longer than its timeout, or
    leaves no score.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise Failed(f"{task.name}: {out} is not empty: an older result could be taken for the new one")
    log = out / f"{task.name}.log"
    places = {"model": str(model.resolve()), "out": str(out.resolve())}
    arguments = [_filled(argument, places) for argument in command.arguments]
    _run(task, command, arguments, log)
    try:
        found = read_results(command.adapter, command.read, out, places)
    except Lacking as error:
        raise Failed(f"{task.name}: {error}\n{_tail(log)}") from None
    return _measured(task, command, found)


def _filled(argument: str, places: Mapping[str, str]) -> str:
    """The argument with places put in; in one pass, so that braces in a path stay."""
    parts = argument.replace("{out}", "\0out\0").replace("{model}", "\0model\0").split("\0")
    return "".join(places[part] if i % 2 else part for i, part in enumerate(parts))


def _run(task: Task, command: Command, arguments: list[str], log: Path) -> None:
    try:
        with open(log, "wb") as file:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=command.folder,
                start_new_session=True,  # so that what it starts can be stopped with it
            )
    except OSError as error:
        raise Failed(f"{task.name}: the program cannot be started: {arguments[0]}: {error.strerror}") from None
    try:
        code = process.wait(command.timeout_s)
    except subprocess.TimeoutExpired:
        _stop(process)
        raise Failed(f"{task.name}: the program took longer than {command.timeout_s:g} s\n{_tail(log)}") from None
    except BaseException:  # an interrupted sweep leaves nothing running
        _stop(process)
        raise
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise Failed(f"{task.name}: the program {how}: {printable(' '.join(arguments))}\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the program and, where processes have groups, all that it has started."""
    if os.name == "nt":
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def _tail(log: Path) -> str:
    """The last lines of the log, and where the rest is."""
    with open(log, encoding="utf-8", errors="replace") as file:
        last = deque(file, maxlen=TAIL)
    lines = [f"    | {printable(line.rstrip())}" for line in last]
    return "\n".join([f"    log:      {log}", *lines])


def _measured(task: Task, command: Command, found: Found) -> Measured:
    """The result; what the recipe says about n, scale and direction goes before what the file says."""
    return Measured(
        name=task.name,
        tag=task.tag,
        score=found.score,
        n=command.n or found.n,
        chance=command.chance,
        scale=command.scale or found.scale,
        higher_is_better=found.higher_is_better if command.higher_is_better is None else command.higher_is_better,
        stderr=found.stderr,
    )
