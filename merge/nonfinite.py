"""What is said of NaN, infinities, overflows, and of integers that differ, wherever they turn up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ggez_merge.errors import Problem


def nonfinite_problems(
    tensor: str | None, dtype: str, inputs: Sequence[tuple[str, int]], counts: Sequence[int], overflows: int, allow: str
) -> Iterator[Problem]:
    """Why a merged tensor is refused, if it is.

    inputs: where each is from, and its elements; counts: how many of those are not finite. overflows: elements of the
    output, of `dtype`, that are not. allow: the opt-out, as the user writes it.
    """
    for (place, n), count in zip(inputs, counts, strict=True):
        if count:
            yield Problem(
                "NaN or Inf among the weights",
                place=place,
                tensor=tensor,
                found=f"{count:,} of {n:,} elements",
                remedy=f"use intact weights, or let them through with {allow}",
            )
    if overflows and not any(counts):
        yield Problem(
            f"the result is too large for {dtype}",
            tensor=tensor,
            found=f"{overflows:,} elements overflow",
            remedy="choose a wider `out_dtype`, or smaller weights",
        )


def unequal_problem(tensor: str, dtype: str, places: Sequence[str]) -> Problem:
    """Why tensors that are no floats are refused, if they differ."""
    return Problem(
        f"{dtype} values cannot be averaged, and the inputs' differ",
        tensor=tensor,
        expected="the same values in " + ", ".join(places),
        remedy="`buffers: base` takes the base's integers"
        if not dtype.startswith("F")
        else "convert the models to bfloat16 first",
    )
