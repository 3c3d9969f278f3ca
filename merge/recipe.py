"""A recipe: the YAML file a user writes, read strictly.

    merge_method: linear
    base_model: google/siglip2-so400m-patch14-384     # path or hub id, with @revision if need be
    models:                                           # or `slices`, or `modules`
      - model: ./siglip2-sea
    parameters: {ratio: 0.75}
    components:
      "*.logit_scale": {ratio: 0}
    output: {path: ./merged, shard_size: 5GB}

Keys mean what they mean in mergekit, which has no `components`, `output`, `nonfinite`, `missing`, `buffers`.
Several documents in one file are stages of one merge (chain.py). Every problem in the file is found and raised at
once. Which parameters a method takes is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggez_merge.chain import NAME, Link, Use, ordered, override_all
from ggez_merge.check import Check, listed, nearest
from ggez_merge.errors import Problem, Refused
from ggez_merge.parameters import Filtered, Scalar, Value, read_parameters
from ggez_merge.reference import ModelReference, read_path, read_reference, resolve_path
from ggez_merge.tokenizer import Tokenizer, read_tokenizer
from ggez_merge.units import parse_bytes
from ggez_merge.yaml_lines import MAX_BYTES, Document, Where, decode, parse

__all__ = [
    "Filtered",
    "ModelReference",
    "Module",
    "Output",
    "Recipe",
    "Scalar",
    "Slice",
    "Source",
    "Value",
    "load_recipe",
    "needed",
    "parse_recipe",
    "references",
    "resolve_path",
]

DEFAULT_SHARD_BYTES = 5_000_000_000
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}

# The keys of each kind of mapping, and mergekit's keys that are refused there, each with what to do about it.
SWEEP_KEYS = ("sweep", "evaluate", "select")  # for `ggez-merge sweep`; a merge passes over them
RECIPE_KEYS = (
    *("name", "merge_method", "base_model", "models", "slices", "modules", "parameters", "components"),
    *("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template"),
    *("nonfinite", "missing", "buffers", "output"),
    *SWEEP_KEYS,
)
MODEL_KEYS = ("model", "parameters")
MODEL_UNSUPPORTED = {
    "layer_range": "use `slices`, whose sources have layer ranges",
    "adapter": "write `model: {adapter: …}`",
    "lora": "write `model: {adapter: …}`",
}
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
SLICE_UNSUPPORTED = {"residual_weight": "remove it: it does nothing"}
MODULE_KEYS = ("models", "slices", "parameters")
OUTPUT_KEYS = ("path", "shard_size")


@dataclass(frozen=True)
class Source:
    """One model of a slice: layers a ... b-1 of it, or (layer_range None) all of it."""

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: dict[str, Value]
    where: Where


@dataclass(frozen=True)
class Slice:
    """Models to be merged with each other. Slices are stacked; `models` is a single slice of whole models."""

    sources: list[Source]
    base_model: ModelReference | None
    parameters: dict[str, Value]
    where: Where


@dataclass(frozen=True)
class Module:
    """A part of the architecture and its slices. name None: all of it, by `models` or `slices` on top."""

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
    """What a recipe says. dtypes are safetensors tags ("BF16"); `text` is the YAML, overrides applied.

    `stages` are the other documents that it needs, each after those that it needs itself; `text` has them too.
    """

    name: str | None
    merge_method: str
    modules: list[Module]
    base_model: ModelReference | None
    parameters: dict[str, Value]
    components: dict[str, dict[str, Value]]
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    nonfinite: str  # "error" or "allow"
    missing: str  # "error" or "copy"
    buffers: str  # "error" or "base"
    output: Output
    path: Path | None
    text: str
    document: Document = field(repr=False, compare=False)
    stages: tuple[Recipe, ...] = ()

    def line(self, *where: str | int) -> int | None:
        """The 1-based line of a key or element, or of what encloses it; None: whole file, or a `--set`."""
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
        raise Refused(Problem("the recipe cannot be read", str(path), found=error.strerror)) from None
    return parse_recipe(decode(str(path), raw), path, overrides)


def parse_recipe(text: str, path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides to it: 'parameters.ratio=0.4', 'components."*.bias".weight=0'.

    `path` names the file in messages, and its folder is where relative paths are looked for first.
    Raises Refused with every problem found.
    """
    problems: list[Problem] = []
    documents = parse(text, "recipe" if path is None else str(path), problems)
    override_all(documents, overrides, problems)
    recipes = [_read(Check(document, path, problems)) for document in documents]
    written = [resolve_path(recipe.output.path, path) for recipe in recipes if recipe.output.path]
    order = ordered([_link(recipe, written) for recipe in recipes], problems)
    for recipe in (recipes[number] for number in order[:-1]):
        if recipe.output.path is None and recipe.output != Output():
            what, remedy = "this document is not written, so it has no files", "remove `output`, or add its `path`"
            problems.append(Problem(what, recipe.place("output"), remedy=remedy))
    if problems:
        raise Refused(problems)
    chain: dict[str | None, Recipe] = {}
    for number in order:
        recipe = recipes[number]
        stages = needed(recipe, [*chain.values()])
        said = "---\n".join(each.document.text for each in (*stages, recipe))
        if number == order[-1] and not overrides:
            said = text
        chain[recipe.name] = replace(recipe, stages=tuple(stages), text=said)
    return chain[recipes[order[-1]].name]


