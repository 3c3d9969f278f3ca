"""The tasks under a recipe's `evaluate:` key, read strictly.

    evaluate:                              # a list of tasks, or {tasks: [...], batch_size: 32, device: cuda, dtype: …}
      - {name: sea, tag: regional, task: retrieval, data: ./sea.jsonl, images: ./images, image: file, text: caption,
         k: [1, 5], group: country}
      - {name: world, tag: global, task: classification, data: ./world, label: label, templates: ["a photo of a {}"]}
      - {name: cvqa, tag: both, task: multiple_choice, data: cvqa.parquet, question: Question, choices: Options,
         answer: Label, where: {"Subset[1]": [Indonesia, Malaysia]}}
      - {name: vqa, tag: regional, task: vqa, data: vqa.csv, metric: anls}
      - {name: captions, tag: none, task: caption_loss, data: ./sea.jsonl, text: caption}
      - {name: mine, tag: regional, command: "python eval.py {model} {out}", scale: 100,
         read: {file: out.json, metric: results.acc}}
      - {name: harness, tag: global, adapter: lm-evaluation-harness, command: …, read: {task: mmlu, metric: acc}}

A task's tag says which score it counts for: `regional`, `global`, `both`, or `none` of them (it is only reported).
Loads neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ggez_merge.chain import NAME
from ggez_merge.check import Check, listed, nearest
from ggez_merge.errors import Problem, Refused
from ggez_merge.evaluate.kinds import COMMAND_KEYS, TASKS, Command, Kind, read_command
from ggez_merge.evaluate.source import SOURCE_KEYS, Source, read_source
from ggez_merge.evaluate.values import count
from ggez_merge.recipe import Recipe
from ggez_merge.yaml_lines import Where

TAGS = ("regional", "global", "both", "none")
DTYPES = ("float32", "bfloat16", "float16")
TOP_KEYS = ("tasks", "batch_size", "device", "dtype")
COMMON_KEYS = ("name", "tag")
BATCH_SIZE = 32


@dataclass(frozen=True)
class Task:
    """One thing to measure. source: its data; None for a command. place: its line of the recipe, for messages."""

    name: str
    tag: str
    kind: Kind
    source: Source | None = None
    place: str | None = field(default=None, compare=False)

    @property
    def is_command(self) -> bool:
        """Whether a program carries it out, which needs the candidate as a folder."""
        return isinstance(self.kind, Command)

    def refused(self, what: str, found: str | None = None, remedy: str | None = None) -> Refused:
        """The error that says what is wrong with this task or its data."""
        return Refused(Problem(f"{self.name}: {what}", self.place, found=found, remedy=remedy))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate:` says. device, dtype: where and in which precision models run; None: CPU, as they are stored."""

    tasks: tuple[Task, ...] = ()
    batch_size: int = BATCH_SIZE
    device: str | None = None
    dtype: str | None = None


def evaluation_of(recipe: Recipe) -> Evaluation:
    """The tasks of a recipe. Raises Refused with every problem found, and when there is none."""
    problems: list[Problem] = []
    check = Check(recipe.document, recipe.path, problems)
    evaluation = read_evaluation(check, ("evaluate",), recipe.document.data.get("evaluate"))
    if not problems and not evaluation.tasks:
        remedy = "add `evaluate:` with a list of tasks"
        problems.append(Problem("the recipe says nothing to evaluate", recipe.place("evaluate"), remedy=remedy))
    if problems:
        raise Refused(problems)
    return evaluation


def read_evaluation(check: Check, where: Where, value: Any) -> Evaluation:
    """The tasks and how to run them; problems go to the check."""
    if value is None or isinstance(value, list):
        return Evaluation(read_tasks(check, where, value))
    top = check.mapping(where, value, TOP_KEYS, needed=True)
    if top:
        check.required(where, top, "tasks")
    return Evaluation(
        tasks=read_tasks(check, (*where, "tasks"), top.get("tasks")),
        batch_size=count(check, (*where, "batch_size"), top.get("batch_size"), BATCH_SIZE),
        device=check.text((*where, "device"), top.get("device")),
        dtype=check.choice((*where, "dtype"), top.get("dtype"), DTYPES, absent="") or None,
    )


def read_tasks(check: Check, where: Where, value: Any) -> tuple[Task, ...]:
    """The tasks of a list; those that cannot be read are left out, and why goes to the check."""
    tasks: dict[str, Task] = {}
    for here, element in check.elements(where, value):
        task = _task(check, here, element)
        if task and task.name in tasks:
            remedy = "give each task a name of its own"
            check.refuse((*here, "name"), "two tasks have the same name", None, task.name, remedy)
        elif task:
            tasks[task.name] = task
    return tuple(tasks.values())


def _task(check: Check, where: Where, value: Any) -> Task | None:
    before = len(check.problems)
    named = value.get("task") if isinstance(value, dict) else None
    ours = isinstance(named, str) and named in TASKS
    if isinstance(value, dict) and not ours and not value.keys() & {"command", "adapter"}:
        found, remedy = None, f"`task:` is one of {listed(TASKS)}; or give a `command`"
        if named is not None:
            found, remedy = named, nearest(str(named), TASKS) or remedy
        check.refuse((*where, "task"), "this is not a task", None, found, remedy)
        return None
    own, read = TASKS[str(named)] if ours else (COMMAND_KEYS, read_command)
    keys = (*COMMON_KEYS, "task", *own, *SOURCE_KEYS) if ours else (*COMMON_KEYS, *own)
    entry = check.mapping(where, value, keys, needed=True)
    for key in (*COMMON_KEYS, "data") if ours else COMMON_KEYS:
        if entry:
            check.required(where, entry, key)
    task = Task(
        name=_name(check, (*where, "name"), entry.get("name")),
        tag=check.choice((*where, "tag"), entry.get("tag"), TAGS, absent="none"),
        kind=read(check, where, entry),
        source=read_source(check, where, entry) if ours else None,
        place=check.document.place(*where),
    )
    return task if len(check.problems) == before else None


def _name(check: Check, where: Where, value: Any) -> str:
    """A task's name, which is also that of its log."""
    name = check.text(where, value) or ""
    if name and not NAME.fullmatch(name):
        check.refuse(where, "this cannot be the name of a task", "letters, digits, `_`, `-` and `.`", name)
    return name
