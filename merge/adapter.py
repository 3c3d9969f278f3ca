"""A PEFT adapter folder, read and checked: adapter_config.json says how, adapter_model.safetensors (or .bin) what.

Its tensors are named after the modules of the model in memory, `base_model.model.<module>.lora_A.weight`, and none of
them may be left over: what is not understood is refused by name, for a merge without it would be another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ggez_merge.checkpoint import FLOATS, ShardFile, Tensor, read_shard_header
from ggez_merge.errors import Problem, Refused
from ggez_merge.layout import ADAPTER_CONFIG, ADAPTER_OUTSIDE, ADAPTER_WEIGHTS, holds_adapter
from ggez_merge.names import grouped
from ggez_merge.torch_bin import read_bin_header
from ggez_merge.untrusted import printable, read_json_bytes, strict_json

BY_PEFT = "load base and adapter with PEFT, merge_and_unload() and save_pretrained() them, and name that folder here"

# What PEFT can do besides, each as its config names it, and why W + s·BA would not be the model that it means.
_OTHERWISE = {
    "trainable_token_indices": "rows of the embeddings that are trained by themselves",
    "target_parameters": "parameters of stacked experts",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "an adapter that is switched on by tokens, which no merged weight can be",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router among adapters",
    "kasa_config": "KaSA, which changes the base's weights as well",
    "monteclora_config": "MonteCLoRA's sampled factors",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that subtract B·A from the base
_LEAF = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<bias>\.bias)?(?:\.weight)?"
)
_SAVED_WHOLE = re.compile(r"\.(modules_to_save\.[^.]+|base_layer)(?=\.)")
_PREFIX = "base_model.model."


Number = TypeVar("Number", int, float)


@dataclass
class Factors:
    """The tensors of one module: delta = scale · B A. `embedding`: of token rows, and so transposed."""

    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of the arithmetic; `base` is where PEFT would look for the base, `revision` of it.

    `rank` and `alpha` hold for modules that no pattern fits.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    transposed: bool
    base: str | None
    revision: str | None

    def rank_of(self, module: str) -> int:
        return _fitting(self.rank_pattern, module, self.rank)

    def scale(self, module: str) -> float:
        """alpha / r, or with rsLoRA (arXiv 2312.03732) alpha / sqrt(r); each by the first pattern that fits."""
        rank = self.rank_of(module)
        return _fitting(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class Adapter:
    """`modules` by the names that the model has in memory; `whole` are tensors that take the place of the base's."""

    reference: str
    folder: Path
    file: ShardFile
    settings: Settings
    modules: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and holds_adapter(path.name for path in folder.iterdir())


def read_adapter(folder: Path, reference: str) -> Adapter:
    """An adapter from its folder; headers only. Raises Refused with every problem found."""
    problems: list[Problem] = []
    settings = _settings(folder, problems)
    if settings is None:
        raise Refused(problems)
    if (folder / ADAPTER_OUTSIDE).exists():
        what = "the adapter comes with weights that PEFT did not save, in a format of its trainer's own"
        remedy = "merge it with the code that trained it, and name the merged model here"
        problems.append(Problem(what, str(folder), None, None, ADAPTER_OUTSIDE, remedy))
    path = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if path is None:
        problems.append(
            Problem("the adapter's weights are not there", str(folder), expected=" or ".join(ADAPTER_WEIGHTS))
        )
    if problems or path is None:
        raise Refused(problems)
    table, file = _read_header(path)
    adapter = Adapter(reference, folder, file, settings)
    names: set[str] = set()
    strange = []
    for tensor in table:
        name = tensor.name.removeprefix(_PREFIX)
        leaf = _LEAF.fullmatch(name)
        if leaf:
            names.add(leaf["adapter"] or "")
            _place(adapter.modules.setdefault(leaf["module"].replace(".base_layer", ""), Factors()), leaf, tensor)
        elif re.search(r"(^|\.)(lora_|trainable_tokens|token_adapter|prompt_)", name):
            strange.append(tensor.name)
        else:
            adapter.whole[_SAVED_WHOLE.sub("", name)] = tensor
    if strange:
        what = "the adapter holds tensors that are none of LoRA's A and B"
        problems.append(Problem(what, str(path), printable(grouped(strange)), remedy=BY_PEFT))
    if len(names) > 1:
        found = printable(", ".join(sorted(names)))
        problems.append(Problem("one file holds several adapters", str(path), None, "one", found, "save each alone"))
    problems.extend(_faults(adapter))
    if problems:
        raise Refused(problems)
    return adapter


def _read_header(path: Path) -> tuple[list[Tensor], ShardFile]:
    if path.suffix == ".bin":
        return read_bin_header(path)
    table, _, file = read_shard_header(path)
    return table, file


def _place(factors: Factors, leaf: re.Match[str], tensor: Tensor) -> None:
    kind = leaf["kind"]
    if leaf["bias"]:
        factors.bias = tensor
    elif kind == "lora_magnitude_vector":
        factors.magnitude = tensor
    else:
        factors.embedding = "embedding" in kind
        setattr(factors, "a" if kind.endswith("A") else "b", tensor)


