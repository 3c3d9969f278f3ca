"""Formats whose numbers are codes and not weights: their names, what gives them away, and what to do.

A mean of two codes means nothing, so none of these can be merged as it is. A model says what it is in config.json
(`quantization_config.quant_method`) or by tensors that no other model has. Those of `schemes` are dequantised when they
are read, as far as it knows them; the others are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ggez_merge.errors import Problem
from ggez_merge.untrusted import printable

Stated = tuple[str, dict[str, Any], str]  # "text_config.quantization_config", that part of a config, the key in it

ORIGINAL = "merge the models that the quantised ones were made from, and quantise the result"


@dataclass(frozen=True)
class Format:
    """`methods` are its names in config.json; `tensors` the words that its tensors of one module end with, together."""

    name: str
    methods: tuple[str, ...]
    tensors: tuple[tuple[str, ...], ...] = ()
    remedy: str = ORIGINAL


def _on_load(how: str) -> str:
    return f"load it with {how}, save_pretrained it and merge that; or {ORIGINAL}"


FORMATS = (
    Format("GPTQ", ("gptq",), (("qweight", "qzeros", "scales", "g_idx"),)),
    Format("AWQ", ("awq",), (("qweight", "qzeros", "scales"),)),
    Format(
        "bitsandbytes",
        ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        (("absmax", "quant_map"), ("weight", "SCB")),
        _on_load("transformers and call model.dequantize()"),
    ),
    Format(
        "compressed-tensors",
        ("compressed-tensors", "compressed_tensors"),
        (("weight_packed", "weight_scale"), ("weight_packed", "weight_shape")),
        _on_load("transformers' CompressedTensorsConfig(run_compressed=False)"),
    ),
    Format("MXFP4", ("mxfp4",), (), _on_load("transformers' Mxfp4Config(dequantize=True)")),
    Format("fp8", ("fp8",), (), _on_load("transformers' FineGrainedFP8Config(dequantize=True)")),
    Format("fbgemm fp8", ("fbgemm_fp8",)),
    Format("HQQ", ("hqq",), (("W_q",),)),
    Format("quanto", ("quanto",), (("_data", "_scale"),)),
    Format("AQLM", ("aqlm",), (("codes", "codebooks", "scales"),)),
    Format("ModelOpt", ("modelopt",)),
    Format("ModelOpt NVFP4", ("modelopt_fp4", "nvfp4"), (("weight", "weight_scale", "weight_scale_2"),)),
    Format("MLX", (), (("weight", "scales", "biases"),)),
    Format("AutoRound", ("auto-round", "intel/auto-round")),
    Format("EETQ", ("eetq",)),
    Format("torchao", ("torchao",)),
    Format("VPTQ", ("vptq",)),
    Format("BitNet", ("bitnet",)),
    Format("SpQR", ("spqr",)),
    Format("HIGGS", ("higgs",)),
    Format("Quark", ("quark",)),
)
"""The first that fits is meant: GPTQ has all that AWQ has."""

GGUF_REMEDY = "merge the safetensors model that it was made from, and convert the result with llama.cpp"


def gguf(place: str, found: str) -> Problem:
    """The refusal of a GGUF file, which has a header of its own and mostly holds blocks of codes."""
    return Problem("GGUF files cannot be merged", place, None, ".safetensors files", found, GGUF_REMEDY)


def known(method: str) -> Format | None:
    """The format that config.json calls so."""
    return next((form for form in FORMATS if method.lower() in form.methods), None)


def stated(config: dict[str, Any]) -> Iterator[Stated]:
    """Where a config speaks of quantisation."""
    pending = [("", config)]  # a vision-language model may say it of one part only
    while pending:
        where, part = pending.pop()
        for key, value in part.items():
            if key in ("quantization_config", "compression_config") and value:
                yield where + key, part, key
            elif isinstance(value, dict):
                pending.append((f"{where}{key}.", value))


def given_away(names: Iterable[str], place: str) -> list[Problem]:
    """The problem of a model whose tensors give it away, if they do."""
    modules: dict[str, set[str]] = defaultdict(set)
    for name in names:
        module, _, word = name.rpartition(".")
        modules[module].add(word)
    for form in FORMATS:
        for words in form.tensors:
            having = [module for module, found in modules.items() if found.issuperset(words)]
            if having:
                first = f"{having[0]}.({', '.join(words)})" + (f" and {len(having) - 1} more" if having[1:] else "")
                return [refusal(form.name, place, printable(first), None, form.remedy)]
    return []


def refusal(name: str, place: str, tensor: str | None, found: str | None, remedy: str | None = None) -> Problem:
    """The refusal of a format by its name."""
    return Problem(
        f"the model is quantised ({printable(name)}): its numbers are codes",
        place=place,
        tensor=tensor,
        found=None if found is None else printable(found),
        remedy=remedy or ORIGINAL,
    )
