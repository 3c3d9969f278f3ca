"""What all benchmarks share: choices from a list, the machine and the versions they write down, one CSV file."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ggez_merge.check import listed, nearest
from ggez_merge.errors import Failed, Problem, Refused


def chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    """ "a,b" -> ["a", "b"], each of them one of `known`; Refused names those that are not."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    strange = [word for word in words if word not in known]
    if strange:
        raise Refused(
            Problem(f"`{word}` is no choice for {option}", expected=listed(known), remedy=nearest(word, known))
            for word in strange
        )
    return words


def processor() -> str:
    """The processor's name, family and model, and how many cores this machine has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f"family {named.get('cpu family', '?')} model {named.get('model', '?')}"
    return f"{named.get('model name', platform.machine())} ({family}) x {os.cpu_count()}"


def versions(*packages: str) -> str:
    """Name and version of those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)


def commit() -> str:
    """The commit that these files belong to, marked where code has changed since; "" outside a checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", __file__).returncode:  # installed in somebody else's repository, perhaps
            return ""
        changed = git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode
        return git("rev-parse", "--short=10", "HEAD").stdout.strip() + ("-changed" if changed else "")
    except OSError:
        return ""


def save(rows: Sequence[Mapping[str, object]], path: Path, append: bool = False) -> None:
    """Write rows with a header line; `append` adds them below what is there, of which `check_columns` has approved."""
    append = append and path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if append else "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if not append:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise Failed(f"{path}: the table cannot be written: {error.strerror}") from error


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse to append to a table of something else: before anything is measured, so that nothing is lost."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(columns):
        what = "rows cannot be appended to a table with other columns"
        remedy = "name another file, or remove this one"
        raise Refused(
            Problem(what, place=str(path), expected=", ".join(columns), found=", ".join(header), remedy=remedy)
        )


def load(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(Problem(f"the table cannot be read: {error}", place=str(path))) from None
