"""Names of one layout read in another: of real architectures, of wrapped and cut models, and of made-up tables."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, merged, models, plan_of, refusals, tensors
from models import LAYOUTS, randomised, read_weights
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from ggez_merge.align import part
from ggez_merge.components import component
from ggez_merge.names import Match, grouped, match

Shapes = dict[str, tuple[int, ...]]
Names = dict[str, str]  # a name in memory -> the same tensor's name in another layout

PREFIX_ONLY = [name for name in LAYOUTS if name not in ("qwen2_moe", "mixtral")]


def found(ours: Shapes, theirs: Shapes) -> Match:
    return match(ours, theirs, part)


@cache
def layouts(family: str) -> tuple[Shapes, dict[str, Names]]:
    """Shapes by the names in memory, and each layout's names by those."""
    with torch.device("meta"):
        model = LAYOUTS[family]()
    state = model.state_dict()
    # what `from_pretrained` leaves behind makes `save_pretrained` write the layout of the hub
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    memory = {name: name for name in state}
    made = {
        "memory": memory,
        "hub": {name: saved[id(tensor)] for name, tensor in state.items()},
        "DDP": {name: f"module.{name}" for name in state},
        "compiled": {name: f"_orig_mod.{name}" for name in state},
        "FSDP": {name: _wrapped(name) for name in state},
    }
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, made


def _wrapped(name: str) -> str:
    """FSDP around the model and around every layer of every stack."""
    words = ["_fsdp_wrapped_module"]
    for word in name.split("."):
        words += [word, "_fsdp_wrapped_module"] if word.isdecimal() and words[-1] in ("layers", "blocks") else [word]
    return ".".join(words)


KINDS = ("memory", "hub", "DDP", "compiled", "FSDP")


@pytest.mark.parametrize("family", PREFIX_ONLY)
@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("model", KINDS)
def test_every_tensor_of_an_architecture_finds_its_own(family: str, base: str, model: str) -> None:
    shapes, names = layouts(family)
    ours = {names[base][name]: shape for name, shape in shapes.items()}
    theirs = {names[model][name]: shape for name, shape in shapes.items()}
    answer = found(ours, theirs)
    assert (answer.ambiguous, answer.doubled) == ((), {})
    assert answer.canonical == {names[model][name]: names[base][name] for name in shapes}
    assert sum(rule.n for rule in answer.rules) == (len(shapes) if ours != theirs else 0)


@pytest.mark.parametrize("family", PREFIX_ONLY)
@pytest.mark.parametrize("base", ["memory", "hub"])
@pytest.mark.parametrize("model", ["memory", "hub"])
def test_a_resized_vocabulary_is_no_matter_of_names(family: str, base: str, model: str) -> None:
    shapes, names = layouts(family)
    ours = {names[base][name]: shape for name, shape in shapes.items()}
    theirs = {names[model][name]: tuple(101 if n == 97 else n for n in shape) for name, shape in shapes.items()}
    assert found(ours, theirs).canonical == {names[model][name]: names[base][name] for name in shapes}


PARTS = {
    "qwen2_5_vl": ("model.language_model.", "model.visual."),
    "gemma3": ("model.language_model.", "model.vision_tower."),
    "llava": ("model.language_model.", "model.vision_tower."),
    "siglip": ("vision_model.", "text_model."),
    "clip": ("vision_model.", "text_model."),
    "whisper": ("model.encoder.", "model.decoder."),
}


ALONE = [
    (family, prefix, wrapper)
    for family in PARTS
    for prefix in PARTS[family]
    for wrapper in ("", {"vision_tower": "vision_model.", "language_model": "model."}.get(component(f"{prefix}x"), ""))
]


