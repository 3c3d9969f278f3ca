"""Finding and opening checkpoints: which files count, what index and shards agree on, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint, write_file, write_index, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.errors import Problem, Refused

ARRAYS = {f"model.layers.{i}.w": np.full((2, 3), i, np.float32) for i in range(5)}


def refused(
    reference: Path | str, revision: str | None = None, search: tuple[Path, ...] = (Path("."),)
) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        open_checkpoint(str(reference), revision, search)
    for problem in caught.value.problems:
        assert problem.remedy or problem.expected
    return caught.value.problems


def refused_once(reference: Path | str, *words: str) -> Problem:
    (problem,) = refused(reference)
    for word in words:
        assert word in str(problem)
    return problem


def test_single_file_folder(tmp_path: Path) -> None:
    config = {"architectures": None, "hidden_size": 3}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, ARRAYS, config=config)))
    assert checkpoint.reference == str(tmp_path)
    assert (checkpoint.folder, checkpoint.revision, checkpoint.config) == (tmp_path, None, config)
    assert list(checkpoint.tensors) == list(ARRAYS)
    assert [file.path.name for file in checkpoint.files] == ["model.safetensors"]


def test_shards_are_in_order_and_hold_the_data(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, ARRAYS, shards=3)))
    assert [file.path.name for file in checkpoint.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(checkpoint.tensors) == list(ARRAYS)
    for name, tensor in checkpoint.tensors.items():
        data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert data == ARRAYS[name].tobytes()


def test_sizes_count_only_floats_as_parameters(tmp_path: Path) -> None:
    arrays = {"w": np.ones((2, 3), np.float16), "scale": np.float32(1), "ids": np.arange(4)}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, {k: np.asarray(v) for k, v in arrays.items()})))
    assert (checkpoint.parameters, checkpoint.nbytes) == (7, 12 + 4 + 32)


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"a": np.ones(1, np.float32)})
    write_file(tmp_path / "b.safetensors", {"b": np.ones(1, np.float32)})
    checkpoint = open_checkpoint(str(tmp_path / "b.safetensors"))
    assert list(checkpoint.tensors) == ["b"]
    assert checkpoint.folder == tmp_path


@pytest.mark.parametrize("shards", [1, 2])
def test_another_base_name(shards: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=shards, base="diffusion_pytorch_model")
    assert list(open_checkpoint(str(tmp_path)).tensors) == list(ARRAYS)


def test_numbered_shards_without_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=3, index=False)
    assert list(open_checkpoint(str(tmp_path)).tensors) == list(ARRAYS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused_once(tmp_path, "shards of the checkpoint are missing", "3 shards", "model-00003-of-00003", "index.json")


@pytest.mark.parametrize("shards", [1, 2])
def test_the_name_model_comes_first(shards: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=shards)
    write_file(tmp_path / "consolidated.safetensors", {"other": np.ones(1, np.float32)})
    assert list(open_checkpoint(str(tmp_path)).tensors) == list(ARRAYS)


def test_loose_files_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_file(tmp_path / f"{name}.safetensors", {name: np.ones(1, np.float32)})
    refused_once(tmp_path, "not clear which files", "a.safetensors, b.safetensors", "name the .safetensors file itself")


def test_two_indexes_are_refused(tmp_path: Path) -> None:
    for base in ("one", "two"):
        write_checkpoint(tmp_path, ARRAYS, shards=2, base=base)
    refused_once(tmp_path, "not clear which files", "one.safetensors.index.json, two.safetensors.index.json")


def test_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=2)
    write_file(tmp_path / "model.safetensors", ARRAYS)
    refused_once(tmp_path, "two checkpoints in one folder", "out of date")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused_once(tmp_path, "not clear which files")


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS)
    write_index(tmp_path, dict.fromkeys(ARRAYS, "model.safetensors"))
    assert list(open_checkpoint(str(tmp_path)).tensors) == list(ARRAYS)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused_once(tmp_path, "pickles", name, "save_pretrained")
    refused_once(tmp_path / name, "pickles", name, "save_pretrained")


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    refused_once(tmp_path, "no checkpoint here", "nothing")
    (tmp_path / "model_index.json").write_text("{}")
    refused_once(tmp_path, "the pipeline has no part to be merged", "a folder whose name begins with unet")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused_once(tmp_path / "notes.txt", "not a checkpoint", "a folder, a .safetensors or a .bin file")


# --- where a reference is looked for


def test_relative_paths_try_each_folder_in_turn(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one" / "both", {"first": np.ones(1, np.float32)})
    write_checkpoint(tmp_path / "two" / "both", {"second": np.ones(1, np.float32)})
    write_checkpoint(tmp_path / "two" / "only", {"third": np.ones(1, np.float32)})
    search = (tmp_path / "one", tmp_path / "two")
    assert list(open_checkpoint("both", search=search).tensors) == ["first"]
    assert list(open_checkpoint("only", search=search).tensors) == ["third"]
    assert list(open_checkpoint(str(tmp_path / "two" / "both"), search=search).tensors) == ["second"]
    (problem,) = refused("none", search=search)
    assert "no such checkpoint: none" in problem.what
    assert problem.found is not None and f"{tmp_path / 'one' / 'none'}, {tmp_path / 'two' / 'none'}" in problem.found


def test_a_local_path_has_no_revision(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", ARRAYS)
    (problem,) = refused(tmp_path / "model", "v2")
    assert "a revision is given for a local path" in problem.what
    write_checkpoint(tmp_path / "model@v2", {"at": np.ones(1, np.float32)})
    assert list(open_checkpoint(str(tmp_path / "model"), "v2").tensors) == ["at"]


@pytest.mark.parametrize(
    "reference", ["", "a\0b", "/no/such/folder", "./no/such", "../no", "no-such.safetensors", "x" * 5000]
)
def test_references_to_nothing_are_refused(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = refused(reference)
    assert "no such checkpoint" in problem.what or "not a path" in problem.what


# --- index and shards


def test_missing_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused_once(tmp_path, "No such file", "model-00002-of-00003.safetensors", "download")


def test_all_problems_of_all_shards_are_told_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=5, config={"quantization_config": {"quant_method": "awq"}})
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].unlink()
    write_raw(shards[1], b"{")
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    write_file(shards[3], {"stray": np.ones(1, np.float32)})
    problems = refused(tmp_path)
    places = [Path(problem.place or "").name for problem in problems]
    assert places == ["config.json", *(shard.name for shard in (*shards[:4], shards[3]))]
    assert "quantised (AWQ)" in problems[0].what


def test_tensor_in_the_index_but_not_in_the_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("zz.one", "aa\x1b", "zz.two"):
        index[name] = "model-00002-of-00002.safetensors"
    write_index(tmp_path, index)
    problem = refused_once(tmp_path, "the index lists tensors that the shard does not hold", "model-00002")
    assert problem.tensor == "aa\\x1b and 2 more"


def test_tensor_in_the_shard_but_not_in_the_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    del index["model.layers.3.w"]
    write_index(tmp_path, index)
    problem = refused_once(tmp_path, "the shard holds tensors that the index does not list", "model-00002")
    assert problem.tensor == "model.layers.3.w"


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, shards=2, index=False)
    write_file(tmp_path / "model-00002-of-00002.safetensors", {"model.layers.0.w": np.ones(1, np.float32)})
    refused_once(tmp_path, "the tensor is in two shards", "model.layers.0.w", "also in", "model-00001-of-00002")


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/model.safetensors",
        "./model.safetensors",
        "a//model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "model.bin",
        "model.safetensors\0",
        "\x1b[2J.safetensors",
        "\n.safetensors",
        "",
        ".",
        7,
        None,
        ["model.safetensors"],
        {"model.safetensors": 1},
    ],
)
def test_shard_names_that_are_no_plain_names(shard: Any, tmp_path: Path) -> None:
    write_file(tmp_path.parent / "model.safetensors", {"a": np.ones(1, np.float32)})
    write_index(tmp_path, {"a": shard})
    problem = refused_once(tmp_path, "not a plain file name inside its folder")
    assert str(problem).replace("\n", "").isprintable()


def test_shards_may_be_symbolic_links_and_lie_deeper(tmp_path: Path) -> None:
    blob = write_file(tmp_path / "blobs" / "5f3c", {"a": np.ones(1, np.float32)})
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "x.safetensors").symlink_to(blob)
    write_index(tmp_path / "model", {"a": "deep/x.safetensors"})
    assert list(open_checkpoint(str(tmp_path / "model")).tensors) == ["a"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"", "the index cannot be read"),
        (b"{", "the index cannot be read"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key 'a'"),
        (b'{"weight_map": {"a": NaN}}', "NaN"),
        (b'{"weight_map": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"weight_map": {"\xff": "x.safetensors"}}', "invalid UTF-8"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": null}', "no weight_map"),
    ],
)
def test_broken_index(index: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    refused_once(tmp_path, words, "model.safetensors.index.json")


def test_an_index_needs_no_metadata(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": np.ones(1, np.float32)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["a"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["a.safetensors", "b.safetensors"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(weight_map=json_values | st.dictionaries(st.sampled_from("abc"), json_values), config=json_values)
def test_random_index_and_config_raise_nothing_but_refused(
    weight_map: object, config: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    for name in "ab":
        write_file(folder / f"{name}.safetensors", {name: np.ones(1, np.float32)})
    write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert open_checkpoint(str(folder)).tensors.keys() == weight_map.keys()  # type: ignore[attr-defined]
    except Refused as refused:
        assert refused.problems


# --- config.json


@pytest.mark.parametrize(
    "config", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_broken_config(config: bytes, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS)
    (tmp_path / "config.json").write_bytes(config)
    refused_once(tmp_path, "config.json cannot be read", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised (GPTQ)", "quantise the result"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantised (AWQ)", "quantise the result"]),
        ({"quantization_config": {"quant_method": "hqq"}}, ["quantised (HQQ)", "quantise the result"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["(bitsandbytes)", "model.dequantize()"]),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["(MXFP4)", "Mxfp4Config(dequantize=True)"]),
        ({"quantization_config": {"quant_method": "of tomorrow"}}, ["(of tomorrow)", "quantise the result"]),
        ({"quantization_config": {"bits": 4}}, ["quantised (unknown method)"]),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}},
            ["(fp8)", "text_config.quantization_config.expert_dtype: fp4", "FineGrainedFP8Config(dequantize=True)"],
        ),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            [
                "(compressed-tensors)",
                "compression_config.config_groups: None",
                "run_compressed=False",
            ],
        ),
        ({"quantization_config": {"quant_method": "\x1b[31m"}}, ["\\x1b[31m"]),
    ],
)
def test_quantised_models_are_refused_by_name(config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS, config=config)
    refused_once(tmp_path, *words, "its numbers are codes")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GPTQ", ["qweight", "qzeros", "scales", "g_idx"]),
        ("AWQ", ["qweight", "qzeros", "scales"]),
        ("bitsandbytes", ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]),
        ("bitsandbytes", ["weight", "SCB", "weight_format"]),
        ("compressed-tensors", ["weight_packed", "weight_scale", "weight_shape"]),
        ("HQQ", ["W_q", "scale", "zero"]),
        ("quanto", ["weight._data", "weight._scale"]),
        ("AQLM", ["codes", "codebooks", "scales"]),
        ("ModelOpt NVFP4", ["weight", "weight_scale", "weight_scale_2"]),
        ("MLX", ["weight", "scales", "biases"]),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_quantised_models_give_themselves_away(name: str, words: list[str], shards: int, tmp_path: Path) -> None:
    codes = {f"layers.{i}.q_proj.{word}": np.zeros(2, np.uint8) for i in range(2) for word in words}
    write_checkpoint(tmp_path, ARRAYS | codes, shards=shards)
    problem = refused_once(tmp_path, f"quantised ({name})", "its numbers are codes")
    assert problem.tensor is not None and problem.tensor.startswith("layers.0.q_proj") and "1 more" in problem.tensor


def test_a_word_alone_gives_nothing_away(tmp_path: Path) -> None:
    names = ("blocks.0.scales", "blocks.0.weight", "codes", "norm.biases", "W.qzeros", "absmax")
    arrays = {name: np.ones(2, np.float32) for name in names}
    assert list(open_checkpoint(str(write_checkpoint(tmp_path, arrays))).tensors) == list(names)


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "MODEL.GGUF"])
def test_gguf_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    refused_once(tmp_path, "GGUF", name, "llama.cpp")
    refused_once(tmp_path / name, "GGUF", name, "llama.cpp")


def test_absent_quantisation_is_fine(tmp_path: Path) -> None:
    config = {"quantization_config": None, "text_config": {"quantization_config": None}}
    assert open_checkpoint(str(write_checkpoint(tmp_path, ARRAYS, config=config))).config == config


def test_no_config_is_fine(tmp_path: Path) -> None:
    assert open_checkpoint(str(write_checkpoint(tmp_path, ARRAYS))).config is None


# --- cost


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A terabyte of (sparse) weights is opened at once, in no memory."""
    numel = 2**38
    header = {"huge": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}}
    path = write_raw(tmp_path / "model.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + 4 * numel)
    except OSError:
        pytest.skip("the file system has no sparse files of a terabyte")
    assert open_checkpoint(str(tmp_path)).parameters == numel


def test_opening_imports_nothing_heavy(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARRAYS)
    script = (
        "import sys; from ggez_merge.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "print({'torch', 'transformers', 'huggingface_hub', 'safetensors', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
