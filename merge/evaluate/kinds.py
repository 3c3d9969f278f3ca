"""The kinds of tasks: what each is told, with its defaults. Read from a recipe; nothing is computed here."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggez_merge.check import Check
from ggez_merge.evaluate.values import count, flag, number, texts
from ggez_merge.yaml_lines import Where

Entry = dict[str, Any]

LETTER_PROMPT = "{question}\n{choices}\nAnswer with the letter of the right choice only."
TEXT_PROMPT = "{question}"
CAPTION_PROMPT = "Describe this image."


@dataclass(frozen=True)
class Retrieval:
    """Recall at each k, from images to texts and from texts to images. The score is the recall at the first k.

    text: columns of captions; each of several is a pool of its own (one column a language). A column may hold a list.
    within: only rows with the same value of this column compete with each other.
    """

    text: tuple[str, ...] = ("text",)
    k: tuple[int, ...] = (1,)
    within: str | None = None


@dataclass(frozen=True)
class Classification:
    """Zero-shot classification: the class whose prompts, averaged, are nearest to the image.

    classes: (label as in the data, name for the prompt); empty: the labels of the data, sorted, are the names.
    templates: each has {} for the name.
    """

    label: str = "label"
    classes: tuple[tuple[str, str], ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}",)


@dataclass(frozen=True)
class MultipleChoice:
    """One right choice among several, found by the log-likelihood of the answers or by generating one.

    choices: one column that holds a list, or a column for each. answer: a column with the number of the right choice
    (from 0), its letter (from A), or its text. answer_with: score the letter of a choice, or its text. normalise: by
    what the log-likelihood of an answer is divided: nothing, its tokens, its UTF-8 bytes.
    """

    question: str = "question"
    choices: tuple[str, ...] = ("choices",)
    answer: str = "answer"
    score_by: str = "loglikelihood"
    answer_with: str = "letter"
    normalise: str = "none"
    prompt: str = LETTER_PROMPT
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Vqa:
    """A question answered freely; answer: a column with the right answer, or a list of such."""

    question: str = "question"
    answer: str = "answer"
    metric: str = "exact_match"
    prompt: str = TEXT_PROMPT
    max_new_tokens: int = 32


@dataclass(frozen=True)
class CaptionLoss:
    """Mean negative log-likelihood (nats a token) of a caption, given the image and the prompt. Lower is better."""

    text: str = "text"
    prompt: str = CAPTION_PROMPT


@dataclass(frozen=True)
class Read:
    """Where a program leaves its score. file: below {out}, may be a pattern; None: where its adapter knows it to be.

    metric: the dotted path in JSON, or (with `task`) a metric's name. column, row: of a CSV file, the row being the
    one that has all these values. n, stderr: dotted paths or columns, too.
    """

    file: str | None = None
    task: str | None = None
    metric: str | None = None
    filter: str = "none"
    column: str | None = None
    row: Mapping[str, str] = field(default_factory=dict)
    n: str | None = None
    stderr: str | None = None


@dataclass(frozen=True)
class Command:
    """A program that is given the candidate's folder and leaves a score in a file.

    arguments: the program and its arguments, {model} and {out} not yet replaced. folder: where it runs, the recipe's.
    timeout_s: None: no limit. higher_is_better: None: as the file says, else true.
    """

    arguments: tuple[str, ...]
    read: Read
    adapter: str | None = None
    timeout_s: float | None = None
    scale: float | None = None
    chance: float | None = None
    n: int | None = None
    higher_is_better: bool | None = None
    folder: Path = Path()


LiveKind = Retrieval | Classification | MultipleChoice | Vqa | CaptionLoss
Kind = LiveKind | Command

ADAPTERS = ("lmms-eval", "lm-evaluation-harness", "vlmevalkit")
COMMAND_KEYS = ("command", "adapter", "read", "timeout", "scale", "chance", "n", "higher_is_better")
READ_KEYS = ("file", "task", "metric", "filter", "column", "row", "n", "stderr")


def _retrieval(check: Check, where: Where, entry: Entry) -> Retrieval:
    value = entry.get("k")
    places = check.elements((*where, "k"), value) if isinstance(value, list) else [((*where, "k"), value)]
    return Retrieval(
        text=texts(check, (*where, "text"), entry.get("text"), ("text",)),
        k=tuple(dict.fromkeys(count(check, here, k, 1) for here, k in places)),
        within=check.text((*where, "within"), entry.get("within")),
    )


def _classification(check: Check, where: Where, entry: Entry) -> Classification:
    templates = texts(check, (*where, "templates"), entry.get("templates"), ("a photo of a {}",))
    for template in templates:
        if template.count("{}") != 1:
            check.refuse((*where, "templates"), "a template needs one {} for the class", None, template)
    value = entry.get("classes")
    if isinstance(value, dict):
        named = [(str(label), check.text((*where, "classes", label), name) or "") for label, name in value.items()]
    else:
        named = [(name, name) for name in texts(check, (*where, "classes"), value)]
    if value is not None and len(named) < 2:
        check.refuse((*where, "classes"), "`classes` must be a list or a mapping of at least two", None, value)
    return Classification(check.text((*where, "label"), entry.get("label")) or "label", tuple(named), templates)


def _multiple_choice(check: Check, where: Where, entry: Entry) -> MultipleChoice:
    score_by = check.choice(
        (*where, "score_by"), entry.get("score_by"), ("loglikelihood", "generation"), absent="loglikelihood"
    )
    answer_with = check.choice((*where, "answer_with"), entry.get("answer_with"), ("letter", "text"), absent="letter")
    for key in ("answer_with", "normalise") if score_by == "generation" else ():
        if key in entry:
            check.refuse((*where, key), f"`{key}` has no effect on generated answers", remedy="remove it")
    letters = answer_with == "letter" or score_by == "generation"
    needed = ("{question}", "{choices}") if letters else ("{question}",)
    return MultipleChoice(
        question=check.text((*where, "question"), entry.get("question")) or "question",
        choices=texts(check, (*where, "choices"), entry.get("choices"), ("choices",)),
        answer=check.text((*where, "answer"), entry.get("answer")) or "answer",
        score_by=score_by,
        answer_with=answer_with,
        normalise=check.choice(
            (*where, "normalise"), entry.get("normalise"), ("none", "tokens", "bytes"), absent="none"
        ),
        prompt=_prompt(check, where, entry, LETTER_PROMPT if letters else TEXT_PROMPT, needed),
        max_new_tokens=count(check, (*where, "max_new_tokens"), entry.get("max_new_tokens"), 16),
    )


def _vqa(check: Check, where: Where, entry: Entry) -> Vqa:
    metrics = ("exact_match", "anls", "chrf")
    return Vqa(
        question=check.text((*where, "question"), entry.get("question")) or "question",
        answer=check.text((*where, "answer"), entry.get("answer")) or "answer",
        metric=check.choice((*where, "metric"), entry.get("metric"), metrics, absent="exact_match"),
        prompt=_prompt(check, where, entry, TEXT_PROMPT, ("{question}",)),
        max_new_tokens=count(check, (*where, "max_new_tokens"), entry.get("max_new_tokens"), 32),
    )


def _caption_loss(check: Check, where: Where, entry: Entry) -> CaptionLoss:
    text = check.text((*where, "text"), entry.get("text")) or "text"
    return CaptionLoss(text, _prompt(check, where, entry, CAPTION_PROMPT, ()))


def _prompt(check: Check, where: Where, entry: Entry, absent: str, needed: tuple[str, ...]) -> str:
    prompt = check.text((*where, "prompt"), entry.get("prompt")) or absent
    for name in needed:
        if name not in prompt:
            check.refuse((*where, "prompt"), f"the prompt has no {name}", None, prompt)
    return prompt


def read_command(check: Check, where: Where, entry: Entry) -> Command:
    """A task that a program carries out."""
    check.required(where, entry, "command")
    check.required(where, entry, "read")
    adapter = check.choice((*where, "adapter"), entry.get("adapter"), ADAPTERS, absent="")
    direction = entry.get("higher_is_better")
    return Command(
        arguments=_arguments(check, (*where, "command"), entry.get("command")),
        read=_read(check, (*where, "read"), entry.get("read"), adapter),
        adapter=adapter or None,
        timeout_s=number(check, (*where, "timeout"), entry.get("timeout"), 1),
        scale=number(check, (*where, "scale"), entry.get("scale"), 1e-9),
        chance=number(check, (*where, "chance"), entry.get("chance"), 0),
        n=count(check, (*where, "n"), entry.get("n"), 0) or None,
        higher_is_better=None if direction is None else flag(check, (*where, "higher_is_better"), direction, True),
        folder=check.path.parent if check.path else Path(),
    )


def _arguments(check: Check, where: Where, value: Any) -> tuple[str, ...]:
    if isinstance(value, list):
        arguments = [check.text(here, argument) or "" for here, argument in check.elements(where, value)]
    else:
        try:
            arguments = shlex.split(check.text(where, value) or "")
        except ValueError as error:
            check.refuse(where, "the command cannot be taken apart", None, value, f"mind the quotes: {error}")
            return ()
    if arguments and not any("{model}" in argument for argument in arguments):
        remedy = "put {model} where the program wants the folder of a model"
        check.refuse(where, "the command is not told which model to evaluate", None, " ".join(arguments), remedy)
    return tuple(arguments)


def _read(check: Check, where: Where, value: Any, adapter: str) -> Read:
    entry = check.mapping(where, value, READ_KEYS, needed=value is not None)
    said = {key: check.text((*where, key), entry.get(key)) for key in READ_KEYS if key != "row"}
    row = {column: str(one) for column, one in check.mapping((*where, "row"), entry.get("row")).items()}
    for key in ("task", "metric") if adapter.startswith("lm") else ("task",) if adapter else ("file",):
        if value is not None:
            check.required(where, entry, key)
    if entry and not adapter:
        check.exactly_one(where, entry, ("metric", "column"))
    return Read(
        file=said["file"],
        task=said["task"],
        metric=said["metric"],
        filter=said["filter"] or "none",
        column=said["column"],
        row=row,
        n=said["n"],
        stderr=said["stderr"],
    )


TASKS: Mapping[str, tuple[tuple[str, ...], Callable[[Check, Where, Entry], Kind]]] = {
    "retrieval": (("text", "k", "within"), _retrieval),
    "classification": (("label", "classes", "templates"), _classification),
    "multiple_choice": (
        ("question", "choices", "answer", "score_by", "answer_with", "normalise", "prompt", "max_new_tokens"),
        _multiple_choice,
    ),
    "vqa": (("question", "answer", "metric", "prompt", "max_new_tokens"), _vqa),
    "caption_loss": (("text", "prompt"), _caption_loss),
}
"""Of each kind that runs on a live model: its own keys, and what reads them."""


def columns(kind: LiveKind) -> tuple[str, ...]:
    """The columns that a task of this kind reads."""
    match kind:
        case Retrieval():
            return (*kind.text, *([kind.within] if kind.within else []))
        case Classification():
            return (kind.label,)
        case MultipleChoice():
            return (kind.question, *kind.choices, kind.answer)
        case Vqa():
            return (kind.question, kind.answer)
        case CaptionLoss():
            return (kind.text,)
