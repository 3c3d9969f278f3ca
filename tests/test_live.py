"""Merging into a live module: the bytes of `linear`, in place, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from merging import BF16, merged
from state_dicts import StateDict, bytes_of, raw

import ggez_merge
from ggez_merge.errors import Refused


class Model(torch.nn.Module):
    """Tied embeddings, statistics of a normalisation, a buffer that is not saved."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16))
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.register_buffer("angles", torch.arange(16.0), persistent=False)
        self.to(dtype)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> Any:
        return self.head(self.layers(self.embed(words)) + self.angles)


def states() -> tuple[StateDict, StateDict]:
    return tuple({name: x.clone() for name, x in Model(seed).state_dict().items()} for seed in (1, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_a_live_module_gets_the_interpolation(ratio: float, dtype: torch.dtype) -> None:
    base, tuned = states()
    model = Model(3, dtype)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    angles = model.angles.clone()
    ggez_merge.merge_into(model, base, tuned, ratio)
    after = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    assert all(after[name][0] is before[name][0] and after[name][1] == before[name][1] for name in before)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.angles, angles), "not in the state dict, and so left alone"
    expected = ggez_merge.linear(base, tuned, ratio=ratio, out_dtype=dtype)
    assert bytes_of(model.state_dict()) == bytes_of(expected)


def test_a_sweep_over_one_module_leaves_no_trace() -> None:
    base, tuned = states()
    swept, fresh = Model(3), Model(4)
    for ratio in (0.9, 0.1, 0.5):
        ggez_merge.merge_into(swept, base, tuned, ratio)
    ggez_merge.merge_into(fresh, base, tuned, 0.5)
    assert bytes_of(swept.state_dict()) == bytes_of(fresh.state_dict())
    words = torch.arange(8)
    assert torch.equal(swept.eval()(words), fresh.eval()(words))


def test_ratios_by_component_are_those_of_a_recipe(tmp_path: Path) -> None:
    base, tuned = states()
    ratios = {"layers.0.*": 0.1, "layers.*": 0.6, "*": 0.3}
    for name, state in (("base", base), ("one", tuned)):
        floats = {k: x for k, x in state.items() if x.is_floating_point() and k != "head.weight"}
        arrays = {k: x.view(torch.int16).numpy().view(BF16) for k, x in floats.items()}
        write_checkpoint(tmp_path / name, arrays)
    recipe = """{merge_method: linear, base_model: base, models: [{model: one}], parameters: {ratio: 0.3},
        components: {"layers.0.*": {ratio: 0.1}, "layers.*": {ratio: 0.6}}}"""
    expected = {name: data for name, (_, data) in merged(tmp_path, recipe).items()}
    model = Model(3)
    ggez_merge.merge_into(model, base, tuned, ratios)
    found = bytes_of(model.state_dict())
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("names", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_tied_parameters_are_found_under_any_of_their_names(names: tuple[str, ...]) -> None:
    base, tuned = states()
    for state in (base, tuned):
        for name in {"embed.weight", "head.weight"} - set(names):
            del state[name]
    model = Model(3)
    ggez_merge.merge_into(model, base, tuned, 0.3)
    assert raw(model.embed.weight) == raw(ggez_merge.linear(base[names[0]], tuned[names[0]], ratio=0.3))


def test_autograd_notices_that_a_weight_was_replaced() -> None:
    base, tuned = states()
    model = Model(3)
    loss = model(torch.arange(8)).sum()
    ggez_merge.merge_into(model, base, tuned, 0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_made_for_inference_can_be_merged_into() -> None:
    base, tuned = states()
    with torch.inference_mode():
        model = Model(3)
    ggez_merge.merge_into(model, base, tuned, 0.3)
    assert bytes_of(model.state_dict()) == bytes_of(ggez_merge.linear(base, tuned, ratio=0.3))


PEAK = """
import re, torch, ggez_merge

def most_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000

def weights(n):
    return {"weight": torch.full((n, 1000), 1.0, dtype=torch.bfloat16)}

with torch.device("meta"):
    model = torch.nn.Linear(1000, 50_000, bias=False, dtype=torch.bfloat16)
model.load_state_dict(weights(50_000), assign=True)
ggez_merge.merge_into(torch.nn.Linear(1000, 9, bias=False), weights(9), weights(9), 0.3)  # loads the kernels
base, tuned = weights(50_000), weights(50_000)
before = most_mb()
ggez_merge.merge_into(model, base, tuned, 0.3)
print(most_mb() - before)
"""


def test_no_weight_is_copied() -> None:
    """The process needs hardly more memory than it has: three times 100 MB."""
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert float(result.stdout or "inf") < 20, result.stderr


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written() -> None:
    base, tuned = states()
    base["layers.0.weight"] = base["layers.0.weight"].t()
    tuned["layers.0.bias"] = torch.zeros(17, dtype=torch.bfloat16)
    del tuned["layers.1.weight"]
    base["extra"] = torch.zeros(1)
    tuned["layers.1.num_batches_tracked"] = torch.tensor(5, dtype=torch.int32)
    tuned["layers.1.running_mean"] = torch.zeros(16, dtype=torch.int64)
    base["layers.1.running_var"] = torch.zeros(16, device="meta")
    base["head.weight"] = base["head.weight"] + 1
    model = Model(3)
    before = bytes_of(model.state_dict())
    with pytest.raises(Refused) as refused:
        ggez_merge.merge_into(model, base, tuned, {"nothing*": 0.5, "layers*": float("nan")})
    said = str(refused.value)
    for problem in (
        "layers.0.weight",
        "not contiguous",
        "[16] as in model",
        "tuned lacks 1 tensor that the model has",
        "the model lacks 1 tensor that base has",
        "torch.int64 as in model",
        "torch.bfloat16 as in model",
        "on meta",
        "what is one tensor in the model are different ones in base",
        "nothing*",
        "no ratio reaches some tensors",
        "`ratio` of linear must be a finite number",
    ):
        assert problem in said, problem
    assert bytes_of(model.state_dict()) == before


def test_layers_are_selected_by_number_as_in_a_recipe() -> None:
    base, tuned = states()
    by_name, by_glob = Model(3), Model(3)
    ggez_merge.merge_into(by_name, base, tuned, {"language_model.layers.1": 0.1, "language_model": 0.3, "other": 0.6})
    ggez_merge.merge_into(by_glob, base, tuned, {"layers.1.*": 0.1, "layers.*": 0.3, "*": 0.6})
    assert bytes_of(by_name.state_dict()) == bytes_of(by_glob.state_dict())
    with pytest.raises(Refused, match="language_model has the layers 0 to"):
        ggez_merge.merge_into(by_name, base, tuned, {"language_model.layers.0-9": 0.1, "*": 0.6})


def test_a_tied_tensor_cannot_have_two_ratios() -> None:
    base, tuned = states()
    with pytest.raises(Refused, match=r"two ratios(.|\n)*embed.weight, head.weight"):
        ggez_merge.merge_into(Model(3), base, tuned, {"head*": 0.0, "*": 0.5})


def test_a_modules_own_state_dict_is_no_input() -> None:
    _, tuned = states()
    model = Model(3)
    with pytest.raises(Refused, match="shares memory") as refused:
        ggez_merge.merge_into(model, model.state_dict(), tuned, 0.5)
    assert len(refused.value.problems) >= len(list(model.parameters()))
