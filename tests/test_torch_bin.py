"""pytorch_model.bin as input: the same tensors as in safetensors, and nothing that a pickle asks for is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import INTERPOLATE, TASK, TIES, carry_out, command_line, contents, plan_of
from models import llama, randomised
from safetensors.torch import save_file

from ggez_merge.checkpoint import Checkpoint, open_checkpoint
from ggez_merge.errors import Problem, Refused
from ggez_merge.read import Files
from ggez_merge.torch_bin import DTYPES

State = Mapping[str, torch.Tensor]


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several kinds: an order unlike safetensors', 0-d, empty, integers, a parameter."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    return {
        "model.norm.weight": normal(7),
        "model.layers.1.w": normal(5, 3).bfloat16(),
        "model.layers.0.w": normal(5, 3).bfloat16(),
        "a b/ü": torch.nn.Parameter(normal(2, 3, 4)),
        "logit_scale": normal(),
        "half": normal(300, 11).half(),
        "double": normal(3).double(),
        "none": normal(0, 3),
        "position_ids": torch.arange(6)[None],
        "mask": torch.tensor([True, False]),
    }


def save(folder: Path, tensors: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name, **options)
    return folder


def save_safetensors(folder: Path, tensors: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def save_shards(folder: Path, tensors: State, n: int = 2) -> Path:
    weight_map = {}
    for number in range(n):
        file = f"pytorch_model-{number + 1:05d}-of-{n:05d}.bin"
        part = {name: tensor for at, (name, tensor) in enumerate(sorted(tensors.items())) if at % n == number}
        save(folder, OrderedDict(part), file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor as the engine reads it."""
    found = {}
    with Files(checkpoint.files) as files:
        for name, tensor in checkpoint.tensors.items():
            raw = bytearray(tensor.nbytes)
            files.read(tensor, 0, memoryview(raw))
            found[name] = (tensor.dtype, tensor.shape, bytes(raw))
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def refused(path: Path, *words: str) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        open_checkpoint(str(path))
    for word in words:
        assert word in str(caught.value)
    assert all(problem.remedy for problem in caught.value.problems)
    return caught.value.problems


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [save, save_shards])
def test_every_tensor_as_torch_has_it(saved: Callable[..., Path], tmp_path: Path) -> None:
    expected = state()
    found = read(open_checkpoint(str(saved(tmp_path, expected))))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        assert found[name] == (dtype, tuple(tensor.shape), bytes_of(tensor)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_safetensors_has(dtype: str, tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8) if dtype != "bool" else torch.ones(48, dtype=torch.uint8)
    tensor = raw.view(getattr(torch, dtype))
    ours = open_checkpoint(str(save(tmp_path / "bin", {"x": tensor})))
    theirs = open_checkpoint(str(save_safetensors(tmp_path / "safe", {"x": tensor})))
    assert read(ours) == read(theirs)


def test_the_order_is_that_of_a_converted_file(tmp_path: Path) -> None:
    kinds = {f"{at}": torch.zeros(8, dtype=getattr(torch, dtype)) for at, dtype in enumerate(DTYPES)}
    tensors = state() | kinds
    ours = open_checkpoint(str(save(tmp_path / "bin", tensors)))
    assert list(ours.tensors) == list(open_checkpoint(str(save_safetensors(tmp_path / "safe", tensors))).tensors)


def test_tied_weights_and_views_are_spans_of_one_storage(tmp_path: Path) -> None:
    embed = torch.randn(6, 4)
    tensors = {"embed": embed, "head": embed, "rows": embed[2:5], "row": embed[3], "one": embed[1:2, 2:3]}
    checkpoint = open_checkpoint(str(save(tmp_path, tensors)))
    assert checkpoint.tensors["embed"].offset == checkpoint.tensors["head"].offset
    assert {name: raw for name, (_, _, raw) in read(checkpoint).items()} == {k: bytes_of(v) for k, v in tensors.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_other_bins_beside_the_weights_are_none(name: str, tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)}, name)
    for other in ("training_args.bin", "optimizer.bin"):
        (tmp_path / other).write_bytes(pickle.dumps({"lr": 1}))
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["x"]


