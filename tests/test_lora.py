"""A base with an adapter against PEFT's own merge, bit for bit, and what must never change a byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from adapters import merged_by_peft, pair, save_adapter, save_base, write_adapter
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import BF16, LITTLE_MEMORY, arrays, carry_out, contents, merged, plan_of, refusals, tensors
from models import LAYOUTS, llama, read_weights
from models import merged as merged_model

from ggez_merge.checkpoint import Tensor
from ggez_merge.lora import Adapted
from ggez_merge.read import Files

RATIO_1 = "{merge_method: linear, base_model: base, models: [{model: base+./sea}], parameters: {ratio: 1}}"


def gpt2() -> tf.PreTrainedModel:
    """Its linear layers are stored [in, out], one of them square."""
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=16))


def biased() -> tf.PreTrainedModel:
    return llama(attention_bias=True, mlp_bias=True, num_hidden_layers=2)


Case = tuple[Callable[[], tf.PreTrainedModel], dict[str, Any]]
LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, Case] = {
    "plain": (llama, {"target_modules": LINEAR, "lora_alpha": 6}),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True, "r": 16, "rank_pattern": {"q_proj": 4}}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "patterns": (
        llama,
        {
            "target_modules": LINEAR,
            "rank_pattern": {
                "v_proj": 2,
                r"^model\.layers\.[01]\.self_attn\.q_proj": 8,
                "model.layers.2.mlp.down_proj": 1,
            },
            "alpha_pattern": {"layers.3.self_attn.v_proj": 16, ".*down_proj": 2},
        },
    ),
    "saved whole": (llama, {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "biases of its modules": (biased, {"target_modules": LINEAR, "bias": "lora_only"}),
    "all biases": (biased, {"target_modules": LINEAR, "bias": "all"}),
    "a bias of B": (biased, {"target_modules": LINEAR, "lora_bias": True}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings tied": (gpt2, {"target_modules": ["wte", "c_proj"], "fan_in_fan_out": True}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "transposed and square": (gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "convolution": (LAYOUTS["siglip"], {"target_modules": ["patch_embedding", "fc1"]}),
    "vision and language": (LAYOUTS["qwen2_5_vl"], {"target_modules": ["q_proj", "qkv", "down_proj", "mlp.0"]}),
    "few names in another layout": (LAYOUTS["gemma3"], {"target_modules": r".*language_model.*\.(q|v)_proj"}),
    "vision alone in another layout": (LAYOUTS["llava"], {"target_modules": r".*vision_tower.*\.q_proj"}),
    "saved whole in another layout": (
        LAYOUTS["llava"],
        {"target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector", "embed_tokens"]},
    ),
}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: type[Any], folder: Path) -> None:
    """The merged folder holds these weights, under whatever names it has them."""
    ours = kind.from_pretrained(folder).state_dict()
    assert ours.keys() == expected.keys()
    different = [name for name in ours if not torch.equal(ours[name], expected[name])]
    assert not different
    assert found


@pytest.mark.parametrize("case", CASES)
def test_ratio_one_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = build()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(base, type(model), tmp_path / "sea", **{"r": 4, "lora_alpha": 8, **config})
    expected = merged_by_peft(base, type(model), adapter)
    untouched = type(model).from_pretrained(base).state_dict()
    assert any(not torch.equal(expected[name], untouched[name]) for name in expected)
    carry_out(plan_of(tmp_path, RATIO_1))
    same(read_weights(tmp_path / "out"), expected, type(model), tmp_path / "out")
    assert sorted(read_weights(tmp_path / "out")) == sorted(read_weights(base))


RANDOM: dict[str, Case] = {
    "lora": (llama, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "dora": (llama, {"target_modules": LINEAR, "use_dora": True}),
    "dora of a convolution": (LAYOUTS["siglip"], {"target_modules": ["patch_embedding", "fc1"], "use_dora": True}),
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_weights_are_nearer_to_exact_ones_than_peft_brings_them(case: str, tmp_path: Path) -> None:
    build, config = RANDOM[case]
    model = build()
    base = save_base(model, tmp_path / "base", dyadic=False)
    save_adapter(base, type(model), tmp_path / "sea", dyadic=False, r=8, lora_alpha=5, **config)
    carry_out(plan_of(tmp_path, RATIO_1))
    ours = type(model).from_pretrained(tmp_path / "out").state_dict()
    single, double = (merged_by_peft(base, type(model), tmp_path / "sea", of) for of in (torch.float32, torch.float64))
    for name, exact in double.items():
        found = ours[name].double()
        # half a unit in the last place, and the little that float64 itself rounds
        assert bool(((found - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 1e-6)).all()), name
        assert (found - exact).norm() <= (single[name].double() - exact).norm(), name


def test_a_bfloat16_base_keeps_what_peft_rounds_away(tmp_path: Path) -> None:
    """The delta is much smaller than the last place of the weights, and task arithmetic makes it large again."""
    shape = (24, 40)
    base = np.random.default_rng(0).normal(size=shape).astype(BF16)
    write_checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": base})
    tensors_ = {name: array * np.float32(0.02) for name, array in pair("layers.0.q_proj", *shape).items()}
    write_adapter(tmp_path / "sea", tensors_)
    found = merged(tmp_path, TASK_OF_ONE.replace("WEIGHT", "64"))["layers.0.q_proj.weight"]
    assert found[0] == "BF16"
    a, b = (array.astype("f8") for array in tensors_.values())
    exact = base.astype("f8") + 64 * (b @ a)
    assert np.abs(np.frombuffer(found[1], BF16).reshape(shape).astype("f8") - exact).max() < np.abs(exact).max() * 2**-8
    rounded = (base.astype("f8") + b @ a).astype(BF16).astype("f8")
    assert np.abs(base.astype("f8") + 64 * (rounded - base.astype("f8")) - exact).max() > 0.1


TASK_OF_ONE = """
merge_method: task_arithmetic
base_model: base
models: [{model: {adapter: ./sea}, parameters: {weight: WEIGHT}}]
"""
SIZES = {"layers.0.q_proj.weight": (180, 1500), "layers.0.k_proj.weight": (7, 1500), "norm.weight": (33,)}


def wide(folder: Path, dtype: Any = BF16) -> None:
    """A base and two adapters of so many columns and so high a rank that all is cut into pieces."""
    random = np.random.default_rng(3)
    write_checkpoint(folder / "base", {name: random.normal(size=shape).astype(dtype) for name, shape in SIZES.items()})
    for number, name in enumerate(("sea", "latam")):
        a = {f"layers.0.{of}_proj.lora_A.weight": random.normal(size=(200, 1500)).astype("f4") for of in "qk"}
        b = {
            f"layers.0.{of}_proj.lora_B.weight": random.normal(size=(n, 200)).astype(BF16)
            for of, n in zip("qk", (180, 7), strict=True)
        }
        m = {
            f"layers.0.{of}_proj.lora_magnitude_vector": np.ones(n, "f4") for of, n in zip("qk", (180, 7), strict=True)
        }
        write_adapter(folder / name, {**a, **b, **(m if number else {})}, r=200, lora_alpha=3, use_dora=bool(number))


TWO = """
merge_method: METHOD
base_model: base
models:
  - {model: base+sea, parameters: {weight: 0.5, density: 0.5}}
  - {model: base+latam, parameters: {weight: 0.4, density: 0.5}}
