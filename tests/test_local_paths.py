"""What is published of local paths: enough to tell the inputs apart, and nothing absolute."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.local_paths import short_names, shortened

PART = st.text('ab1 .-_é"|', min_size=1, max_size=3).filter(lambda text: text.strip(" ."))
PATHS = st.lists(st.lists(PART, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)), unique=True)


def report(paths: list[str]) -> dict[str, object]:
    return {"recipe": json.dumps({"models": paths}), "inputs": [{"reference": path} for path in paths]}


@given(PATHS)
def test_distinct_and_not_absolute(paths: list[str]) -> None:
    names = short_names(report(paths))
    assert set(names) == set(paths)
    assert len(set(names.values())) == len(paths)
    assert all(path.endswith(names[path]) and not names[path].startswith("/") for path in paths)


@given(PATHS)
def test_json_keeps_its_shape(paths: list[str]) -> None:
    said = {"parameters": dict.fromkeys(paths, 1), "from": paths}
    names = short_names(report(paths))
    text = json.dumps(said, ensure_ascii=False).encode()
    short = [names[path] for path in paths]
    assert json.loads(shortened(text, names, as_json=True)) == {"parameters": dict.fromkeys(short, 1), "from": short}


@pytest.mark.parametrize(
    ("recipe", "references", "names"),
    [
        ("{output: {path: /data/out}}", ["./tuned", "org/name"], {"/data/out": "out"}),
        ("base_model: /a/base\nmodels: [{model: /b/base}]", [], {"/a/base": "a/base", "/b/base": "b/base"}),
        ("base_model: ~/base", ["/home/me/base"], {"/home/me/base": "base"}),
        ("base_model: C:\\me\\base", [], {"C:\\me\\base": "base"}),
        ("base_model: /", [], {}),
        ("not: [yaml", [], {}),
        (None, [None, 3], {}),
    ],
)
def test_what_counts_as_one(recipe: object, references: list[object], names: dict[str, str]) -> None:
    assert short_names({"recipe": recipe, "inputs": [{"reference": value} for value in references]}) == names


@pytest.mark.parametrize("said", [{}, {"inputs": 3}, {"inputs": [3], "recipe": 3}])
def test_reports_of_another_shape(said: dict[str, object]) -> None:
    assert short_names(said) == {}


def test_one_path_that_begins_another() -> None:
    names = {"/a/b": "b", "/a/b/c": "c"}
    assert shortened(b"/a/b/c and /a/b", names, as_json=False) == b"c and b"


@pytest.mark.parametrize("base", ["org/base@abc", "/home/me/base"])
def test_an_adapter_beside_its_base_is_cut_too(base: str) -> None:
    reference = f"{base}+/home/me/secret/lora"
    said = {"recipe": f"models: [{{model: {reference}}}]", "inputs": [{"reference": reference}]}
    text = json.dumps({**said, "from": f"{base}: weight"}).encode()
    assert b"/home/me" not in shortened(text, short_names(said), as_json=True)


def test_names_that_only_look_alike_are_left_alone() -> None:
    names = {"/model": "model", "/data": "data"}
    text = b"text_encoder/model.safetensors, org/data-llm, https://example.org/data/z, /model-7b, /data_2"
    assert shortened(text, names, as_json=False) == text
    assert shortened(b'"- /model/a.bin\\n/data"', names, as_json=True) == b'"- model/a.bin\\ndata"'
