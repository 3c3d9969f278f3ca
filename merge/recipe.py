"""A recipe: the YAML file a user writes, read strictly.

    merge_method: linear
    base_model: google/siglip2-so400m-patch14-384     # path or hub id, with @revision if need be
    models:                                           # or `slices`, or `modules`
      - model: ./siglip2-sea
    parameters: {ratio: 0.75}
    components:
      "*.logit_scale": {ratio: 0}
    output: {path: ./merged, shard_size: 5GB}

The keys mean what they mean in mergekit; `components`, `output`, `nonfinite`, `missing`, `buffers` are ours. Every
problem in the file is found and raised at once. Which parameters a method takes is not known here: the plan checks it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ggez_merge.errors import Problem, Refused
from ggez_merge.parameters import Filtered, Scalar, Value
from ggez_merge.yaml_lines import MAX_BYTES, Document, Where, parse, read_file

__all__ = [
    "Filtered", "ModelReference", "Module", "Output", "Recipe", "Scalar", "Slice", "Source", "Value",
    "load_recipe", "parse_recipe", "resolve_path",
]  # fmt: skip

DEFAULT_SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


# The keys of each kind of mapping in a recipe; and keys that mergekit has there but a merge here does without.
TOP_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "components", "dtype", "out_dtype",
    "tokenizer_source", "chat_template", "nonfinite", "missing", "buffers", "output", "sweep", "evaluate", "select",
)  # fmt: skip
TOP_REFUSED = {
    "tokenizer": "use `tokenizer_source: base`",
    "name": "remove it: it names one of several merges in a file, and this file is a single merge",
}
MODEL_KEYS = ("model", "parameters")
MODEL_REFUSED = {"layer_range": "use `slices`, whose sources have layer ranges"}
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
SLICE_REFUSED = {"residual_weight": "remove it: it does nothing"}
MODULE_KEYS = ("models", "slices", "parameters")
REFERENCE_REFUSED = {
    "lora": "merge the adapter into its base model first, and name the merged model here",
    "override_architecture": "remove it: tensors are matched by name, whatever the architecture",
}


@dataclass(frozen=True)
class ModelReference:
    """A folder, a file or a hub id, and which revision of it."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True)
class Source:
    """One model of a slice: layers a ... b-1 of it, or (layer_range None) all of it."""

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: dict[str, Value]
    where: Where


@dataclass(frozen=True)
class Slice:
    """Models to be merged with each other. Slices are stacked; `models:` is a single slice of whole models."""

    sources: list[Source]
    base_model: ModelReference | None
    parameters: dict[str, Value]
    where: Where


@dataclass(frozen=True)
class Module:
    """A part of the architecture with slices of its own; name None: the whole model, `models` or `slices` on top."""

    name: str | None
    slices: list[Slice]
    parameters: dict[str, Value]
    where: Where


@dataclass(frozen=True)
class Output:
    path: str | None = None
    shard_size_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True)
class Recipe:
    """What a recipe says. dtypes are safetensors tags ("BF16"); `text` is the YAML with the overrides in it."""

    merge_method: str
    modules: list[Module]
    base_model: ModelReference | None
    parameters: dict[str, Value]
    components: dict[str, dict[str, Value]]
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    chat_template: str | None
    nonfinite: Literal["error", "allow"]
    missing: Literal["error", "copy"]
    buffers: Literal["error", "base"]
    output: Output
    path: Path | None
    text: str
    document: Document = field(repr=False, compare=False)

    def line(self, *where: str | int) -> int | None:
        """The 1-based line of a key or list element, or of what encloses it; None for the whole file or a `--set`."""
        return self.document.line(*where)

    def place(self, *where: str | int) -> str:
        """The same for people: "recipe.yaml:12", "recipe.yaml", or the `--set` that wrote it."""
        return self.document.place(*where)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file; see `parse_recipe`."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Refused(Problem("The recipe cannot be read.", str(path), found=error.strerror)) from None
    return parse_recipe(read_file(str(path), raw), path, overrides)