"""


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
def test_threads_and_memory_never_change_a_byte(method: str, tmp_path: Path) -> None:
    wide(tmp_path)
    recipe = TWO.replace("METHOD", method)
    recipe = recipe.replace(", density: 0.5", "") if method == "task_arithmetic" else recipe
    first = merged(tmp_path, recipe, "first")
    for number, options in enumerate(
        ({"threads": 3, "memory_bytes": 3 * LITTLE_MEMORY}, {"threads": 1, "memory_bytes": LITTLE_MEMORY})
    ):
        assert merged(tmp_path, recipe, f"out{number}", **options) == first
        assert contents(tmp_path / f"out{number}").keys() == contents(tmp_path / "first").keys()
    assert {dtype for dtype, _ in first.values()} == {"BF16"}
    assert first["norm.weight"] == tensors(tmp_path / "base")["norm.weight"]
    assert first["layers.0.q_proj.weight"] != tensors(tmp_path / "base")["layers.0.q_proj.weight"]


def test_ratio_zero_is_the_base(tmp_path: Path) -> None:
    wide(tmp_path)
    found = merged(tmp_path, RATIO_1.replace("ratio: 1", "ratio: 0"))
    assert found == tensors(tmp_path / "base")


def test_float64_stays_float64(tmp_path: Path) -> None:
    wide(tmp_path, np.float64)
    found = merged(tmp_path, RATIO_1)["layers.0.q_proj.weight"]
    a, b = (arrays(tmp_path / "sea")[f"base_model.model.layers.0.q_proj.lora_{of}.weight"] for of in "AB")
    exact = b.reshape(180, 200).astype("f8") @ a.reshape(200, 1500).astype("f8") * (3 / 200)
    exact += arrays(tmp_path / "base")["layers.0.q_proj.weight"].reshape(180, 1500)
    assert found[0] == "F64"
    assert np.abs(np.frombuffer(found[1]).reshape(exact.shape) - exact).max() < 1e-12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Tensor, bytes]]]:
    """The adapted weights of each adapter, with all their bytes."""
    folder = tmp_path_factory.mktemp("made")
    wide(folder)
    found = {}
    for name in ("sea", "latam"):
        plan = plan_of(folder, RATIO_1.replace("./sea", name))
        for output in plan.outputs:
            if isinstance(output.models[0].made, Adapted):
                with Files([file for each in plan.checkpoints for file in each.files]) as files:
                    out = bytearray(output.models[0].nbytes)
                    files.read(output.models[0], 0, memoryview(out))
                found[f"{name} {output.entry.name}"] = (plan, output.models[0], bytes(out))
    return folder, found


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_span_is_read_as_it_is_in_the_whole(made: Any, data: st.DataObject) -> None:
    _, found = made
    plan, tensor, whole = found[data.draw(st.sampled_from(sorted(found)))]
    start = data.draw(st.integers(0, tensor.numel - 1))
    n = data.draw(st.integers(1, min(tensor.numel - start, 5000)) | st.just(tensor.numel - start))
    with Files([file for each in plan.checkpoints for file in each.files]) as files:
        out = bytearray(4 * n)
        files.read(tensor, 4 * start, memoryview(out))
    assert bytes(out) == whole[4 * start : 4 * (start + n)]


# --- around the weights -----------------------------------------------------------------------------------------------


def resized(folder: Path) -> None:
    """A tied base of 97 rows, and an adapter that was trained with 101, embeddings and head saved whole."""
    model = llama(num_hidden_layers=2, tie_word_embeddings=True)
    save_base(model, folder / "base")
    larger = tf.LlamaForCausalLM.from_pretrained(folder / "base")
    larger.resize_token_embeddings(101)
    larger.save_pretrained(folder / "larger")
    save_adapter(
        folder / "larger",
        tf.LlamaForCausalLM,
        folder / "sea",
        r=4,
        lora_alpha=8,
        target_modules=LINEAR,
        modules_to_save=["embed_tokens", "lm_head"],
    )


def test_a_resized_vocabulary_and_a_head_of_its_own(tmp_path: Path) -> None:
    resized(tmp_path)
    out = merged_model(tmp_path, merge_method="passthrough", models=[{"model": "base+sea"}])
    said = json.loads((out / "config.json").read_text())
    assert (said["vocab_size"], said["tie_word_embeddings"]) == (101, False)
    expected = merged_by_peft(tmp_path / "larger", tf.LlamaForCausalLM, tmp_path / "sea")
    found = tf.LlamaForCausalLM.from_pretrained(out).state_dict()
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (problem,) = (p for p in refusals(tmp_path, RATIO_1, out="other") if p.tensor == "model.embed_tokens.weight")
    assert "disagree on a tensor's shape" in problem.what