@pytest.mark.parametrize(("family", "prefix", "wrapper"), ALONE)
@pytest.mark.parametrize("base", ["memory", "hub"])
def test_a_part_that_was_saved_alone_finds_its_place(family: str, prefix: str, base: str, wrapper: str) -> None:
    shapes, names = layouts(family)
    ours = {names[base][name]: shape for name, shape in shapes.items()}
    part = {name: wrapper + name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    answer = found(ours, {own: shapes[name] for name, own in part.items()})
    assert (answer.ambiguous, answer.doubled) == ((), {})
    assert answer.canonical == {own: names[base][name] for name, own in part.items()}


def test_the_rules_read_as_people_say_them() -> None:
    shapes, names = layouts("gemma3")
    ours = {names["hub"][name]: shape for name, shape in shapes.items()}
    assert [str(rule) for rule in found(ours, shapes).rules] == [
        "model.vision_tower.* ↔ vision_tower.vision_model.*: 37 tensors",
        "model.multi_modal_projector.* ↔ multi_modal_projector.*: 2 tensors",
        "model.language_model.* ↔ language_model.model.*: 28 tensors",
        "lm_head.weight ↔ language_model.lm_head.weight: 1 tensor",
    ]
    wrapped = {f"module.{name}": shape for name, shape in shapes.items()}
    assert [str(rule) for rule in found(shapes, wrapped).rules] == ["module.* ↔ *: 68 tensors"]


# --- what must not be guessed ----------------------------------------------------------------------------------------


def tower(prefix: str, layers: int = 2) -> Shapes:
    words = ("attn.q", "attn.k", "attn.v", "mlp.up", "norm")
    return {f"{prefix}layers.{i}.{word}.weight": (8, 8) for i in range(layers) for word in words}


def test_what_fits_two_places_equally_well_is_left_alone() -> None:
    answer = found({**tower("left."), **tower("right.")}, tower(""))
    assert len(answer.ambiguous) == 1
    assert {str(rule) for rule in answer.ambiguous[0]} == {
        "layers.* ↔ left.layers.*: 10 tensors",
        "layers.* ↔ right.layers.*: 10 tensors",
    }


def test_one_more_tensor_decides() -> None:
    ours = {**tower("left."), **tower("right."), "right.patch.weight": (3, 8)}
    assert found(ours, {**tower(""), "patch.weight": (3, 8)}).canonical["layers.0.norm.weight"] == (
        "right.layers.0.norm.weight"
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.norm.weight", "visual.norm.weight"),  # another part of the model
        ("a.weight", "b.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("lm_head.weight", "lm_head.bias"),
        ("model.layers.0.weight", "model.weight"),
    ],
)
def test_a_likeness_of_single_names_is_none(ours: str, theirs: str) -> None:
    shared: Shapes = {"model.embed_tokens.weight": (9, 8)}
    answer = found({**shared, ours: (8,)}, {**shared, theirs: (8,)})
    assert answer.canonical[theirs] == theirs


def test_one_tensor_under_two_names_is_reported() -> None:
    ours = tower("a.")
    theirs = {**tower("module.a."), "a.layers.0.norm.weight": (8, 8)}
    assert found(ours, theirs).doubled == {
        "a.layers.0.norm.weight": ["module.a.layers.0.norm.weight", "a.layers.0.norm.weight"]
    }


def test_extras_follow_their_neighbours() -> None:
    ours, theirs = tower("model.text."), {**tower("text.", layers=3), "text.layers.0.extra": (4,), "head.w": (4,)}
    canonical = found(ours, theirs).canonical
    assert canonical["text.layers.2.norm.weight"] == "model.text.layers.2.norm.weight"
    assert canonical["text.layers.0.extra"] == "model.text.layers.0.extra"
    assert canonical["head.w"] == "head.w"


def test_groups_say_what_is_left() -> None:
    names = [*tower("visual."), "visual.merger.mlp.weight", "visual.merger.ln.weight", "lm_head.weight"]
    assert grouped(names) == "visual.layers.* (10), visual.merger.* (2), lm_head.weight"


words = st.sampled_from(["a", "b", "model", "layers", "0", "1", "norm", "q", "weight"])
tables = st.dictionaries(
    st.lists(words, min_size=1, max_size=5).map(".".join), st.sampled_from([(), (2,), (2, 3)]), max_size=14
)


@given(ours=tables, theirs=tables)
def test_any_two_tables_give_a_sound_answer(ours: Shapes, theirs: Shapes) -> None:
    answer = found(ours, theirs)
    assert list(answer.canonical) == list(theirs)
    targets = list(answer.canonical.values())
    assert {name for name in targets if targets.count(name) > 1} == answer.doubled.keys()
    for name, target in answer.canonical.items():
        assert target.split(".")[-1] == name.split(".")[-1]
    if not answer.ambiguous:
        counted = sum(rule.n for rule in answer.rules)
        hits = sum(target in ours for target in targets)
        assert not answer.rules or counted <= hits


@given(table=tables)
def test_a_table_is_itself(table: Shapes) -> None:
    assert found(table, table) == Match({name: name for name in table})


@settings(max_examples=60, deadline=None)  # the first example of a family builds it
@given(data=st.data(), prefix=st.sampled_from(["module", "_orig_mod", "model", "a.b", "x"]))
def test_a_wrapper_around_everything_comes_off(data: Any, prefix: str) -> None:
    family = data.draw(st.sampled_from(PREFIX_ONLY))
    shapes, _ = layouts(family)
    order = data.draw(st.permutations(list(shapes)))
    wrapped = {f"{prefix}.{name}": shapes[name] for name in order}
    assert found(shapes, wrapped).canonical == {f"{prefix}.{name}": name for name in order}
    assert found(wrapped, shapes).canonical == {name: f"{prefix}.{name}" for name in shapes}


def without(names: list[str], data: Any) -> list[str]:
    """Names without a few subtrees, small or large."""
    for _ in range(data.draw(st.integers(0, 3))):
        depth = data.draw(st.integers(1, 5))
        cut = data.draw(st.sampled_from(sorted({tuple(name.split(".")[:depth]) for name in names})))
        names = [name for name in names if tuple(name.split(".")[:depth]) != cut] or names
    return names


@settings(max_examples=300, deadline=None)
@given(data=st.data(), family=st.sampled_from(PREFIX_ONLY), kinds=st.tuples(*[st.sampled_from(KINDS)] * 2))
def test_where_parts_are_missing_no_tensor_is_taken_for_another(data: Any, family: str, kinds: tuple[str, str]) -> None:
    shapes, names = layouts(family)
    ours, theirs = ({names[kind][name]: name for name in without(list(shapes), data)} for kind in kinds)
    answer = found(*({own: shapes[name] for own, name in side.items()} for side in (ours, theirs)))
    if not answer.ambiguous and not answer.doubled:
        for own, target in answer.canonical.items():
            assert target not in ours or ours[target] == theirs[own]


# --- real models, merged ---------------------------------------------------------------------------------------------


def save_as(model: tf.PreTrainedModel, folder: Path, layout: str) -> Path:
    """The model under the hub's names, as transformers saves it, or under those that it has in memory."""
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder)
    if layout == "memory":
        kept = read_weights(folder)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if len(kept) < len(state) else set()
        save_file({n: t for n, t in state.items() if n not in tied}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize(("base", "tuned"), [("hub", "memory"), ("memory", "hub")])
def test_models_of_two_layouts_merge_and_load_completely(family: str, base: str, tuned: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = randomised(LAYOUTS[family](), seed=0)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    save_as(one, tmp_path / "base", base)
    two = randomised(one, seed=1)
    after = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    save_as(two, tmp_path / "one", tuned)
    merged(tmp_path, INTERPOLATE)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    model, info = type(one).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: what for key, what in info.items() if what} == {}
    for name, value in model.state_dict().items():
        expected = (0.7 * before[name].double() + 0.3 * after[name].double()).to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)
        assert not value.is_floating_point() or not torch.equal(value, before[name]), name


