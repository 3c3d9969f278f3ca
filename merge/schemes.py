"""What a config says of quantised weights: the schemes that are understood, a refusal by name for every other.

Sources: the formats as Hugging Face transformers (FineGrainedFP8Config, FbgemmFp8Config), compressed-tensors
(`config_groups`) and NVIDIA ModelOpt's unified checkpoints document them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ggez_merge.errors import Problem
from ggez_merge.formats import Stated, known, refusal

Block = tuple[int, int]
"""How many rows and columns of a matrix share a scale; 0 for all that there are."""

TENSOR: Block = (0, 0)
ROWS: Block = (1, 0)
COLUMNS: Block = (0, 1)
_DEFAULT_BLOCK: Block = (128, 128)  # DeepSeek-V3, arXiv 2412.19437, section 3.3.2
_LARGEST_BLOCK = 2**31 - 1
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Scheme:
    """Codes with scales: weight = (code - zero point) * scale.

    kind, bits: floats of 8 bits, or integers of 4 or 8; `packed` integers lie side by side in words of 32 bits. block:
    who shares a scale; stacked: the same for matrices stacked in one tensor, if that is another. zero: whether there
    are zero points, laid out as the scales are.
    """

    kind: Literal["float", "int"]
    bits: int
    block: Block
    stacked: Block | None = None
    packed: bool = False
    zero: bool = False

    def count(self, n: int) -> str:
        """So many weights, in words."""
        rows, columns = self.block
        how = {TENSOR: "with one scale each", ROWS: "by rows", COLUMNS: "by columns"}.get(self.block)
        if how is None:
            how = f"by groups of {columns}" if rows == 1 else f"by blocks of {rows} × {columns}"
        return f"{n} {'fp' if self.kind == 'float' else 'int'}{self.bits} weight{'' if n == 1 else 's'} {how}"


UNSTATED = tuple(Scheme("float", 8, block) for block in (TENSOR, ROWS, _DEFAULT_BLOCK))
"""What weights in 8-bit floats may be where a config says nothing of them."""


class _UnknownError(Exception):
    """A key of a quantization_config, with its value, that is not understood."""

    def __init__(self, key: str, value: object) -> None:
        super().__init__(f"{key}: {value}")


def read_schemes(stated: Iterable[Stated], place: str) -> tuple[list[Scheme], list[Problem]]:
    """The schemes that a config states, and a problem for each of its parts that is not understood."""
    schemes: list[Scheme] = []
    problems = []
    for where, part, key in stated:
        said = part[key]
        method = str(said.get("quant_method", "unknown method") if isinstance(said, dict) else said)
        form = known(method)
        name, remedy = (form.name, form.remedy) if form else (method, None)
        try:
            if not isinstance(said, dict) or name not in _READERS:
                problems.append(refusal(name, place, None, where, remedy))
            else:
                schemes += _READERS[name](said)
        except _UnknownError as unknown:
            problems.append(refusal(name, place, None, f"{where}.{unknown}", remedy))
    return list(dict.fromkeys(schemes)), problems


def nominal_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config says its model is in; BF16 if it names none of those that are merged."""
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    said = [str(part.get(key)).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype")]
    return next((_DTYPES[name] for name in said if name in _DTYPES), "BF16")


def _fp8(said: Mapping[str, Any]) -> Iterator[Scheme]:
    """As in DeepSeek-V3, Qwen3-FP8 and transformers' FineGrainedFP8, or with one scale for each tensor."""
    if said.get("expert_dtype", "fp8") != "fp8":
        raise _UnknownError("expert_dtype", said["expert_dtype"])
    block = said.get("weight_block_size")
    if block is not None:
        yield Scheme("float", 8, _sizes("weight_block_size", block))
        return
    yield Scheme("float", 8, TENSOR)
    if "weight_block_size" not in said:
        yield Scheme("float", 8, _DEFAULT_BLOCK)


def _fbgemm(said: Mapping[str, Any]) -> Iterator[Scheme]:
    """Rows of matrices; of Llama 4's stacked experts, which are multiplied from the left, columns."""
    yield Scheme("float", 8, ROWS, stacked=COLUMNS)


def _modelopt(said: Mapping[str, Any]) -> Iterator[Scheme]:
    if said.get("quant_algo") != "FP8":
        raise _UnknownError("quant_algo", said.get("quant_algo"))
    yield Scheme("float", 8, TENSOR)


def _compressed(said: Mapping[str, Any]) -> Iterator[Scheme]:
    sparsity = said.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _UnknownError("sparsity_config", sparsity)
    if said.get("transform_config"):
        raise _UnknownError("transform_config", "weights in a rotated basis")
    groups = said.get("config_groups")
    if not isinstance(groups, dict):
        raise _UnknownError("config_groups", groups)
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights") or {}, dict):
            raise _UnknownError(f"config_groups.{name}", group)
        if group.get("weights"):
            try:
                yield _group(group["weights"], group.get("format") or said.get("format"))
            except _UnknownError as unknown:
                raise _UnknownError(f"config_groups.{name}", unknown) from None


def _group(weights: Mapping[str, Any], form: object) -> Scheme:
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    packed = form == "pack-quantized"
    kinds = {"float-quantized": "float", "int-quantized": "int", "pack-quantized": "int", "naive-quantized": kind}
    if not isinstance(form, str) or kinds.get(form, "") != kind:
        raise _UnknownError("format", f"{form}, type {kind}")
    if (kind, bits) not in (("float", 8), ("int", 4), ("int", 8)):
        raise _UnknownError("num_bits", f"{bits}, type {kind}")
    if weights.get("actorder") not in (None, False, "weight", "static"):  # these leave no trace in the file
        raise _UnknownError("actorder", weights["actorder"])
    symmetric = weights.get("symmetric", True)
    block = _strategy(weights)
    if symmetric is not True and (symmetric is not False or kind == "float" or (packed and block[0] != 1)):
        raise _UnknownError("symmetric", f"{symmetric}, type {kind}")
    return Scheme(kind, bits, block, packed=packed, zero=not symmetric)


def _strategy(weights: Mapping[str, Any]) -> Block:
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:  # as compressed-tensors fills it in
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return TENSOR
    if strategy == "channel":
        return ROWS
    if strategy == "group":
        return _sizes("group_size", [1, size])
    if strategy == "block":
        return _sizes("block_structure", weights.get("block_structure"))
    raise _UnknownError("strategy", strategy)


def _sizes(key: str, value: object) -> Block:
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST_BLOCK for size in sizes):
        raise _UnknownError(key, value)
    return sizes[0], sizes[1]


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Scheme]]] = {
    "fp8": _fp8,
    "fbgemm fp8": _fbgemm,
    "compressed-tensors": _compressed,
    "ModelOpt": _modelopt,
}
