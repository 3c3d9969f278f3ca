"""The one door to the arithmetic: picks the kernels a merge runs on."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import cast

from ggez_merge.errors import Failed
from ggez_merge.methods.method import Kernels

KERNELS = {
    "linear": ("linear",),
    "vote": ("vote",),
    "gram": ("gram",),
    "drop": ("l1",),
    "threshold": ("histogram", "ties", "nth_tie"),
}  # the same files, with the same functions, in every backend's folder


def load_kernels() -> tuple[Kernels, str]:
    """The CPU's kernels and a word for them: compiled by numba, or plain torch where numba has no wheel."""
    if importlib.util.find_spec("numba") is not None:
        return _load("ggez_kernels.cpu"), "cpu (numba)"
    if importlib.util.find_spec("torch") is not None:
        return _load("ggez_kernels.reference"), "cpu (torch; numba would be faster)"
    raise Failed("neither numba nor torch is installed: install one of them, numba is the faster")


def _load(package: str) -> Kernels:
    modules = {stem: importlib.import_module(f"{package}.{stem}") for stem in KERNELS}
    functions = {name: getattr(modules[stem], name) for stem, names in KERNELS.items() for name in names}
    return cast(Kernels, SimpleNamespace(**functions, counting=modules["threshold"].COUNTING))