# --- in a merge ------------------------------------------------------------------------------------------------------

HUB = {
    "visual.blocks.0.attn.qkv.weight": (6, 2),
    "visual.blocks.1.attn.qkv.weight": (6, 2),
    "visual.blocks.0.norm1.weight": (2,),
    "visual.blocks.1.norm1.weight": (2,),
    "visual.merger.ln_q.weight": (2,),
    "model.embed_tokens.weight": (9, 2),
    "model.layers.0.mlp.up_proj.weight": (4, 2),
    "model.layers.0.norm.weight": (2,),
    "lm_head.weight": (9, 2),
}


def new_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def renamed_checkpoint(folder: Path, rename: dict[str, str]) -> None:
    """The same file with other names of the same tensors."""
    from checkpoints import write_file
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    arrays = load_file(path)
    write_file(path, {rename.get(name, name): arrays[name] for name in reversed(arrays)})


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    models(tmp_path, ["base", "one"], HUB)
    return tmp_path


def test_two_layouts_merge_as_one(pair: Path) -> None:
    expected = merged(pair, INTERPOLATE, "same")
    renamed_checkpoint(pair / "one", {name: new_name(name) for name in HUB})
    assert merged(pair, INTERPOLATE, "mixed") == expected
    report = json.loads((pair / "mixed" / "merge_report.json").read_text())
    assert [rule["said"] for rule in report["names"][0]["rules"]] == [
        "model.visual.* ↔ visual.*: 5 tensors",
        "model.language_model.* ↔ model.*: 3 tensors",
        "1 tensor of the same name",
    ]
    assert report["tensors"]["visual.merger.ln_q.weight"]["from"][1].endswith("model.visual.merger.ln_q.weight")