def parse_recipe(text: str, path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as "parameters.ratio=0.4" or 'components."*.bias".weight=0' to it.

    `path` names the file in messages, and its folder is the first place where relative model paths are looked for.
    Raises Refused with every problem found.
    """
    problems: list[Problem] = []
    document = parse(text, "recipe" if path is None else str(path), tuple(overrides), problems)
    reader = _Reader(document, path, problems)
    recipe = reader.recipe(document.dump() if overrides else text)
    if problems:
        raise Refused(problems)
    return recipe


def resolve_path(reference: str, recipe_path: Path | None) -> Path | None:
    """The existing file or folder that `reference` names: looked for beside the recipe, then in the working folder."""
    for folder in ([recipe_path.parent] if recipe_path else []) + [Path()]:
        if os.path.exists(folder / reference):  # unlike Path.exists, never raises
            return folder / reference
    return None


_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(I?)B")


class _Reader:
    """Turns plain data into a Recipe. What is wrong goes to `problems` and is read as absent, so that reading goes on.

    Every method takes the place of a value and the value, where None is an absent key.
    """

    def __init__(self, document: Document, path: Path | None, problems: list[Problem]) -> None:
        self.document = document
        self.path = path
        self.problems = problems

    def refuse(
        self, where: Where, what: str, expected: str | None = None, found: object = None, remedy: str | None = None
    ) -> None:
        shown = None if found is None else _shown(found)
        self.problems.append(Problem(what, self.document.place(*where), None, expected, shown, remedy))

    # The parts of a recipe, from the whole to its leaves.

    def recipe(self, text: str) -> Recipe:
        top = self.mapping((), self.document.data, TOP_KEYS, TOP_REFUSED)
        for key in ("sweep", "evaluate", "select"):  # read by `ggez-merge sweep`
            self.mapping((key,), top.get(key))
        output = self.mapping(("output",), top.get("output"), ("path", "shard_size"))
        return Recipe(
            merge_method=self.text(("merge_method",), self.required((), top, "merge_method")) or "",
            modules=self.modules(top),
            base_model=self.reference(("base_model",), top.get("base_model")),
            parameters=self.parameters(("parameters",), top.get("parameters")),
            components=self.components(top.get("components")),
            dtype=self.dtype(("dtype",), top.get("dtype")),
            out_dtype=self.dtype(("out_dtype",), top.get("out_dtype")),
            tokenizer_source=self.path_text(("tokenizer_source",), top.get("tokenizer_source")),
            chat_template=self.text(("chat_template",), top.get("chat_template")),
            nonfinite="allow" if self.choice(top, "nonfinite", ("error", "allow")) == "allow" else "error",
            missing="copy" if self.choice(top, "missing", ("error", "copy")) == "copy" else "error",
            buffers="base" if self.choice(top, "buffers", ("error", "base")) == "base" else "error",
            output=Output(
                path=self.path_text(("output", "path"), output.get("path")),
                shard_size_bytes=self.shard_size(("output", "shard_size"), output.get("shard_size")),
            ),
            path=self.path,
            text=text,
            document=self.document,
        )

    def modules(self, top: dict[str, Any]) -> list[Module]:
        modules: list[Module] = []
        key = self.exactly_one((), top, ("models", "slices", "modules"))
        if key == "modules":
            for name, value in self.mapping(("modules",), top["modules"], needed=True).items():
                where = ("modules", name)
                module = self.mapping(where, value, MODULE_KEYS, needed=True)
                inner = self.exactly_one(where, module, ("models", "slices"))
                slices = self.slices((*where, inner), module[inner]) if inner else []
                parameters = self.parameters((*where, "parameters"), module.get("parameters"))
                modules.append(Module(name, slices, parameters, where))
        elif key:
            modules.append(Module(None, self.slices((key,), top[key]), {}, (key,)))
        return modules

    def slices(self, where: Where, value: Any) -> list[Slice]:
        """The slices under a `models` or `slices` key."""
        entries = self.elements(where, value)
        if where[-1] == "models":
            sources = [self.source((*where, i), entry, MODEL_KEYS, MODEL_REFUSED) for i, entry in entries]
            return [Slice([source for source in sources if source], None, {}, where)]
        return [self.slice((*where, i), entry) for i, entry in entries]

    def slice(self, where: Where, value: Any) -> Slice:
        entry = self.mapping(where, value, SLICE_KEYS, SLICE_REFUSED, needed=True)
        entries = self.elements((*where, "sources"), self.required(where, entry, "sources"))
        sources = [self.source((*where, "sources", i), source, SOURCE_KEYS, {}) for i, source in entries]
        return Slice(
            sources=[source for source in sources if source],
            base_model=self.reference((*where, "base_model"), entry.get("base_model")),
            parameters=self.parameters((*where, "parameters"), entry.get("parameters")),
            where=where,
        )

    def source(self, where: Where, value: Any, keys: Sequence[str], refused: dict[str, str]) -> Source | None:
        entry = self.mapping(where, value, keys, refused, needed=True)
        if not entry:
            return None
        model = self.reference((*where, "model"), self.required(where, entry, "model"))
        layers = None
        if "layer_range" in keys:
            layers = self.layer_range((*where, "layer_range"), self.required(where, entry, "layer_range"))
        parameters = self.parameters((*where, "parameters"), entry.get("parameters"))
        return Source(model, layers, parameters, where) if model else None

    def components(self, value: Any) -> dict[str, dict[str, Value]]:
        where = ("components",)
        components = {}
        for glob, parameters in self.mapping(where, value).items():
            entry = self.mapping((*where, glob), parameters, needed=True)
            components[glob] = self.parameters((*where, glob), entry)
        return components

    def parameters(self, where: Where, value: Any) -> dict[str, Value]:
        read = {name: self.value((*where, name), given) for name, given in self.mapping(where, value).items()}
        return {name: given for name, given in read.items() if given is not None}

    def value(self, where: Where, value: Any) -> Value | None:
        """A scalar, a gradient, a {filter, value} mapping, or a list of these mappings."""
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            return self.scalar(where, value)
        if value and all(isinstance(step, dict) for step in value):
            return self.filtered(where, value)
        if any(isinstance(step, dict) for step in value):
            expected, remedy = "a list of {filter, value} only", "write a value for all other tensors as {value: ...}"
            self.refuse(where, "A list mixes plain values and filters.", expected, value, remedy)
            return None
        return self.gradient(where, value)

    def filtered(self, where: Where, steps: list[dict[str, Any]]) -> list[Filtered]:
        read: list[Filtered] = []
        for i, step in enumerate(steps):
            here = (*where, i) if len(steps) > 1 else where
            entry = self.mapping(here, step, ("filter", "value"), needed=True)
            name = self.text((*here, "filter"), entry.get("filter"))
            if any(earlier.reaches_all or earlier.filter == name for earlier in read):
                remedy = "remove it, or move it before the filter that takes its tensors"
                self.refuse(here, "This filter is never reached: one before it takes all its tensors.", remedy=remedy)
            given = self.required(here, entry, "value")
            here = (*here, "value")
            value = self.gradient(here, given) if isinstance(given, list) else self.scalar(here, given)
            if value is not None:
                read.append(Filtered(name, value))
        return read

    def gradient(self, where: Where, value: list[Any]) -> list[float] | None:
        numbers = [float(step) for step in value if isinstance(step, int | float) and not isinstance(step, bool)]
        if len(numbers) < max(1, len(value)) or not all(map(math.isfinite, numbers)):
            return self.refuse(where, "A gradient is a list of numbers.", "at least one finite number", value)
        return numbers

    def scalar(self, where: Where, value: Any) -> Scalar | None:
        if isinstance(value, bool | int | str):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        name = next(step for step in reversed(where) if isinstance(step, str))
        expected = "a finite number, true or false, a word, a list of numbers, or a list of {filter, value}"
        return self.refuse(where, f"`{name}` has no usable value.", expected, "nothing" if value is None else value)

    # Leaves.

    def reference(self, where: Where, value: Any) -> ModelReference | None:
        """A model: "path[@revision]" or, as in mergekit, {model: {path, revision}}."""
        if isinstance(value, dict):
            outer = self.mapping(where, value, ("model",), REFERENCE_REFUSED)
            inner = self.required(where, outer, "model")
            where = (*where, "model")
            if isinstance(inner, dict):
                entry = self.mapping(where, inner, ("path", "revision"))
                path = self.path_text((*where, "path"), self.required(where, entry, "path"))
                return ModelReference(path, self.text((*where, "revision"), entry.get("revision"))) if path else None
            value = inner
        text = self.path_text(where, value)
        if text is None or resolve_path(text, self.path):
            return ModelReference(text) if text else None
        path, at, revision = text.rpartition("@")
        if not at:
            path, revision = text, ""
        if "+" in text and not resolve_path(path, self.path):
            what = "A LoRA adapter cannot be applied here, and there is no local model of this name."
            return self.refuse(where, what, "path[@revision]", text, REFERENCE_REFUSED["lora"])
        if not path or (at and not revision):
            return self.refuse(where, "This is not a model reference.", "path[@revision]", text)
        return ModelReference(path, revision or None)

    def path_text(self, where: Where, value: Any) -> str | None:
        """Text in which $VARIABLE, ${VARIABLE} and a leading ~ are expanded."""
        text = self.text(where, value)

        def expand(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in os.environ:
                self.refuse(where, f"The environment variable `{name}` is not set.", found=text, remedy="set it")
            return os.environ.get(name, "")

        return None if text is None else os.path.expanduser(_VARIABLE.sub(expand, text)) or None

    def text(self, where: Where, value: Any) -> str | None:
        if isinstance(value, str) and value:
            return value
        if value is not None:
            remedy = None if isinstance(value, str | dict | list) else "put it in quotes"
            self.refuse(where, f"`{where[-1]}` must be text.", "text", value, remedy)
        return None

    def choice(self, section: dict[str, Any], key: str, choices: Sequence[str]) -> str | None:
        value = section.get(key)
        if value is None or value in choices:
            return value
        self.refuse((key,), f"`{key}` must be one of {_listed(choices)}.", found=value, remedy=_nearest(value, choices))
        return None

    def dtype(self, where: Where, value: Any) -> str | None:
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name is None or (isinstance(name, str) and name in DTYPES):
            return None if name is None else DTYPES[name]
        remedy = "remove it: integers cannot hold merged weights" if name == "int64" else _nearest(name, DTYPES)
        return self.refuse(where, f"`{where[-1]}` must be one of {_listed(DTYPES)}.", found=value, remedy=remedy)

    def layer_range(self, where: Where, value: Any) -> tuple[int, int] | None:
        if isinstance(value, list) and len(value) == 2 and all(type(layer) is int for layer in value):
            if 0 <= value[0] < value[1]:
                return value[0], value[1]
        if value is not None:
            expected = "[first, end] with 0 <= first < end; layer `end` is not included"
            self.refuse(where, "This is not a range of layers.", expected, value)
        return None

    def shard_size(self, where: Where, value: Any) -> int:
        if value is None:
            return DEFAULT_SHARD_BYTES
        size = value if type(value) is int else 0
        if isinstance(value, str) and (match := _SIZE.fullmatch(value.upper())):
            number, prefix, binary = match.groups()
            size = round(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix or " ")))
        if size < 1000:
            self.refuse(where, "This is not a shard size.", '"5GB", "500MiB", or bytes; at least 1 KB', value)
        return size

    # Mappings and lists.

    def mapping(
        self,
        where: Where,
        value: Any,
        keys: Sequence[str] | None = None,
        refused: dict[str, str] | None = None,
        needed: bool = False,
    ) -> dict[str, Any]:
        """A mapping; if its `keys` are known, without those that are null. Empty if it is absent or wrong."""
        if value is None and not needed:
            return {}
        if not isinstance(value, dict) or (needed and not value):
            expected = "a mapping" + (f" with the keys {_listed(keys)}" if keys else "")
            shown = "nothing" if value is None else value
            self.refuse(where, f"{_named(where)} must be a mapping.", expected, shown)
            return {}
        if keys is None:
            return value
        for key in value:
            if refused and key in refused:
                self.refuse((*where, key), f"`{key}` is not supported here.", remedy=refused[key])
            elif key not in keys:
                remedy = _nearest(key, keys)
                if remedy is None and "parameters" in keys:
                    remedy = "if it is a parameter of the merge method, put it under `parameters`"
                self.refuse((*where, key), f"`{key}` is not a key here.", f"one of {_listed(keys)}", remedy=remedy)
        return {key: given for key, given in value.items() if key in keys and given is not None}

    def elements(self, where: Where, value: Any) -> list[tuple[int, Any]]:
        """The elements of a list with their positions; it must have some."""
        if isinstance(value, list) and value:
            return list(enumerate(value))
        if value is not None:
            self.refuse(where, f"`{where[-1]}` must be a list of at least one element.", found=value)
        return []

    def required(self, where: Where, section: dict[str, Any], key: str) -> Any:
        if key not in section:
            self.refuse(where, f"`{key}` is missing.")
        return section.get(key)

    def exactly_one(self, where: Where, section: dict[str, Any], keys: Sequence[str]) -> str | None:
        given = [key for key in keys if key in section]
        if len(given) != 1:
            here = (*where, given[1]) if given else where
            self.refuse(here, f"Exactly one of {_listed(keys)} must be given.", found=_listed(given) or "none of them")
        return given[0] if given else None


def _named(where: Where) -> str:
    return f"`{where[-1]}`" if where and isinstance(where[-1], str) else "An element"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _nearest(word: object, words: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