def references(recipe: Recipe) -> list[tuple[ModelReference, Where]]:
    """Every model the recipe names, with the place of its name, in order, base first."""
    found: list[tuple[ModelReference, Where]] = []
    if recipe.base_model:
        found.append((recipe.base_model, ("base_model",)))
    for module in recipe.modules:
        for piece in module.slices:
            if piece.base_model:
                found.append((piece.base_model, (*piece.where, "base_model")))
            found.extend((source.model, (*source.where, "model")) for source in piece.sources)
    return found


def needed(recipe: Recipe, stages: Sequence[Recipe], there: Collection[str | None] = ()) -> list[Recipe]:
    """Those of the stages that a recipe needs, itself or for one of them that is not `there` yet, in their order."""
    names: set[str | None] = {reference.path for reference, _ in references(recipe)}
    for stage in reversed(stages):
        if stage.name in names and stage.name not in there:
            names |= {reference.path for reference, _ in references(stage)}
    return [stage for stage in stages if stage.name in names]


def _link(recipe: Recipe, written: Collection[Path | None]) -> Link:
    """What a document's place in a chain depends on; written: the folders that the documents write, as far as there."""

    def use(reference: ModelReference, where: Where) -> Use:
        there = any(resolve_path(name, recipe.path) for name in (reference.path, str(reference)))
        return Use(reference.path, reference.revision, there, recipe.place(*where))

    namesake = resolve_path(recipe.name, recipe.path) if recipe.name else None
    return Link(
        name=recipe.name,
        place=recipe.place("name"),
        namesake=str(namesake) if namesake and namesake not in written else None,
        uses=tuple(use(*found) for found in references(recipe)),
    )


def _read(check: Check) -> Recipe:
    top = check.mapping((), check.document.data, RECIPE_KEYS)
    for key in SWEEP_KEYS:
        if not (key == "evaluate" and isinstance(top.get(key), list)):  # it may be the list of its tasks
            check.mapping((key,), top.get(key))
    output = check.mapping(("output",), top.get("output"), OUTPUT_KEYS)
    check.required((), top, "merge_method")
    return Recipe(
        name=_name(check, top.get("name")),
        merge_method=check.text(("merge_method",), top.get("merge_method")) or "",
        modules=_modules(check, top),
        base_model=read_reference(check, ("base_model",), top.get("base_model")),
        parameters=read_parameters(check, ("parameters",), top.get("parameters")),
        components={
            glob: read_parameters(check, ("components", glob), check.mapping(("components", glob), values, needed=True))
            for glob, values in check.mapping(("components",), top.get("components")).items()
        },
        dtype=_dtype(check, ("dtype",), top.get("dtype")),
        out_dtype=_dtype(check, ("out_dtype",), top.get("out_dtype")),
        tokenizer=read_tokenizer(check, top),
        chat_template=check.text(("chat_template",), top.get("chat_template")),
        nonfinite=check.choice(("nonfinite",), top.get("nonfinite"), ("error", "allow"), absent="error"),
        missing=check.choice(("missing",), top.get("missing"), ("error", "copy"), absent="error"),
        buffers=check.choice(("buffers",), top.get("buffers"), ("error", "base"), absent="error"),
        output=Output(
            path=read_path(check, ("output", "path"), output.get("path")),
            shard_size_bytes=_shard_size_bytes(check, ("output", "shard_size"), output.get("shard_size")),
        ),
        path=check.path,
        text=check.document.text,
        document=check.document,
    )


