"""Recipes: what each key becomes, and what each mistake is answered with."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.errors import Refused
from ggez_merge.recipe import (
    Filtered,
    ModelReference,
    Output,
    Recipe,
    Source,
    load_recipe,
    parse_recipe,
    resolve_path,
)
from ggez_merge.tokenizer import Tokenizer

# Recipes as people write them for mergekit, one per form of the dialect.
LINEAR = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2@main
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""
TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
PASSTHROUGH = """\
slices:
  - sources:
    - model: mistralai/Mistral-7B-v0.1
      layer_range: [0, 24]
  - sources:
    - model: mistralai/Mistral-7B-v0.1
      layer_range: [8, 32]
      parameters: {scale: {filter: o_proj, value: 0}}
merge_method: passthrough
dtype: bfloat16
"""
MODULES = """\
merge_method: task_arithmetic
base_model: {model: {path: Qwen/Qwen2.5-VL-3B-Instruct, revision: main}}
modules:
  text_decoder:
    slices:
      - sources:
          - model: Qwen/Qwen2.5-VL-3B-Instruct
            layer_range: [0, 36]
          - model: a/tuned
            layer_range: [0, 36]
        base_model: a/other
        parameters: {lambda: 2}
    parameters: {weight: 0.5}
  vision_tower:
    models:
      - model: a/tuned
        parameters: {weight: 0}
out_dtype: torch.bfloat16
tokenizer_source: base
chat_template: auto
"""
FROM_MERGEKIT = {
    "linear": LINEAR,
    "ties": TIES,
    "slerp": SLERP,
    "passthrough": PASSTHROUGH,
    "modules": MODULES,
}

OURS = """\
merge_method: linear
base_model: ./global
models:
  - model: ./tuned
parameters: {ratio: 0.75}
components:
  vision_tower.*: {ratio: 0.5}
  "*.logit_scale": {ratio: 0}