def test_a_bin_of_any_name_may_be_named_itself(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)}, "tuned.bin")
    assert list(open_checkpoint(str(tmp_path / "tuned.bin")).tensors) == ["x"]
    refused(tmp_path, "pickles", "can be named itself")


def test_safetensors_win(tmp_path: Path) -> None:
    save(tmp_path, {"bin": torch.ones(2)})
    save_shards(tmp_path, {"bin": torch.ones(2), "two": torch.ones(2)})
    save_safetensors(tmp_path, {"safe": torch.ones(2)})
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["safe"]


# --- what is merged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [INTERPOLATE, TASK, TIES], ids=["linear", "task", "ties"])
@pytest.mark.parametrize("bins", [("base",), ("one",), ("base", "one", "two")], ids="+".join)
def test_the_bytes_of_a_merge_do_not_depend_on_the_format(recipe: str, bins: tuple[str, ...], tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        tensors = state(seed)
        save_safetensors(tmp_path / "safe" / name, tensors)
        (save if name in bins else save_safetensors)(tmp_path / "bin" / name, tensors)
    for kind in ("safe", "bin"):
        carry_out(plan_of(tmp_path / kind, recipe))
    ours, theirs = (
        {name: raw for name, raw in contents(tmp_path / kind / "out").items() if name.endswith(".safetensors")}
        for kind in ("bin", "safe")
    )
    assert ours == theirs and ours


@pytest.mark.parametrize("shards", [1, 3])
def test_a_real_model_merges_and_loads(shards: int, tmp_path: Path) -> None:
    base, tuned = llama(), randomised(llama(), 1)
    tuned.save_pretrained(tmp_path / "one")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    (save if shards == 1 else save_shards)(tmp_path / "base", base.state_dict())
    carry_out(plan_of(tmp_path, INTERPOLATE))
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, merged in loaded.state_dict().items():
        a, b = base.state_dict()[name].double(), tuned.state_dict()[name].double()
        torch.testing.assert_close(merged.double(), 0.7 * a + 0.3 * b, rtol=1e-6, atol=1e-7)
    assert not list((tmp_path / "out").glob("*.bin*"))


# --- what is refused -----------------------------------------------------------------------------------------------


class Evil:
    """A pickle that makes a file as soon as it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not(zipped: bool, tmp_path: Path) -> None:
    for name in ("base", "one"):
        save(tmp_path / name, {"x": torch.ones(2)})
    content = {"x": torch.ones(2), "y": Evil(tmp_path / "ran")}
    save(tmp_path / "one", content, _use_new_zipfile_serialization=zipped)
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    result = command_line("recipe.yaml", "--out", "out", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "pytorch_model.bin" in result.stderr and "trust" in result.stderr
    assert "posix.system" in result.stderr or not zipped
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "one" / "pytorch_model.bin", weights_only=False)  # it would have, elsewhere
    assert (tmp_path / "ran").exists()


def test_the_older_format_is_refused_with_a_remedy(tmp_path: Path) -> None:
    save(tmp_path, state(), _use_new_zipfile_serialization=False)
    refused(tmp_path, "no zip archive", "safetensors.torch.save_file", "trust")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    refused(tmp_path, "no zip archive")


def test_views_that_are_not_contiguous_are_refused_by_name_all_at_once(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    tensors = {"fine": whole, "t": whole.t(), "column": whole[:, 1:3], "wide": torch.ones(1).expand(9)}
    problems = refused(save(tmp_path, tensors), "not contiguous", "strides [1, 4]")
    assert [problem.tensor for problem in problems] == ["t", "column", "wide"]


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.cfloat).conj()],
)
def test_tensors_that_safetensors_does_not_have(tensor: torch.Tensor, tmp_path: Path) -> None:
    problems = refused(save(tmp_path, {"odd": tensor, "fine": torch.ones(2)}))
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": {"x": torch.ones(2)}}, "'state_dict'"),
        ({"x": torch.ones(2), "epoch": 3}, "'epoch'"),
        ({1: torch.ones(2)}, "1"),
        ({"": torch.ones(2)}, "''"),
        ({"\ud800": torch.ones(2)}, "\\ud800"),
        ([torch.ones(2)], "the whole"),
        (torch.ones(2), "the whole"),
    ],
)
def test_files_that_hold_something_else(content: Any, words: str, tmp_path: Path) -> None:
    refused(save(tmp_path, content), "something else than tensors by name", words, "state dict")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(save(tmp_path, {"x": torch.ones(2)}) / "pytorch_model.bin", "a") as archive:
        archive.writestr("pytorch_model/constants.pkl", pickle.dumps(()))
    refused(tmp_path, "not as torch.save writes it", "constants.pkl")


def test_every_truncation(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": torch.arange(5), "y": torch.ones(3)}) / "pytorch_model.bin"
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        refused(tmp_path, str(path))


def test_damaged_bytes_are_refused_or_change_only_values(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": torch.arange(5), "y": torch.ones(3)}) / "pytorch_model.bin"
    raw = path.read_bytes()
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        try:
            checkpoint = open_checkpoint(str(tmp_path))
        except Refused as caught:
            assert str(path) in str(caught)
        else:
            assert all(t.offset + t.nbytes <= len(raw) for t in checkpoint.tensors.values())


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    """The same archive by another hand, with other content in its members, as torch.save wrote it before 2.7."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, raw in members.items():
            if not name.endswith("/.format_version"):  # with it, torch works out by itself where storages are
                archive.writestr(name, change(name, raw))


def test_storages_shorter_than_their_tensors_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": torch.arange(50), "y": torch.ones(30)}) / "pytorch_model.bin"
    rewritten(path, lambda name, raw: raw)
    assert read(open_checkpoint(str(tmp_path)))["y"][2] == bytes_of(torch.ones(30))
    rewritten(path, lambda name, raw: raw[:-8] if "/data/" in name else raw)
    problems = refused(tmp_path, "does not hold all of the tensor", "400 bytes", "392 bytes", "120 bytes", "112 bytes")
    assert [problem.tensor for problem in problems] == ["x", "y"]


def test_archives_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": torch.randn(5000)}) / "pytorch_model.bin"
    whole = path.read_bytes()
    rewritten(path, lambda name, raw: raw, compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path, "not as torch.save writes it", "data.pkl")
    path.write_bytes(whole)
    rewritten(path, lambda name, raw: b"big" if name.endswith("byteorder") else raw)
    refused(tmp_path, "big-endian")
    path.write_bytes(b"PK\3\4")
    refused(tmp_path, "cannot be read")
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, "not a regular file")


# --- index and shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["../evil.bin", "/etc/evil.bin", "a\\..\\evil.bin", "model.safetensors", "x.pt", 7])
def test_an_index_stays_in_its_folder(shard: object, tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(2)}, "evil.bin")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(tmp_path / "model", "not a plain file name inside its folder", "pytorch_model-00001-of-00002.bin")


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    save_shards(tmp_path, state())
    index = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    first, *_, last = content["weight_map"]
    content["weight_map"]["extra"] = content["weight_map"][first]
    del content["weight_map"][last]
    index.write_text(json.dumps(content))
    refused(tmp_path, "lists tensors that the shard does not hold", "extra", "does not list there", last)


def test_shards_that_are_missing_or_stale(tmp_path: Path) -> None:
    save_shards(tmp_path, state())
    shutil.copy(tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "pytorch_model.bin")
    refused(tmp_path, "two checkpoints in one folder: pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    refused(tmp_path, "No such file", "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    refused(tmp_path, "shards of the checkpoint are missing", "2 shards")
