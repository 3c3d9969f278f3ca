"""Merge methods, one file each. A new one is a file that ends in METHOD = Method(...), and a line here."""

from __future__ import annotations

from ggez_merge.methods import dare, linear, passthrough, slerp, task_arithmetic, ties
from ggez_merge.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare.LINEAR,
        dare.TIES,
        slerp.METHOD,
        passthrough.METHOD,
    )
}
