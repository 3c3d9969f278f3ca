"""YAML that remembers its lines: small documents, read strictly, and `--set` overrides on top of them.

Only plain data is understood: mappings with text keys, lists, text, numbers, true/false and null. Anchors,
aliases and `<<` work; tags that build objects do not. Plain `yes`, `no`, `on`, `off` are truth values, as in
YAML 1.1; but `1e-5` is a number (to PyYAML it is text), and `010`, `12:30` and dates are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from ggez_merge.errors import Problem, Refused
from ggez_merge.untrusted import printable

Where = tuple[str | int, ...]  # the way from the top to a key or a list element: ("models", 0, "parameters")

MAX_BYTES = 1 << 20  # of the file, and of what it says once aliases are expanded
_VALUE_BYTES = 8  # what a key, a value or an element counts for, besides its text
MAX_DEPTH = 32
_DEPTH = f"at most {MAX_DEPTH} levels"
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and half characters; not tab and newline

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)\Z"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,29})\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    "merge": re.compile(r"<<\Z"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - not the parent's


class _Dumper(yaml.SafeDumper):
    """Quotes what either PyYAML or `_Loader` would not read back as the same text."""


for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, None)


@dataclass(frozen=True)
class Document:
    """Plain data, and where each part of it was written; `source` is its text, without what stands around it.

    Of several in one file, `lines` has the first line of the document under ().
    """

    name: str
    data: dict[str, Any]
    lines: dict[Where, int]
    overrides: dict[Where, str] = field(default_factory=dict)
    source: str = ""

    def line(self, *where: str | int) -> int | None:
        """The 1-based line of a key or element, or of what encloses it; None: whole file, or a `--set`."""
        source = self._source(where)
        return source if isinstance(source, int) else None

    def place(self, *where: str | int) -> str:
        """Where a key or element was written, for people: "recipe.yaml:12", or the `--set` that wrote it."""
        source = self._source(where)
        if source is None:
            return self.name
        return f"{self.name}:{source}" if isinstance(source, int) else source

    def _source(self, where: Where) -> int | str | None:
        for length in range(len(where), -1, -1):
            source = self.overrides.get(where[:length], self.lines.get(where[:length]))
            if source is not None:
                return source
        return None

    @property
    def text(self) -> str:
        """This document alone: as it was written or, if it is no longer that, as `dump` has it."""
        return self.dump() if self.overrides else self.source

    def dump(self) -> str:
        """The data as YAML, overrides included; comments and layout are lost."""
        return yaml.dump(self.data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def decode(name: str, raw: bytes) -> str:
    """The text of a recipe file. Refuses what is too big or not UTF-8."""
    if len(raw) > MAX_BYTES:
        raise Refused(Problem("the recipe is too big", name, expected=f"at most {MAX_BYTES} bytes"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x}"
        problem = Problem("the recipe is not UTF-8", f"{name}:{line}", found=found, remedy="save it as UTF-8")
        raise Refused(problem) from None


def parse(text: str, name: str, problems: list[Problem]) -> list[Document]:
    """Reads YAML mappings, one a document, with `---` between them; what is empty among several is passed over.

    What can be passed over (a duplicate key) goes to `problems`; raises Refused with all of them when there is no
    mapping to go on with.
    """
    loaded = _load(text, lambda line: f"{name}:{line}", problems)
    given = [each for each in loaded if each[0] is not None] or loaded[:1]
    documents = []
    for data, lines, source in given:
        place = f"{name}:{lines[()]}" if len(given) > 1 else name
        if isinstance(data, dict):
            own = lines if len(given) > 1 else {where: line for where, line in lines.items() if where}
            documents.append(Document(name, data, own, source=source))
            continue
        found = "nothing" if data is None else "a list" if isinstance(data, list) else "a single value"
        expected = "keys and values, such as `merge_method: linear`"
        problems.append(Problem("the recipe is not a mapping", place, expected=expected, found=found))
    if len(documents) < max(len(given), 1):
        raise Refused(problems)
    return documents


Loaded = tuple[Any, dict[Where, int], str]  # of one document: data, lines, text


def _load(text: str, place: Callable[[int], str], problems: list[Problem]) -> list[Loaded]:
    """All documents of a text, at least one (of nothing)."""
    builder = _Builder(place, problems)
    documents: list[Loaded] = []
    try:
        # Nodes are text with tags; nothing of PyYAML that makes Python objects from them is ever called.
        loader = _Loader(text)
        while loader.check_node() and (node := loader.get_node()) is not None:
            builder.lines = {(): _line(node)}
            documents.append((builder.build(node, ()), builder.lines, _source(text, node)))
        return documents or [(None, {(): 1}, "")]
    except RecursionError:
        problem = Problem("the YAML is nested too deeply", place(loader.line + 1), expected=_DEPTH)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"the character U+{ord(text[error.position]):04X}"
        problem = Problem("the YAML cannot be read: a character is not text", place(line), found=found)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        said = ", ".join(part for part in (error.context, error.problem) if part)
        problem = Problem(f"the YAML cannot be read: {said}", place(line))
    except (ValueError, OverflowError):  # raised where PyYAML reads an escape or a version number
        problem = Problem("the YAML cannot be read: a number in it is out of range", place(loader.line + 1))
    problems.append(problem)
    raise Refused(problems)


def _source(text: str, node: yaml.Node) -> str:
    """The text of a document, from the indentation of its first line on."""
    begin = int(node.start_mark.index)
    indentation = len(text[:begin]) - len(text[:begin].rstrip(" "))
    return text[begin - indentation : int(node.end_mark.index)].rstrip() + "\n"


class _Builder:
    """Plain data from YAML nodes: notes the line of every key, and puts what it cannot use in `problems`."""

    def __init__(self, place: Callable[[int], str], problems: list[Problem]) -> None:
        self.place = place
        self.problems = problems
        self.lines: dict[Where, int] = {}
        self.size = 0

    def refuse(self, node: yaml.Node, what: str, **fields: str) -> None:
        self.problems.append(Problem(what, self.place(_line(node)), **fields))

    def stop(self, node: yaml.Node, what: str, expected: str) -> NoReturn:
        self.refuse(node, what, expected=expected)
        raise Refused(self.problems)

    def spend(self, node: yaml.Node, size: int) -> None:
        """Aliases of aliases grow exponentially, so what they grow to is counted: also where it is empty."""
        self.size += size
        if self.size > MAX_BYTES:
            expected = f"at most {MAX_BYTES} bytes"
            self.stop(node, "the YAML is too big once its aliases are expanded", expected)

    def build(self, node: yaml.Node, where: Where) -> Any:
        if len(where) > MAX_DEPTH:
            self.stop(node, "the YAML is nested too deeply", _DEPTH)
        self.spend(node, _VALUE_BYTES)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            self.lines |= {(*where, i): _line(item) for i, item in enumerate(node.value)}
            return [self.build(item, (*where, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, where)
        return self.refuse(node, f"the tag `{node.tag}` is not allowed", remedy="write plain values")

    def mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value, inherited in self.pairs(node):
            name = self.scalar(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                found = printable(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                self.refuse(key, "a key is not text", found=found, remedy="put it in quotes")
            elif name not in data:
                self.lines[(*where, name)] = _line(key)
                data[name] = self.build(value, (*where, name))
            elif not inherited:
                first = self.place(self.lines[(*where, name)])
                self.refuse(key, f"`{printable(name)}` is given twice", found=f"first at {first}")
        return data

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node, bool]]:
        """(key, value, inherited): the mapping's own pairs, then those of the mappings under its `<<`."""
        parents: list[yaml.Node] = []
        for key, value in node.value:
            self.spend(key, _VALUE_BYTES)
            if key.tag != _TAG + "merge":
                yield key, value, False
            else:
                parents += value.value if isinstance(value, yaml.SequenceNode) else [value]
        for parent in parents:
            if isinstance(parent, yaml.MappingNode):
                yield from ((key, value, True) for key, value, _ in self.pairs(parent))
            else:
                self.refuse(parent, "`<<` takes a mapping or a list of mappings")

    def scalar(self, node: yaml.ScalarNode) -> bool | int | float | str | None:
        text: str = node.value
        self.spend(node, len(text))
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "merge"):
            if _CONTROL.search(text):
                self.refuse(node, "the text holds a control character", found=printable(text))
            return text
        if kind not in _SCALARS or not _SCALARS[kind].match(text):
            self.refuse(node, f"the tag `{node.tag}` is not allowed", remedy="write plain values")
        elif kind == "bool":
            return text.lower() in ("yes", "true", "on")
        elif kind == "int":
            return int(text.replace("_", ""))
        elif kind == "float":
            return float(re.sub(r"_|\.(?=[in])", "", text.lower()))  # .inf and .nan are inf and nan to Python
        return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


