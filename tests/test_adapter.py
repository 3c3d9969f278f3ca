"""Adapter folders: every form that PEFT has written them in, and everything that is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import pair, write_adapter
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import BF16, merged, refusals, scratch, tensors

from ggez_merge.adapter import read_adapter
from ggez_merge.errors import Refused

RECIPE = "{merge_method: linear, base_model: base, models: [{model: base+sea}], parameters: {ratio: 1}}"
Q = "model.layers.0.self_attn.q_proj"
BASE = {
    f"{Q}.weight": (6, 4),
    f"{Q}.bias": (6,),
    "model.layers.0.self_attn.v_proj.weight": (4, 4),
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.0.mlp.gate.weight": (3, 4),
    "model.counter": (),
}


def base(folder: Path, config: dict[str, Any] | None = None) -> None:
    random = np.random.default_rng(0)
    arrays_ = {name: np.asarray(random.normal(size=shape), "f4") for name, shape in BASE.items()}
    arrays_["model.counter"] = np.asarray(3, "i8")
    arrays_["lm_head.weight"] = np.asarray(random.normal(size=(8, 4)), "f4")
    write_checkpoint(folder / "base", arrays_, config=config or {"model_type": "llama", "tie_word_embeddings": False})


def expected(folder: Path, scale: float = 1.0) -> bytes:
    """Q's weight with the adapter `pair(Q, 6, 4)`, to the bit (the sums of two products are near enough)."""
    weight = np.frombuffer(tensors(folder / "base")[f"{Q}.weight"][1], "f4").reshape(6, 4)
    a, b = pair(Q, 6, 4).values()
    return (weight.astype("f8") + scale * (b.astype("f8") @ a.astype("f8"))).astype("f4").tobytes()