def test_extra_tensors_are_told_by_their_own_names(pair: Path) -> None:
    models(pair, ["one"], HUB | {"visual.extra.weight": (8, 8), "visual.extra.bias": (8,)})
    renamed_checkpoint(
        pair / "one", {name: f"module.{name}" for name in (*HUB, "visual.extra.weight", "visual.extra.bias")}
    )
    (problem,) = refusals(pair, INTERPOLATE)
    assert problem.what == "base lacks 2 tensors that one has"
    assert problem.tensor is not None and "visual.extra.weight" in problem.tensor
    assert problem.found is not None and problem.found.startswith("in one: module.visual.extra.")


def test_the_output_has_the_layout_of_the_base(pair: Path) -> None:
    renamed_checkpoint(pair / "base", {name: new_name(name) for name in HUB})
    assert merged(pair, INTERPOLATE).keys() == {new_name(name) for name in HUB}


def test_the_dry_run_shows_the_rules(pair: Path) -> None:
    renamed_checkpoint(pair / "one", {name: f"module.{name}" for name in HUB})
    (pair / "recipe.yaml").write_text(INTERPOLATE)
    command = [sys.executable, "-m", "ggez_merge", "recipe.yaml", "--out", "out", "--dry-run"]
    said = subprocess.run(command, cwd=pair, capture_output=True, text=True, check=True).stdout
    assert "names of one in the base's layout:" in said
    assert "module.* ↔ *: 9 tensors" in said


def test_an_unclear_place_is_refused(tmp_path: Path) -> None:
    models(tmp_path, ["base"], {**tower("left."), **tower("right.")})
    models(tmp_path, ["one"], tower(""))
    problem = next(problem for problem in refusals(tmp_path, INTERPOLATE) if "not clear" in problem.what)
    assert "left" in f"{problem.expected} {problem.found}" and "right" in f"{problem.expected} {problem.found}"


def test_a_part_alone_is_refused_or_copied_around(pair: Path) -> None:
    models(pair, ["one"], {name.removeprefix("visual."): shape for name, shape in HUB.items() if "visual" in name})
    (problem,) = refusals(pair, INTERPOLATE)
    assert problem.what == "one lacks 4 tensors that base has"
    plan = plan_of(pair, INTERPOLATE, overrides=["missing=copy"])
    actions = {output.entry.name: output.action for output in plan.outputs}
    assert {name for name, action in actions.items() if action == "merge"} == {n for n in HUB if "visual" in n}
