"""Names of one layout read in another: of real architectures, of wrapped and cut models, and of made-up tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import INTERPOLATE, carry_out, merged, models, plan_of, refusals, tensors
from models import LAYOUTS, WRITTEN, in_layout, layout_names, randomised, read_weights
from safetensors.torch import save_file

from ggez_merge.align import part
from ggez_merge.components import component
from ggez_merge.names import Match, grouped, match

Shapes = dict[str, tuple[int, ...]]
Names = dict[str, str]  # a name in memory -> the same tensor's name in another layout


def found(ours: Shapes, theirs: Shapes) -> Match:
    return match(ours, theirs, part)


PREFIX_ONLY = [name for name in LAYOUTS if name not in ("qwen2_moe", "mixtral")]
WRAPPED = ("DDP", "compiled", "FSDP")
KINDS = ("memory", "hub", "memory of 4.52", "saved by 5", *WRAPPED)


@cache
def layouts(family: str) -> tuple[Shapes, dict[str, Names]]:
    """Shapes by the names in memory, and each layout's names by those."""
    with torch.device("meta"):
        state = LAYOUTS[family]().state_dict()
    made = {kind: layout_names(family, kind, state) for kind in KINDS if kind not in WRAPPED}
    made["DDP"] = {name: f"module.{name}" for name in state}
    made["compiled"] = {name: f"_orig_mod.{name}" for name in state}
    made["FSDP"] = {name: _wrapped(name) for name in state}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, made


def kinds_of(family: str) -> list[str]:
    """The layouts that are not the same as one before."""
    _, names = layouts(family)
    return [kind for at, kind in enumerate(KINDS) if names[kind] not in [names[before] for before in KINDS[:at]]]


def _wrapped(name: str) -> str:
    """FSDP around the model and around every layer of every stack."""
    words = ["_fsdp_wrapped_module"]
    for word in name.split("."):
        words += [word, "_fsdp_wrapped_module"] if word.isdecimal() and words[-1] in ("layers", "blocks") else [word]
    return ".".join(words)


@pytest.mark.parametrize("family", PREFIX_ONLY)
def test_every_tensor_of_an_architecture_finds_its_own(family: str) -> None:
    for base, model in product(kinds_of(family), repeat=2):
        finds_its_own(family, base, model)


def finds_its_own(family: str, base: str, model: str) -> None:
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


PROJECTOR: Shapes = {
    "0.weight": (7,),
    "0.bias": (7,),
    "1.weight": (8, 7),
    "1.bias": (8,),
    "3.weight": (8, 8),
    "3.bias": (8,),
}
GONE = {"mlp1.3.weight": None, "mlp1.3.bias": None}
WORDS = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def named(name: str) -> str:
    number, _, last = name.partition(".")
    return f"model.multi_modal_projector.{WORDS[number]}.{last}"


@given(order=st.permutations(list(PROJECTOR)), wrapper=st.sampled_from(["", "module.", "model."]))
def test_numbered_modules_are_named_ones_in_their_order(order: list[str], wrapper: str) -> None:
    text = tower("model.text.")
    theirs = {f"{wrapper}{name}": shape for name, shape in text.items()}
    theirs |= {f"{wrapper}mlp1.{name}": PROJECTOR[name] for name in order}
    ours = {**{named(name): shape for name, shape in PROJECTOR.items()}, **text}
    wanted = {f"{wrapper}mlp1.{name}": named(name) for name in PROJECTOR}
    assert found(ours, theirs).canonical.items() >= wanted.items()
    assert found(theirs, ours).canonical.items() >= {ours: own for own, ours in wanted.items()}.items()


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("one more", {"mlp1.4.weight": (8, 8)}),
        ("one less", {"mlp1.3.weight": None}),
        ("another shape", {"mlp1.3.weight": (8, 9)}),
        ("another kind", {"mlp1.1.bias": None}),
        ("in two places", {**GONE, "mlp1.more.3.weight": (8, 8), "mlp1.more.3.bias": (8,)}),
        ("no number", {**GONE, "mlp1.last.weight": (8, 8), "mlp1.last.bias": (8,)}),
    ],
)
def test_numbers_alone_do_not_make_a_sequence(what: str, changes: dict[str, tuple[int, ...] | None]) -> None:
    theirs = {f"mlp1.{name}": shape for name, shape in PROJECTOR.items()} | changes
    answer = found(
        {named(name): shape for name, shape in PROJECTOR.items()},
        {name: shape for name, shape in theirs.items() if shape is not None},
    )
    assert all(own == name for own, name in answer.canonical.items()), what


def test_one_module_is_no_sequence_nor_are_two_of_one_name() -> None:
    one = {"multi_modal_projector.linear_1.weight": (8, 7)}
    assert found(one, {"mlp1.0.weight": (8, 7)}).canonical == {"mlp1.0.weight": "mlp1.0.weight"}
    lists = ({f"visual.{word}_list.{i}.scale": (8,) for i in range(2)} for word in ("merger", "gate"))
    ours, theirs = lists
    assert all(own == name for own, name in found(ours, theirs).canonical.items())


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


MERGED = [
    (family, base, tuned)
    for family in LAYOUTS
    for base, tuned in product(("memory", *WRITTEN.get(family, ())), ("memory", *WRITTEN.get(family, ()), "DDP"))
    if base != tuned
]


