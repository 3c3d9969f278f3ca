"""Formats whose numbers are codes and not weights, each refused by its name: what gives it away, and what to do.

A mean of two codes means nothing, so none of these can be merged as it is. A model says what it is in config.json
(`quantization_config.quant_method`) or by tensors that no other model has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ggez_merge.errors import Problem
from ggez_merge.untrusted import printable

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
    Format("fp8", ("fp8",), (), "make bfloat16 of weights and scales with ggez_merge.dequantize(weight, scale)"),
    Format("fbgemm fp8", ("fbgemm_fp8",), (), "make bfloat16 of them with ggez_merge.dequantize(weight, scale)"),
    Format("HQQ", ("hqq",), (("W_q",),)),
    Format("quanto", ("quanto",), (("_data", "_scale"),)),
    Format("AQLM", ("aqlm",), (("codes", "codebooks", "scales"),)),
    Format("ModelOpt NVFP4", ("modelopt", "nvfp4"), (("weight", "weight_scale", "weight_scale_2"),)),
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


def quantised(config: Mapping[str, Any], place: str) -> list[Problem]:
    """One problem for each part of the model that its config says is quantised."""
    problems = []
    pending: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while pending:  # a vision-language model may say it of one part only, in text_config
        where, part = pending.pop()
        for key, value in part.items():
            if key in ("quantization_config", "compression_config") and value:
                method = str(value.get("quant_method", "unknown method") if isinstance(value, dict) else value)
                known = next((form for form in FORMATS if method.lower() in form.methods), None)
                remedy = known.remedy if known else ORIGINAL
                problems.append(_problem(known.name if known else method, place, None, where + key, remedy))
            elif isinstance(value, dict):
                pending.append((f"{where}{key}.", value))
    return problems


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
                return [_problem(form.name, place, printable(first), None, form.remedy)]
    return []


def _problem(name: str, place: str, tensor: str | None, found: str | None, remedy: str) -> Problem:
    return Problem(
        f"the model is quantised ({printable(name)}): its numbers are codes",
        place=place,
        tensor=tensor,
        found=None if found is None else printable(found),
        remedy=remedy,
    )
