"""Quantised checkpoints: every format against its formula, merged as the plain weights they stand for, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from checkpoints import write_checkpoint
from merging import (
    BF16,
    INTERPOLATE,
    LITTLE_MEMORY,
    TASK,
    TIES,
    carry_out,
    command_line,
    merged,
    plan_of,
)
from models import llama
from quantising import E4M3, WAYS, Array, Stored, W, Way, refusal, whole

from ggez_merge.checkpoint import open_checkpoint

BLOCKS = WAYS["fp8 by blocks"]
DARE = TIES.replace("ties", "dare_ties")
SLERP = "{merge_method: slerp, base_model: base, models: [{model: one}], parameters: {t: 0.3}}"


def bf16(weight: Array) -> bytes:
    return weight.astype(BF16).tobytes()


# --- what they stand for --------------------------------------------------------------------------------------------


def test_stacked_experts_of_fbgemm_are_scaled_by_columns(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scales = random.random((3, 1, 10)).astype("f4"), random.random((3, 10, 1)).astype("f4")
    codes = random.normal(size=(3, 10, 10)).astype(E4M3)  # as wide as high: the shape does not tell
    arrays = {"gate_up_proj": codes, "gate_up_proj_scale": scales[0], "down_proj": codes, "down_proj_scale": scales[1]}
    config = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, arrays, config=config)))
    for name, scale in zip(("gate_up_proj", "down_proj"), scales, strict=True):
        assert whole(checkpoint, name).tobytes() == (codes.astype("f4") * scale.reshape(3, 1, 10)).tobytes()
    assert "2 fp8 weights by columns" in checkpoint.notes[0]


@pytest.mark.parametrize("scale_shape", [(3, 2, 1), (3, 1, 1), (3,), (1,), ()])
def test_stacked_experts_with_few_scales(scale_shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(E4M3)
    scale = np.random.default_rng(1).random(scale_shape).astype("f4")
    arrays = {
        "experts.gate_up_proj": codes,
        "experts.gate_up_proj_scale_inv": scale,
        "experts.gate_up_proj_bias": scale,
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, arrays, config=config)))
    spread = np.repeat(scale, 4, 1) if scale_shape == (3, 2, 1) else scale.reshape(-1, 1, 1)
    assert whole(checkpoint, "experts.gate_up_proj").tobytes() == (codes.astype("f4") * spread).tobytes()
    assert list(checkpoint.tensors) == ["experts.gate_up_proj", "experts.gate_up_proj_bias"]


def test_several_groups_and_what_they_leave_plain(tmp_path: Path) -> None:
    ways = [WAYS["packed int4 by groups"], WAYS["compressed fp8 by rows"]]
    stored = [way.store((16, 64)) for way in ways]
    groups = [way.config() for way in ways]
    config = groups[0] | {"format": "mixed-precision", "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8}}
    config["config_groups"] = {
        f"group_{i}": group["config_groups"]["group_0"] | {"format": group["format"]} for i, group in enumerate(groups)
    }
    arrays = (
        stored[0].named("experts.0.weight") | stored[1].named("q.weight") | {"lm_head.weight": np.ones((2, 2), BF16)}
    )
    arrays |= {"q.input_scale": np.ones(1, "f4"), "attn.k_scale": np.ones(1, BF16), "attn.v_scale": np.ones(1, BF16)}
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, arrays, config={"quantization_config": config})))
    assert set(checkpoint.tensors) == {"experts.0.weight", "q.weight", "lm_head.weight"}
    assert whole(checkpoint, "experts.0.weight").tobytes() == stored[0].weight.tobytes()
    assert whole(checkpoint, "q.weight").tobytes() == stored[1].weight.tobytes()
    assert checkpoint.notes == (
        "dequantised: 1 int4 weight by groups of 8, 1 fp8 weight by rows; left out: 2 weight_scale, 1 weight_shape, "
        "1 input_scale, 1 k_scale, 1 v_scale",
    )


@pytest.mark.parametrize("name", ["fp8 by blocks", "fp8 with one scale", "compressed fp8 by rows"])
def test_a_config_that_says_nothing(name: str, tmp_path: Path) -> None:
    stored = WAYS[name].store((200, 300))
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, stored.named(W) | {"x.k_scale": np.ones(1, "f4")})))
    assert whole(checkpoint, W).tobytes() == stored.weight.tobytes()
    assert list(checkpoint.tensors) == [W]
    assert "config.json says nothing of them" in checkpoint.notes[0]


def test_plain_weights_under_a_config_that_says_otherwise(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {W: np.ones((2, 2), BF16)}, config={"quantization_config": BLOCKS.config()})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.notes == ("config.json states quantised weights, but there are none",)
    assert (checkpoint.tensors[W].made, checkpoint.config) == (None, {})


def test_weights_in_torch_files(tmp_path: Path) -> None:
    stored = BLOCKS.store((200, 300))
    tmp_path.joinpath("config.json").write_text(json.dumps(stored.config))
    state = {
        W: torch.from_numpy(stored.tensors[""].view(np.uint8)).view(torch.float8_e4m3fn),
        f"{W}_scale_inv": torch.from_numpy(stored.tensors["_scale_inv"]),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert whole(open_checkpoint(str(tmp_path)), W).tobytes() == stored.weight.tobytes()


def test_transformers_dequantises_to_the_same_model(tmp_path: Path) -> None:
    """A Llama in fp8, as FineGrainedFP8 loads it where it has no kernels, and as a merge writes it."""
    model = llama(hidden_size=64, intermediate_size=96, num_hidden_layers=2).to(torch.bfloat16)
    block = {"weight_block_size": [32, 32]}
    way = Way("fp8", (32, 32), suffix="_scale_inv", more=block)
    arrays: dict[str, Array] = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if "_proj" in name:
            arrays |= way.store(tuple(tensor.shape), number).named(name)
        else:
            arrays[name] = tensor.view(torch.int16).numpy().view(BF16)
    config = model.config.to_dict() | {"quantization_config": way.config() | {"modules_to_not_convert": ["lm_head"]}}
    for name in ("base", "one"):
        write_checkpoint(tmp_path / name, arrays, config=config | {"architectures": ["LlamaForCausalLM"]})
    carry_out(plan_of(tmp_path, INTERPOLATE))
    models_ = [
        tf.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype="bfloat16", output_loading_info=True)
        for name in ("base", "out")
    ]
    (theirs, _), (ours, info) = models_
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert getattr(ours.config, "quantization_config", None) is None
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


# --- merged ---------------------------------------------------------------------------------------------------------


def trio(folder: Path, way: Way, plain: bool, **more: Any) -> None:
    """Models base, one and two, quantised, or plain in float32 with the same values."""
    for number, model in enumerate(("base", "one", "two")):
        arrays: dict[str, Array] = {"norm.weight": np.full(5, number, BF16)}
        for layer in range(3):
            stored = way.store((70, 8 * 90), seed=10 * layer + number % 2)
            name = W.replace("0", str(layer))
            arrays |= {name: stored.weight} if plain else stored.named(name)
        config = {"model_type": "llama", "torch_dtype": "bfloat16"}
        write_checkpoint(folder / model, arrays, config=config if plain else config | stored.config, **more)


@pytest.mark.parametrize(
    "recipe", [INTERPOLATE, TASK, TIES, DARE, SLERP], ids=["linear", "task", "ties", "dare", "slerp"]
)
@pytest.mark.parametrize("name", ["fp8 by blocks", "packed int4 with zeros"])
def test_a_merge_gives_what_merging_the_plain_weights_gives(name: str, recipe: str, tmp_path: Path) -> None:
    trio(tmp_path / "quantised", WAYS[name], plain=False)
    trio(tmp_path / "plain", WAYS[name], plain=True)
    expected = merged(tmp_path / "plain", yaml.dump(yaml.safe_load(recipe) | {"out_dtype": "bfloat16"}))
    assert merged(tmp_path / "quantised", recipe) == expected


def test_threads_memory_and_shards_change_no_byte(tmp_path: Path) -> None:
    way = WAYS["packed int4 with zeros"]
    trio(tmp_path, way, plain=False)
    trio(tmp_path / "cut", way, plain=False, shards=5)
    expected = merged(tmp_path, TIES)
    for number, options in enumerate(({"threads": 1}, {"threads": 3, "memory_bytes": LITTLE_MEMORY})):
        assert merged(tmp_path, TIES, f"out{number}", **options) == expected
    assert merged(tmp_path / "cut", TIES) == expected


@pytest.mark.parametrize("quantised", [["base"], ["one"], ["base", "one"]])
def test_endpoints_are_the_dequantised_weights_rounded_once(quantised: list[str], tmp_path: Path) -> None:
    stored = {model: BLOCKS.store((300, 200), seed) for seed, model in enumerate(("base", "one"))}
    for model, each in stored.items():
        config = {"text_config": {"vocab_size": 7}}
        arrays = {W: each.weight.astype(BF16)}
        if model in quantised:
            arrays = each.named(W) | {"layers.0.k_scale": np.ones(1, "f4")}
            config["text_config"] |= each.config
            config["text_config"]["dtype"] = "bfloat16"
            (tmp_path / model).mkdir()
            (tmp_path / model / "hf_quant_config.json").write_text("{}")
        write_checkpoint(tmp_path / model, arrays, config=config)
    for ratio, model in ((0, "base"), (1, "one")):
        out = f"out{ratio}"
        assert merged(tmp_path, INTERPOLATE.replace("0.3", str(ratio)), out) == {
            W: ("BF16", bf16(stored[model].weight))
        }
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert "quantization_config" not in config["text_config"]
        assert not (tmp_path / out / "hf_quant_config.json").exists()
        report = json.loads((tmp_path / out / "merge_report.json").read_text())
        line = "dequantised: 1 fp8 weight by blocks of 128 × 128; left out: 1 weight_scale_inv, 1 k_scale"
        assert report["notes"] == [f"{model}: {line}" for model in quantised]
        assert (tmp_path / out / "README.md").read_text().count(line) == len(quantised)


def test_the_dtype_is_the_one_that_the_config_states(tmp_path: Path) -> None:
    stored = BLOCKS.store((3, 3))
    for model in ("base", "one"):
        write_checkpoint(tmp_path / model, stored.named(W), config=stored.config | {"torch_dtype": "float16"})
    assert merged(tmp_path, INTERPOLATE)[W] == ("F16", stored.weight.astype("f2").tobytes())


def test_experts_of_another_layout(tmp_path: Path) -> None:
    """Stacked and plain in the base, one each and in 8 bits in the model."""
    n, rows, columns = 3, 40, 24
    arrays: dict[str, Array] = {}
    expected = []
    for e in range(n):
        for seed, word in enumerate(("gate_proj", "up_proj")):
            stored = BLOCKS.store((rows, columns), 10 * e + seed)
            arrays |= stored.named(f"layers.0.mlp.experts.{e}.{word}.weight")
            expected.append(stored.weight)
    whole_ = np.stack(expected).reshape(n, 2 * rows, columns)
    write_checkpoint(tmp_path / "base", {"layers.0.mlp.experts.gate_up_proj": np.zeros_like(whole_, BF16)})
    write_checkpoint(tmp_path / "one", arrays, config=stored.config)
    (found,) = merged(tmp_path, INTERPOLATE.replace("0.3", "1")).values()
    assert found == ("BF16", bf16(whole_))


def test_what_the_commands_say(tmp_path: Path) -> None:
    stored = BLOCKS.store((300, 200))
    write_checkpoint(tmp_path / "base", stored.named(W), config=stored.config)
    write_checkpoint(tmp_path / "one", {W: stored.weight.astype(BF16)})
    (tmp_path / "recipe.yaml").write_text(INTERPOLATE)
    line = "dequantised: 1 fp8 weight by blocks of 128 × 128; left out: 1 weight_scale_inv"
    shown = command_line("recipe.yaml", "--out", "out", "--dry-run", "--json", cwd=tmp_path)
    said = json.loads(shown.stdout)
    assert f"base: {line}" in said["notes"]
    assert [entry["dtypes"] for entry in said["inputs"]] == [["F32", "F8_E4M3"], ["BF16"]]
    assert [entry["bytes"] for entry in said["inputs"]] == [60_024, 120_000]
    assert (said["read_bytes"], said["dtypes"]) == (180_024, ["BF16"])
    seen = json.loads(command_line("inspect", "base", "--json", "--tensors", cwd=tmp_path).stdout)
    assert [(t["name"], t["dtype"]) for t in seen["tensors"]] == [(W, "F8_E4M3"), (f"{W}_scale_inv", "F32")]
    assert (seen["parameters"], seen["notes"]) == (60_000, [line])
    assert line in command_line("inspect", "base", cwd=tmp_path).stdout
    seen = json.loads(command_line("diff", "base", "one", "--json", cwd=tmp_path).stdout)
    assert seen["other_dtype"] == [{"name": W, "a": "F8_E4M3 [300, 200]", "b": "BF16 [300, 200]"}]
    assert seen["components"][0]["relative_l2"] < 2**-8
    assert seen["only_a"] == seen["only_b"] == []


# --- refused --------------------------------------------------------------------------------------------------------

FIT = "a quantised weight and its scales do not fit"
NEEDS = "a quantised weight needs scales"
ONES = np.ones


@pytest.mark.parametrize(
    ("name", "change", "words_"),
    [
        ("fp8 by blocks", {"_scale_inv": None}, [NEEDS, f"{W}_scale_inv", "found:    none"]),
        ("fp8 by blocks", {"_scale_inv": ONES((3, 2), "f4")}, [FIT, "scales [2, 3]", "scales [3, 2]"]),
        ("fp8 by blocks", {"_scale_inv": ONES(1, "f4")}, [FIT, "scales [1]"]),
        ("fp8 by blocks", {"_scale_inv": ONES((2, 3), "f8")}, ["scales of this dtype", "F64", "F32 or BF16"]),
        ("fp8 by blocks", {"_scale_inv": ONES((2, 3), "u1")}, ["scales of this dtype", "U8"]),
        ("fp8 by blocks", {"_scale": ONES((2, 3), "f4")}, [NEEDS, "and no other"]),
        ("fp8 by blocks", {"_zero_point": ONES((2, 3), "i1")}, [FIT, "zero points I8 [2, 3]"]),
        ("fp8 by blocks", {"_scale_2": ONES(1, "f4")}, ["not understood", f"{W}_scale_2"]),
        ("fp8 by blocks", {"": ONES((200, 320), BF16)}, ["belongs to no quantised weight", f"{W} in BF16"]),
        ("fp8 by blocks", {"": None}, ["belongs to no quantised weight", f"no {W}"]),
        ("fbgemm", {"_scale": ONES((200,), "f4")}, [FIT, "fp8 weight by rows, scales [200, 1]"]),
        ("compressed int8 by rows", {"": ONES((200, 320), E4M3)}, [FIT, "a scheme for such weights"]),
        ("compressed int8 with zeros", {"_zero_point": None}, [FIT, "zero points I8 [200, 1]"]),
        ("compressed fp8 by rows", {"": ONES((200, 320), "i1")}, ["belongs to no quantised weight", "in I8"]),
        ("packed int4 by groups", {"_shape": None}, ["has to state its shape", "found:    none"]),
        (
            "packed int4 by groups",
            {"_shape": np.array([320, 200])},
            ["has to state its shape", "[200, 'n']", "[320, 200]"],
        ),
        ("packed int4 by groups", {"_shape": np.array([200, -1])}, ["has to state its shape"]),
        ("packed int4 by groups", {"_shape": np.array([200, 2**62])}, [FIT]),
        ("packed int4 by groups", {"_shape": np.array([200, 328])}, [FIT, "I32 [200, 41]"]),
        ("packed int4 by groups", {"_g_idx": ONES(320, "i4")}, ["not understood", f"{W}_g_idx"]),
        ("packed int4 by groups", {"_packed": ONES((200, 40), "u4")}, [FIT, "U32 [200, 40]"]),
        ("packed int4 by groups", {"": ONES((200, 320), BF16)}, ["twice, quantised and not"]),
        (
            "packed int4 by groups",  # a last group that is smaller
            {"_shape": np.array([200, 316]), "_packed": ONES((200, 40), "i4"), "_scale": ONES((200, 40), "f4")},
            [FIT, "a scheme for such weights"],
        ),
        ("compressed int8 with zeros", {"_zero_point": ONES((200, 1), "u1")}, [FIT, "zero points U8 [200, 1]"]),
        ("packed int4 with zeros", {"_zero_point": ONES((200, 40), "i1")}, [FIT, "zero points I32 [25, 40]"]),
    ],
)
def test_what_does_not_fit(name: str, change: dict[str, Any], words_: list[str], tmp_path: Path) -> None:
    stored = WAYS[name].store((200, 320))
    arrays = {
        n: a for n, a in Stored({}, {**stored.tensors, **change}, stored.weight).named(W).items() if a is not None
    }
    said = refusal(tmp_path, arrays, stored.config)
    for word in (*words_, W, "model.safetensors"):
        assert word in said, said


def test_one_fault_of_many_weights_is_said_once(tmp_path: Path) -> None:
    arrays = {W.replace("0", str(i)): np.ones((3, 3), E4M3) for i in range(5)}
    assert f"{W} and 4 more" in refusal(tmp_path, arrays, {"quantization_config": BLOCKS.config()})


def test_a_weight_that_two_schemes_fit_differently(tmp_path: Path) -> None:
    config = WAYS["compressed fp8 by blocks"].config()
    group = config["config_groups"]["group_0"]["weights"]
    config["config_groups"]["other"] = {"weights": group | {"block_structure": [17, 24]}}
    stored = WAYS["compressed fp8 by blocks"].store((30, 48))
    assert "several schemes fit" in refusal(tmp_path, stored.named(W), {"quantization_config": config})


def test_packed_words_that_may_be_of_either_width(tmp_path: Path) -> None:
    stored = {bits: Way("compressed-tensors", (1, 0), "int", bits, packed=True).store((5, 4)) for bits in (4, 8)}
    config = stored[4].config["quantization_config"]
    config["config_groups"]["wider"] = stored[8].config["quantization_config"]["config_groups"]["group_0"]
    assert "several schemes fit" in refusal(tmp_path, stored[4].named(W), {"quantization_config": config})


def test_scales_that_do_not_fit_where_nothing_is_stated(tmp_path: Path) -> None:
    arrays = {W: np.ones((200, 300), E4M3), f"{W}_scale": np.ones((5, 1), "f4")}
    assert FIT in refusal(tmp_path, arrays, None)
