"""Values of parameters: gradients and filters, resolved for one tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.parameters import Filtered, Value, evaluate, matching

numbers = st.floats(-1e6, 1e6)
depths = st.floats(0, 1)
gradients = st.lists(numbers, min_size=1, max_size=9)


@given(gradients, depths)
def test_a_gradient_is_numpy_interp(gradient: list[float], t: float) -> None:
    points = np.linspace(0, 1, len(gradient)) if len(gradient) > 1 else [0.0]
    scale = max(map(abs, gradient))
    assert math.isclose(
        float(evaluate(gradient, "x", t) or 0),
        np.interp(t, points, gradient),
        rel_tol=0,
        abs_tol=1e-14 * scale,
    )


@given(gradients, st.integers(0, 8))
def test_a_gradient_is_exact_at_its_points(gradient: list[float], i: int) -> None:
    i %= len(gradient)
    t = i / (len(gradient) - 1) if len(gradient) > 1 else 1.0
    assert evaluate(gradient, "x", 0.0) == gradient[0]
    assert evaluate(gradient, "x", 1.0) == gradient[-1]
    assert evaluate(gradient, "x", t) == pytest.approx(gradient[i])


@given(numbers, st.integers(1, 9), depths)
def test_a_level_gradient_is_its_value(value: float, n: int, t: float) -> None:
    assert evaluate([value] * n, "x", t) == value


@pytest.mark.parametrize("value", [True, 3, 0.5, "global"])
def test_a_scalar_is_itself(value: bool | int | float | str) -> None:
    assert evaluate(value, "x", 0.5) is value
    assert matching(value, "x") == 0


FILTERED: Value = [
    Filtered("visual.merger", 1.0),
    Filtered("visual", [0.0, 0.5]),
    Filtered("l[ae]", "no pattern"),
    Filtered("mlp", True),
]


@pytest.mark.parametrize(
    ("name", "element", "expected"),
    [
        ("visual.merger.mlp.0.weight", 0, 1.0),
        ("visual.blocks.0.mlp.weight", 1, 0.25),
        ("model.layers.0.mlp.up_proj.weight", 3, True),
        ("lm_head.weight", None, None),
        ("la.weight", None, None),
    ],
)
def test_the_first_filter_in_the_name_decides(name: str, element: int | None, expected: object) -> None:
    assert matching(FILTERED, name) == element
    assert evaluate(FILTERED, name, 0.5) == expected


@pytest.mark.parametrize("everything", [None, "*"])
def test_a_last_value_for_all_others(everything: str | None) -> None:
    value: Value = [Filtered("mlp", 1), Filtered(everything, [0.0, 2.0])]
    assert evaluate(value, "a.mlp", 1.0) == 1
    assert evaluate(value, "lm_head", 1.0) == 2.0
    assert matching(value, "lm_head") == 1


def test_matching_of_a_gradient_is_its_beginning() -> None:
    assert matching([0.0, 1.0], "x") == 0


@given(gradients, depths)
def test_gradients_are_those_of_mergekit(gradient: list[float], t: float) -> None:
    config = pytest.importorskip("mergekit.config")
    theirs = config.evaluate_setting("x", gradient, t, validate=float)
    assert evaluate(gradient, "x", t) == pytest.approx(theirs, rel=1e-12, abs=1e-8)