@cache
def built(family: str, folder: Path) -> tuple[tf.PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """A model, what it and a tuned copy hold, and in the folder its config and what a save in each layout gives."""
    torch.manual_seed(0)
    model = LAYOUTS[family]()
    model.save_pretrained(folder / family / "config")
    kept = read_weights(folder / family / "config")
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if not any("lm_head" in n for n in kept) else set()
    states = []
    for seed in range(2):
        state = {name: tensor.clone() for name, tensor in randomised(model, seed=seed).state_dict().items()}
        states.append(state)
        for layout in ("memory", *WRITTEN.get(family, ()), "DDP"):
            written = in_layout(family, layout, {n: t for n, t in state.items() if n not in tied})
            target = folder / family / layout / ("base", "one")[seed]
            target.mkdir(parents=True)
            shutil.copy(folder / family / "config" / "config.json", target)
            if layout == "DDP":
                written = {f"module.{name}": tensor for name, tensor in written.items()}
            save_file(written, target / "model.safetensors", {"format": "pt"})
    return model, states


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize(("family", "base", "tuned"), MERGED)
def test_models_of_two_layouts_merge_and_load_completely(
    family: str, base: str, tuned: str, saved: Path, tmp_path: Path
) -> None:
    """The layout is the base's, the numbers those of an independent merge, and transformers misses nothing in it."""
    model, (before, after) = built(family, saved)
    (tmp_path / "base").symlink_to(saved / family / base / "base")
    (tmp_path / "one").symlink_to(saved / family / tuned / "one")
    merged(tmp_path, INTERPOLATE)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: what for key, what in info.items() if what} == {}
    for name, value in loaded.state_dict().items():
        expected = (0.7 * before[name].double() + 0.3 * after[name].double()).to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)
        assert not value.is_floating_point() or not torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_layouts_are_what_transformers_itself_writes(family: str, saved: Path, tmp_path: Path) -> None:
    """The hub's after loading from there, and its own from a model that was made from a config."""
    model, _ = built(family, saved)
    first, hub = "saved by 5", "hub" if "hub" in WRITTEN.get(family, ()) else "memory"
    loaded = type(model).from_pretrained(saved / family / hub / "base")
    loaded.save_pretrained(tmp_path)
    assert read_weights(tmp_path).keys() == read_weights(saved / family / hub / "base").keys()
    if first in WRITTEN.get(family, ()):
        fresh = read_weights(saved / family / "config").keys()
        assert fresh == read_weights(saved / family / first / "base").keys()


ALONE_IN = [
    ("gemma3", "model.language_model"),
    ("gemma3", "model.vision_tower"),
    ("llava", "model.language_model"),
    ("llava", "model.vision_tower"),
    ("qwen2_5_vl", "model.language_model"),
    ("qwen2_5_vl", "model.visual"),
    ("mistral3", "model.vision_tower"),
    ("idefics3", "model.text_model"),
    ("blip2", "language_model"),
    ("clip", "vision_model"),
    ("siglip", "text_model"),
]


@pytest.mark.parametrize(("family", "place"), ALONE_IN)
def test_a_part_that_transformers_saved_alone_is_merged_into_the_whole(
    family: str, place: str, saved: Path, tmp_path: Path
) -> None:
    """Refused, as it lacks the rest; with `missing: copy` the rest stays the base's, and all of it loads."""
    model, (before, after) = built(family, saved)
    base = saved / family / ("hub" if "hub" in WRITTEN.get(family, ()) else "memory") / "base"
    (tmp_path / "base").symlink_to(base)
    model.load_state_dict(after)
    model.get_submodule(place).save_pretrained(tmp_path / "one")
    alone = read_weights(tmp_path / "one")
    problems = refusals(tmp_path, INTERPOLATE)
    lacking = len(read_weights(base)) - len(alone)
    assert [problem.what for problem in problems] == [f"one lacks {lacking} tensors that base has"]
    carry_out(plan_of(tmp_path, INTERPOLATE, overrides=["missing=copy"]))
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: what for key, what in info.items() if what} == {}
    tied = {"lm_head.weight"} if not any("lm_head" in name for name in read_weights(base)) else set()
    for name, value in loaded.state_dict().items():
        of_part = name.startswith(f"{place}.") or (name in tied and place == "model.language_model")
        expected = 0.7 * before[name].double() + 0.3 * after[name].double() if of_part else before[name]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-7, msg=name)


def test_experts_that_transformers_5_turned_are_refused(tmp_path: Path) -> None:
    """The hub's files of Qwen3-VL-MoE have [E, in, out] where transformers 5 has and writes [E, out, in]."""
    model = randomised(LAYOUTS["qwen3_vl_moe"](), seed=0)
    for name in ("base", "one"):
        model.save_pretrained(tmp_path / name)
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in read_weights(tmp_path / "base").items()
    }
    save_file(turned, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    problems = refusals(tmp_path, INTERPOLATE)
    assert {(problem.what, problem.remedy) for problem in problems} == {
        (
            "the inputs disagree on a tensor's shape",
            "one lies on its side: save both with one version of transformers",
        )
    }
    assert len(problems) == sum(".experts." in name for name in turned) == 4


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
