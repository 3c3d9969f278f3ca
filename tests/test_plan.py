"""Plans: everything that is refused, one by one and all at once, and what is planned for what is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from checkpoints import write_checkpoint, write_file
from merging import INTERPOLATE, TASK, TIES, arrays, merged, models, plan_of, refusals, sparse, tensors

from ggez_merge.errors import Problem, Refused
from ggez_merge.recipe import load_recipe

SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    **{f"model.layers.{i}.{part}.weight": (4, 4) for i in range(4) for part in ("attn", "mlp")},
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}
CONFIG = {"num_hidden_layers": 4, "hidden_size": 4, "torch_dtype": "float32", "layer_types": ["a", "b", "c", "d"]}


@pytest.fixture
def trio(tmp_path: Path) -> Path:
    """Three tiny language models of four layers; every element tells its model (1, 2, 3) and its layer (.0 to .3)."""
    for number, model in enumerate(("base", "one", "two"), start=1):
        write_checkpoint(tmp_path / model, numbered(number), config=CONFIG)
    return tmp_path


def numbered(number: int) -> dict[str, np.ndarray[Any, Any]]:
    made = {}
    for name, shape in SHAPES.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        made[name] = np.full(shape, number + layer / 8, np.float32)
    return made


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def in_recipe(problem: Problem, recipe: str, line: str) -> bool:
    """Whether the problem's place is the recipe's line that contains `line`."""
    numbers = [i for i, text in enumerate(recipe.splitlines(), start=1) if line in text]
    return str(problem.place).endswith(tuple(f"recipe.yaml:{number}" for number in numbers))


class TestInputs:
    @pytest.mark.parametrize("lacking", ["base", "one", "two"])
    def test_missing_tensors_are_named_with_who_lacks_them(self, lacking: str, trio: Path) -> None:
        made = numbered(1)
        for layer in range(4):
            del made[f"model.layers.{layer}.mlp.weight"]
        write_checkpoint(trio / lacking, made)
        problem = only(refusals(trio, TASK))
        assert problem.what.startswith(f"{lacking} lacks 4 tensors that ")
        assert problem.tensor == ", ".join(f"model.layers.{i}.mlp.weight" for i in range(3)) + " and 1 more"
        assert "missing: copy" in str(problem.remedy)

    def test_missing_tensors_are_copied_if_asked_for(self, trio: Path) -> None:
        first, last = numbered(1), numbered(2)
        del first["lm_head.weight"], last["model.norm.weight"]
        write_checkpoint(trio / "base", first)
        write_checkpoint(trio / "one", last)
        plan = plan_of(trio, INTERPOLATE + "\n", overrides=["missing=copy"])
        copied = {
            output.entry.name: str(output.models[0].file.parent.name) for output in plan.outputs if not output.job
        }
        assert copied == {"model.norm.weight": "base", "lm_head.weight": "one"}
        assert len(plan.notes) == 2
        found = merged(trio, yaml.safe_dump({**yaml.safe_load(INTERPOLATE), "missing": "copy"}))
        assert found["model.norm.weight"] == tensors(trio / "base")["model.norm.weight"]
        assert found["lm_head.weight"] == tensors(trio / "one")["lm_head.weight"]
        assert list(found) == [*(n for n in SHAPES if n != "lm_head.weight"), "lm_head.weight"]

    def test_shapes_differ(self, trio: Path) -> None:
        made = numbered(2)
        made["lm_head.weight"] = np.zeros((12, 4), np.float32)
        made["model.norm.weight"] = np.zeros((2, 2), np.float32)
        write_checkpoint(trio / "one", made)
        norm, head = refusals(trio, TASK)
        assert (norm.tensor, head.tensor) == ("model.norm.weight", "lm_head.weight")
        assert head.expected == f"[11, 4] as in {trio / 'base/model.safetensors'}"
        assert head.found == f"[12, 4] in {trio / 'one/model.safetensors'}"
        assert "tokenizer: {source: base}" in str(head.remedy)

    @pytest.mark.parametrize("other", [np.int32, np.uint8, np.float32, ml_dtypes.float8_e4m3fnuz])
    def test_dtypes_of_what_cannot_be_averaged_differ(self, other: Any, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "base", {"w": np.ones(2, "f4"), "ids": np.arange(3)})
        write_checkpoint(tmp_path / "one", {"w": np.ones(2, "f4"), "ids": np.arange(3).astype(other)})
        problem = only(refusals(tmp_path, INTERPOLATE))
        assert problem.tensor == "ids"
        assert str(problem.expected).startswith("I64 as in")

    def test_the_same_model_twice(self, trio: Path) -> None:
        (trio / "alias").symlink_to("one")
        recipe = TASK.replace("model: two", "model: ./alias")
        problem = only(refusals(trio, recipe))
        assert problem.what == "the same model is listed twice"
        assert "./alias and one" in str(problem.found)
        assert in_recipe(problem, recipe, "alias")

    def test_the_base_may_be_listed_among_the_models(self, trio: Path) -> None:
        listed = TASK.replace("models: [", "models: [{model: base}, ")
        assert merged(trio, listed, "a") == merged(trio, TASK, "b")

    @pytest.mark.parametrize("out", ["one", "base/../one", "alias", "."])
    def test_the_output_would_replace_an_input(self, out: str, trio: Path) -> None:
        (trio / "alias").symlink_to("one")
        found = {problem.what for problem in refusals(trio, TASK, out=out)}
        assert found == {"the output folder is (or holds) an input"}

    def test_the_output_may_lie_in_an_input(self, trio: Path) -> None:
        assert merged(trio, INTERPOLATE, "base/merged")

    def test_inputs_that_cannot_be_opened_are_all_named(self, trio: Path) -> None:
        shutil.rmtree(trio / "one")
        os.truncate(trio / "two" / "model.safetensors", 100)
        first, second = refusals(trio, TASK.replace("model: one", "model: ./one"))
        assert "./one" in first.what
        assert str(trio / "two") in str(second.place)

    def test_names_of_tensors_cannot_command_a_terminal(self, tmp_path: Path) -> None:
        evil = "\x1b[2J\r\u202e.weight"
        write_checkpoint(
            tmp_path / "base", {"x": np.ones(3, "f4"), evil: np.ones(3, "f4"), "é" + evil: np.ones(3, "f4")}
        )
        write_checkpoint(tmp_path / "one", {"x": np.ones(3, "f4"), evil: np.ones(4, "f4")})
        said = "\n".join(str(problem) for problem in refusals(tmp_path, INTERPOLATE))
        assert said.count("\\x1b[2J\\r\\u202e.weight") == 2
        assert said.replace("\n", "").isprintable()
        write_checkpoint(tmp_path / "one", {"x": np.ones(3, "f4")})
        (note,) = plan_of(tmp_path, INTERPOLATE, overrides=["missing=copy"]).notes
        assert note.isprintable()

    def test_no_tensors_at_all(self, tmp_path: Path) -> None:
        for model in ("base", "one"):
            write_checkpoint(tmp_path / model, {})
        assert "no tensors" in only(refusals(tmp_path, INTERPOLATE)).what

    def test_files_as_models(self, trio: Path) -> None:
        write_file(trio / "lone.safetensors", numbered(2))
        assert merged(trio, INTERPOLATE.replace("one", "lone.safetensors"), "a") == merged(trio, INTERPOLATE, "b")


class TestOutput:
    def test_none_given(self, trio: Path) -> None:
        (trio / "recipe.yaml").write_text(INTERPOLATE)
        recipe = load_recipe(trio / "recipe.yaml")
        from ggez_merge.plan import make_plan

        with pytest.raises(Refused, match=r"names no output folder"):
            make_plan(recipe)
        (trio / "recipe.yaml").write_text(yaml.safe_dump({**yaml.safe_load(INTERPOLATE), "output": {"path": "there"}}))
        assert make_plan(load_recipe(trio / "recipe.yaml")).folder == trio / "there"
        assert make_plan(load_recipe(trio / "recipe.yaml"), Path("here")).folder == Path.cwd() / "here"

    def test_dots_in_its_path_are_resolved(self, trio: Path) -> None:
        merged(trio, INTERPOLATE, "base/../out/.")
        assert {path.name for path in trio.iterdir()} == {"base", "one", "two", "out"}

    def test_a_disk_too_small_for_it(self, tmp_path: Path) -> None:
        shape = (1 << 20, 1 << 20)
        for model in ("base", "one"):
            for part in "ab":
                sparse(tmp_path / model / f"model-{part}.safetensors", {part: ("F32", shape)})
            weight_map = {part: f"model-{part}.safetensors" for part in "ab"}
            (tmp_path / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        problem = only(refusals(tmp_path, INTERPOLATE, ["out_dtype=float64"]))
        assert problem.what.startswith("not enough free space")
        assert int(str(problem.expected).replace(",", "").removesuffix(" bytes")) > 2**44

    def test_planning_writes_nothing(self, trio: Path) -> None:
        before = sorted(trio.rglob("*"))
        plan_of(trio, TIES)
        assert sorted(trio.rglob("*")) == before


class TestMethod:
    @pytest.mark.parametrize(
        ("name", "near"), [("linaer", "linear"), ("task-arithmetic", "task_arithmetic"), ("TIES", None)]
    )
    def test_unknown(self, name: str, near: str | None, trio: Path) -> None:
        recipe = TASK.replace("task_arithmetic", name)
        problem = only(refusals(trio, recipe))
        assert repr(name) in problem.what
        assert in_recipe(problem, recipe, "merge_method")
        assert "ties" in str(problem.expected)
        assert problem.remedy == (f"did you mean `{near}`?" if near else None)

    @pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "linear"])
    def test_base_missing(self, method: str, trio: Path) -> None:
        said = {"t": 0.5} if method == "slerp" else {"ratio": 0.5} if method == "linear" else {"weight": 1}
        recipe = yaml.safe_dump({"merge_method": method, "models": [{"model": "one"}], "parameters": said})
        problem = only(refusals(trio, recipe))
        assert problem.what == f"{method} needs a base_model"
        assert in_recipe(problem, recipe, "merge_method")

    @pytest.mark.parametrize(
        ("recipe", "said"),
        [
            (
                "merge_method: slerp\nbase_model: base\nmodels: [model: one, model: two]\nparameters: {t: 0}",
                "exactly 1",
            ),
            ("merge_method: slerp\nbase_model: base\nmodels: [model: base]\nparameters: {t: 0}", "exactly 1"),
            ("merge_method: passthrough\nmodels: [model: one, model: two]", "exactly 1"),
            ("merge_method: ties\nbase_model: base\nmodels: [model: base]", "at least 1"),
        ],
    )
    def test_wrong_number_of_models(self, recipe: str, said: str, trio: Path) -> None:
        problem = only(refusals(trio, recipe))
        assert said in problem.what
        assert in_recipe(problem, recipe, "models")

    def test_a_ratio_is_between_two(self, trio: Path) -> None:
        recipe = "merge_method: linear\nbase_model: base\nmodels: [model: one, model: two]\nparameters: {ratio: 0.5}"
        assert "not 2" in only(refusals(trio, recipe)).what

    def test_a_base_that_only_gives_the_layout_is_noted(self, trio: Path) -> None:
        recipe = "merge_method: linear\nbase_model: base\nmodels: [model: one, model: two]\nparameters: {weight: 1}"
        (note,) = plan_of(trio, recipe).notes
        assert note.startswith("base gives the layout")
        assert (arrays_of(trio, recipe)["model.norm.weight"] == 2.5).all()


def arrays_of(folder: Path, recipe: str) -> dict[str, np.ndarray[Any, Any]]:
    merged(folder, recipe, overwrite=True)
    return arrays(folder / "out")


class TestSeveralAtOnce:
    def test_all_problems_are_in_one_refusal(self, trio: Path) -> None:
        made = numbered(2)
        made["lm_head.weight"] = np.zeros((12, 4), np.float32)
        del made["model.norm.weight"]
        write_checkpoint(trio / "one", made)
        recipe = """
        merge_method: ties
        base_model: base
        models:
        - {model: one, parameters: {weight: 1, denisty: 0.5, lambda: 2}}
        - {model: two, parameters: {weight: [{filter: nowhere, value: 3}, {value: 1}], density: 1.5}}
        parameters: {nomralize: true}
        components:
          "*.vision.*": {weight: 0}
        """
        problems = refusals(trio, recipe)
        said = "\n".join(str(problem) for problem in problems)
        for words in (
            "one lacks 1 tensor that base has",
            "disagree on a tensor's shape",
            "takes no parameter `denisty`",
            "did you mean `density`?",
            "`lambda` is a parameter of the whole merge",
            "the filter 'nowhere' reaches no tensor",
            "`density` of ties must be a number from 0 to 1",
            "did you mean `normalize`?",
            'components: "*.vision.*" reaches no tensor',
        ):
            assert words in said
        assert len(problems) == 8
        assert Refused(problems).exit_code == 2


class TestSlices:
    STACK = """
    merge_method: passthrough
    slices:
    - sources: [{model: one, layer_range: [0, 3]}]
    - sources: [{model: two, layer_range: [1, 4]}]
    """

    def test_stacked_layers_and_config(self, trio: Path) -> None:
        merged(trio, self.STACK)
        found = {name: set(array.tolist()) for name, array in arrays(trio / "out").items()}
        layers = [2, 2.125, 2.25, 3.125, 3.25, 3.375]
        assert found == {
            "model.embed_tokens.weight": {2.0},
            **{f"model.layers.{i}.{part}.weight": {x} for i, x in enumerate(layers) for part in ("attn", "mlp")},
            "model.norm.weight": {3.0},
            "lm_head.weight": {3.0},
        }
        config = json.loads((trio / "out" / "config.json").read_text())
        assert config["num_hidden_layers"] == 6
        assert config["layer_types"] == ["a", "b", "c", "b", "c", "d"]
        assert config["hidden_size"] == 4

    def test_fewer_layers(self, trio: Path) -> None:
        recipe = "merge_method: passthrough\nslices:\n- sources: [{model: one, layer_range: [2, 3]}]"
        merged(trio, recipe)
        assert {name for name in tensors(trio / "out") if "layers" in name} == {
            "model.layers.0.attn.weight",
            "model.layers.0.mlp.weight",
        }
        assert json.loads((trio / "out" / "config.json").read_text())["layer_types"] == ["c"]

    def test_merged_slices_pair_layers_by_position(self, trio: Path) -> None:
        recipe = """
        merge_method: linear
        slices:
        - sources:
          - {model: one, layer_range: [0, 2], parameters: {weight: 1}}
          - {model: two, layer_range: [2, 4], parameters: {weight: 3}}
        """
        found = arrays_of(trio, recipe)
        assert (found["model.layers.0.attn.weight"] == (2 + 3 * 3.25) / 4).all()
        assert (found["model.layers.1.attn.weight"] == (2.125 + 3 * 3.375) / 4).all()
        assert json.loads((trio / "out" / "config.json").read_text())["num_hidden_layers"] == 2

    def test_the_same_layers_of_one_model_twice_in_a_slice(self, trio: Path) -> None:
        recipe = self.STACK.replace("linear", "passthrough").replace("two", "one").replace("[1, 4]", "[0, 3]")
        assert plan_of(trio, recipe)  # stacked, a layer may come twice
        twice = "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources:\n"
        twice += "  - {model: one, layer_range: [0, 2]}\n" * 2
        assert "listed twice" in only(refusals(trio, twice)).what

    def test_ranges_beyond_the_last_layer(self, trio: Path) -> None:
        recipe = self.STACK.replace("[0, 3]", "[0, 5]").replace("[1, 4]", "[3, 9]")
        first, second = refusals(trio, recipe)
        assert (first.what, first.expected, first.found) == (
            "one has 4 layers under model.layers",
            "a range within [0, 4]",
            "[0, 5]",
        )
        assert in_recipe(first, recipe, "[0, 5]")
        assert in_recipe(second, recipe, "[3, 9]")

    def test_ranges_of_different_lengths(self, trio: Path) -> None:
        recipe = """
        merge_method: linear
        parameters: {weight: 1}
        slices:
        - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 3]}]
        """
        problem = only(refusals(trio, recipe))
        assert "different lengths" in problem.what
        assert problem.found == "[0, 2], [0, 3]"

    def test_two_stacks(self, trio: Path) -> None:
        for number, model in enumerate(("one", "two")):
            extra = {f"vision_tower.layers.{i}.weight": np.ones(3, np.float32) for i in range(2)}
            write_checkpoint(trio / model, {**numbered(number), **extra}, config=CONFIG)
        problem = only(refusals(trio, self.STACK))
        assert problem.what == "layer ranges need exactly one stack of layers"
        assert problem.found == "model.layers (4 layers), vision_tower.layers (2 layers)"

    def test_no_stack(self, tmp_path: Path) -> None:
        models(tmp_path, ["one", "two"], {"x": (3,)})
        assert only(refusals(tmp_path, self.STACK)).found == "none"

    @pytest.mark.parametrize(
        ("config", "found"),
        [
            ({"hidden_size": 4}, 0),
            ({"num_hidden_layers": 5}, 0),
            ({"num_hidden_layers": 4, "n_layer": 4}, 2),
            ({"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}, 2),
        ],
    )
    def test_a_config_that_does_not_say_the_depth(self, config: Any, found: int, trio: Path) -> None:
        (trio / "one" / "config.json").write_text(json.dumps(config))
        problem = only(refusals(trio, self.STACK))
        assert problem.found == f"{found} such keys"
        assert problem.place == str(trio / "one" / "config.json")

    def test_a_nested_config_and_none_at_all(self, trio: Path) -> None:
        (trio / "one" / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 4}}))
        config = plan_of(trio, self.STACK).config
        assert config is not None
        assert config["text_config"] == {"num_hidden_layers": 6}
        (trio / "one" / "config.json").unlink()
        assert plan_of(trio, self.STACK).config is None

    def test_a_layer_that_only_one_model_has(self, trio: Path) -> None:
        made = numbered(3)
        del made["model.layers.2.mlp.weight"]
        write_checkpoint(trio / "two", made, config=CONFIG)
        recipe = """
        merge_method: linear
        parameters: {weight: 1}
        slices:
        - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [2, 4]}]
        """
        problem = only(refusals(trio, recipe))
        assert problem.what.startswith("two lacks 1 tensor")
        assert problem.tensor == "model.layers.2.mlp.weight"


class TestModules:
    MODULES = """
    merge_method: linear
    parameters: {weight: 1}
    modules:
      model.layers: {models: [{model: one}, {model: two}]}
      default: {models: [{model: base}]}
    """

    def test_each_module_has_its_models(self, trio: Path) -> None:
        found = {name: set(array.tolist()) for name, array in arrays_of(trio, self.MODULES).items()}
        assert found["model.layers.1.mlp.weight"] == {2.625}
        assert found["model.norm.weight"] == {1.0}
        assert list(found) == list(SHAPES) or set(found) == set(SHAPES)

    @pytest.mark.parametrize("name", ["model.layers.*", "model.layers"])
    def test_prefixes_and_globs(self, name: str, trio: Path) -> None:
        assert (arrays_of(trio, self.MODULES.replace("model.layers", name))["model.layers.0.attn.weight"] == 2.5).all()

    def test_names_of_parts(self, tmp_path: Path) -> None:
        shapes = {"vision_tower.x": (2,), "multi_modal_projector.x": (2,), "language_model.model.layers.0.x": (2,)}
        models(tmp_path, ["base", "one", "two"], shapes)
        recipe = """
        merge_method: passthrough
        modules:
          vision_tower: {models: [{model: base}]}
          multi_modal_projector: {models: [{model: one}]}
          text_decoder: {models: [{model: two}]}
        """
        found = merged(tmp_path, recipe)
        for name, model in zip(shapes, ("base", "one", "two"), strict=True):
            assert found[name] == tensors(tmp_path / model)[name]

    def test_tensors_in_no_module(self, trio: Path) -> None:
        recipe = self.MODULES.replace("default", "lm_head")
        problem = only(refusals(trio, recipe))
        assert problem.what == "some tensors belong to no module of the recipe"
        assert problem.tensor == "model.embed_tokens.weight, model.norm.weight"

    def test_a_module_without_tensors(self, trio: Path) -> None:
        recipe = self.MODULES.replace("model.layers:", "vision_tower:")
        problem = only(refusals(trio, recipe))
        assert problem.what == "the module `vision_tower` reaches no tensor"
        assert in_recipe(problem, recipe, "vision_tower")

    def test_slices_inside_a_module(self, trio: Path) -> None:
        recipe = """
        merge_method: passthrough
        modules:
          model.layers:
            slices:
            - sources: [{model: one, layer_range: [0, 1]}]
            - sources: [{model: two, layer_range: [0, 1]}]
          default: {models: [{model: base}]}
        """
        found = arrays_of(trio, recipe)
        assert (found["model.layers.1.mlp.weight"] == 3).all()
        assert (found["lm_head.weight"] == 1).all()
        assert json.loads((trio / "out" / "config.json").read_text())["num_hidden_layers"] == 2


class TestFingerprint:
    def test_is_the_same_for_the_same_merge_and_another_for_another(self, trio: Path) -> None:
        same = plan_of(trio, TIES).fingerprint
        assert plan_of(trio, TIES).fingerprint == same
        assert plan_of(trio, "# a comment\n" + TIES, "elsewhere").fingerprint == same
        others = [
            "models.0.parameters.weight=0.51",
            "models.1.parameters.density=0.4",
            "parameters.scope=global",
            "dtype=bfloat16",
            "nonfinite=allow",
            "chat_template='{{ messages }}'",
        ]
        found = {plan_of(trio, TIES, overrides=[other]).fingerprint for other in others}
        assert len(found) == len(others)
        assert same not in found
