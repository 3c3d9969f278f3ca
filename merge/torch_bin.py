"""A pytorch_model.bin as a table of tensors: torch's weights-only loader says what is in it, the zip says where.

torch.save writes a zip archive whose members are not compressed: `data.pkl` says names, dtypes, shapes and strides, and
each storage is a member of its own. So a tensor is a span of the file, as in safetensors, and is read as one. Nothing
here runs what a pickle asks for: `weights_only` builds tensors and plain containers, without their bytes (`meta`), and
what it says is believed as far as the archive's directory bears it out.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from xxhash import xxh3_128

from ggez_merge.errors import Problem, Refused
from ggez_merge.header import ShardFile, Tensor
from ggez_merge.untrusted import MAX_JSON_BYTES, printable

if TYPE_CHECKING:
    import torch

DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's name of a dtype -> safetensors', in the order in which its library writes them."""
_ORDER = list(DTYPES.values())

CONVERT = (
    "on a machine that may run its code, if you trust whoever made it, write its weights anew: "
    "safetensors.torch.save_file({name: tensor.contiguous().clone(), ...}, 'model.safetensors')"
)
_DOWNLOAD_AGAIN = "download or copy the file again"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: its magic, and the lengths of its name and extra field

Spans = dict[int, int]
"""Where each storage starts in the file -> its bytes."""


def read_bin_header(path: Path) -> tuple[list[Tensor], ShardFile]:
    """Tensors in the order in which safetensors would hold them, and the file itself; no weight is read.

    In that order (by dtype, then by name) a merge gives the bytes that it gives after a conversion. Tied
    weights are two names of one span. Raises Refused with all problems of this file.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # before opening: a pipe would block
            raise Refused(Problem("not a regular file", place=str(path), remedy=_DOWNLOAD_AGAIN))
        spans = _spans(path)
    except OSError as error:
        what = f"the weights cannot be read: {error.strerror}"
        raise Refused(Problem(what, place=str(path), remedy=_DOWNLOAD_AGAIN)) from None
    problems: list[Problem] = []
    tensors = [_tensor(path, name, value, spans, problems) for name, value in _load(path).items()]
    if problems:
        raise Refused(problems)
    table = sorted((t for t in tensors if t is not None), key=lambda t: (_ORDER.index(t.dtype), t.name))
    said = repr([(t.name, t.dtype, t.shape, t.offset) for t in table]).encode()
    return table, ShardFile(path, status.st_size, status.st_mtime_ns, xxh3_128(said).hexdigest())


def _spans(path: Path) -> Spans:
    """The storages of an archive, by its directory; raises Refused for what torch.save does not write."""
    with path.open("rb") as file:
        magic = file.read(4)
        if not magic.startswith(b"PK"):
            raise Refused(
                Problem(
                    "this .bin is no zip archive, as torch.save has written since torch 1.6",
                    place=str(path),
                    found="an empty file"
                    if not magic
                    else "an older format, which is a bare pickle, or something else",
                    remedy=CONVERT,
                )
            )
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                order = next((m for m in members if m.filename.endswith("/byteorder") and m.file_size < 16), None)
                if order is not None and archive.read(order) != b"little":
                    raise Refused(Problem("the weights are big-endian", place=str(path), remedy=CONVERT))
                directory = archive.start_dir
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
            raise Refused(
                Problem(
                    f"the archive cannot be read: {printable(str(error))}",
                    place=str(path),
                    found="a file that is cut off, most likely",
                    remedy=_DOWNLOAD_AGAIN,
                )
            ) from None
        spans: Spans = {}
        for member in members:
            start = _start(file, member)
            pickle = member.filename.endswith("/data.pkl")
            fits = start is not None and start + member.file_size <= directory
            plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
            script = member.filename.endswith("/constants.pkl")  # TorchScript, which is a program
            if start is None or not fits or not plain or script or (pickle and member.file_size > MAX_JSON_BYTES):
                raise Refused(
                    Problem(
                        "the archive is not as torch.save writes it",
                        place=str(path),
                        expected="members that are stored as they are, inside the file",
                        found=f"{printable(member.filename)}, {member.file_size} bytes",
                        remedy=_DOWNLOAD_AGAIN,
                    )
                )
            if re.fullmatch(r"[^/]+/data/[^/]+", member.filename):
                spans[start] = max(member.file_size, spans.get(start, 0))
    return spans


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin: after its own header, whose lengths the directory does not give."""
    if member.header_offset < 0:
        return None
    file.seek(member.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        return None
    magic, name, extra = _LOCAL_HEADER.unpack(raw)
    return member.header_offset + _LOCAL_HEADER.size + int(name) + int(extra) if magic == b"PK\3\4" else None


def _load(path: Path) -> dict[Any, Any]:
    """What the pickle says, as a dict of tensors without bytes; raises Refused for all that is not only weights."""
    import torch  # seconds: only where a model is in torch's format

    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch documents none, and a damaged or hostile pickle raises whatever it hits on
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        line = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise Refused(
            Problem(
                "torch's weights-only loader refuses this file",
                place=str(path),
                expected="tensors by name, and nothing that needs code to be run",
                found=f"it asks for {printable(wanted[1])}" if wanted else printable(line),
                remedy=f"download it again if it may be damaged; else, {CONVERT}",
            )
        ) from None
    others = ["the whole"] if not isinstance(content, dict) else []
    if isinstance(content, dict):
        others = [repr(key) for key, value in content.items() if not _named_tensor(key, value)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise Refused(
            Problem(
                "the file holds something else than tensors by name",
                place=str(path),
                found=", ".join(printable(other) for other in others[:3]) + more,
                remedy="if it is a training checkpoint, save its state dict alone, by name and in one level",
            )
        )
    return dict(content)


def _named_tensor(name: object, value: object) -> bool:
    import torch

    return isinstance(name, str) and name != "" and _is_text(name) and isinstance(value, torch.Tensor)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no output can hold
        return False
    return True


def _tensor(path: Path, name: str, tensor: torch.Tensor, spans: Spans, problems: list[Problem]) -> Tensor | None:
    """One tensor as a span of the file, or None and a problem."""

    def complain(what: str, expected: object, found: object, remedy: str = CONVERT) -> None:
        problems.append(Problem(what, str(path), printable(name), str(expected), printable(str(found)), remedy))

    kind = str(tensor.dtype).removeprefix("torch.")
    dense = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
    if kind not in DTYPES or not dense:
        complain("the tensor is of a kind that safetensors does not have", "a dense tensor of plain numbers", kind)
        return None
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        strides = f"shape {list(tensor.shape)}, strides {list(tensor.stride())}"
        complain("the tensor is a view that is not contiguous: its bytes are not in its order", "row-major", strides)
        return None
    at = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if at is None:
        complain("this torch does not say where in the file a tensor lies", "a newer torch", "", "pip install -U torch")
        return None
    start, nbytes = tensor.storage_offset() * tensor.element_size(), tensor.numel() * tensor.element_size()
    held = spans.get(at)
    if held is None or start + nbytes > held:
        found = f"{held} bytes" if held is not None else "no such member of the archive"
        complain("the file does not hold all of the tensor", f"{start + nbytes} bytes", found, _DOWNLOAD_AGAIN)
        return None
    return Tensor(name, DTYPES[kind], tuple(tensor.shape), path, at + start, nbytes)
