"""What all benchmarks write with their figures: the machine, the versions, one CSV file."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path


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
    return " ".join(f"{package} {version(package)}" for package in packages)


def save(rows: Sequence[Mapping[str, object]], path: Path, append: bool = False) -> None:
    """Write rows with a header line; `append` adds them below what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append = append and path.exists()
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if not append:
            writer.writeheader()
        writer.writerows(rows)
