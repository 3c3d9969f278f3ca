"""Uploads, by the real huggingface_hub to a small server: what arrives, what is refused, what goes on after a break."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HANG, TOKEN, Hub, Repository, file, serving
from merging import COMMAND, INTERPOLATE, carry_out, command_line, models, plan_of

from ggez_merge.errors import Refused
from ggez_merge.push import push
from ggez_merge.verify import verify
from ggez_merge.write import REPORT

FILES = {
    "config.json": '{"hidden_size": 4}',
    "tokenizer.json": "{}",
    "LICENSE": "do as you like",
    "additional_chat_templates/tools.jinja": "{{ x }}",
}
FOREIGN = (".env", "notes.txt", "other.safetensors", "additional_chat_templates/key.pem", ".cache/huggingface/x.lock")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose recipe names its models, and its output, by absolute paths."""
    folder = tmp_path_factory.mktemp("secret-client")
    models(folder, ["base", "one"], {"x": (3000,), "y": (500,), "z": (9,)})
    for name, text in FILES.items():
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text(text)
    recipe = INTERPOLATE.replace(": base", f": {folder}/base").replace(": one", f": {folder}/one")
    carry_out(plan_of(folder, recipe, overrides=["output.shard_size=4KB", f"output.path={folder}/out"]))
    return folder / "out"


@pytest.fixture
def merged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "merged"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        yield served


def environment(home: Path, hub: Hub, **more: str) -> dict[str, str]:
    given = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    return {**given, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **more}


def pushed(
    merged: Path, hub: Hub, *options: str, repo: str = "org/name", **more: str
) -> subprocess.CompletedProcess[str]:
    """What `ggez-merge push` says; `hub.asked` is then what it alone has asked."""
    hub.asked.clear()
    home = merged.parent / "home"
    return command_line("push", merged, repo, *options, cwd=merged.parent, env=environment(home, hub, **more))


def sent(hub: Hub) -> list[str]:
    """Every request that carries weights."""
    return [request for request in hub.asked if request.startswith(("PUT", "POST /cas/v1/xorbs"))]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_the_merge_wrote_arrives_in_one_commit_and_nothing_else(merged: Path, hub: Hub, tmp_path: Path) -> None:
    written = names(merged)
    assert {*FILES, *SHARDS, "README.md", REPORT, "model.safetensors.index.json"} == written
    for name in FOREIGN:
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        (merged / name).write_text("secret")
    result = pushed(merged, hub)
    assert result.returncode == 0, result.stderr
    repository = hub.repositories["org/name"]
    assert repository.private
    assert len(repository.commits) == 2
    assert set(repository.files) == {*written, ".gitattributes"}
    for name in written - {"README.md", REPORT}:
        assert repository.files[name].raw == (merged / name).read_bytes(), name
    assert result.stdout.startswith(f"{hub.url}/org/name: {len(written)} files, ")
    assert result.stdout.endswith(", private\n")
    left_out = ", ".join(sorted(FOREIGN))
    assert result.stderr == f"note: left out, as the merge did not write it: {left_out}\n"


def test_the_repository_verifies_and_tells_no_local_path(merged: Path, whole: Path, hub: Hub, tmp_path: Path) -> None:
    place = str(whole.parent)
    assert place in (merged / REPORT).read_text()
    assert place in (merged / "README.md").read_text()
    assert pushed(merged, hub).returncode == 0
    for name, held in hub.repositories["org/name"].files.items():
        assert held.raw is not None
        assert place.encode() not in held.raw, name
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(held.raw)
    assert verify(tmp_path / "down").problems == ()
    assert "| base | base |" in (tmp_path / "down" / "README.md").read_text()
    assert verify(merged).problems == ()
    assert names(merged) == names(whole), "an upload leaves nothing in the folder"


