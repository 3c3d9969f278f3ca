"""Names of components and layers in a recipe reach the tensors that they say, and no others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from merging import INTERPOLATE, command_line, models, plan_of, refusals

from ggez_merge.components import COMPONENTS, component, is_norm, layer
from ggez_merge.selection import NAMES, read_selection

TOWER = [f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(3)]
STACK = [
    f"language_model.model.layers.{i}.{part}.weight" for i in range(8) for part in ("mlp.up_proj", "input_layernorm")
]
VLM = [
    *TOWER,
    "vision_tower.vision_model.post_layernorm.weight",
    "multi_modal_projector.mm_input_projection_weight",
    "multi_modal_projector.mm_soft_emb_norm.weight",
    "language_model.model.embed_tokens.weight",
    *STACK,
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    "logit_scale",
]
UNET = [f"{stack}.{i}.conv.weight" for stack in ("down_blocks", "up_blocks") for i in range(3)] + ["conv_in.weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("selection")
    models(made, ["base", "one"], dict.fromkeys(VLM, (2,)))
    models(made / "unet", ["base", "one"], dict.fromkeys(UNET, (2,)))
    return made


def ratios(folder: Path, components: str, names: Sequence[str] = VLM) -> dict[str, object]:
    """The ratio of every tensor that does not have the recipe's 0.3."""
    plan = plan_of(folder, INTERPOLATE[:-1] + f", components: {components}}}")
    found = {output.entry.name: output.job.shared["ratio"] for output in plan.outputs if output.job}
    assert found.keys() == set(names)
    return {name: ratio for name, ratio in found.items() if ratio != 0.3}


@pytest.mark.parametrize("name", sorted({component(name) for name in VLM}))
def test_a_component_by_name(name: str, folder: Path) -> None:
    assert ratios(folder, f"{{{name}: {{ratio: 1}}}}") == {x: 1 for x in VLM if component(x) == name}


def test_norms_reach_into_every_component_but_what_stands_above_them(folder: Path) -> None:
    norms = [name for name in VLM if "norm" in name]
    assert ratios(folder, "{norms: {ratio: 0}}") == dict.fromkeys(norms, 0)
    found = ratios(folder, "{vision_tower: {ratio: 1}, norms: {ratio: 0}}")
    assert found == dict.fromkeys(norms, 0) | dict.fromkeys(VLM[:4], 1)


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        ("language_model.layers.0-7", range(8)),
        ("language_model.layers.2-4", range(2, 5)),
        ("language_model.layers.7", [7]),
        ("language_model.layers.0-0", [0]),
    ],
)
def test_layers_by_number_with_both_ends(key: str, layers: Sequence[int], folder: Path) -> None:
    expected = {name: 1 for i in layers for name in STACK[2 * i : 2 * i + 2]}
    assert ratios(folder, f"{{{key}: {{ratio: 1}}}}") == expected


def test_the_first_line_wins_so_layers_stand_above_their_component(folder: Path) -> None:
    found = ratios(folder, '{"language_model.layers.0-1": {ratio: 0}, language_model: {ratio: 1}}')
    assert found == dict.fromkeys(STACK[:4], 0) | dict.fromkeys([*STACK[4:], "language_model.model.norm.weight"], 1)


def test_a_stack_by_its_own_name(folder: Path) -> None:
    found = ratios(folder / "unet", '{"unet.up_blocks.1-2": {ratio: 1}}', UNET)
    assert found == dict.fromkeys(UNET[4:6], 1)


def test_a_gradient_over_a_component_ends_where_the_model_ends(folder: Path) -> None:
    found = ratios(folder, "{language_model: {ratio: [0, 7]}, lm_head: {ratio: [0, 1]}, projector: {ratio: [2, 1]}}")
    assert [found[name] for name in STACK[::2]] == pytest.approx(list(range(8)), abs=1e-12)
    assert found["language_model.model.norm.weight"] == 7  # after the layers: the last value, as the head
    assert found["language_model.lm_head.weight"] == 1
    assert [found[name] for name in VLM if component(name) == "projector"] == [2, 2]  # before them, norm or not


def test_a_gradient_over_layers_begins_and_ends_with_them(folder: Path) -> None:
    found = ratios(folder, '{"language_model.layers.2-6": {ratio: [0, 1]}, "language_model.layers.7": {ratio: [0, 2]}}')
    assert [found[name] for name in STACK[4::2]] == [0, 0.25, 0.5, 0.75, 1, 2]


