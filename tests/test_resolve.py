"""Which value of a parameter reaches which tensor, and what is said about those that reach none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging import INTERPOLATE, TASK, models, plan_of, refusals, scratch

from ggez_merge.errors import Problem, Refused
from ggez_merge.plan import Plan
from ggez_merge.recipe import parse_recipe
from ggez_merge.resolve import gradient_position
from ggez_merge.untrusted import some

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resolve")
    models(made, ["base", "one", "two"], dict.fromkeys(NAMES, (2,)))
    return made


def given_to(plan: Plan, name: str, parameter: str, model: int | None = None) -> object:
    job = next(output.job for output in plan.outputs if output.entry.name == name)
    assert job is not None
    return job.shared[parameter] if model is None else job.models[model][parameter]


def table(plan: Plan, parameter: str, model: int | None = None) -> list[object]:
    return [given_to(plan, name, parameter, model) for name in NAMES]


SCOPES = """
merge_method: ties
base_model: base
modules:
  model.layers:
    parameters: {density: 0.4}
    slices:
    - sources:
      - {model: one, layer_range: [0, 5], PARAMETERS}
      - {model: two, layer_range: [0, 5]}
      SLICE
  default:
    models: [model: one, model: two]
parameters: {weight: 1, density: 0.5}
COMPONENTS
"""


class TestScopes:
    @pytest.mark.parametrize("own", [None, 0.2])
    @pytest.mark.parametrize("slice_", [None, 0.3])
    @pytest.mark.parametrize("component", [None, 0.1])
    def test_the_nearest_wins(
        self, folder: Path, own: float | None, slice_: float | None, component: float | None
    ) -> None:
        recipe = SCOPES.replace("PARAMETERS", f"parameters: {{density: {own}}}" if own else "parameters: {}")
        recipe = recipe.replace("SLICE", f"parameters: {{density: {slice_}}}" if slice_ else "")
        recipe = recipe.replace(
            "COMPONENTS", f'components: {{"*.layers.0.*": {{density: {component}}}}}' if component else ""
        )
        plan = plan_of(folder, recipe)
        first, other, outside = (
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
            "lm_head.weight",
        )
        for model, chain in ((0, (own, slice_, 0.4)), (1, (slice_, 0.4))):
            expected = next(value for value in chain if value)
            assert given_to(plan, other, "density", model) == expected
            assert given_to(plan, first, "density", model) == component or expected
            assert given_to(plan, outside, "density", model) == 0.5

    def test_a_component_of_one_parameter_leaves_the_others(self, folder: Path) -> None:
        recipe = TASK + 'parameters: {lambda: 2}\ncomponents: {"lm_head*": {weight: 0}, "*": {lambda: 3}}'
        plan = plan_of(folder, recipe)
        assert table(plan, "lambda") == [3] * 12 + [2]  # the first component line that matches is the only one
        assert table(plan, "weight", 0) == [0.5] * 12 + [0]
        assert table(plan, "weight", 1) == [0.4] * 12 + [0]
        assert {output.via for output in plan.outputs} == {'components "*"', 'components "lm_head*"'}

    def test_defaults(self, folder: Path) -> None:
        plan = plan_of(folder, TASK.replace("task_arithmetic", "dare_ties"))
        job = plan.outputs[0].job
        assert job is not None
        assert (job.shared["lambda"], job.shared["seed"], job.shared["normalize"], job.shared["rescale"]) == (
            1,
            0,
            0,
            1,
        )
        assert job.models[0]["density"] == 1


class TestFilters:
    RECIPE = """
    merge_method: linear
    base_model: base
    models: [model: one]
    parameters:
      ratio:
      - {filter: self_attn, value: 0.1}
      - {filter: layers.0, value: 0.2}
      - {filter: lm_head, value: 0.3}
      - {value: 0.9}
    """

    def test_the_first_that_is_part_of_the_name_wins(self, folder: Path) -> None:
        layers = [0.1, 0.2] + [0.1, 0.9] * 4
        assert table(plan_of(folder, self.RECIPE), "ratio") == [0.9, *layers, 0.9, 0.3]

    def test_without_a_last_one_the_next_scope_decides(self, folder: Path) -> None:
        recipe = """
        merge_method: task_arithmetic
        base_model: base
        models:
        - {model: one, parameters: {weight: [{filter: mlp, value: 0.7}]}}
        - {model: two}
        parameters: {weight: 0.2}
        """
        plan = plan_of(folder, recipe)
        assert table(plan, "weight", 0) == [0.2] + [0.2, 0.7] * 5 + [0.2, 0.2]
        assert table(plan, "weight", 1) == [0.2] * 13

    def test_one_that_is_hidden_by_others_or_reaches_nothing_is_refused(self, folder: Path) -> None:
        recipe = (
            self.RECIPE.replace("self_attn", "proj.weight").replace("layers.0", "up_proj").replace("lm_head", "vision")
        )
        problems = refusals(folder, recipe)
        assert [(problem.what, str(problem.place).rpartition(":")[2]) for problem in problems] == [
            ("`ratio`: the filter 'up_proj' reaches no tensor", "8"),
            ("`ratio`: the filter 'vision' reaches no tensor", "9"),
        ]

    def test_a_tensor_that_no_filter_reaches_lacks_a_required_parameter(self, folder: Path) -> None:
        recipe = TASK.replace("weight: 0.5", "weight: [{filter: mlp, value: 1}]")
        (problem,) = refusals(folder, recipe)
        assert problem.what == "a required parameter of task_arithmetic is missing: `weight`"
        assert problem.tensor == f"{NAMES[0]}, {NAMES[1]}, {NAMES[3]} and 5 more"


class TestGradients:
    def ratios(self, folder: Path, gradient: list[float]) -> list[object]:
        return table(plan_of(folder, INTERPOLATE, overrides=[f"parameters.ratio={gradient}"]), "ratio")

    def test_linear_between_the_points_over_the_layers(self, folder: Path) -> None:
        layers = [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
        assert self.ratios(folder, [0, 1]) == [0.0, *layers, 1.0, 1.0]
        layers = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
        assert self.ratios(folder, [0, 1, 0]) == [0.0, *layers, 0.0, 0.0]
        assert self.ratios(folder, [0.3]) == [0.3] * 13

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
    def test_as_numpy_interpolates(self, folder: Path, gradient: list[float]) -> None:
        found = self.ratios(folder, gradient)[1:11:2]
        points = np.linspace(0, 1, len(gradient)) if len(gradient) > 1 else [0.0]
        np.testing.assert_allclose(np.array(found, float), np.interp(np.arange(5) / 4, points, gradient), atol=1e-12)

    def test_inside_a_filter(self, folder: Path) -> None:
        value = "[{filter: mlp, value: [0, 1]}, {value: 0.4}]"
        found = table(plan_of(folder, INTERPOLATE, overrides=[f"parameters.ratio={value}"]), "ratio")
        assert found == [0.4, 0.4, 0.0, 0.4, 0.25, 0.4, 0.5, 0.4, 0.75, 0.4, 1.0, 0.4, 0.4]

    def test_restart_in_every_slice(self, folder: Path) -> None:
        with scratch() as here:
            models(here, ["one", "two"], dict.fromkeys(NAMES, (2,)))
            recipe = """
            merge_method: passthrough
            parameters: {scale: [0, 1]}
            slices:
            - sources: [{model: one, layer_range: [0, 3]}]
            - sources: [{model: two, layer_range: [4, 5]}]
            - sources: [{model: two, layer_range: [0, 2]}]
            """
            plan = plan_of(here, recipe)
            found = [given_to(plan, f"model.layers.{i}.mlp.up_proj.weight", "scale", 0) for i in range(6)]
            assert found == [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("name", "position"),
        [
            ("model.layers.0.x", 0.0),
            ("model.layers.3.x", 0.5),
            ("model.layers.6.x", 1.0),
            ("lonely.layers.0.x", 1.0),
            ("elsewhere.layers.3.x", 0.0),
            ("model.embed_tokens.weight", 0.0),
            ("model.norm.weight", 1.0),
            ("lm_head.weight", 1.0),
            ("transformer.ln_f.bias", 1.0),
            ("vision_model.pre_layrnorm.weight", 0.0),
            ("logit_scale", 1.0),
            ("text_projection.weight", 1.0),
            ("vision_model.head.mlp.fc1.weight", 1.0),
            ("vision_tower.vision_model.post_layernorm.weight", 1.0),
            ("multi_modal_projector.mm_soft_emb_norm.weight", 0.0),
            ("model.visual.merger.norm.weight", 0.0),
            ("model.vision_tower.patch_embed.norm.weight", 0.0),
            ("model.language_model.per_layer_projection_norm.weight", 0.0),  # Gemma 3n, of its embeddings by layer
            ("model.embedding_norm.weight", 1.0),  # LFM2's final norm
            ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", 1.0),
            ("conv_in.weight", 0.0),
            ("conv_norm_out.weight", 1.0),
            ("conv_out.weight", 1.0),
            ("model.diffusion_model.final_layer.linear.weight", 1.0),
            ("mid_block.attentions.0.proj_out.weight", 0.0),
            ("x", 0.0),
        ],
    )
    def test_positions(self, name: str, position: float) -> None:
        assert gradient_position(name, {"model.layers": 7, "lonely.layers": 1}) == position


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("method", "parameters", "said"),
        [
            ("ties", "density: 1.5", "`density` of ties must be a number from 0 to 1"),
            ("ties", "density: -0.1", "a number from 0 to 1"),
            ("ties", "density: all", "a number"),
            ("ties", "density: true", "a number"),
            ("ties", "normalize: 1", "true or false"),
            ("ties", "normalize: 'yes'", "true or false"),
            ("ties", "vote: median", "one of sum, count"),
            ("ties", "scope: layer", "one of tensor, global"),
            ("ties", "ties: 3", "one of index, all"),
            ("dare_ties", "seed: 1.5", "a whole number"),
            ("dare_ties", "seed: -1", "a number from 0"),
            ("dare_ties", "seed: true", "a whole number"),
            ("dare_ties", "rescale: 2", "one of exact, l1, true, false"),
            ("task_arithmetic", "lambda: much", "a number"),
            ("task_arithmetic", "weight: [0.5, true]", "gradient"),
        ],
    )
    def test_values(self, method: str, parameters: str, said: str, folder: Path) -> None:
        recipe = f"merge_method: {method}\nbase_model: base\nmodels: [model: one]\nparameters:\n  {parameters}\n"
        recipe += "" if "weight" in parameters else "  weight: 1\n"
        (problem,) = problems_of_reading(recipe) if "gradient" in said else refusals(folder, recipe)
        assert said in f"{problem.what} {problem.expected}"
        assert str(problem.place).endswith(":5")

    @pytest.mark.parametrize(
        ("recipe", "said"),
        [
            ("merge_method: slerp\nbase_model: base\nmodels: [model: one]", "missing: `t`"),
            ("merge_method: ties\nbase_model: base\nmodels: [model: one]", "missing: `weight`"),
            ("merge_method: linear\nmodels: [model: one, model: two]", "needs either `ratio`"),
            (
                "merge_method: linear\nmodels: [model: one, {model: two, parameters: {weight: -1}}]\n"
                "parameters: {weight: 1}",
                "add up to zero",
            ),
        ],
        ids=["t", "weight", "neither", "zero"],
    )
    def test_combinations(self, recipe: str, said: str, folder: Path) -> None:
        (problem,) = refusals(folder, recipe)
        assert said in problem.what
        assert problem.tensor == f"{NAMES[0]}, {NAMES[1]}, {NAMES[2]} and 10 more"

    @pytest.mark.parametrize(
        ("weight", "components"), [("0.5", "{}"), ("[{filter: model, value: 0.5}]", '{"lm_head*": {ratio: 0}}')]
    )
    def test_weights_and_a_ratio_even_of_different_tensors(self, weight: str, components: str, folder: Path) -> None:
        ratio = ", ratio: 0.5" if components == "{}" else ""
        recipe = f"""
        merge_method: linear
        base_model: base
        models: [model: base, model: one]
        parameters: {{weight: {weight}{ratio}}}
        components: {components}
        """
        (problem,) = refusals(folder, recipe)
        assert "contradict each other" in problem.what

    @pytest.mark.parametrize(
        ("where", "key", "remedy"),
        [
            ("parameters", "raito", "did you mean `ratio`?"),
            ("parameters", "zzz", "remove it"),
            ("parameters", "t", "remove it"),
        ],
    )
    def test_unknown_parameters(self, where: str, key: str, remedy: str, folder: Path) -> None:
        problems = refusals(folder, INTERPOLATE, [f"{where}.{key}=1"])
        assert [problem.what for problem in problems] == [f"linear takes no parameter `{key}`"]
        assert str(problems[0].remedy).startswith(remedy)

    def test_a_parameter_of_the_whole_merge_given_to_one_model(self, folder: Path) -> None:
        (problem,) = refusals(folder, TASK, ["models.1.parameters.lambda=2"])
        assert problem.what == "`lambda` is a parameter of the whole merge, not of one model"
        assert "models.1.parameters.lambda" in str(problem.place)

    def test_component_lines_that_reach_nothing_or_are_hidden(self, folder: Path) -> None:
        recipe = """
        merge_method: linear
        base_model: base
        models: [model: one]
        parameters: {ratio: 1}
        components:
          "*.mlp.*": {ratio: 0}
          "*.vision.*": {ratio: 0}
          "*.mlp.up*": {ratio: 0}
        """
        problems = refusals(folder, recipe)
        assert [str(problem.place).rpartition(":")[2] for problem in problems] == ["8", "9"]
        assert all("reaches no tensor" in problem.what for problem in problems)


def problems_of_reading(recipe: str) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        parse_recipe(recipe)
    return caught.value.problems


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more"), ([], "")],
)
def test_some(names: list[str], shown: str) -> None:
    assert some(names) == shown
