"""The YAML that a recipe may be written in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Problem, Refused
from ggez_merge.yaml_lines import MAX_BYTES, MAX_DEPTH, Document, parse


def read(text: str) -> Document:
    problems: list[Problem] = []
    (document,) = parse(text, "f", problems)
    assert not problems
    return document


def problems_of(text: str) -> list[Problem]:
    problems: list[Problem] = []
    try:
        parse(text, "f", problems)
    except Refused as refused:
        assert refused.problems == problems
    return problems


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("-0", 0),
        ("-.inf", -float("inf")),
        ("18446744073709551615", 2**64 - 1),
        ("yes", True),
        ("off", False),
        ("On", True),
        ("~", None),
        ("", None),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("'1e-5'", "1e-5"),
        ("!!str 5", "5"),
        ("9" * 5000, "9" * 5000),
        ('"\\u00e9"', "é"),
    ],
)
def test_scalars(written: str, value: object) -> None:
    read_back = read(f"a: {written}").data["a"]
    assert read_back == value
    assert type(read_back) is type(value)


def test_not_a_number() -> None:
    value = read("a: .NaN").data["a"]
    assert value != value


def test_anchors_and_merged_keys() -> None:
    document = read("a: &a {x: 1, y: 2}\nb: *a\nc:\n  <<: *a\n  y: 3\nd: {<<: [{z: 1}, *a], '<<': 5}")
    assert document.data["b"] == {"x": 1, "y": 2}
    assert document.data["c"] == {"y": 3, "x": 1}
    assert document.data["d"] == {"<<": 5, "z": 1, "x": 1, "y": 2}
    assert document.line("c", "y") == 5
    assert document.line("c", "x") == 1


NESTED = "".join(f"{'  ' * depth}a:\n" for depth in range(MAX_DEPTH))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3", 3, "`a` is given twice"),
        ("a:\n  b: 1\n  b: 1", 3, "first at f:2"),
        ("a: 1\n1: 2", 2, "not text"),
        ("a: 1\nno: 2", 2, "not text"),
        ("a: 1\n? [x]\n: 2", 2, "a list or a mapping"),
        ("a: 1\n~: 1", 2, "not text"),
        ("a: 1\nb: !!python/object/apply:os.system [echo]", 2, "not allowed"),
        ("a: 1\nb: !local {x: 1}", 2, "not allowed"),
        ("a: 1\nb: !!binary aGk=", 2, "not allowed"),
        ("a: 1\nb: !!set {x}", 2, "not allowed"),
        ("a: 1\nb: !!int x", 2, "not allowed"),
        ("a: 1\nb: {<<: 1}", 2, "takes a mapping"),
        ('a: 1\nb: "\\0"', 2, "control character"),
        ('a: 1\nb: "\\ud800"', 2, "control character"),
        ('a: 1\nb: "\\UFFFFFFFF"', 2, "out of range"),
        ("a: 1\nb: \x07", 2, "U+0007"),
        ("a: 1\n---\n- b", 3, "not a mapping"),
        ("a: 1\nb: [1", 2, "cannot be read"),
        ("a: 1\n\tb: 2", 2, "cannot be read"),
        ("a: 1\nb: *c", 2, "undefined alias"),
        ("a: 1\nb: &b [*b]", 2, "nested too deeply"),
        ("a: 1\nb: &b {<<: *b}", 2, "nested too deeply"),
        (f"{NESTED}{'  ' * MAX_DEPTH}b: 1", MAX_DEPTH + 1, "nested too deeply"),
        ("a: 1\nb: " + "[" * 100_000, 2, "nested too deeply"),
        (f"%YAML 1.{'1' * 5000}\n---\na: 1", 1, "out of range"),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, line: int, said: str) -> None:
    (problem,) = problems_of(text)
    assert problem.place == f"f:{line}"
    assert said in str(problem)


def test_the_deepest_nesting_allowed() -> None:
    assert read(NESTED).line(*["a"] * MAX_DEPTH) == MAX_DEPTH


@pytest.mark.parametrize(("first", "link"), [("[]", "[{}]"), ("{x: 1}", "{{<<: [{}]}}"), ("{}", "{{<<: [{}]}}")])
def test_aliases_of_aliases_stay_small(first: str, link: str) -> None:
    lines = [f"a0: &a0 {first}"]
    for i in range(7):
        lines.append(f"a{i + 1}: &a{i + 1} " + link.format(", ".join([f"*a{i}"] * 9)))
    (problem,) = problems_of("\n".join(lines))
    assert "too big once its aliases are expanded" in problem.what


def test_a_long_text_repeated_by_aliases_stays_small() -> None:
    text = "x" * (MAX_BYTES // 4)
    assert read(f"a: &a {text}\nb: [*a, *a]").data["b"] == [text, text]
    (problem,) = problems_of(f"a: &a {text}\nb: [*a, *a, *a]")
    assert "too big" in problem.what


@pytest.mark.parametrize("text", ["", "# nothing", "~", "a", "[a]", "1"])
def test_a_document_is_a_mapping(text: str) -> None:
    (problem,) = problems_of(text)
    assert problem.what == "the recipe is not a mapping"
    assert problem.place == "f"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**29), 10**29)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1.-e5on~", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("ab1.-e5on~<:# '\"", min_size=1), plain, max_size=3))
def test_a_dump_reads_back_as_the_same_data(data: dict[str, object]) -> None:
    assert read(Document("f", data, {}).dump()).data == data
