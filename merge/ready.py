"""The ready recipes that come with the package: which there are, and a copy of one to edit."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ggez_merge.check import nearest
from ggez_merge.errors import Problem, Refused


def titles() -> dict[str, str]:
    """Name and purpose (the first line) of every ready recipe, by name."""
    return {name: text.splitlines()[0].removeprefix("# ") for name, text in sorted(_texts().items())}


def copy(name: str, to: Path | None = None) -> Path:
    """Write a ready recipe to a new file, and say where.

    to: the file, or an existing folder for `NAME.yaml`, by default the working folder. Nothing is ever replaced.
    Raises Refused for a name that does not exist, and where the file cannot be made.
    """
    name = name.removesuffix(".yaml")
    texts = _texts()
    if name not in texts:
        expected = "one of " + ", ".join(sorted(texts))
        raise Refused(Problem(f"there is no ready recipe {name!r}", expected=expected, remedy=nearest(name, texts)))
    path = to or Path()
    if path.is_dir():
        path = path / f"{name}.yaml"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(texts[name])
    except FileExistsError:
        remedy = f"give another name: ggez-merge recipes copy {name} FILE"
        raise Refused(Problem("this file exists already", place=str(path), remedy=remedy)) from None
    except OSError as error:
        raise Refused(Problem("the recipe cannot be written", place=str(path), found=error.strerror)) from None
    return path


def _texts() -> dict[str, str]:
    """The recipes that need no models shipped beside them, by name."""
    found = [entry for entry in files("ggez_merge.recipes").iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in found}