def _name(check: Check, value: Any) -> str | None:
    name = check.text(("name",), value)
    if name is not None and not NAME.fullmatch(name):
        expected = "letters, digits, `_`, `-` and `.`, none of the last two in front"
        check.refuse(("name",), "this cannot be the name of a document", expected, name)
        return None
    return name


def _modules(check: Check, top: dict[str, Any]) -> list[Module]:
    key = check.exactly_one((), top, ("models", "slices", "modules"))
    if key is None:
        return []
    if key != "modules":
        return [Module(None, _slices(check, (key,), top[key]), {}, (key,))]
    modules = check.mapping(("modules",), top["modules"], needed=True)
    return [_module(check, ("modules", name), name, value) for name, value in modules.items()]


def _module(check: Check, where: Where, name: str, value: Any) -> Module:
    entry = check.mapping(where, value, MODULE_KEYS, needed=True)
    key = check.exactly_one(where, entry, ("models", "slices"))
    slices = _slices(check, (*where, key), entry[key]) if key else []
    return Module(name, slices, read_parameters(check, (*where, "parameters"), entry.get("parameters")), where)


def _slices(check: Check, where: Where, value: Any) -> list[Slice]:
    """The slices under a `slices` key, or the single one of whole models that a `models` key stands for."""
    elements = check.elements(where, value)
    if where[-1] == "slices":
        return [_slice(check, here, element) for here, element in elements]
    sources = [_source(check, here, element, MODEL_KEYS, MODEL_UNSUPPORTED) for here, element in elements]
    return [Slice([source for source in sources if source], None, {}, where)]


def _slice(check: Check, where: Where, value: Any) -> Slice:
    entry = check.mapping(where, value, SLICE_KEYS, SLICE_UNSUPPORTED, needed=True)
    check.required(where, entry, "sources")
    elements = check.elements((*where, "sources"), entry.get("sources"))
    sources = [_source(check, here, element, SOURCE_KEYS, {}) for here, element in elements]
    return Slice(
        sources=[source for source in sources if source],
        base_model=read_reference(check, (*where, "base_model"), entry.get("base_model")),
        parameters=read_parameters(check, (*where, "parameters"), entry.get("parameters")),
        where=where,
    )


def _source(
    check: Check, where: Where, value: Any, keys: Sequence[str], unsupported: Mapping[str, str]
) -> Source | None:
    entry = check.mapping(where, value, keys, unsupported, needed=True)
    for key in keys:
        if entry and key != "parameters":
            check.required(where, entry, key)
    model = read_reference(check, (*where, "model"), entry.get("model"))
    layer_range = _layer_range(check, (*where, "layer_range"), entry.get("layer_range"))
    parameters = read_parameters(check, (*where, "parameters"), entry.get("parameters"))
    return Source(model, layer_range, parameters, where) if model else None


def _layer_range(check: Check, where: Where, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and len(value) == 2 and all(type(layer) is int for layer in value)
    if whole and 0 <= value[0] < value[1]:
        return value[0], value[1]
    check.refuse(where, "this is not a range of layers", "[first, end] with 0 <= first < end, end excluded", value)
    return None


def _dtype(check: Check, where: Where, value: Any) -> str | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        remedy = "remove it: integers cannot hold merged weights" if name == "int64" else nearest(name, DTYPES)
        check.refuse(where, f"`{where[-1]}` must be one of {listed(DTYPES)}", None, value, remedy)
    return DTYPES.get(name)


def _shard_size_bytes(check: Check, where: Where, value: Any) -> int:
    if value is None:
        return DEFAULT_SHARD_BYTES
    size_bytes = parse_bytes(str(value)) if isinstance(value, (int, str)) else None
    if size_bytes is None or size_bytes < 1000:
        check.refuse(where, "this is not a shard size", '"5GB", "500MiB" or bytes; at least 1 KB', value)
        return DEFAULT_SHARD_BYTES
    return size_bytes
