"""The `evaluate:` key of a recipe: what it may say, and how everything else is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ggez_merge.errors import Refused
from ggez_merge.evaluate.kinds import CaptionLoss, Classification, Command, MultipleChoice, Retrieval, Vqa
from ggez_merge.evaluate.tasks import Evaluation, Task, evaluation_of
from ggez_merge.recipe import parse_recipe

HEAD = "merge_method: linear\nbase_model: a\nmodels: [{model: b}]\n"
ROWS = {"name": "x", "tag": "regional", "data": "rows.jsonl"}
KINDS: dict[str, dict[str, Any]] = {
    "retrieval": {"k": [1, 5], "text": ["en", "id"], "within": "language"},
    "classification": {"label": "y", "classes": {"0": "cat", "1": "dog"}, "templates": ["{}", "a {}"]},
    "multiple_choice": {"question": "Q", "choices": ["a", "b"], "answer": "L", "answer_with": "text"},
    "vqa": {"metric": "anls", "max_new_tokens": 3, "prompt": "Q: {question}"},
    "caption_loss": {"text": "caption"},
}
COMMAND = {"command": "python e.py {model} '{out}/a b'", "read": {"file": "o.json", "metric": "a.b"}}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "images").mkdir()
    return tmp_path


def read(here: Path, evaluate: Any) -> Evaluation:
    text = HEAD + yaml.safe_dump({"evaluate": evaluate}, sort_keys=False)
    return evaluation_of(parse_recipe(text, here / "recipe.yaml"))


def refused(here: Path, *tasks: Any) -> str:
    with pytest.raises(Refused) as caught:
        read(here, list(tasks))
    return str(caught.value)


def one(here: Path, **task: Any) -> Task:
    (found,) = read(here, [{"name": "x", "tag": "regional", **task}]).tasks
    return found


def test_every_kind_is_read(here: Path) -> None:
    kinds = {name: one(here, task=name, data="rows.jsonl", **keys).kind for name, keys in KINDS.items()}
    assert kinds["retrieval"] == Retrieval(("en", "id"), (1, 5), "language")
    assert kinds["classification"] == Classification("y", (("0", "cat"), ("1", "dog")), ("{}", "a {}"))
    assert kinds["multiple_choice"] == MultipleChoice("Q", ("a", "b"), "L", answer_with="text", prompt="{question}")
    assert kinds["vqa"] == Vqa(metric="anls", max_new_tokens=3, prompt="Q: {question}")
    assert kinds["caption_loss"] == CaptionLoss("caption")
    command = one(here, **COMMAND, scale=100, timeout=60, n=7).kind
    assert isinstance(command, Command)
    assert command.arguments == ("python", "e.py", "{model}", "{out}/a b")
    assert (command.read.file, command.read.metric) == ("o.json", "a.b")
    assert (command.scale, command.timeout_s, command.n, command.higher_is_better) == (100, 60, 7, None)


def test_defaults_are_those_of_the_kinds(here: Path) -> None:
    for name, kind in zip(KINDS, (Retrieval, Classification, MultipleChoice, Vqa, CaptionLoss), strict=True):
        assert one(here, task=name, data="rows.jsonl").kind == kind()


def test_data_are_found_beside_the_recipe_and_by_pattern(here: Path) -> None:
    for name in ("b.tar", "a.tar"):
        (here / name).touch()
    keys = {"images": "images", "image": "file", "where": {"c": ["x", 3], "d": True}, "group": "c", "max_broken": 0.1}
    source = one(here, task="retrieval", data="*.tar", **keys).source
    assert source is not None
    assert source.paths == (here / "a.tar", here / "b.tar")
    assert (source.images, source.image, source.group, source.limit) == (here / "images", "file", ("c",), None)
    assert source.where == {"c": ("x", "3"), "d": ("True",)}
    assert source.max_broken == 0.1
    text_only = one(here, task="vqa", data=["rows.jsonl", "a.tar"], image=False).source
    assert text_only is not None and text_only.image is None and len(text_only.paths) == 2


def test_a_mapping_says_how_to_run_them(here: Path) -> None:
    tasks = [{**ROWS, "task": "retrieval"}]
    found = read(here, {"tasks": tasks, "batch_size": 4, "device": "cuda", "dtype": "bfloat16"})
    assert (found.batch_size, found.device, found.dtype) == (4, "cuda", "bfloat16")
    assert found.tasks == read(here, tasks).tasks


ROW_TASK = {**ROWS, "task": "retrieval"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({**ROW_TASK, "txet": "a"}, "`text`"),
    "key of another kind": ({**ROW_TASK, "templates": ["{}"]}, "`templates` is not a key here"),
    "unknown task": ({**ROWS, "task": "retreival"}, "did you mean `retrieval`?"),
    "no task": (ROWS, "or give a `command`"),
    "unknown tag": ({**ROW_TASK, "tag": "region"}, "did you mean `regional`?"),
    "no tag": ({"name": "x", "task": "vqa", "data": "rows.jsonl"}, "`tag` is missing"),
    "no data": ({"name": "x", "tag": "both", "task": "vqa"}, "`data` is missing"),
    "lost data": ({**ROW_TASK, "data": "lost.csv"}, "no lost.csv beside"),
    "lost images": ({**ROW_TASK, "images": "lost"}, "names nothing that exists"),
    "images that are a file": ({**ROW_TASK, "images": "rows.jsonl"}, "must be a folder"),
    "bad name": ({**ROW_TASK, "name": "../x"}, "cannot be the name of a task"),
    "bad k": ({**ROW_TASK, "k": [1, 0]}, "at least 1"),
    "bad share": ({**ROW_TASK, "max_broken": 2}, "from 0 to 1"),
    "bad condition": ({**ROW_TASK, "where": {"a": {"b": 1}}}, "a condition is a value"),
    "bad template": ({**ROWS, "task": "classification", "templates": ["photo"]}, "one {} for the class"),
    "one class": ({**ROWS, "task": "classification", "classes": ["cat"]}, "at least two"),
    "prompt without question": ({**ROWS, "task": "vqa", "prompt": "why?"}, "has no {question}"),
    "prompt without choices": ({**ROWS, "task": "multiple_choice", "prompt": "{question}"}, "has no {choices}"),
    "generated and normalised": (
        {**ROWS, "task": "multiple_choice", "score_by": "generation", "normalise": "bytes"},
        "no effect on generated answers",
    ),
    "metric": ({**ROWS, "task": "vqa", "metric": "exactmatch"}, "did you mean `exact_match`?"),
    "command without model": ({"name": "x", "tag": "both", **COMMAND, "command": "python e.py"}, "put {model}"),
    "command with open quote": ({"name": "x", "tag": "both", **COMMAND, "command": "a '{model}"}, "mind the quotes"),
    "command without read": ({"name": "x", "tag": "both", "command": "a {model}"}, "`read` is missing"),
    "read without file": ({"name": "x", "tag": "both", **COMMAND, "read": {"metric": "a"}}, "`file` is missing"),
    "read of nothing": ({"name": "x", "tag": "both", **COMMAND, "read": {"file": "a"}}, "exactly one of `metric`"),
    "adapter without task": (
        {"name": "x", "tag": "both", **COMMAND, "adapter": "lmms-eval", "read": {"metric": "acc"}},
        "`task` is missing",
    ),
    "unknown adapter": ({"name": "x", "tag": "both", **COMMAND, "adapter": "lmms_eval"}, "did you mean `lmms-eval` or"),
    "not a mapping": ("x", "must be a mapping"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(("task", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_with_its_line(task: Any, message: str, here: Path) -> None:
    text = refused(here, ROW_TASK | {"name": "fine"}, task)
    assert message in text
    assert "recipe.yaml:" in text


def test_every_problem_is_found_at_once(here: Path) -> None:
    tasks = [task if isinstance(task, str) else {**task, "name": task.get("name")} for task, _ in WRONG.values()]
    text = refused(here, *tasks)
    assert all(message in text for _, message in WRONG.values())


def test_two_tasks_cannot_share_a_name(here: Path) -> None:
    assert "two tasks have the same name" in refused(here, ROW_TASK, ROW_TASK)


def test_a_recipe_without_tasks_is_refused() -> None:
    with pytest.raises(Refused, match="nothing to evaluate"):
        evaluation_of(parse_recipe(HEAD))


def test_reading_tasks_loads_neither_torch_nor_transformers(here: Path) -> None:
    (here / "recipe.yaml").write_text(HEAD + yaml.safe_dump({"evaluate": [ROW_TASK]}))
    code = (
        "import sys; from pathlib import Path; from ggez_merge.recipe import load_recipe\n"
        "from ggez_merge.evaluate.tasks import evaluation_of\n"
        "evaluation_of(load_recipe(Path(sys.argv[1])))\n"
        "print({'torch', 'transformers', 'pyarrow', 'pandas', 'PIL', 'datasets'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(here / "recipe.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
