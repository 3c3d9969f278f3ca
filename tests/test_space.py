"""The candidates of a sweep, and the recipe of each."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.recipe import Recipe, load_recipe, parse_recipe
from ggez_merge.sweep.candidate import Candidate
from ggez_merge.sweep.space import DEFAULT_RATIOS, candidate_recipe, candidates, read_space, refine

RECIPES = Path(__file__).parents[1] / "recipes"

LINEAR = "merge_method: linear\nbase_model: ./global\nmodels: [{model: ./sea}]\nparameters: {ratio: 0.3}\n"
TIES = """\
merge_method: ties
base_model: ./global
models:
  - model: ./sea
    parameters: {weight: 0.3}
  - model: ./latam
    parameters: {weight: 0.2}
parameters: {density: 0.5, lambda: 1.0}
"""
CHAIN = """\
name: regions
merge_method: linear
models: [{model: ./sea, parameters: {weight: 1}}, {model: ./latam, parameters: {weight: 1}}]
---
merge_method: linear
base_model: ./global
models: [{model: regions}]
parameters: {ratio: 0.3}
"""


def recipe(sweep: str = "", text: str = LINEAR) -> Recipe:
    return parse_recipe(text + (f"sweep: {sweep}\n" if sweep else ""))


def swept(sweep: str, text: str = LINEAR) -> list[dict[str, float]]:
    """The values of what is merged, in order."""
    space = read_space(recipe(sweep, text))
    return [dict(each.values) for each in candidates(space) if each.role == "candidate"]


def problems_of(sweep: str, text: str = LINEAR) -> list[str]:
    with pytest.raises(Refused) as refused:
        read_space(recipe(sweep, text))
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize("sweep", ["", "{}", "{mode: grid, refine: 2}"])
def test_the_default_is_a_grid_over_the_ratio(sweep: str) -> None:
    space = read_space(recipe(sweep))
    assert space.axes == {"ratio": DEFAULT_RATIOS}
    assert [each.values["ratio"] for each in candidates(space)] == [0, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    assert [each.role for each in candidates(space)] == ["base", *["candidate"] * 5, "regional"]
    assert [candidates(space)[i].model for i in (0, -1)] == ["./global", "./sea"]


def test_the_default_of_the_ready_recipes_of_the_paper() -> None:
    for name in ("gemma3_27b", "sdxl_unet", "siglip2_so400m", "linear"):
        assert len(candidates(read_space(load_recipe(RECIPES / f"{name}.yaml")))) == 7


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ('"0:1:0.1"', [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0.1:0.4:0.1", [0.1, 0.2, 0.3, 0.4]),
        ("0:1:.3", [0, 0.3, 0.6, 0.9]),
        ("[0.5, 0:0.2:0.1, 0.1, 0.50]", [0.5, 0, 0.1, 0.2]),
        ("0.3", [0.3]),
        ("-1:1:1", [-1, 0, 1]),
        ("[1e-3, '1e-3:2e-3:5e-4']", [0.001, 0.0015, 0.002]),
        ("0.7:0.7:1", [0.7]),
        ("[-0.0, 0]", [0]),
    ],
)
def test_lists_ranges_and_single_values(written: str, values: list[float]) -> None:
    space = read_space(recipe(f"{{ratio: {written}}}"))
    assert list(map(str, space.axes["ratio"])) == [str(float(value)) for value in values]  # no -0.0
    merged = [each.values["ratio"] for each in candidates(space)]
    assert merged == [0, *(value for value in values if value not in (0, 1)), 1]  # the ends, whether listed or not


@given(st.integers(-300, 300), st.integers(0, 200), st.integers(1, 50))
def test_ranges_are_decimal(start: int, steps: int, step: int) -> None:
    """In hundredths: each value is the float that its decimal text stands for."""
    stop = start + steps * step
    values = read_space(recipe(f'{{ratio: "{start / 100}:{stop / 100}:{step / 100}"}}')).axes["ratio"]
    assert list(values) == [float(f"{(start + k * step) / 100:.2f}") for k in range(steps + 1)]


def test_grid_and_zip() -> None:
    axes = {"density": [0.2, 0.5, 0.9], "models.0.parameters.weight": [0.1, 0.3, 0.4]}
    grid = [dict(zip(axes, point, strict=True)) for point in product(*axes.values())]
    side_by_side = [dict(zip(axes, point, strict=True)) for point in zip(*axes.values(), strict=True)]
    written = ", ".join(f"{path}: {values}" for path, values in axes.items())
    assert swept(f"{{{written}}}", TIES) == grid
    assert swept(f"{{{written}, mode: zip}}", TIES) == side_by_side


def test_the_ends_are_there_even_where_no_value_stands_for_them() -> None:
    everyone = candidates(read_space(recipe("{density: [0.2, 1]}", TIES)))
    assert everyone[0] == Candidate({}, "base", "./global")
    assert everyone[-2:] == [Candidate({}, "regional", "./sea"), Candidate({}, "regional", "./latam")]
    # one ratio of two does not make ratio 0 the base
    for sweep in ("{ratio: [0, 1], components.vision_tower.ratio: 0.5}", "{components.vision_tower.ratio: [0, 1]}"):
        both = candidates(read_space(recipe(sweep)))
        assert [(each.role, bool(each.values)) for each in both] == [
            ("base", False),
            ("candidate", True),
            ("candidate", True),
            ("regional", False),
        ]
    partly = LINEAR + "components: {norms: {ratio: 0}}\n"
    assert candidates(read_space(recipe("{ratio: [0, 1]}", partly)))[0] == Candidate({}, "base", "./global")


def test_a_chain_ends_in_the_models_of_its_stages() -> None:
    everyone = candidates(read_space(recipe("{ratio: 0.1, 'regions:models.0.parameters.weight': [1, 2]}", CHAIN)))
    assert [str(each) for each in everyone if each.role != "candidate"] == [
        "base ./global",
        "regional ./sea",
        "regional ./latam",
    ]
    merged = candidate_recipe(recipe("", CHAIN), everyone[2])
    assert merged.parameters == {"ratio": 0.1}
    assert merged.stages[0].modules[0].slices[0].sources[0].parameters == {"weight": 2}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("ratio", lambda r: r.parameters["ratio"]),
        ("parameters.ratio", lambda r: r.parameters["ratio"]),
        ("components.vision_tower.ratio", lambda r: r.components["vision_tower"]["ratio"]),
        ('components."*.logit_scale".ratio', lambda r: r.components["*.logit_scale"]["ratio"]),
    ],
)
@given(value=st.floats(-1e3, 1e3))
def test_a_candidates_recipe_is_the_recipe_with_that_value(path: str, found: object, value: float) -> None:
    whole = recipe(f"{{'{path}': {value!r}}}")
    candidate = next(each for each in candidates(read_space(whole)) if each.values.get(path) == value)
    made = candidate_recipe(whole, candidate)
    assert found(made) == value  # type: ignore[operator]
    assert made.base_model == whole.base_model and made.modules == whole.modules
    assert "ratio" in made.text and parse_recipe(made.text).parameters == made.parameters


def test_overrides_given_to_the_sweep_are_in_every_candidate() -> None:
    whole = parse_recipe(LINEAR, overrides=["dtype=float32", "sweep.ratio=[0.2]"])
    (merged,) = (each for each in candidates(read_space(whole)) if each.role == "candidate")
    made = candidate_recipe(whole, merged)
    assert (made.dtype, made.parameters) == ("F32", {"ratio": 0.2})


def test_an_axis_never_shares_its_name_with_a_column_of_scores() -> None:
    text = "merge_method: passthrough\nbase_model: ./global\nmodels: [{model: ./sea}]\n"
    space = read_space(recipe("{scale: [0.5, 1]}", text))
    assert [*space.axes] == ["parameters.scale"]
    assert candidate_recipe(recipe("", text), candidates(space)[1]).parameters == {"scale": 0.5}


def test_refining_halves_the_distances_around_the_best() -> None:
    space = read_space(recipe("{ratio: [0, 0.1, 0.25, 1], refine: 3}"))
    tried = candidates(space)
    best = next(each for each in tried if each.values["ratio"] == 0.1)
    second = refine(space, tried, best)
    assert [each.values for each in second] == [{"ratio": 0.05}, {"ratio": 0.175}]
    assert [each.role for each in second] == ["candidate"] * 2
    third = refine(space, [*tried, *second], second[1])
    assert [each.values for each in third] == [{"ratio": 0.1375}, {"ratio": 0.2125}]
    assert refine(space, [*tried, *second, *third], second[1]) == [
        Candidate({"ratio": 0.15625}),
        Candidate({"ratio": 0.19375}),
    ]
    assert [each.values for each in refine(space, tried, tried[-1])] == [{"ratio": 0.625}]  # an end has one neighbour
    assert refine(space, tried, Candidate({}, "base")) == []


def test_refining_a_grid_moves_along_each_axis_and_zip_along_all() -> None:
    grid = read_space(recipe("{density: [0.2, 0.6], lambda: [0.5, 1, 1.5]}", TIES))
    best = Candidate({"density": 0.6, "lambda": 1.0})
    assert [each.values for each in refine(grid, candidates(grid), best)] == [
        {"density": 0.4, "lambda": 1.0},
        {"density": 0.6, "lambda": 0.75},
        {"density": 0.6, "lambda": 1.25},
    ]
    tied = read_space(recipe("{density: [0.2, 0.6, 1], lambda: [2, 1, 0], mode: zip}", TIES))
    assert [each.values for each in refine(tied, candidates(tied), best)] == [
        {"density": 0.4, "lambda": 1.5},
        {"density": 0.8, "lambda": 0.5},
    ]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True), st.data())
def test_rounds_find_new_values_between_the_neighbours(hundredths: list[int], data: st.DataObject) -> None:
    space = read_space(recipe(f"{{ratio: {[each / 100 for each in hundredths]}}}"))
    tried = candidates(space)
    for _ in range(4):
        best = data.draw(st.sampled_from(tried))
        values = sorted(each.values["ratio"] for each in tried)
        at = values.index(best.values["ratio"])
        new = refine(space, tried, best)
        around = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False) if values[at] in (a, b)]
        assert [each.values["ratio"] for each in new] == pytest.approx(around)
        tried += new


def test_refining_stays_within_the_limit_and_leaves_seeds_alone() -> None:
    space = read_space(recipe("{ratio: [0, 0.5, 1], limit: 4}"))
    assert len(refine(space, candidates(space), candidates(space)[1])) == 1
    dare = TIES.replace("ties", "dare_ties")
    seeds = read_space(recipe("{seed: [1, 2, 3]}", dare))
    assert seeds.whole == {"seed"}
    assert refine(seeds, candidates(seeds), candidates(seeds)[2]) == []
    assert candidate_recipe(recipe("", dare), candidates(seeds)[2]).parameters["seed"] == 2


@pytest.mark.parametrize(
    ("sweep", "text", "said"),
    [
        ("{ratoi: [0.1]}", LINEAR, "did you mean `ratio`?"),
        ("{'lakes:ratio': [0.1]}", CHAIN, "linear takes no parameter `lakes:ratio`"),
        ("{refin: 3}", LINEAR, "did you mean `refine`?"),
        ("{density: [0.1]}", LINEAR, "linear takes no parameter `density`"),
        ("{normalize: [0, 1]}", LINEAR, "a sweep varies numbers"),
        ("{vote: [0, 1]}", TIES, "a sweep varies numbers"),
        ("{dtype.x: [0.1]}", LINEAR, "is not the path of a parameter"),
        ("{components.vision_tower: [0.1]}", LINEAR, "is not the path of a parameter"),
        ("{base_model.parameters.ratio: [0.1]}", LINEAR, "is not the path of a parameter"),
        ("{'a..b': [0.1]}", LINEAR, "is not the path of a parameter"),
        ("{models.2.parameters.weight: [0.1]}", TIES, "`models` has no element 2"),
        ("{models.0.parameters.lambda: [0.1]}", TIES, "is a parameter of the whole merge"),
        ("{weight: [0.1]}", TIES, "has no effect: every model has a `weight` of its own"),
        ("{ratio: []}", LINEAR, "`ratio` has no values"),
        ("{ratio: [0.1, much]}", LINEAR, "this is not a value of a sweep"),
        ("{ratio: [true]}", LINEAR, "this is not a value of a sweep"),
        ("{ratio: .nan}", LINEAR, "this is not a value of a sweep"),
        ("{ratio: {a: 1}}", LINEAR, "this is not a value of a sweep"),
        ("{ratio: null}", LINEAR, "this is not a value of a sweep"),
        ("{ratio: '1:0:0.1'}", LINEAR, "this range is empty"),
        ("{ratio: '0:1:0'}", LINEAR, "this range is empty"),
        ("{ratio: '0:1:0.0001'}", LINEAR, "too many values"),
        ("{ratio: '0:1:1e-300'}", LINEAR, "too many values"),
        ("{density: [0.5, 1.5]}", TIES, "`density` must be a number from 0 to 1"),
        ("{seed: [0.5]}", TIES.replace("ties", "dare_ties"), "`seed` must be a whole number"),
        ("{ratio: [0.1], parameters.ratio: [0.2]}", LINEAR, "are the same parameter"),
        ("{density: [0.1, 0.2], lambda: [1], mode: zip}", TIES, "equally many values"),
        ("{mode: gird}", LINEAR, "did you mean `grid`"),
        ("{refine: -1}", LINEAR, "`refine` must be a whole number"),
        ("{limit: 0}", LINEAR, "`limit` must be a whole number"),
        ("{density: '0:1:0.02', lambda: '0:1:0.02'}", TIES, "the sweep has 2,601 candidates"),
        ("{ratio: [0.1, 0.2], limit: 1}", LINEAR, "allow more: `limit: 2`"),
        ("", TIES, "does not say what to sweep"),
        ("", LINEAR.replace("parameters: {ratio: 0.3}", "parameters: {weight: 0.3}"), "does not say what to sweep"),
        ("{weight: [1]}", "merge_method: linear\nmodels: [{model: ./sea}]\n", "a sweep needs a base"),
        ("{ratio: [1]}", LINEAR.replace("linear", "linaer"), "there is no such merge method"),
    ],
)
def test_what_a_sweep_must_not_say(sweep: str, text: str, said: str) -> None:
    (problem,) = problems_of(sweep, text)
    assert said in problem


def test_everything_is_found_at_once_by_line() -> None:
    sweep = "\n  ratio: [0.1,\n    x]\n  wieght: [1]\n  mode: gird\n  refine: 1.5"
    found = problems_of(sweep)
    assert len(found) == 4
    assert [any(f"recipe:{line}" in problem for problem in found) for line in (7, 8, 9, 10)] == [True] * 4


def test_a_higher_limit_allows_more() -> None:
    assert len(swept("{density: '0:1:0.02', lambda: '0:1:0.02', limit: 2601}", TIES)) == 51 * 51
