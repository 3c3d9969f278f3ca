"""The same recipe file run by mergekit 0.1.5 and by us, side by side; and where we differ on purpose, both results.

mergekit computes in the recipe's `dtype`, so bfloat16 models are merged there with `dtype: float32` and rounded once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from merging import BF16
from models import FAMILIES, llama, randomised, read_weights, run_recipe, save_tuned, write_recipe

from ggez_merge.errors import Refused

Weights = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("base", "one", "two", "three", "far")
MOST_TIES = 0.005  # share of bfloat16 elements that may lie so near a tie that the last bit of a float32 decides


@pytest.fixture(scope="module", params=DTYPES)
def word(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(word: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Llama, three near it, and one that has nothing to do with it."""
    return save_llamas(tmp_path_factory.mktemp(word), DTYPES[word])


def save_llamas(folder: Path, dtype: torch.dtype) -> dict[str, Path]:
    torch.manual_seed(0)
    near, far = llama(), randomised(llama(), seed=9)
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.normal_(std=0.3)
    noise = {"base": 0.0, "one": 0.02, "two": 0.01, "three": 0.03}
    paths = {
        name: save_tuned(near, folder / name, seed=seed, noise=noise[name], dtype=dtype)
        for seed, name in enumerate(noise)
    }
    return {**paths, "far": save_tuned(far, folder / "far", seed=4, noise=0.0, dtype=dtype)}


@dataclass(frozen=True)
class Pair:
    """Weights of one recipe. `unrounded` are mergekit's in float32."""

    ours: Weights
    theirs: Weights
    unrounded: Weights

    def without(self, *names: str) -> Pair:
        return Pair(*({n: t for n, t in ws.items() if n not in names} for ws in vars(self).values()))

    def layers(self) -> Pair:
        """All but what comes after the layers, where the two tools read a gradient differently (see below)."""
        return self.without("lm_head.weight", "model.norm.weight")


def both(folder: Path, word: str, **keys: Any) -> Pair:
    """Merge with both tools from one file. Names, shapes and dtypes of their outputs must already agree."""
    if word == "bf16":
        keys = {"dtype": "float32", "out_dtype": "bfloat16", **keys}
    recipe = write_recipe(folder / "recipe.yaml", **keys)
    run_recipe(recipe, folder / "ours")
    theirs = mergekit(recipe, folder / "theirs")
    unrounded = theirs
    if word == "bf16":
        wide = {**keys, "dtype": "float32", "out_dtype": "float32"}
        unrounded = mergekit(write_recipe(folder / "wide.yaml", **wide), folder / "wide")
    ours = read_weights(folder / "ours")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    return Pair(ours, theirs, unrounded)


def mergekit(recipe: Path, out: Path) -> Weights:
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())), str(out), options)
    return read_weights(out)


def assert_same(pair: Pair, relative: float = 2e-6, besides: Weights | None = None) -> None:
    """Equal up to what two orders of summation in float32 can make of it.

    float32 and float64: no element differs by more than `relative` of its own size and the tensor's mean size.
    bfloat16: no element differs unless the unrounded value is that near to the middle between the two, so that either
    rounding is right; those are few. besides: name -> elements that do not count.
    """
    ties = total = 0
    for name, mine in pair.ours.items():
        a, b, exact = mine.double(), pair.theirs[name].double(), pair.unrounded[name].double()
        counts = ~besides[name] if besides else torch.ones_like(a, dtype=torch.bool)
        slack = relative * (exact.abs() + (exact.abs().mean() if exact.numel() else 0.0))
        off = (exact - (a + b) / 2).abs() if mine.dtype == torch.bfloat16 else (a - b).abs()
        wrong = (a != b) & (off > slack) & counts
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {a.numel()}, first {a[wrong][0]} not {b[wrong][0]}"
        ties += int(((a != b) & counts).sum()) if mine.dtype == torch.bfloat16 else 0
        total += int(counts.sum())
    assert total
    assert ties <= MOST_TIES * total, f"{ties} of {total} elements differ"


def entry(path: Path, **parameters: Any) -> dict[str, Any]:
    return {"model": path, "parameters": parameters} if parameters else {"model": path}


def merge_of(method: str, family: dict[str, Path], models: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "base_model": family["base"], "models": models, **keys}


# --- linear ---------------------------------------------------------------------------------------------------------