def test_a_second_push_changes_nothing_and_an_edited_card_is_all_that_is_sent(merged: Path, hub: Hub) -> None:
    assert pushed(merged, hub).returncode == 0
    again = pushed(merged, hub)
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing has changed" in again.stdout
    repository = hub.repositories["org/name"]
    assert (len(repository.commits), sent(hub)) == (2, [])
    (merged / "README.md").write_text("# Mine")
    assert pushed(merged, hub).returncode == 0
    before, after = repository.commits[-2:]
    assert {name for name in after if after[name] != before[name]} == {"README.md"}
    assert sent(hub) == []


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_broken_upload_is_continued(xet: bool, merged: Path, hub: Hub) -> None:
    second = file((merged / SHARDS[1]).read_bytes())
    hub.fails = {"/commit/": 0} if xet else {second.sha256: 400}
    broken = pushed(merged, hub, HF_HUB_DISABLE_XET=str(1 - xet))
    assert broken.returncode == 1
    assert "Run the same command again" in broken.stderr
    assert len(hub.repositories["org/name"].commits) == 1, "the model is there as a whole or not at all"
    assert sent(hub)
    hub.fails = {}
    result = pushed(merged, hub, HF_HUB_DISABLE_XET=str(1 - xet))
    assert result.returncode == 0, result.stderr
    assert sent(hub) == ([] if xet else [f"PUT /store/{second.sha256}"])
    for name in SHARDS:
        assert hub.repositories["org/name"].files[name].sha256 == file((merged / name).read_bytes()).sha256


def test_interrupted_by_the_user(merged: Path, hub: Hub) -> None:
    hub.fails = {"/commit/": HANG}
    command = [*COMMAND, "push", str(merged), "org/name"]
    process = subprocess.Popen(
        command, env=environment(merged.parent / "home", hub), stderr=subprocess.PIPE, text=True, cwd=merged.parent
    )
    while not any("/commit/" in request for request in hub.asked):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "Run the same command again" in process.communicate(timeout=60)[1]
    assert process.returncode == 130


def flip(merged: Path) -> None:
    raw = bytearray((merged / SHARDS[0]).read_bytes())
    raw[-1] ^= 1
    (merged / SHARDS[0]).write_bytes(raw)


def interrupted_merge(merged: Path) -> None:
    (merged.parent / "merged.partial" / "checkpoint").mkdir(parents=True)


