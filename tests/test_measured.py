"""Results keep every bit on their way through a file."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggez_merge.evaluate.measured import Item, Measured, Part, of_items

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
MAYBE = st.none() | FLOATS


@given(
    st.builds(
        Measured,
        name=TEXT,
        tag=st.sampled_from(["regional", "global", "both"]),
        score=FLOATS,
        n=st.none() | st.integers(0, 10**9),
        chance=MAYBE,
        scale=MAYBE,
        higher_is_better=st.booleans(),
        stderr=MAYBE,
        groups=st.dictionaries(TEXT, st.builds(Part, FLOATS, st.integers(0, 99)), max_size=3),
        details=st.dictionaries(TEXT, FLOATS, max_size=3),
        items=st.lists(st.builds(Item, TEXT, FLOATS, st.tuples(TEXT)), max_size=3).map(tuple),
    )
)
def test_json_gives_back_the_same_result(measured: Measured) -> None:
    line = measured.to_line()
    assert Measured.from_line(line) == measured
    assert Measured.from_line(line).to_line() == line
    assert "\n" not in line


def test_a_score_is_the_mean_of_its_items_in_any_order_and_in_every_group() -> None:
    rng = random.Random(0)
    items = [Item(str(i), rng.random(), (f"country={i % 3}", f"language={i % 2}")) for i in range(100)]
    result = of_items("x", "regional", items, chance=None, scale=1)
    rng.shuffle(items)
    again = of_items("x", "regional", items, chance=None, scale=1)
    assert (again.score, again.groups) == (result.score, result.groups)
    assert result.score == pytest.approx(sum(item.outcome for item in items) / 100)
    assert list(result.groups) == ["country=0", "country=1", "country=2", "language=0", "language=1"]
    for column in ("country", "language"):
        parts = [part for group, part in result.groups.items() if group.startswith(column)]
        assert sum(part.n for part in parts) == 100
        assert sum(part.n * part.score for part in parts) / 100 == pytest.approx(result.score)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_result_holds_nan(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN"):
        of_items("x", "global", [Item("1", bad)], chance=None, scale=None)
    with pytest.raises(ValueError, match="NaN"):
        Measured("x", "global", 1.0, details={"a": bad})


def test_percent_is_what_scales_share() -> None:
    assert Measured("x", "global", 0.25, scale=1).percent == Measured("x", "global", 25.0, scale=100).percent == 25
    assert Measured("x", "global", 25.0).percent is None