def test_a_glob_still_works_and_so_does_a_whole_name(folder: Path) -> None:
    assert ratios(folder, '{"*.up_proj.*": {ratio: 1}}') == dict.fromkeys(STACK[::2], 1)
    assert ratios(folder, f"{{{STACK[3]}: {{ratio: 1}}}}") == {STACK[3]: 1}


@pytest.mark.parametrize(
    ("key", "what", "remedy"),
    [
        ("vison_tower", "reaches no tensor", "did you mean `vision_tower`?"),
        ("language_modle.layers.0-3", "reaches no tensor", "did you mean `language_model`?"),
        ("language_model.layer.0-3", "reaches no tensor", "the components here are `vision_tower`, `projector`"),
        ("vae", "reaches no tensor", "`embeddings`, `language_model`, `lm_head`, `logit_scale`;"),
        ("*.vae.*", "reaches no tensor", "inspect MODEL --tensors"),
        ("norms.layers.0", "reaches no tensor", "did you mean `norms`?"),
        ("language_model.layers.0-8", "language_model has the layers 0 to 7", "language_model.layers.0-7"),
        ("language_model.layers.9", "language_model has the layers 0 to 7", "language_model.layers.0-7"),
        ("language_model.layers.3-2", "ends before it begins", "language_model.layers.0-7"),
    ],
)
def test_a_line_that_is_mistaken_is_refused(key: str, what: str, remedy: str, folder: Path) -> None:
    (problem,) = refusals(folder, INTERPOLATE[:-1] + f', components: {{"{key}": {{ratio: 1}}}}}}')
    assert problem.what.startswith(f'components: "{key}"')
    assert what in problem.what
    assert remedy in str(problem.remedy)
    assert str(problem.place).endswith(":1")


def test_a_line_that_others_hide_is_refused(folder: Path) -> None:
    components = '{language_model: {ratio: 1}, "language_model.layers.0-3": {ratio: 0}}'
    (problem,) = refusals(folder, INTERPOLATE[:-1] + f", components: {components}}}")
    assert 'components: "language_model.layers.0-3" reaches no tensor' in problem.what
    assert "the first wins" in str(problem.remedy)


def test_layers_of_several_stacks_are_refused(folder: Path) -> None:
    (problem,) = refusals(folder / "unet", INTERPOLATE[:-1] + ', components: {"unet.layers.0": {ratio: 1}}}')
    assert "unet has several stacks of layers: `down_blocks`, `up_blocks`" in problem.what


def test_the_dry_run_lists_an_unknown_architecture_by_names_and_says_so(tmp_path: Path) -> None:
    for name in ("base", "one"):
        arrays = {x: np.ones(2, np.float32) for x in ("net.eyes.0.w", "net.eyes.1.w", "net.mind.w", "lm_head.weight")}
        write_checkpoint(tmp_path / name, arrays)
    recipe = INTERPOLATE[:-1] + ', components: {"net.eyes.*": {ratio: 0.1}, other: {ratio: 0.2}}}'
    (tmp_path / "recipe.yaml").write_text(recipe)
    wide = {**os.environ, "COLUMNS": "200"}
    said = command_line("recipe.yaml", "--out", "out", "--dry-run", cwd=tmp_path, env=wide).stdout
    rows = {line.split()[0]: " ".join(line.split()) for line in said.splitlines() if line.strip()}
    assert 'net.eyes.* components "net.eyes.*" ratio 0.1 2' in rows["net.eyes.*"]
    assert 'net.mind.* components "other" ratio 0.2 1' in rows["net.mind.*"]
    assert "the names of 3 of the tensors do not tell their component" in rows["note"]


keys = st.sampled_from([*NAMES, "language_model.layers.0-3", "vision_tower.layers.2", "*.mlp.*", "logit*", "lm_head.x"])


@given(keys, st.sampled_from(VLM + UNET))
def test_every_key_is_a_component_or_layers_of_one_or_a_glob(key: str, name: str) -> None:
    takes = read_selection(key).takes(name)
    if key == "norms":
        assert takes == is_norm(name)
    elif key in COMPONENTS:
        assert takes == (component(name) == key)
    elif ".layers." in key:
        part, _, ends = key.split(".")
        first, _, last = ends.partition("-")
        place = layer(name)
        inside = place is not None and place[0].endswith("layers") and int(first) <= place[1] <= int(last or first)
        assert takes == (inside and component(name) == part)
    else:
        assert takes == fnmatchcase(name, key)