def _faults(adapter: Adapter) -> Iterable[Problem]:
    place = str(adapter.file.path)
    if not adapter.modules and not adapter.whole:
        yield Problem("the adapter holds no tensors", place)
    for module, factors in adapter.modules.items():
        a, b = factors.a, factors.b
        if a is None or b is None:
            found = "lora_A" if a else "lora_B" if b else "neither"
            yield Problem("half of an adapter's pair is missing", place, printable(module), "lora_A and lora_B", found)
            continue
        rank = adapter.settings.rank_of(module)
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        others = [each for each in (factors.magnitude, factors.bias) if each]
        if {each.dtype for each in (a, b, *others)} - FLOATS:
            yield Problem("the adapter is not in floats", place, printable(module), ", ".join(sorted(FLOATS)), a.dtype)
        elif len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != rank or b.shape[1] != rank or not a.numel * b.numel:
            yield Problem(
                "the adapter's tensors do not have the rank that its config says",
                place=place,
                tensor=printable(module),
                expected=f"A [{rank}, in], B [out, {rank}]",
                found=shapes,
                remedy="gather sharded parameters before saving it, or put its own adapter_config.json beside it",
            )
        elif len(b.shape) != len(a.shape) or any(size != 1 for size in b.shape[2:]):
            yield Problem("an adapter of this form is unknown", place, printable(module), None, shapes, BY_PEFT)
        elif (factors.magnitude is not None) != adapter.settings.dora:
            said = f"use_dora: {str(adapter.settings.dora).lower()}"
            found = "magnitudes" if factors.magnitude else "no magnitudes"
            yield Problem("config and tensors of the adapter disagree", place, printable(module), said, found)
        elif factors.magnitude and factors.magnitude.numel != b.shape[0]:
            found = str(list(factors.magnitude.shape))
            yield Problem("one magnitude for each output is needed", place, printable(module), str(b.shape[0]), found)
        elif factors.bias and factors.bias.shape != b.shape[:1]:
            yield Problem("one bias for each output is needed", place, printable(module), None, str(factors.bias.shape))


# --- adapter_config.json ----------------------------------------------------------------------------------------------


def _settings(folder: Path, problems: list[Problem]) -> Settings | None:
    """None with a problem if there is no telling what the adapter does."""
    path = folder / ADAPTER_CONFIG
    try:
        config = strict_json(read_json_bytes(path))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        problems.append(_no_adapter(folder))
        return None
    except (OSError, ValueError) as error:
        problems.append(
            Problem(f"{ADAPTER_CONFIG} cannot be read: {error}", str(path), remedy="download or save it again")
        )
        return None
    kind = config.get("peft_type")
    if kind != "LORA":
        what = f"adapters of PEFT's type {printable(str(kind))} cannot be applied here"
        problems.append(Problem(what, str(path), None, "peft_type: LORA", None, BY_PEFT))
        return None
    for key, means in _OTHERWISE.items():
        if config.get(key):
            problems.append(Problem(f"not supported: {means}", str(path), None, None, key, BY_PEFT))
    initialised = config.get("init_lora_weights")
    if isinstance(initialised, str) and initialised.lower().startswith(_CHANGES_BASE):
        problems.append(
            Problem(
                "the adapter belongs to a base that its initialisation has changed, not to the original one",
                place=str(path),
                found=f"init_lora_weights: {printable(initialised)}",
                remedy="save it by save_pretrained(…, path_initial_model_for_weight_conversion=…), or " + BY_PEFT,
            )
        )

    def number(key: str, value: Any, whole: bool = False) -> Any:
        fine = type(value) is int or (type(value) is float and not whole)
        if not fine or not abs(value) < 1e300 or (whole and value < 1):  # NaN is not, either
            expected = "a whole number of at least 1" if whole else "a number"
            problems.append(Problem(f"{printable(key)} is no such number", str(path), None, expected, _shown(value)))
            return 1
        return value

    def patterns(key: str, whole: bool) -> dict[str, Any]:
        given = config.get(key) or {}
        if not isinstance(given, dict):
            problems.append(Problem(f"{key} is no mapping", str(path)))
            return {}
        for pattern in given:
            if not _is_plain_pattern(pattern):
                what = f"{key}: this pattern is none that can be followed"
                problems.append(
                    Problem(what, str(path), None, "a module's name, or a simple regular expression", pattern)
                )
        return {pattern: number(f"{key} {pattern}", value, whole) for pattern, value in given.items()}

    def flag(key: str) -> bool:
        value = config.get(key)
        if value is not None and type(value) is not bool:
            problems.append(Problem(f"{key} is neither true nor false", str(path), None, None, _shown(value)))
        return value is True

    def text(key: str) -> str | None:
        value = config.get(key)
        return value if isinstance(value, str) and value else None

    return Settings(
        rank=number("r", config.get("r", 8), whole=True),
        alpha=number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern=patterns("rank_pattern", whole=True),
        alpha_pattern=patterns("alpha_pattern", whole=False),
        rank_stabilised=flag("use_rslora"),
        dora=flag("use_dora"),
        transposed=flag("fan_in_fan_out"),
        base=text("base_model_name_or_path"),
        revision=text("revision"),
    )


def _shown(value: object) -> str:
    return printable(repr(value)) if isinstance(value, (str, int, float)) else type(value).__name__


def _no_adapter(folder: Path) -> Problem:
    """There is no adapter_config.json: perhaps one level further down, where PEFT saves all but the first adapter."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    remedy = (
        f"name one of them: {folder / inside[0]}" if inside else "name the folder that PEFT's save_pretrained wrote"
    )
    found = "adapters in " + printable(", ".join(inside[:6])) if inside else None
    return Problem("there is no adapter in this folder", str(folder), None, ADAPTER_CONFIG, found, remedy)


def _is_plain_pattern(pattern: str) -> bool:
    """Whether it is a regular expression, and one that cannot take ages: few repetitions, and none of groups."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    few = len(re.findall(r"[*+{]", pattern)) <= 3 and pattern.count("?") <= 8
    return few and len(pattern) <= 1000 and not re.search(r"\)[*+{?]|[*+}][*+{]", pattern)


def _fitting(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that fits the end of the module's name, from a dot on or all of it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
