"""What is installed, under which names, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "merge": "ggez_merge",
    "kernels": "ggez_kernels",
    "benchmarks": "ggez_merge/benchmarks",
    "recipes": "ggez_merge/recipes",
}
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
HEAVY = {"torch", "transformers", "triton"}
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.py[co]", "*.nbi", "*.nbc")

# Each of these may import what stands further up, and nothing further down, not even through other modules.
ORDER = (
    ("errors",),
    ("recipe", "components", "names"),
    ("checkpoint",),
    ("plan",),
    ("run",),
    ("sweep",),
    ("benchmarks.kernels", "benchmarks.merge", "benchmarks.models", "benchmarks.report", "benchmarks.roofline"),
    ("cli",),
    ("__main__", "benchmarks.copy_limit"),
)


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-index", cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree without what builds and test runs leave in it."""
    folder = tmp_path_factory.mktemp("build") / "checkout"
    folder.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFTOVERS)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, checkout, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def as_installed(source: Path) -> dict[str, Path]:
    """Every file of the four folders by its path below site-packages."""
    return {
        f"{package}/{file.relative_to(source / folder).as_posix()}": file
        for folder, package in FOLDERS.items()
        for file in (source / folder).rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".nbi", ".nbc")
    }


def modules(source: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for name, file in as_installed(source).items()
        if name.endswith(".py")
    }


def test_the_wheel_holds_the_packages_and_nothing_else(checkout: Path, wheel: Path) -> None:
    expected = as_installed(checkout)
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == set(expected)
        assert all(archive.read(name) == file.read_bytes() for name, file in expected.items())
    for needed in (
        "ggez_merge/py.typed",
        "ggez_kernels/py.typed",
        "ggez_merge/recipes/linear.yaml",
        "ggez_merge/recipes/emoji/sea.yaml",
        "ggez_merge/recipes/emoji/global/model.safetensors",
        "ggez_merge/recipes/emoji/LICENSE-UNICODE.txt",
    ):
        assert needed in expected


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_every_module_imports_from_outside_the_checkout(how: str, checkout: Path, wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    source = [wheel] if how == "wheel" else ["--no-build-isolation", "--editable", checkout]
    pip("install", "--target", site, *source, cwd=tmp_path)
    names = sorted(set(modules(checkout)) - {"ggez_merge.__main__"})
    if importlib.util.find_spec("triton") is None:  # it has wheels for Linux only
        names = [name for name in names if not name.startswith("ggez_kernels.gpu")]
    # -S leaves out the .pth files of this environment, in which the project is likely to be installed too.
    files = run(
        sys.executable,
        "-S",
        "-c",
        "import importlib, site, sys\n"
        "site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2])\n"
        "for name in sys.argv[3:]: print(importlib.import_module(name).__file__)",
        site,
        sysconfig.get_path("purelib"),
        *names,
        cwd=tmp_path,
    ).splitlines()
    home = site if how == "wheel" else checkout
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(home) for file in files)


def test_the_folder_kernels_does_not_hide_the_package_of_that_name() -> None:
    theirs = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    code = "import kernels, transformers.integrations.hub_kernels; print(kernels.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=ROOT).strip()) == Path(str(theirs))
    assert not (ROOT / "kernels/__init__.py").exists()


def imports(file: Path, package: str = "", known: Collection[str] = ()) -> set[str]:
    """What a module of `package` imports anywhere: those in `known` in full, others by their top name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            whole = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in known else source for name in whole}
        elif isinstance(node, ast.Constant) and node.value in known:  # what importlib is given
            found.add(str(node.value))
    return {name if name in known else name.partition(".")[0] for name in found}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> what it imports, at its top or inside functions."""
    files = modules(ROOT)
    packages = {name: name if file.name == "__init__.py" else name.rpartition(".")[0] for name, file in files.items()}
    return {name: imports(file, packages[name], set(files)) for name, file in files.items()}


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a module imports, directly or through others."""
    seen: set[str] = set()
    front = set(graph[start])
    while front:
        seen |= front
        front = {further for name in front for further in graph.get(name, set())} - seen
    return seen


def test_imports_run_one_way(graph: dict[str, set[str]]) -> None:
    assert [name for name in graph if name in reach(graph, name)] == [], "these modules import themselves"
    below: set[str] = set()
    for names in reversed(ORDER):
        level = {f"ggez_merge.{name}" for name in names}
        for name in level & set(graph):
            assert not reach(graph, name) & (below | level), f"{name} imports what builds on it"
        below |= level


def test_kernels_know_nothing_of_merging(graph: dict[str, set[str]]) -> None:
    for name in graph:
        if name.startswith("ggez_kernels"):
            assert not [other for other in reach(graph, name) if other.startswith("ggez_merge")], name
        if name.startswith("ggez_kernels.cpu"):
            assert not reach(graph, name) & HEAVY, name


def test_one_door_leads_to_the_backends(graph: dict[str, set[str]]) -> None:
    backends = ("ggez_kernels.cpu", "ggez_kernels.gpu", "ggez_kernels.reference")
    doors = {
        name
        for name, others in graph.items()
        if name.startswith("ggez_merge") and any(other.startswith(backends) for other in others)
    }
    # numpy to torch is the definition's to say, and the benchmarks need it for their baselines
    assert doors - {"ggez_merge.benchmarks.places"} == {"ggez_merge.arithmetic"}


def test_nothing_imports_by_folder_name() -> None:
    folders = {*FOLDERS, "tests", "benchmarks"}
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            assert not imports(file, package="here.here.here") & folders, file


@pytest.mark.parametrize("what", [["--help"], ["--dry-run"], []], ids=["help", "dry-run", "merge"])
def test_the_command_line_loads_nothing_heavy(what: list[str], tmp_path: Path) -> None:
    arguments: list[str | Path] = [ROOT / "recipes/emoji/sea.yaml", "--out", tmp_path / "merged", *what]
    if what == ["--help"]:
        arguments = ["--help"]
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('\\nloaded:', *sys.modules))\n"
        "runpy.run_module('ggez_merge', run_name='__main__', alter_sys=True)"
    )
    output = run(sys.executable, "-c", code, *arguments, cwd=tmp_path)
    loaded = {name.partition(".")[0] for name in output.rpartition("loaded:")[2].split()}
    assert "ggez_merge" in loaded
    assert loaded & HEAVY == set()
    assert (tmp_path / "merged" / "model.safetensors").exists() == (not what)