FORMS: dict[str, Callable[[str], str]] = {
    "as PEFT saves it": lambda name: f"base_model.model.{name}",
    "with the adapter's name": lambda name: f"base_model.model.{name}".replace(".weight", ".sea.weight"),
    "without a prefix": lambda name: name,
    "from a hub's layout": lambda name: f"base_model.model.{name}".replace(
        "model.layers", "model.language_model.layers"
    ),
    "of a wrapped model": lambda name: f"base_model.model.module.{name}",
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_names_means_the_same(form: str, suffix: str, tmp_path: Path) -> None:
    base(tmp_path)
    folder = write_adapter(tmp_path / "sea", {})
    named = {FORMS[form](name): torch.from_numpy(array) for name, array in pair(Q, 6, 4).items()}
    (folder / "adapter_model.safetensors").unlink()
    if suffix == "bin":
        torch.save(named, folder / "adapter_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(named, folder / "adapter_model.safetensors")
    found = merged(tmp_path, RECIPE)
    assert found[f"{Q}.weight"] == ("F32", expected(tmp_path))
    assert {name for name, value in found.items() if value != tensors(tmp_path / "base")[name]} == {f"{Q}.weight"}


Tensors = dict[str, np.ndarray[Any, Any]]
ONE = pair(Q, 6, 4)
V = "model.layers.0.self_attn.v_proj"
REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    **{
        key: (ONE, {key: value}, said)
        for key, value, said in (
            ("peft_type", "IA3", "IA3 cannot be applied"),
            ("trainable_token_indices", [1], "rows of the embeddings"),
            ("target_parameters", ["experts.gate_up_proj"], "stacked experts"),
            ("layer_replication", [[0, 1]], "several times"),
            ("alora_invocation_tokens", [1], "switched on by tokens"),
            ("use_qalora", True, "QALoRA"),
            ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
            ("arrow_config", {"top_k": 1}, "router"),
            ("kasa_config", {"beta": 1}, "KaSA"),
            ("monteclora_config", {"num_samples": 1}, "MonteCLoRA"),
            ("r", 0, "no such number"),
            ("lora_alpha", "two", "no such number"),
            ("use_rslora", 1, "neither true nor false"),
            ("use_dora", True, "config and tensors of the adapter disagree"),
            ("rank_pattern", {"(": 2}, "none that can be followed"),
            ("alpha_pattern", {"(a+)+": 2}, "none that can be followed"),
            ("alpha_pattern", {".+.+.+.+.+.+.+z": 2}, "none that can be followed"),
            ("rank_pattern", {"a?" * 24 + "a" * 24 + "b": 2}, "none that can be followed"),
            ("fan_in_fan_out", 3, "neither true nor false"),
        )
    },
    **{
        f"init {kind}": (ONE, {"init_lora_weights": kind}, "its initialisation has changed")
        for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    },
    "another rank": (ONE, {"r": 3}, "do not have the rank"),
    "another rank by a pattern": (ONE, {"rank_pattern": {"q_proj": 1}}, "do not have the rank"),
    "half a pair": (dict([*ONE.items()][:1]), {}, "half of an adapter's pair"),
    "unknown tensors": ({**ONE, f"{Q}.lora_diag": np.ones(2, "f4")}, {}, "none of LoRA's A and B"),
    "several adapters": ({**ONE, f"{V}.lora_A.b.weight": np.ones((2, 4), "f4")}, {}, "several adapters"),
    "no tensors": ({}, {}, "holds no tensors"),
    "integers": ({name: array.astype("i8") for name, array in ONE.items()}, {}, "not in floats"),
    "a sharded tensor": ({**ONE, f"{Q}.lora_A.weight": np.ones(0, "f4")}, {}, "do not have the rank"),
    "magnitudes without DoRA": ({**ONE, f"{Q}.lora_magnitude_vector": np.ones(6, "f4")}, {}, "disagree"),
    "too few magnitudes": (
        {**ONE, f"{Q}.lora_magnitude_vector": np.ones(4, "f4")},
        {"use_dora": True},
        "one magnitude for each output",
    ),
    "a module that is not there": (pair("model.layers.0.self_attn.k_proj", 6, 4), {}, "that base lacks"),
    "a layer that is not there": (pair("model.layers.7.self_attn.q_proj", 6, 4), {}, "that base lacks"),
    "a whole tensor that is not there": ({**ONE, "model.adapter_gate": np.ones(3, "f4")}, {}, "that base lacks"),
    "a bias that is not there": ({**pair(V, 4, 4), f"{V}.lora_B.bias": np.ones(4, "f4")}, {"lora_bias": True}, "lacks"),
    "another shape": (pair(Q, 6, 5), {}, "does not fit"),
    "another shape of a whole tensor": (
        {**ONE, "model.layers.0.norm.weight": np.ones(5, "f4")},
        {},
        "another shape than the base's",
    ),
    "DoRA on its side": (
        {**pair(Q, 4, 6), f"{Q}.lora_magnitude_vector": np.ones(4, "f4")},
        {"use_dora": True},
        "transposed weights",
    ),
    "square, and others disagree": ({**pair(V, 4, 4), **pair(Q, 4, 6)}, {}, "on whether this one is transposed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    base(tmp_path)
    tensors_, config, said = REFUSED[case]
    write_adapter(tmp_path / "sea", tensors_, **config)
    found = refusals(tmp_path, RECIPE)
    assert any(said in problem.what for problem in found), found
    assert all(problem.place for problem in found)


def test_every_problem_of_a_folder_at_once(tmp_path: Path) -> None:
    base(tmp_path)
    folder = write_adapter(tmp_path / "sea", ONE, use_qalora=True, r=0, lora_alpha=True)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    (folder / "adapter_model.safetensors").unlink()
    assert len(refusals(tmp_path, RECIPE)) == 5


def test_a_tied_head_and_weights_that_are_no_floats(tmp_path: Path) -> None:
    base(tmp_path, {"model_type": "llama", "tie_word_embeddings": True})
    write_adapter(tmp_path / "sea", pair("lm_head", 8, 4))
    assert "ties to the embeddings" in refusals(tmp_path, RECIPE)[0].what
    integers = {f"{Q}.weight": np.ones((6, 4), "i8")}
    write_checkpoint(tmp_path / "base", integers)
    write_adapter(tmp_path / "sea", ONE)
    assert "only floats" in refusals(tmp_path, RECIPE)[0].what


def test_a_folder_of_adapters_says_which_there_are(tmp_path: Path) -> None:
    base(tmp_path)
    for name in ("sea", "latam"):
        write_adapter(tmp_path / "all" / name, ONE)
    (problem,) = refusals(tmp_path, RECIPE.replace("+sea", "+all"))
    assert "latam, sea" in (problem.found or "") and "all/latam" in (problem.remedy or "")


def test_experts_in_one_tensor_in_memory_and_apart_in_the_file(tmp_path: Path) -> None:
    experts = {
        f"model.layers.0.mlp.experts.{e}.{of}_proj.weight": np.ones(shape, "f4")
        for e in range(2)
        for of, shape in (("gate", (3, 4)), ("up", (3, 4)), ("down", (4, 3)))
    }
    write_checkpoint(tmp_path / "base", {f"{Q}.weight": np.ones((6, 4), "f4"), **experts})
    whole = {"model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 6, 4), "f4")}
    write_adapter(tmp_path / "sea", {**ONE, **whole})
    (problem,) = refusals(tmp_path, RECIPE)
    assert problem.tensor == "model.layers.0.mlp.experts.gate_up_proj" and "apart in its file" in (problem.remedy or "")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rank_pattern", "use_dora", "peft_type", "bias", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)
def test_any_config_is_read_or_refused(config: dict[str, Any]) -> None:
    with scratch() as folder:
        write_adapter(folder / "sea", ONE)
        (folder / "sea/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        try:
            adapter = read_adapter(folder / "sea", "sea")
        except Refused:
            return
        assert np.isfinite(adapter.settings.scale(Q))


def test_the_first_pattern_that_fits_the_end_of_a_name_counts(tmp_path: Path) -> None:
    """As in PEFT: from a dot on or all of the name, and rank and alpha by themselves."""
    patterns = {"v_proj": 1, "layers.0.self_attn.q_proj": 2, "q_proj": 5, "proj": 6, r"^model\..*gate": 7}
    write_adapter(tmp_path, ONE, r=2, lora_alpha=4, rank_pattern=patterns, alpha_pattern={"q_proj": 3})
    settings_ = read_adapter(tmp_path, "sea").settings
    ranks = {
        name: settings_.rank_of(name)
        for name in (Q, f"1{Q}", V, "q_proj", "a.k_proj", "model.mlp.gate", "a.model.gate")
    }
    assert list(ranks.values()) == [2, 2, 1, 5, 2, 7, 2]
    assert settings_.scale(Q) == 1.5 and settings_.scale(V) == 4


def test_half_precision_factors_are_widened_exactly(tmp_path: Path) -> None:
    base(tmp_path)
    halves = {name: array.astype(BF16) for name, array in ONE.items()}
    write_adapter(tmp_path / "sea", halves, lora_alpha=1)
    a, b = (array.astype("f8") for array in halves.values())
    weight = np.frombuffer(tensors(tmp_path / "base")[f"{Q}.weight"][1], "f4").reshape(6, 4).astype("f8")
    assert merged(tmp_path, RECIPE)[f"{Q}.weight"][1] == (weight + 0.5 * (b @ a)).astype("f4").tobytes()