_STEP = re.compile(r"""(?: "([^"]+)" | '([^']+)' | ([^."'=]+) ) ([.=])""", re.VERBOSE)


def keys_of(given: str) -> tuple[list[str], int]:
    """The keys before the `=` of an override, and where its value begins; no keys if it is none."""
    keys: list[str] = []
    position = 0
    while match := _STEP.match(given, position):
        keys.append(match[1] or match[2] or match[3])
        position = match.end()
        if match[4] == "=":
            return keys, position
    return [], 0


def override(document: Document, given: str, place: str, problems: list[Problem]) -> None:
    """Sets one value in the document, "models.0.parameters.weight=0.3"; keys with a dot in them go in quotes.

    Mappings on the way are made when missing; list elements are not. `place` is what is said of where it stands.
    """

    def refuse(what: str, **fields: str) -> None:
        problems.append(Problem(what, place, **fields))

    keys, position = keys_of(given)
    if not keys:
        return refuse("this is not an override", expected='key.key=value; keys with dots in quotes: "a.b".c=1')
    known = len(problems)
    values: list[Loaded] = []
    with suppress(Refused):  # which is in `problems`
        values = _load(given[position:], lambda line: place, problems)
    if len(problems) > known:
        return None
    if len(values) > 1:
        return refuse("this is more than one value", found="several YAML documents")
    value = values[0][0]

    target: Any = document.data
    where: Where = ()
    for i, key in enumerate(keys):
        name = ".".join(keys[:i])
        step: str | int = key
        if isinstance(target, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(target):
                return refuse(f"`{name}` has no element {key}", found=f"{len(target)} of them, from 0")
            step = int(key)
        elif not isinstance(target, dict):
            return refuse(f"`{name}` is a single value: it has no `{key}`", found=printable(str(target)))
        where = (*where, step)
        if i == len(keys) - 1:
            target[step] = value
        else:
            if (isinstance(target, dict) and step not in target) or target[step] is None:
                target[step] = {}
                document.overrides[where] = place
            target = target[step]
    written: dict[Where, Any]
    for written in (document.lines, document.overrides):
        for old in [old for old in written if old[: len(where)] == where]:
            del written[old]
    document.overrides[where] = place
