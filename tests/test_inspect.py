"""A summary counts every tensor once, says what config.json says, and prints nothing a terminal would obey."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from rich.console import Console

from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.inspect import Size, Summary, as_json, show, summarise
from ggez_merge.units import readable_bytes

BF16 = ml_dtypes.bfloat16
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "lm_head.weight": np.zeros((8, 4), BF16),
    "logit_scale": np.zeros((), np.float32),
    "model.embed_tokens.weight": np.zeros((8, 4), BF16),
    **{f"model.layers.{i}.w": np.zeros(6, BF16) for i in (0, 1, 2, 10)},
    "model.layers.0.norm": np.zeros(3, np.float32),
    "model.norm.weight": np.zeros(0, BF16),
    "visual.blocks.0.w": np.zeros(5, np.float32),
    "visual.merger.mlp.0.weight": np.zeros(7, np.float32),
    "visual.steps": np.zeros(2, np.int64),
}


def summary(folder: Path, arrays: dict[str, np.ndarray[Any, Any]] = ARRAYS, **options: Any) -> Summary:
    return summarise(open_checkpoint(str(write_checkpoint(folder, arrays, **options))))


def printed(what: Summary, width: int = 120, tensors: bool = False) -> str:
    out = io.StringIO()
    show(what, Console(file=out, width=width), tensors)
    return out.getvalue()


@pytest.mark.parametrize("shards", [1, 3])
def test_parts_count_every_tensor_once(shards: int, tmp_path: Path) -> None:
    found = summary(tmp_path, shards=shards)
    assert {(part.component, part.dtype): part.size for part in found.parts} == {
        ("vision_tower", "F32"): Size(1, 5, 20),
        ("vision_tower", "I64"): Size(1, 2, 16),
        ("projector", "F32"): Size(1, 7, 28),
        ("embeddings", "BF16"): Size(1, 32, 64),
        ("language_model", "BF16"): Size(5, 24, 48),
        ("language_model", "F32"): Size(1, 3, 12),
        ("lm_head", "BF16"): Size(1, 32, 64),
        ("logit_scale", "F32"): Size(1, 1, 4),
    }
    assert found.parameters == sum(a.size for a in ARRAYS.values()) - 2  # without the integers
    assert found.size == Size(len(ARRAYS), found.parameters + 2, sum(a.nbytes for a in ARRAYS.values()))
    assert found.dtypes == {"BF16": Size(7, 88, 176), "F32": Size(4, 16, 64), "I64": Size(1, 2, 16)}
    assert len(found.files) == shards


def test_parts_follow_the_flow_of_data(tmp_path: Path) -> None:
    components = list(dict.fromkeys(part.component for part in summary(tmp_path).parts))
    assert components == ["vision_tower", "projector", "embeddings", "language_model", "lm_head", "logit_scale"]


def test_stacks(tmp_path: Path) -> None:
    found = summary(tmp_path)
    assert [(s.component, s.name, s.layers, s.size) for s in found.stacks] == [
        ("vision_tower", "visual.blocks", (0,), Size(1, 5, 20)),
        ("language_model", "model.layers", (0, 1, 2, 10), Size(5, 27, 60)),
    ]
    assert "model.layers.0–2, 10" in printed(found)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (None, None),
        ({}, None),
        ({"architectures": None}, None),
        ({"architectures": ["Qwen2VL"], "model_type": "qwen2_vl"}, "Qwen2VL (qwen2_vl)"),
        ({"architectures": "Qwen2VL", "model_type": 7}, None),
        ({"architectures": ["A", "B"]}, "A B"),
        ({"architectures": ["\x1b[31m"]}, "\\x1b[31m"),
    ],
)
def test_architecture(config: dict[str, Any] | None, architecture: str | None, tmp_path: Path) -> None:
    found = summary(tmp_path, config=config)
    assert found.architecture == architecture
    assert (architecture or "not stated") in printed(found)


def test_norms_are_counted_where_they_lie_and_once_more_together(tmp_path: Path) -> None:
    found = summary(tmp_path)
    assert found.norms == Size(1, 0, 0)  # model.norm.weight; `model.layers.0.norm` has no parameter's name
    assert "norms (of all)" in printed(found)
    assert "(of all)" not in printed(summary(tmp_path / "without", {"lm_head.weight": np.zeros(1, np.float32)}))


def test_what_the_names_do_not_tell_is_split_by_names_and_said(tmp_path: Path) -> None:
    assert summary(tmp_path).unrecognised is None
    arrays = {
        name: np.zeros(1, np.float32) for name in ("net.eyes.0.w", "net.eyes.1.w", "net.mind.w", "lm_head.weight")
    }
    found = summary(tmp_path / "unknown", arrays)
    assert [part.component for part in found.parts] == ["lm_head", "net.eyes.*", "net.mind.*"]
    assert "the names of 3 of the tensors do not tell their component" in printed(found)
    assert json.loads(json.dumps(as_json(found)))["unrecognised"] == found.unrecognised


def test_json_is_complete(tmp_path: Path) -> None:
    found = summary(tmp_path)
    short, full = (json.loads(json.dumps(as_json(found, tensors))) for tensors in (False, True))
    assert "tensors" not in short
    assert short == {key: value for key, value in full.items() if key != "tensors"}
    assert {t["name"]: tuple(t["shape"]) for t in full["tensors"]} == {n: a.shape for n, a in ARRAYS.items()}
    assert full["tensors"][0].keys() == {"name", "dtype", "shape", "file", "offset", "nbytes"}
    assert full["reference"] == str(tmp_path)
    assert sum(part["size"]["n_bytes"] for part in full["parts"]) == full["size"]["n_bytes"]


def test_tensor_lines_are_never_wrapped(tmp_path: Path) -> None:
    name = "model.layers.0." + "x" * 200
    found = summary(tmp_path, {name: np.zeros((2, 3), BF16), "b": np.zeros((), np.float32)})
    lines = printed(found, width=60, tensors=True).splitlines()
    assert f"{name}  BF16 [2, 3]  12 B" in lines
    assert "b  F32 []  4 B" in lines
    assert not any(name in line for line in printed(found, width=60).splitlines())


@pytest.mark.parametrize("name", ["\x1b[2Jred", "\u202egnp", "[red]x[/red]", "[/]", "a\nb", "\x9b31m"])
def test_hostile_names_do_nothing(name: str, tmp_path: Path) -> None:
    found = summary(tmp_path, {f"{name}.layers.0.w": np.zeros(1, np.float32)})
    text = printed(found, tensors=True)
    assert not {"\x1b", "\u202e", "\x9b"} & set(text)
    assert (
        text.count(name if name.isprintable() else name.encode("unicode_escape").decode()) == 4
    )  # part, stack, its layers, tensor


def test_empty_checkpoint(tmp_path: Path) -> None:
    found = summary(tmp_path, {})
    assert (found.parameters, found.parts, found.stacks) == (0, (), ())
    assert "0 parameters" in printed(found, tensors=True)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_994, "999.99 kB"),
        (999_996, "1.00 MB"),
        (5 * 10**9, "5.00 GB"),
    ],
)
def test_units(n_bytes: int, text: str) -> None:
    assert readable_bytes(n_bytes) == text