LAYERED = [
    {"filter": "self_attn", "value": [0.0, 0.5, 1.0]},
    {"filter": "mlp.down", "value": 0.9},
    {"filter": "mlp", "value": [1.0, 0.2]},
    {"value": 0.4},
]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.5, -0.25), (2, 3), (1,)], ids=str)
def test_linear(
    weights: tuple[float, ...], normalize: bool, family: dict[str, Path], word: str, tmp_path: Path
) -> None:
    models = [entry(family[name], weight=w) for name, w in zip(NAMES, weights, strict=False)]
    keys = {"merge_method": "linear", "models": models, "parameters": {"normalize": normalize}}
    # mergekit's linear works in float32 whatever the dtype, so nothing need be asked for
    plain = {"dtype": None, "out_dtype": None}
    assert_same(both(tmp_path, word, **keys, **plain))


def test_linear_with_filters_and_gradients(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [
        entry(family["base"], weight=1.0),
        entry(family["one"], weight=LAYERED),
        entry(family["two"], weight=[0.1, 0.3, 0.2, 0.6, 0.5]),
    ]
    pair = both(tmp_path, word, merge_method="linear", models=models)
    assert_same(pair.layers())


def test_a_list_that_names_the_base_as_any_other_model(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [entry(family["one"], weight=0.4), entry(family["base"], weight=0.6)]
    assert_same(both(tmp_path, word, **merge_of("linear", family, models)))


# --- task arithmetic and its relatives ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "shared"),
    [
        ((0.5,), {}),
        ((1.0,), {"lambda": 0.3}),
        ((0.6, 0.3), {}),
        ((0.6, -0.3), {}),
        ((1.0, 0.5, 0.25), {"normalize": True}),
        ((1.0, -0.5), {"normalize": True, "lambda": 0.7}),
        ((0.7, 0.4, -0.2), {"normalize": False, "lambda": 1.5}),
        ((1.0, -1.0), {"normalize": True}),
    ],
    ids=str,
)
def test_task_arithmetic(
    weights: tuple[float, ...], shared: dict[str, Any], family: dict[str, Path], word: str, tmp_path: Path
) -> None:
    models = [entry(family[name], weight=w) for name, w in zip(NAMES[1:], weights, strict=False)]
    keys = merge_of("task_arithmetic", family, models, parameters=shared)
    assert_same(both(tmp_path, word, **keys))


def test_the_base_in_the_list_of_models_adds_nothing(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [entry(family["base"]), entry(family["one"], weight=0.5), entry(family["two"], weight=LAYERED)]
    keys = merge_of("task_arithmetic", family, models)
    assert_same(both(tmp_path, word, **keys).layers())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_that_drops_nothing(method: str, family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [entry(family["one"], weight=0.6, density=1.0), entry(family["two"], weight=0.5, density=1.0)]
    keys = merge_of(method, family, models, parameters={"normalize": method == "dare_ties", "lambda": 0.9})
    assert_same(both(tmp_path, word, **keys))


def at_threshold(family: dict[str, Path], names: tuple[str, ...], density: float) -> dict[str, torch.Tensor]:
    """Where some model's |delta| equals its threshold: mergekit keeps an arbitrary choice of those."""
    base = read_weights(family["base"])
    ties = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in base.items()}
    for model in names:
        for name, tensor in read_weights(family[model]).items():
            magnitude = (tensor.float() - base[name].float()).abs()
            k = max(1, int(density * tensor.numel()))
            threshold = magnitude.flatten().sort(descending=True).values[k - 1]
            if (magnitude >= threshold).sum() > k:
                ties[name] |= magnitude == threshold
    return ties


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.57, 0.9, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(density: float, normalize: bool, family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [entry(family["one"], weight=1.0, density=density), entry(family["two"], weight=0.7, density=density)]
    keys = merge_of("ties", family, models, parameters={"normalize": normalize})
    pair = both(tmp_path, word, **keys)
    ties = at_threshold(family, ("one", "two"), density)
    assert sum(int(t.sum()) for t in ties.values()) <= 0.05 * sum(t.numel() for t in ties.values())
    assert_same(pair, besides=ties)


@pytest.mark.parametrize(
    ("weights", "shared"),
    [
        ((1.0,), {}),
        ((0.5,), {"normalize": False}),
        ((1.0, 1.0, 1.0), {}),
        ((1.0, 0.5, 0.25), {"lambda": 0.4}),
        ((0.5, 1.0, 0.5), {"lambda": 1.3, "normalize": False}),
        ((0.5, -1.0, 0.5), {"normalize": False}),
        ((1.0, 1.0), {"rescale": True}),
        ((0.3, 0.9, 0.6), {"rescale": True, "normalize": False, "int8_mask": True}),
    ],
    ids=str,
)
def test_ties_with_weights_and_scales(
    weights: tuple[float, ...], shared: dict[str, Any], family: dict[str, Path], word: str, tmp_path: Path
) -> None:
    names = NAMES[1 : len(weights) + 1]
    models = [entry(family[name], weight=w, density=0.4) for name, w in zip(names, weights, strict=True)]
    pair = both(tmp_path, word, **merge_of("ties", family, models, parameters=shared))
    # rescaling divides two long sums, which float32 (there) rounds more often than float64 (here)
    relative = 1e-5 if "rescale" in shared else 2e-6
    assert_same(pair, relative, at_threshold(family, names, 0.4))


def test_ties_with_densities_by_filter(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    density = [{"filter": "mlp", "value": 0.2}, {"filter": "norm", "value": 1.0}, {"value": 0.6}]
    models = [entry(family["one"], weight=1.0, density=density), entry(family["two"], weight=LAYERED, density=0.5)]
    pair = both(tmp_path, word, **merge_of("ties", family, models)).layers()
    ties = at_threshold(family, ("one",), 0.2)
    for name in ties:
        here = 0.2 if "mlp" in name else 1.0 if "norm" in name else 0.6
        ties[name] = at_threshold(family, ("one",), here)[name] | at_threshold(family, ("two",), 0.5)[name]
    assert_same(pair, besides=ties)


# --- slerp ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["one", "far"])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.85, 1.0])
def test_slerp(t: float, other: str, family: dict[str, Path], word: str, tmp_path: Path) -> None:
    """`one` is nearly parallel to the base in most tensors, `far` in none: both branches are taken."""
    models = [entry(family["base"]), entry(family[other])]
    pair = both(tmp_path, word, **merge_of("slerp", family, models, parameters={"t": t}))
    # the angle comes from sums of float32 there and of float64 here
    assert_same(pair, relative=1e-5)


def test_both_branches_of_slerp_are_met(family: dict[str, Path]) -> None:
    base = read_weights(family["base"])

    def cosines(name: str) -> list[float]:
        pairs = ((base[n].flatten().double(), t.flatten().double()) for n, t in read_weights(family[name]).items())
        return [float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in pairs]

    assert any(cosine > 0.9995 for cosine in cosines("one"))
    assert all(abs(cosine) < 0.9 for cosine in cosines("far"))


def test_slerp_with_filters_and_gradients(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    sources = [{"model": family[name], "layer_range": [0, 4]} for name in ("base", "far")]
    keys = {"merge_method": "slerp", "base_model": family["base"], "slices": [{"sources": sources}]}
    pair = both(tmp_path, word, **keys, parameters={"t": t})
    assert_same(pair, relative=1e-5)


# --- slices and modules ---------------------------------------------------------------------------------------------


def stack(family: dict[str, Path], *ranges: tuple[str, int, int], **parameters: Any) -> list[dict[str, Any]]:
    return [
        {"sources": [{"model": family[name], "layer_range": [begin, end], **parameters}]} for name, begin, end in ranges
    ]


def test_a_stack_of_layers_of_several_models(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    slices = stack(family, ("one", 0, 3), ("far", 1, 4), ("two", 3, 4))
    pair = both(tmp_path, word, merge_method="passthrough", slices=slices)
    assert all(torch.equal(tensor, pair.theirs[name]) for name, tensor in pair.ours.items())
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    assert [config["num_hidden_layers"] for config in configs] == [7, 7]


def test_a_stack_with_scaled_projections(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    slices = stack(family, ("one", 0, 4)) + stack(family, ("one", 2, 4), parameters={"scale": scale})
    pair = both(tmp_path, word, merge_method="passthrough", slices=slices)
    assert not pair.ours["model.layers.4.self_attn.o_proj.weight"].any()
    assert_same(pair)


def test_slices_that_are_each_merged(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    def piece(begin: int, end: int, weight: Any) -> dict[str, Any]:
        first = {"model": family["one"], "layer_range": [begin, end], "parameters": {"weight": weight}}
        return {"sources": [first, {"model": family["two"], "layer_range": [begin, end], "parameters": {"weight": 1}}]}

    slices = [piece(0, 2, 0.5), piece(1, 4, [0.0, 1.0])]
    pair = both(tmp_path, word, merge_method="linear", slices=slices, dtype=None, out_dtype=None)
    assert "model.layers.4.mlp.up_proj.weight" in pair.ours
    assert_same(pair.layers())


def test_a_module_called_default(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    models = [entry(family["one"], weight=1.0), entry(family["two"], weight=2.0)]
    modules = {"default": {"models": models, "parameters": {"normalize": False}}}
    pair = both(tmp_path, word, merge_method="linear", modules=modules)
    assert_same(pair)


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    model = randomised(FAMILIES["qwen2_5_vl"].build(), seed=0)
    folder = tmp_path_factory.mktemp("qwen")
    return {
        name: save_tuned(model, folder / name, seed=seed, noise=0.02 * seed, dtype=torch.float32)
        for seed, name in enumerate(("base", "one"))
    }


def test_the_modules_of_a_vision_language_model(qwens: dict[str, Path], tmp_path: Path) -> None:
    modules = {
        part: {"models": [entry(qwens["one"], weight=weight)]}
        for part, weight in (("text_decoder", 0.3), ("multi_modal_projector", 1.0), ("vision_tower", 0.0))
    }
    keys = {"merge_method": "task_arithmetic", "base_model": qwens["base"], "modules": modules}
    assert_same(both(tmp_path, "fp32", **keys))


# --- odd shapes -----------------------------------------------------------------------------------------------------

SHAPES = {"scale": (), "bias": (1,), "norm": (7,), "w": (13, 11), "long": (1009,), "experts": (3, 5, 7), "row": (1, 17)}
ODD_METHODS = {
    "linear": ({"weight": [1.0, 0.5, 0.25]}, {}),
    "task_arithmetic": ({"weight": [0.5, 0.25]}, {"lambda": 1.5}),
    "ties": ({"weight": [1.0, 0.5], "density": [0.5, 0.3]}, {}),
    "ties at full density": ({"weight": [1.0, 0.5], "density": [1.0, 1.0]}, {"normalize": False}),
    "slerp": ({}, {"t": 0.35}),
}


@pytest.mark.parametrize("method", ODD_METHODS)
@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f2"), np.dtype("f8"), BF16], ids=str)
def test_odd_shapes_against_the_oracle_in_memory(method: str, dtype: Any, tmp_path: Path) -> None:
    """Permuted ramps: no two |delta| of a tensor are equal, so that TIES has nothing arbitrary in it."""
    per_model, shared = ODD_METHODS[method]
    name = method.split()[0]
    count = {"linear": 3, "slerp": 2}.get(name, 3)
    random = np.random.default_rng(3)
    states, tensors = [], []
    for number in range(count):
        state = {}
        for key, shape in SHAPES.items():
            n = int(np.prod(shape))
            # multiples of 1/1024 below 1 (bfloat16: of 2^-8 below 1): exact as they stand, and as differences
            steps = 256 if dtype == BF16 else 1024
            ramp = random.permutation(np.arange(1, n + 1) % steps) * random.choice([-1, 1], size=n) / steps
            values = ramp if number or name in ("linear", "slerp") else np.zeros(n)
            state[key] = np.asarray(values.reshape(shape), dtype)
        state["ids"] = np.arange(4)
        states.append(state)
        write_checkpoint(tmp_path / str(number), state)
        tensors.append(read_weights(tmp_path / str(number)))
    listed = range(count) if name == "linear" else range(1, count)
    models = [
        entry(tmp_path / str(i), **{key: values[at] for key, values in per_model.items()})
        for at, i in enumerate(listed)
    ]
    keys: dict[str, Any] = {"merge_method": name, "models": models, "parameters": shared, "dtype": "float32"}
    if dtype == np.float64:
        keys["dtype"] = "float64"
    if name != "linear":
        keys["base_model"] = tmp_path / "0"
    run_recipe(write_recipe(tmp_path / "recipe.yaml", **keys), tmp_path / "ours")
    work = torch.float64 if dtype == np.float64 else torch.float32
    padded = {key: values if name == "linear" else [0.0, *values] for key, values in per_model.items()}
    oracle = merge_state_dicts(
        dict(enumerate(tensors)),
        name,
        parameters={**{key: dict(enumerate(values)) for key, values in padded.items()}, **shared},
        base=None if name == "linear" else 0,
        dtype=work,
    )
    ours = read_weights(tmp_path / "ours")
    assert ours.keys() == oracle.keys()
    besides = {}
    for key, tensor in ours.items():
        assert tensor.shape == oracle[key].shape
        assert key == "ids" or tensor.dtype == work
        besides[key] = torch.zeros_like(tensor, dtype=torch.bool)
    if name == "ties" and "full" not in method:
        for i, density in ((1, 0.5), (2, 0.3)):
            for key in SHAPES:
                magnitude = tensors[i][key].double().abs()
                k = max(1, int(density * magnitude.numel()))
                threshold = magnitude.flatten().sort(descending=True).values[k - 1]
                if (magnitude >= threshold).sum() > k:
                    besides[key] |= magnitude == threshold
    assert torch.equal(ours.pop("ids"), oracle["ids"])
    relative = 1e-12 if work == torch.float64 else 1e-5 if name == "slerp" else 2e-6
    assert_same(Pair(ours, oracle, oracle), relative, besides)


# --- differences that are meant -------------------------------------------------------------------------------------


def test_a_gradient_ends_in_the_head_here_and_begins_there(family: dict[str, Path], word: str, tmp_path: Path) -> None:
    """[0, 1] is "the base's first layers, the model's last": what follows the layers takes the last value with us."""
    models = [entry(family["one"], weight=[0.0, 1.0])]
    pair = both(tmp_path, word, **merge_of("task_arithmetic", family, models))
    base, one = read_weights(family["base"]), read_weights(family["one"])
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(pair.ours[name], one[name])
        assert torch.equal(pair.theirs[name], base[name])
    assert_same(pair.layers())


def test_bfloat16_models_are_merged_in_float32_whatever_the_dtype(tmp_path: Path) -> None:
    """mergekit works in the models' own dtype: many of its results are then not the nearest bfloat16."""
    folder = save_llamas(tmp_path / "models", torch.bfloat16)
    models = [entry(folder["one"], weight=0.6), entry(folder["two"], weight=0.3)]
    keys = merge_of("task_arithmetic", folder, models, dtype="bfloat16", out_dtype=None)
    pair = both(tmp_path, "bf16", **keys)
    total = sum(t.numel() for t in pair.unrounded.values())
    off = {
        who: sum(int((t != pair.unrounded[name].bfloat16()).sum()) for name, t in weights.items()) / total
        for who, weights in (("ours", pair.ours), ("theirs", pair.theirs))
    }
    assert off["ours"] < MOST_TIES
    assert off["theirs"] > 0.1


def test_a_base_that_is_not_listed_takes_no_part_in_an_average(tmp_path: Path) -> None:
    """mergekit gives it the weight that stands at the top, and so averages three models."""
    folder = save_llamas(tmp_path / "models", torch.float32)
    models = [entry(folder["one"]), entry(folder["two"])]
    keys = {"merge_method": "linear", "base_model": folder["base"], "models": models, "parameters": {"weight": 1.0}}
    pair = both(tmp_path, "fp32", **keys)
    base, one, two = (read_weights(folder[name]) for name in ("base", "one", "two"))
    for name in base:
        torch.testing.assert_close(pair.ours[name], (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(pair.theirs[name], (base[name] + one[name] + two[name]) / 3, rtol=1e-5, atol=1e-7)


def test_a_negative_weight_does_not_turn_the_elected_sign_around(tmp_path: Path) -> None:
    """Deltas -1 (weight 1) and -3 (weight -1): the weighted sum is +2, so + is elected; there it comes out as -3."""
    for name, value in (("base", 0.0), ("one", -1.0), ("two", -3.0)):
        write_checkpoint(tmp_path / name, {"w": np.full(4, value, np.float32)})
    models = [entry(tmp_path / "one", weight=1.0), entry(tmp_path / "two", weight=-1.0)]
    keys = {"merge_method": "ties", "base_model": tmp_path / "base", "models": models}
    run_recipe(write_recipe(tmp_path / "recipe.yaml", **keys), tmp_path / "ours")
    states = [read_weights(tmp_path / name) for name in ("base", "one", "two")]
    weights = {0: 0.0, 1: 1.0, 2: -1.0}
    theirs = merge_state_dicts(dict(enumerate(states)), "ties", parameters={"weight": weights}, base=0)
    assert theirs["w"].tolist() == [-3.0] * 4
    assert read_weights(tmp_path / "ours")["w"].tolist() == [3.0] * 4


def test_weights_that_cancel_are_refused_where_they_divide_by_zero(family: dict[str, Path], tmp_path: Path) -> None:
    models = [entry(family["one"], weight=1.0), entry(family["two"], weight=-1.0)]
    keys: dict[str, Any] = {"merge_method": "linear", "models": models}
    with pytest.raises(Refused, match="add up to zero"):
        both(tmp_path, "fp32", **keys)
    theirs = mergekit(tmp_path / "recipe.yaml", tmp_path / "theirs")
    assert not any(tensor.isfinite().all() for tensor in theirs.values())


def test_a_misspelt_key_is_refused_where_it_is_passed_over(family: dict[str, Path], tmp_path: Path) -> None:
    models = [entry(family["one"], weight=0.5)]
    keys = merge_of("task_arithmetic", family, models, parametres={"lambda": 0.1})
    with pytest.raises(Refused, match="parameters"):
        both(tmp_path, "fp32", **keys)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert "parametres" not in MergeConfiguration.model_validate(recipe).model_dump()
