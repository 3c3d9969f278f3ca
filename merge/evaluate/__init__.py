"""Tasks of a recipe, measured on a live model or by a program: `rows_of`, then `evaluate` for each candidate.

Nothing heavy is imported before it is needed: reading a recipe's tasks (tasks.py) loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ggez_merge.evaluate.data import Rows
    from ggez_merge.evaluate.measured import Measured
    from ggez_merge.evaluate.model import Live
    from ggez_merge.evaluate.tasks import Task


def rows_of(task: Task) -> Rows:
    """The data of a task that runs on a live model, read and checked; the same for every candidate of a sweep.

    Raises Refused (see data.py).
    """
    from ggez_merge.evaluate.data import read_rows
    from ggez_merge.evaluate.kinds import Command, columns

    if isinstance(task.kind, Command) or task.source is None:
        raise TypeError(f"{task.name} is carried out by a program, which has data of its own")
    return read_rows(task.source, columns(task.kind))


def evaluate(
    task: Task,
    live: Live | None = None,
    *,
    rows: Rows | None = None,
    batch_size: int = 32,
    folder: Path | None = None,
    out: Path | None = None,
) -> Measured:
    """Measure one task on one model.

    live: the model, for tasks that run on it (model.py); rows: their data, read if not given. The score does not depend
    on batch_size, which bounds memory. For a command: folder, the candidate's; out: an empty or new folder for what the
    program writes, its log included.
    Raises Refused if the task does not suit the model or its data, Failed if a program fails or the model gives NaN.
    """
    from ggez_merge.evaluate.kinds import Classification, Command, Retrieval

    kind = task.kind
    if isinstance(kind, Command):
        from ggez_merge.evaluate.command import run_command

        if folder is None or out is None:
            raise TypeError(f"{task.name} is carried out by a program: it needs folder and out")
        return run_command(task, kind, folder, out)
    if live is None:
        raise TypeError(f"{task.name} needs a live model")
    from ggez_merge.evaluate import dual, generative
    from ggez_merge.evaluate.model import repeatable

    needed = "dual" if isinstance(kind, Retrieval | Classification) else "generative"
    if live.kind != needed:
        models = {"dual": "an image and a text encoder, such as CLIP", "generative": "a model that generates text"}
        found = f"{live.model.config.model_type}, {models[live.kind]}"
        raise task.refused(f"this task needs {models[needed]}", found)
    every = (rows or rows_of(task)).rows
    with repeatable():
        if isinstance(kind, Retrieval):
            return dual.retrieve(task, kind, live, every, batch_size)
        if isinstance(kind, Classification):
            return dual.classify(task, kind, live, every, batch_size)
        return generative.answer(task, kind, live, every, batch_size)
