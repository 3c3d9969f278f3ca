"""What is in a checkpoint: its parts, dtypes and layers, counted from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggez_merge.checkpoint import ITEM_BITS, Checkpoint, Tensor
from ggez_merge.components import COMPONENTS, is_norm, layer, split, unrecognised
from ggez_merge.units import readable_bytes
from ggez_merge.untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Size:
    """How much a set of tensors holds. Elements of integer tensors are counted too."""

    n_tensors: int
    n_elements: int
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """The tensors of one component in one dtype. `component` is the name, or the glob, that selects it in a recipe."""

    component: str
    dtype: str
    size: Size


@dataclass(frozen=True)
class Stack:
    """The layers `{name}.{number}` of one component; `layers` are the numbers, ascending."""

    component: str
    name: str
    layers: tuple[int, ...]
    size: Size


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers, as its files hold it.

    `architecture` is what its config.json says, None if it says nothing. `norms` are the normalisation layers, which
    `parts` count as well, under the component that each lies in. `unrecognised` is a remark on the tensors that
    belong to no known component. `parameters` are the model's: those of quantised weights, without their scales, and
    `notes` say what a merge makes of them.
    """

    reference: str
    revision: str | None
    folder: str
    files: tuple[str, ...]
    architecture: str | None
    parameters: int
    size: Size
    dtypes: dict[str, Size]
    parts: tuple[Part, ...]
    norms: Size
    unrecognised: str | None
    stacks: tuple[Stack, ...]
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...]


def summarise(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint by component and dtype, and by stack of layers. Reads nothing."""
    tensors = tuple(_as_held(tensor) for tensor in checkpoint.stored.values())
    parts: dict[tuple[str, str], list[Tensor]] = {}
    stacks: dict[tuple[str, str], list[Tensor]] = {}
    dtypes: dict[str, list[Tensor]] = {}
    layers: dict[tuple[str, str], set[int]] = {}
    labels = split(checkpoint.stored)
    for tensor in tensors:
        of = labels[tensor.name]
        dtypes.setdefault(tensor.dtype, []).append(tensor)
        parts.setdefault((of, tensor.dtype), []).append(tensor)
        place = layer(tensor.name)
        if place is not None:
            stacks.setdefault((of, place[0]), []).append(tensor)
            layers.setdefault((of, place[0]), set()).add(place[1])
    return Summary(
        reference=checkpoint.reference,
        revision=checkpoint.revision,
        folder=str(checkpoint.folder),
        files=tuple(_relative(file.path, checkpoint.folder) for file in checkpoint.files),
        architecture=_architecture(checkpoint.config),
        parameters=checkpoint.parameters,
        size=_size(tensors),
        dtypes={dtype: _size(dtypes[dtype]) for dtype in sorted(dtypes)},
        parts=tuple(Part(*key, _size(parts[key])) for key in sorted(parts, key=_order)),
        norms=_size(tensor for tensor in tensors if is_norm(tensor.name)),
        unrecognised=unrecognised(checkpoint.stored),
        stacks=tuple(Stack(*key, tuple(sorted(layers[key])), _size(stacks[key])) for key in sorted(stacks, key=_order)),
        tensors=tensors,
        notes=checkpoint.notes,
    )


def as_json(summary: Summary, tensors: bool = False) -> dict[str, Any]:
    """The summary as JSON values; with `tensors`, every tensor with dtype, shape, bytes and file."""
    table = asdict(summary)
    table["tensors"] = [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": _relative(tensor.file, Path(summary.folder)),
            "offset": tensor.offset,
            "nbytes": tensor.nbytes,
        }
        for tensor in summary.tensors
    ]
    if not tensors:
        del table["tensors"]
    return table


def show(summary: Summary, console: Console, tensors: bool = False) -> None:
    """Print the summary as tables; with `tensors`, one line per tensor after them, never wrapped."""
    from rich.text import Text

    files = f"{len(summary.files)} file" + ("s" if len(summary.files) != 1 else "")
    dtypes = ", ".join(f"{dtype} {size.n_elements:,}" for dtype, size in summary.dtypes.items())
    facts = {
        "model": summary.reference + (f"@{summary.revision}" if summary.revision else ""),
        "folder": summary.folder,
        "architecture": summary.architecture or "not stated",
        "weights": f"{summary.parameters:,} parameters, {readable_bytes(summary.size.n_bytes)} in {files}",
        "dtypes": dtypes or "none",
    }
    for label, fact in facts.items():
        console.print(Text(f"{label + ':':<14}{printable(fact)}"), soft_wrap=True)
    parts = _table(("component", "dtype"))
    for part in summary.parts:
        parts.add_row(Text(printable(part.component)), part.dtype, *_columns(part.size))
    if summary.norms.n_tensors:
        parts.add_section()
        parts.add_row("norms (of all)", "", *_columns(summary.norms))
    console.print(parts)
    if summary.stacks:
        stacks = _table(("component", "layers"))
        for stack in summary.stacks:
            name = Text(f"{printable(stack.name)}.{_ranges(stack.layers)}", overflow="fold")
            stacks.add_row(Text(printable(stack.component)), name, *_columns(stack.size))
        console.print(stacks)
    for note in (*summary.notes, *([summary.unrecognised] if summary.unrecognised else [])):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if tensors:
        for tensor in summary.tensors:
            line = f"{printable(tensor.name)}  {tensor.dtype} {list(tensor.shape)}  {readable_bytes(tensor.nbytes)}"
            console.print(Text(line), soft_wrap=True)


def _as_held(tensor: Tensor) -> Tensor:
    """With the dtype and bytes that the model has it in, wherever it is made in a wider one."""
    dtype = tensor.nominal or tensor.dtype
    return replace(tensor, dtype=dtype, nbytes=tensor.numel * ITEM_BITS[dtype] // 8)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _architecture(config: dict[str, Any] | None) -> str | None:
    config = config or {}
    stated = config.get("architectures")
    names = [str(name) for name in stated] if isinstance(stated, list) else []
    class_name = config.get("_class_name")  # diffusers'
    names += [class_name] if isinstance(class_name, str) else []
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        names.append(f"({model_type})")
    return printable(" ".join(names)) or None


def _size(tensors: Iterable[Tensor]) -> Size:
    tensors = list(tensors)
    return Size(len(tensors), sum(t.numel for t in tensors), sum(t.nbytes for t in tensors))


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    place = next((at for at, known in enumerate(COMPONENTS) if known == key[0]), len(COMPONENTS))
    return (place, *key)


def _columns(size: Size) -> tuple[str, str, str]:
    return f"{size.n_tensors:,}", f"{size.n_elements:,}", readable_bytes(size.n_bytes)


def _table(labels: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for label in labels:
        table.add_column(label)
    for label in ("tensors", "elements", "size"):
        table.add_column(label, justify="right", no_wrap=True)
    return table


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0–2, 5"."""
    said: list[str] = []
    start = 0
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            said.append(f"{numbers[start]}–{number}" if at > start else f"{number}")
            start = at + 1
    return ", ".join(said)