def link(merged: Path) -> None:
    (merged.parent / "id_rsa").write_text("secret")
    (merged / "README.md").unlink()
    (merged / "README.md").symlink_to("../id_rsa")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (flip, "a file has other content"),
    "shard missing": (lambda merged: (merged / SHARDS[1]).unlink(), "a file is missing"),
    "config missing": (lambda merged: (merged / "config.json").unlink(), "a file is missing"),
    "interrupted merge": (interrupted_merge, "an interrupted merge is waiting"),
    "no report": (lambda merged: (merged / REPORT).unlink(), "no readable merge report"),
    "link": (link, "a link might publish a file from elsewhere"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_checkpoint_is_refused(damage: str, merged: Path) -> None:
    act, what = DAMAGES[damage]
    act(merged)
    with pytest.raises(Refused, match=what):
        push(merged, "org/name", private=None, overwrite=False, quiet=True)


@pytest.mark.parametrize("repo", ["name", "org/", "a/b/c", "https://huggingface.co/org/name", "org/na me", "../name"])
def test_what_names_no_repository_is_refused(repo: str, merged: Path) -> None:
    with pytest.raises(Refused, match="does not name a repository"):
        push(merged, repo, private=None, overwrite=False, quiet=True)


def test_a_refusal_lists_everything_and_asks_nobody(merged: Path, hub: Hub) -> None:
    for act in (flip, interrupted_merge, link):
        act(merged)
    result = pushed(merged, hub, repo="name")
    assert (result.returncode, result.stdout, hub.asked) == (2, "", [])
    assert result.stderr.startswith("4 problems:\n")


@pytest.mark.parametrize(
    ("token", "repo", "said", "asked"),
    [
        ("", "org/name", "you are not logged in", 0),
        ("hf_wrong", "org/name", "does not accept your access token", 1),
        (TOKEN, "theirs/name", "does not let you write to theirs/name", 2),
        (TOKEN, "org/read-only", "does not let you write to org/read-only", 3),
    ],
)
def test_who_may_not_write_is_told_so(token: str, repo: str, said: str, asked: int, merged: Path, hub: Hub) -> None:
    hub.repositories["org/read-only"] = Repository(private=False)
    hub.fails = {"read-only/preupload": 403}
    result = pushed(merged, hub, repo=repo, HF_TOKEN=token)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert "remedy:" in result.stderr
    assert len([request for request in hub.asked if "harness" not in request]) == asked
    assert not hub.stored


@pytest.mark.parametrize("more", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_no_network(more: dict[str, str], merged: Path, hub: Hub) -> None:
    result = pushed(merged, hub, **more)
    assert (result.returncode, result.stdout, hub.asked) == (1, "", [])
    assert "org/name: not uploaded: " in result.stderr


class TestARepositoryThatExists:
    """It keeps what it holds, unless asked, and stays as private as it is."""

    @pytest.fixture
    def theirs(self, hub: Hub) -> Repository:
        repository = hub.repositories["org/name"] = Repository(private=False)
        held = [
            "model.safetensors",
            "chat_template.jinja",
            "config.json",
            "plot.png",
            "gguf/x.gguf",
            "onnx/config.json",
        ]
        repository.commits.append(repository.files | {name: file(b"old") for name in held})
        return repository

    def test_another_model_is_not_replaced_by_accident(self, theirs: Repository, merged: Path, hub: Hub) -> None:
        result = pushed(merged, hub)
        assert (result.returncode, len(theirs.commits), sent(hub)) == (2, 2, [])
        assert "holds a model already" in result.stderr
        assert "model.safetensors" in result.stderr
        assert "--overwrite" in result.stderr

    def test_but_if_asked_without_leaving_what_a_loader_would_mix_up(
        self, theirs: Repository, merged: Path, hub: Hub
    ) -> None:
        result = pushed(merged, hub, "--overwrite")
        assert result.returncode == 0, result.stderr
        assert set(theirs.files) == {*names(merged), ".gitattributes", "plot.png", "gguf/x.gguf", "onnx/config.json"}
        assert "removed from the repository: chat_template.jinja, model.safetensors" in result.stderr
        assert result.stdout.endswith(", public\n")

    def test_one_without_a_model_is_filled(self, merged: Path, hub: Hub) -> None:
        hub.repositories["org/name"] = Repository(private=True)
        assert pushed(merged, hub, "--private").returncode == 0
        assert len(hub.repositories["org/name"].commits) == 2

    def test_its_visibility_is_not_changed(self, theirs: Repository, merged: Path, hub: Hub) -> None:
        result = pushed(merged, hub, "--private", "--overwrite")
        assert (result.returncode, len(theirs.commits)) == (2, 2)
        assert "exists and is public" in result.stderr


def test_a_public_repository_on_request_and_quietly(merged: Path, hub: Hub) -> None:
    result = pushed(merged, hub, "--public", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not hub.repositories["org/name"].private


def test_files_that_the_hub_passes_over_are_missed(merged: Path, hub: Hub) -> None:
    hub.ignored = ("tokenizer.json",)
    result = pushed(merged, hub)
    assert result.returncode == 1
    assert "not all has arrived: tokenizer.json" in result.stderr


def test_a_card_that_the_hub_cannot_read(merged: Path, hub: Hub) -> None:
    (merged / "README.md").write_text("---\nbroken: [\n---\n")
    result = pushed(merged, hub)
    assert result.returncode == 2
    assert "refuses the model card" in result.stderr
    assert "not YAML" in result.stderr
    assert sent(hub) == []