dtype: float32
out_dtype: float64
nonfinite: allow
missing: copy
buffers: base
output: {path: ./merged, shard_size: 500MiB}
sweep: {ratio: [0, 0.5, 1]}
evaluate: {anything: [at, {all: 1}]}
select: {rule: max_grp, alpha: kof:SEA@2023}
"""
SHORT = "merge_method: linear\nmodels:\n  - model: a/b\n"


def sources(recipe: Recipe) -> list[Source]:
    return [source for module in recipe.modules for piece in module.slices for source in piece.sources]


def refusals(text: str, *overrides: str, path: Path | None = Path("recipe.yaml")) -> list[tuple[str, str]]:
    """(place, everything said) of each problem."""
    with pytest.raises(Refused) as caught:
        parse_recipe(text, path, overrides)
    return [(str(problem.place), str(problem)) for problem in caught.value.problems]


# What the keys become.


def test_linear() -> None:
    recipe = parse_recipe(LINEAR)
    assert recipe.merge_method == "linear"
    assert recipe.dtype == "F16"
    assert recipe.base_model is None
    (module,) = recipe.modules
    assert (module.name, module.where) == (None, ("models",))
    (piece,) = module.slices
    assert (piece.base_model, piece.where) == (None, ("models",))
    first, second = piece.sources
    assert first == Source(ModelReference("psmathur/orca_mini_v3_13b"), None, {"weight": 1.0}, ("models", 0))
    assert second.model == ModelReference("WizardLM/WizardLM-13B-V1.2", "main")
    assert str(second.model) == "WizardLM/WizardLM-13B-V1.2@main"


def test_gradients_filters_and_flags() -> None:
    recipe = parse_recipe(TIES)
    first, second, third = sources(recipe)
    assert first.parameters == {"density": [1.0, 0.7, 0.1], "weight": 1.0}
    assert second.parameters["weight"] == [0.0, 0.3, 0.7, 1.0]
    assert third.parameters["weight"] == [Filtered("mlp", 0.5), Filtered(None, 0)]
    assert recipe.parameters == {"normalize": True, "int8_mask": True}
    assert recipe.parameters["normalize"] is True


def test_slices() -> None:
    recipe = parse_recipe(SLERP)
    assert [source.layer_range for source in sources(recipe)] == [(0, 40), (0, 40)]
    assert [source.where for source in sources(recipe)] == [
        ("slices", 0, "sources", 0),
        ("slices", 0, "sources", 1),
    ]
    assert recipe.modules[0].where == ("slices",)
    assert recipe.modules[0].slices[0].where == ("slices", 0)
    assert recipe.parameters["t"] == [
        Filtered("self_attn", [0, 0.5, 0.3, 0.7, 1]),
        Filtered("mlp", [1, 0.5, 0.7, 0.3, 0]),
        Filtered(None, 0.5),
    ]


def test_stacked_slices_and_a_single_filter() -> None:
    recipe = parse_recipe(PASSTHROUGH)
    assert [piece.where for piece in recipe.modules[0].slices] == [("slices", 0), ("slices", 1)]
    assert sources(recipe)[1].parameters == {"scale": [Filtered("o_proj", 0)]}
    assert sources(recipe)[1].layer_range == (8, 32)


def test_modules() -> None:
    recipe = parse_recipe(MODULES)
    text, vision = recipe.modules
    assert recipe.base_model == ModelReference("Qwen/Qwen2.5-VL-3B-Instruct", "main")
    assert (text.name, text.where, text.parameters) == (
        "text_decoder",
        ("modules", "text_decoder"),
        {"weight": 0.5},
    )
    assert text.slices[0].base_model == ModelReference("a/other")
    assert text.slices[0].parameters == {"lambda": 2}
    assert text.slices[0].where == ("modules", "text_decoder", "slices", 0)
    assert vision.slices[0].where == ("modules", "vision_tower", "models")
    assert vision.slices[0].sources[0].where == ("modules", "vision_tower", "models", 0)
    assert (recipe.dtype, recipe.out_dtype) == (None, "BF16")
    assert (recipe.tokenizer, recipe.chat_template) == (Tokenizer("base", ("tokenizer_source",)), "auto")


def test_our_keys() -> None:
    recipe = parse_recipe(OURS)
    assert recipe.components == {"vision_tower.*": {"ratio": 0.5}, "*.logit_scale": {"ratio": 0}}
    assert list(recipe.components) == ["vision_tower.*", "*.logit_scale"]
    assert (recipe.dtype, recipe.out_dtype) == ("F32", "F64")
    assert (recipe.nonfinite, recipe.missing, recipe.buffers) == ("allow", "copy", "base")
    assert recipe.output == Output("./merged", 500 * 2**20)
    assert recipe.text == OURS


def test_defaults() -> None:
    recipe = parse_recipe(SHORT + "base_model:\nparameters:\noutput:\n")
    assert (recipe.nonfinite, recipe.missing, recipe.buffers) == ("error", "error", "error")
    assert recipe.output == Output(None, 5_000_000_000)
    assert (recipe.parameters, recipe.components) == ({}, {})
    assert recipe.dtype is recipe.out_dtype is recipe.tokenizer is recipe.chat_template is None
    assert (recipe.base_model, recipe.path) == (None, None)


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("500 MiB", 500 * 2**20),
        ("1.5gb", 15 * 10**8),
        ("2kB", 2000),
        ("1TiB", 2**40),
        ("5000B", 5000),
        ("4000", 4000),
    ],
)
def test_shard_size(written: str, size_bytes: int) -> None:
    assert parse_recipe(SHORT + f"output: {{shard_size: {written}}}").output.shard_size_bytes == size_bytes


@pytest.mark.parametrize("name", FROM_MERGEKIT)
def test_the_examples_are_valid_in_mergekit_too(name: str) -> None:
    config = pytest.importorskip("mergekit.config")
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(FROM_MERGEKIT[name]))
    ours = parse_recipe(FROM_MERGEKIT[name])
    models = {str(source.model) for source in sources(ours)}
    models |= {str(ours.base_model)} - {"None"}
    assert {str(model) for model in theirs.referenced_models()} == models


def test_model_paths_that_hold_at_and_plus(tmp_path: Path) -> None:
    for name in ("qwen2+de@v1", "plain"):
        (tmp_path / name).mkdir()
    path = tmp_path / "recipe.yaml"

    def read(model: str) -> ModelReference:
        return sources(parse_recipe(f"merge_method: x\nmodels: [{{model: {model}}}]", path))[0].model

    assert read("qwen2+de@v1") == ModelReference("qwen2+de@v1")
    assert read("qwen2+de@v1@main") == ModelReference("qwen2+de@v1", "main")
    assert read("plain@main") == ModelReference("plain", "main")
    assert read("hub/a@b@c") == ModelReference("hub/a@b", "c")
    assert read("{model: hub/a@b}") == ModelReference("hub/a", "b")
    assert read("{model: {path: no/such+a@b}}") == ModelReference("no/such+a@b")


def test_paths_are_looked_for_beside_the_recipe_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside" / "both").mkdir(parents=True)
    (tmp_path / "here" / "both").mkdir(parents=True)
    (tmp_path / "here" / "only").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "beside" / "recipe.yaml"
    assert resolve_path("both", recipe) == tmp_path / "beside" / "both"
    assert resolve_path("only", recipe) == Path("only")
    assert resolve_path(str(tmp_path), recipe) == tmp_path
    assert resolve_path("neither", recipe) is None


def test_variables_and_home_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/data/models")
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "merge_method: x\nbase_model: $MODELS/base\nmodels:\n- model: ${MODELS}x/a@v1\n- {model: ~/b}\n"
        "output: {path: ~/$MODELS}\ntokenizer_source: $MODELS/base\nchat_template: $MODELS"
    )
    recipe = parse_recipe(text)
    assert recipe.base_model == ModelReference("/data/models/base")
    assert [str(source.model) for source in sources(recipe)] == ["/data/modelsx/a@v1", "/home/me/b"]
    assert recipe.output.path == "/home/me//data/models"
    assert recipe.tokenizer == Tokenizer("/data/models/base", ("tokenizer_source",))
    assert recipe.chat_template == "$MODELS"
    assert recipe.text == text


def test_lines_and_places() -> None:
    recipe = parse_recipe(TIES, Path("r/ties.yaml"))
    assert recipe.line("models", 2, "parameters", "weight", 1) == 16
    assert recipe.line("models", 2, "parameters", "weight", 0, "value") == 15
    assert recipe.line("models", 1) == 6
    assert recipe.line("base_model") == 18
    assert recipe.line("models", 1, "parameters", "no such key") == 7
    assert recipe.line("no such key") is None
    assert recipe.line() is None
    assert recipe.place("base_model") == "r/ties.yaml:18"
    assert recipe.place() == "r/ties.yaml"
    assert parse_recipe(TIES).place("base_model") == "recipe:18"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + LINEAR.encode())
    assert load_recipe(path).path == path
    assert load_recipe(path).text == LINEAR
    assert load_recipe(path, ["dtype=float32"]).dtype == "F32"
    with pytest.raises(Refused, match=r"cannot be read.*\n.*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(Refused, match="cannot be read"):
        load_recipe(tmp_path)
    path.write_bytes(LINEAR.encode() + b"\n# caf\xe9")
    with pytest.raises(Refused, match=r"not UTF-8.*\n.*recipe\.yaml:11\n.*0xe9"):
        load_recipe(path)
    path.write_bytes(LINEAR.encode() + b"#" * (1 << 20))
    with pytest.raises(Refused, match="too big"):
        load_recipe(path)


# What is refused.

SLICE = "merge_method: x\nslices:\n- sources:\n  - model: a\n    layer_range: "
VALUE = SHORT + "parameters:\n  weight: "


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        # keys
        (SHORT + "dtyp: float32", 4, "did you mean `dtype`"),
        (SHORT + "    wieght: 1", 4, "put it under `parameters`"),
        (SHORT + "    parametrs: {weight: 1}", 4, "did you mean `parameters`?"),
        (SHORT + "weight: 1", 4, "put it under `parameters`"),
        (SHORT + "output:\n  shardsize: 5GB", 5, "did you mean `shard_size`?"),
        (SHORT + "name: x y", 4, "the name of a document"),
        (SHORT + "tokenizer: {sauce: union}", 4, "did you mean `source`?"),
        (SHORT + "tokenizer: {source: base}\ntokenizer_source: base", 5, "exactly one of"),
        (SHORT + "tokenizer: {pad_to_multiple_of: 0}", 4, "no number of rows"),
        (SHORT + "tokenizer: {pad_to_multiple_of: true}", 4, "no number of rows"),
        (SHORT + "tokenizer: {tokens: {x: {force: 1}}}", 4, "true or false"),
        (SHORT + "tokenizer: {tokens: {x: {source: {kind: one}}}}", 4, "`kind` must be one of"),
        (SHORT + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}", 4, "`model` is not a key here"),
        (SHORT + "tokenizer: {tokens: {x: {source: {model: a}}}}", 4, "exactly one of"),
        (SHORT + "tokenizer: {tokens: {x: {source: {model: a, token_id: x}}}}", 4, "does not name a token"),
        (SHORT + "tokenizer: {tokens: {x: {source: {token_id: 3}}}}", 4, "`model` is missing"),
        (SHORT + "    layer_range: [0, 4]", 4, "use `slices`"),
        (SLICE + "[0, 1]\n  residual_weight: 1", 6, "does nothing"),
        (SHORT + "base_model:\n  model: {path: a}\n  lora: b\n  adapter: c", 6, "the same thing"),
        (SHORT + "base_model:\n  adapter: {path: b, revison: c}", 5, "did you mean `revision`?"),
        (SHORT + "base_model:\n  revision: c", 5, "is not a key here"),
        (SHORT + "base_model:\n  model: a\n  override_architecture: b", 6, "remove it"),
        (SHORT + "base_model:\n  model:\n    path: a\n    rev: b", 7, "`revision`"),
        # structure
        (SHORT + "slices:\n- sources: [{model: a, layer_range: [0, 1]}]", 4, "exactly one"),
        ("merge_method: x\nmodels: a", 2, "list of at least one"),
        ("merge_method: x\nmodels: []", 2, "list of at least one"),
        ("merge_method: x\nmodels:\n- a/b", 3, "must be a mapping"),
        ("merge_method: x\nmodels:\n- parameters: {weight: 1}", 3, "`model` is missing"),
        ("merge_method: x\nslices:\n- sources:\n  - model: a", 4, "`layer_range` is missing"),
        ("merge_method: x\nslices:\n- parameters: {weight: 1}", 3, "`sources` is missing"),
        ("merge_method: x\nmodules:\n  a: {parameters: {t: 1}}", 3, "exactly one"),
        ("merge_method: x\nmodules:\n  a:", 3, "must be a mapping"),
        ("merge_method: x\nmodules: [a]", 2, "must be a mapping"),
        (SHORT + "sweep: 1", 4, "must be a mapping"),
        (SHORT + "parameters: 1", 4, "must be a mapping"),
        (SHORT + "components: [a]", 4, "must be a mapping"),
        (SHORT + "components:\n  vision:", 5, "must be a mapping"),
        (SHORT + "components:\n  vision: 0.5", 5, "must be a mapping"),
        # leaves
        (SLICE + "[1, 1]", 5, "range of layers"),
        (SLICE + "[-1, 1]", 5, "range of layers"),
        (SLICE + "[0, 1, 2]", 5, "range of layers"),
        (SLICE + "[0, 1.5]", 5, "range of layers"),
        (SLICE + "[no, 1]", 5, "range of layers"),
        (SLICE + "4", 5, "range of layers"),
        (SHORT + "dtype: int64", 4, "integers cannot hold"),
        (SHORT + "dtype: bf16", 4, "did you mean `bfloat16`?"),
        (SHORT + "out_dtype: 16", 4, "must be one of"),
        (SHORT + "nonfinite: alow", 4, "did you mean `allow`?"),
        (SHORT + "missing: yes", 4, "must be one of"),
        (SHORT + "buffers: [base]", 4, "must be one of"),
        (SHORT + "base_model: 12", 4, "put it in quotes"),
        (SHORT + "base_model: [a]", 4, "must be text"),
        (SHORT + "base_model: a/b+", 4, "does not name a model"),
        (SHORT + "base_model: a/b+@c", 4, "does not name a model"),
        (SHORT + "base_model: a/b@", 4, "path[@revision]"),
        (SHORT + "base_model: '@v1'", 4, "path[@revision]"),
        (SHORT + "base_model: $GGEZ_UNSET/a", 4, "`GGEZ_UNSET` is not set"),
        (SHORT + "output: {path: a}\ntokenizer_source: '${GGEZ_UNSET}'", 5, "`GGEZ_UNSET` is not set"),
        (SHORT + "output:\n  path: $GGEZ_UNSET", 5, "`GGEZ_UNSET` is not set"),
        (SHORT + "tokenizer_source: {model: a}", 4, "must be text"),
        (SHORT + "chat_template: ''", 4, "must be text"),
        (SHORT + "output: ./merged", 4, "must be a mapping"),
        (SHORT + "output:\n  shard_size: 5 apples", 5, "shard size"),
        (SHORT + "output:\n  shard_size: 999", 5, "shard size"),
        (SHORT + "output:\n  shard_size: -5GB", 5, "shard size"),
        (SHORT + "output:\n  shard_size: 5.5", 5, "shard size"),
        (SHORT + "output:\n  shard_size: yes", 5, "shard size"),
        # values of parameters
        (VALUE, 5, "no usable value"),
        (VALUE + ".nan", 5, "no usable value"),
        (VALUE + "-.inf", 5, "no usable value"),
        (VALUE + "1e999", 5, "no usable value"),
        (VALUE + "[]", 5, "list of at least one finite number"),
        (VALUE + "[1, .inf]", 5, "list of at least one finite number"),
        (VALUE + "[1, yes]", 5, "list of at least one finite number"),
        (VALUE + "[1, a]", 5, "list of at least one finite number"),
        (VALUE + "[1, [2]]", 5, "list of at least one finite number"),
        (VALUE + "[{filter: a, value: 1}, 2]", 5, "mixes plain values and filters"),
        (VALUE + "\n  - value: 1\n  - {filter: a, value: 2}", 7, "never reached"),
        (VALUE + "\n  - {filter: a, value: 1}\n  - {filter: ab, value: 2}", 7, "never reached"),
        (VALUE + "\n  - {filter: '*', value: 1}\n  - {value: 2}", 7, "never reached"),
        (VALUE + "\n  - filter: a\n    valeu: 1", 7, "did you mean `value`?"),
        (VALUE + "\n  - filter: a", 6, "`value` is missing"),
        (VALUE + "\n  - filter: 3\n    value: 1", 6, "must be text"),
        (VALUE + "\n  - value: {filter: a, value: 1}", 6, "no usable value"),
        (VALUE + "\n  - value: [{filter: a, value: 1}]", 6, "list of at least one finite number"),
        (SHORT + "components:\n  a:\n    ratio: []", 6, "list of at least one finite number"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, line: int, said: str) -> None:
    matching = [told for place, told in refusals(text) if place == f"recipe.yaml:{line}" and said in told]
    assert len(matching) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{model: a}]", "`merge_method` is missing"),
        ("merge_method: x", "exactly one"),
        ("merge_method: x\nmodels:", "exactly one"),
    ],
)
def test_what_is_missing_on_top_has_no_line(text: str, said: str) -> None:
    ((place, told),) = refusals(text)
    assert place == "recipe.yaml"
    assert said in told


def test_a_control_character_never_reaches_a_terminal() -> None:
    for text in ('"\\e[31m": 1', 'merge_method: "\\e]0;"', '"a\\nb": 1', '? !x "\\x9b"\n: 1'):
        for _, told in refusals(text):
            assert all(line.isprintable() for line in told.splitlines())


def test_all_problems_are_told_at_once() -> None:
    places = [place for place, _ in refusals(
        "merge_metod: x\nmodels:\n- model: a\n  wieght: 1\n- {}\ndtype: bf16\ndtype: float16\non: 1\n"
        "parameters:\n  a: .nan\n  b: []\noutput: {shard_size: x, path: $GGEZ_UNSET}",
        "models.5.model=x",
    )]  # fmt: skip
    assert sorted(places) == sorted(
        [f"recipe.yaml:{line}" for line in (1, 4, 5, 6, 7, 8, 10, 11, 12, 12)]
        + ["recipe.yaml", "--set models.5.model=x"]
    )


# Overrides.


def test_overrides() -> None:
    recipe = parse_recipe(
        OURS,
        Path("recipe.yaml"),
        [
            "parameters.ratio=0.4",
            "parameters.extra=1e-5",
            "models.0.parameters.weight=[0, 1]",
            "output.path=./x=y",
            'components."*.logit_scale".ratio=1',
            "components.'a.b'.ratio=2",
            "dtype=",
            "missing=error",
        ],
    )
    assert recipe.parameters == {"ratio": 0.4, "extra": 1e-5}
    assert sources(recipe)[0].parameters == {"weight": [0.0, 1.0]}
    assert recipe.output == Output("./x=y", 500 * 2**20)
    assert recipe.components["*.logit_scale"] == {"ratio": 1}
    assert recipe.components["a.b"] == {"ratio": 2}
    assert recipe.dtype is None
    assert recipe.missing == "error"
    assert recipe.place("parameters", "ratio") == "--set parameters.ratio=0.4"
    assert recipe.line("parameters", "ratio") is None
    assert recipe.line("components", "vision_tower.*", "ratio") == 7
    assert recipe.place("models", 0, "parameters", "weight", 0) == "--set models.0.parameters.weight=[0, 1]"
    again = parse_recipe(recipe.text)
    assert list(again.components) == ["vision_tower.*", "*.logit_scale", "a.b"]
    assert again.parameters == recipe.parameters
    assert again.components == recipe.components
    assert sources(again) == sources(recipe)
    assert again.output == recipe.output


def test_an_override_replaces_what_lies_below_it() -> None:
    recipe = parse_recipe(SLERP, None, ["parameters={t: [0, 1]}"])
    assert recipe.parameters == {"t": [0.0, 1.0]}
    assert recipe.line("parameters", "t", 1) is None
    recipe = parse_recipe(SLERP, None, ["parameters.t=1", "parameters={}"])
    assert recipe.place("parameters", "t") == "--set parameters={}"
    recipe = parse_recipe(SHORT + "parameters:\n", None, ["parameters.ratio=1"])
    assert recipe.parameters == {"ratio": 1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("", "not an override"),
        ("a", "not an override"),
        ("=1", "not an override"),
        ("a..b=1", "not an override"),
        ('"a=1', "not an override"),
        ("models.1.model=x", "`models` has no element 1"),
        ("models.-1.model=x", "`models` has no element -1"),
        ("models.x=x", "`models` has no element x"),
        ("models.0.model.x=x", "`models.0.model` is a single value"),
        ("parameters.a=[", "cannot be read"),
        ("parameters.a={b: 1, b: 2}", "given twice"),
        ("parameters.a=!!python/none x", "not allowed"),
        ("parameters.a=.inf", "no usable value"),
        ("parameter.a=1", "did you mean `parameters`?"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str) -> None:
    ((place, told),) = refusals(SHORT, override)
    assert place == f"--set {override}"
    assert said in told


# Anything at all.


def reads_or_refuses(text: str, overrides: list[str]) -> None:
    try:
        parse_recipe(text, None, overrides)
    except Refused as refused:
        assert refused.problems
        assert all(problem.place for problem in refused.problems)


@given(st.text(), st.lists(st.text(), max_size=2))
def test_any_text_reads_or_is_refused(text: str, overrides: list[str]) -> None:
    reads_or_refuses(text, overrides)


PIECES = "merge_method models slices sources model parameters filter value output components base_model"
PIECES += " ~ $HOME - : [ ] { } , \n \n\u0020\u0020 & * &a *a << ! !!int !!x ? | > ' \" \\ # %YAML --- ..."
PIECES += " 1 .5 1e5 .nan on \\ud800 @ + ="


@given(st.lists(st.sampled_from([*PIECES.split(" "), " ", ": ", "- ", "  "])).map("".join), st.data())
def test_any_heap_of_yaml_pieces_reads_or_is_refused(text: str, data: st.DataObject) -> None:
    overrides = data.draw(st.lists(st.text(alphabet=list("a0.=\"'[{m")), max_size=1))
    reads_or_refuses(text, overrides)


@given(st.binary(max_size=64))
def test_any_bytes_read_or_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with suppress(Refused):
        load_recipe(path)


numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).map("w".__add__)
scalars = numbers | st.booleans() | words
gradients = st.lists(numbers, min_size=1, max_size=4)
values = (
    scalars
    | gradients
    | st.builds(lambda value, rest: [{"filter": "mlp", "value": value}, {"value": rest}], scalars | gradients, scalars)
)
parameters = st.dictionaries(words, values, max_size=3)
hub_ids = st.from_regex(r"[a-z0-9]{1,9}/[A-Za-z][A-Za-z0-9._-]{0,9}(@[A-Za-z][a-z0-9]{1,9})?", fullmatch=True)
recipes = st.fixed_dictionaries(
    {
        "merge_method": words,
        "models": st.lists(st.fixed_dictionaries({"model": hub_ids, "parameters": parameters}), min_size=1, max_size=3),
    },
    optional={
        "base_model": hub_ids,
        "parameters": parameters,
        "dtype": st.sampled_from(["float16", "bfloat16", "torch.float32"]),
        "components": st.dictionaries(words, parameters.filter(bool), max_size=2),
        "chat_template": words,
    },
)


@given(recipes)
def test_valid_recipes_survive_a_dump(data: dict[str, Any]) -> None:
    """What any writer of YAML writes is read back; so is what is written for a recipe with overrides."""
    recipe = parse_recipe(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    assert recipe.merge_method == data["merge_method"]
    assert [str(source.model) for source in sources(recipe)] == [model["model"] for model in data["models"]]
    again = parse_recipe(parse_recipe(recipe.text, None, ["missing=copy"]).text)
    assert (again.missing, recipe.missing) == ("copy", "error")
    assert again.modules == recipe.modules
    assert (again.parameters, again.components) == (recipe.parameters, recipe.components)
    assert (again.chat_template, again.base_model, again.dtype) == (
        recipe.chat_template,
        recipe.base_model,
        recipe.dtype,
    )
