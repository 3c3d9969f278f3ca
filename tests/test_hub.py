"""Hugging Face ids: cache hits without a network, downloads from a server, and errors that say what to do.

huggingface_hub reads its environment when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from checkpoints import write_checkpoint, write_file

from ggez_merge.carry import CARRIED_STEMS, CARRIED_SUFFIXES
from ggez_merge.hub import _weights, is_hub_id

SHA = "0123456789abcdef0123456789abcdef01234567"
ARRAYS = {f"layers.{i}.w": np.full(4, i, np.float32) for i in range(4)}
OPEN = """
import json, sys
from ggez_merge.checkpoint import open_checkpoint
from ggez_merge.errors import Refused
try:
    checkpoint = open_checkpoint(sys.argv[1], *sys.argv[2:])
    files = sorted(str(p.relative_to(checkpoint.folder)) for p in checkpoint.folder.rglob("*") if p.is_file())
    print(json.dumps([checkpoint.revision, list(checkpoint.tensors), files, checkpoint.config]))
except Refused as refused:
    print(json.dumps(str(refused)))
"""


def opened(home: Path, *arguments: str, endpoint: str | None = None) -> list[object]:
    answer = run(home, *arguments, endpoint=endpoint)
    assert isinstance(answer, list), answer
    return answer


def refused(home: Path, *arguments: str, endpoint: str | None = None) -> str:
    answer = run(home, *arguments, endpoint=endpoint)
    assert isinstance(answer, str), answer
    return answer


def run(home: Path, *arguments: str, endpoint: str | None) -> object:
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    command = [sys.executable, "-c", OPEN, *arguments]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fill_cache(home: Path, source: Path) -> Path:
    """The cache as huggingface_hub lays it out: refs, blobs, and snapshots that are links to the blobs."""
    repository = home / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("revision", [(), ("main",), (SHA,)])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_cached_model_needs_no_network(revision: tuple[str, ...], shards: int, tmp_path: Path) -> None:
    fill_cache(tmp_path / "home", write_checkpoint(tmp_path / "model", ARRAYS, shards=shards, config={"a": 1}))
    commit, tensors, _, config = opened(tmp_path / "home", "org/name", *revision)
    assert (commit, tensors, config) == (SHA, list(ARRAYS), {"a": 1})


def test_a_local_folder_wins_over_a_cached_model(tmp_path: Path) -> None:
    fill_cache(tmp_path / "home", write_checkpoint(tmp_path / "model", ARRAYS))
    write_checkpoint(tmp_path / "home" / "org" / "name", {"local": np.ones(1, np.float32)})
    assert opened(tmp_path / "home", "org/name")[:2] == [None, ["local"]]


def test_an_incomplete_cache_without_network_is_refused(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "home", write_checkpoint(tmp_path / "model", ARRAYS, shards=2))
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    message = refused(tmp_path / "home", "org/name")
    assert "org/name is not a local path and cannot be fetched" in message
    assert "hf download" in message


def test_nothing_cached_and_no_network_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "home", "org/name", "v1.0")
    assert "org/name is not a local path and cannot be fetched" in message
    assert "org/name@v1.0" in message
    assert "no local file or folder: org/name" in message


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A Hub of one model, org/name, whose files are those of a folder; and the paths asked of it."""
    root = tmp_path / "served"
    root.mkdir()
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
            asked.append(path)
            if path.startswith(("/api/models/org/name/revision/", "/api/models/org/name/tree/")):
                if path.rsplit("/", 1)[1] not in ("main", SHA):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                sizes = [(root / name).stat().st_size for name in files]
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": f"{at:040x}"}
                    for at, (name, size) in enumerate(zip(files, sizes, strict=True))
                ]
                info = {"id": "org/name", "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
                return self.send(200, json.dumps(tree if "/tree/" in path else info).encode(), {}, body)
            prefix = f"/org/name/resolve/{SHA}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                name = path.removeprefix(prefix)
                headers = {"X-Repo-Commit": SHA, "ETag": f'"{files.index(name):040x}"'}
                return self.send(200, (root / name).read_bytes(), headers, body)
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=hub.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{hub.server_port}", root, asked
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.mark.parametrize("shards", [1, 2])
def test_download_takes_what_a_merge_needs_and_no_more(
    shards: int, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    endpoint, root, asked = server
    write_checkpoint(root, ARRAYS, shards=shards, config={"a": 1})
    write_file(root / "consolidated.safetensors", ARRAYS)
    carried = {f"it{suffix}" for suffix in CARRIED_SUFFIXES} | {f"{stem}.md" for stem in CARRIED_STEMS}
    for name in (*carried, "tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "README.md"):
        (root / name).write_text("{}")
    (root / "onnx").mkdir()
    (root / "onnx" / "config.json").write_text("{}")
    commit, tensors, files, config = opened(tmp_path / "home", "org/name", endpoint=endpoint)
    weights = {path.name for path in root.glob("model*")}
    assert (commit, tensors, config) == (SHA, list(ARRAYS), {"a": 1})
    assert isinstance(files, list)
    assert set(files) == weights | carried | {"config.json", "tokenizer.json", "chat_template.jinja"}
    asked.clear()
    assert opened(tmp_path / "home", "org/name", endpoint=endpoint) == [commit, tensors, files, config]
    assert not asked  # a complete cache asks nobody
    assert opened(tmp_path / "home", "org/name") == [commit, tensors, files, config]


def test_weights_in_subfolders_are_not_the_model(server: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, root, _ = server
    write_checkpoint(root / "unet", ARRAYS)
    assert "no checkpoint here" in refused(tmp_path / "home", "org/name", endpoint=endpoint)
    write_checkpoint(root, ARRAYS, base="other")
    assert opened(tmp_path / "another home", "org/name", endpoint=endpoint)[1] == list(ARRAYS)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pipeline_is_downloaded_part_by_part(
    shards: int, server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    endpoint, root, asked = server
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    write_checkpoint(root / "unet", ARRAYS, shards=shards, config={"a": 1}, base="diffusion_pytorch_model")
    write_checkpoint(root / "vae", ARRAYS, config={"b": 1}, base="diffusion_pytorch_model")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    for other in ("vae/diffusion_pytorch_model.fp16", "vae_1_0/diffusion_pytorch_model", "sd_xl_base_1.0"):
        (root / other).parent.mkdir(exist_ok=True)
        write_file(root / f"{other}.safetensors", ARRAYS)
    wanted = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "sd_xl_base_1.0.safetensors",
    }
    found = opened(tmp_path / "home", "org/name", endpoint=endpoint)
    assert found[1] == [f"{part}.{name}" for part in ("unet", "vae") for name in ARRAYS]
    snapshot = next((tmp_path / "home").rglob(f"snapshots/{SHA}"))
    assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == wanted
    asked.clear()
    assert opened(tmp_path / "home", "org/name", endpoint=endpoint) == found
    assert not asked  # a complete cache asks nobody
    for lost in ("vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        (snapshot / lost).unlink()
        if lost.startswith("scheduler"):
            (snapshot / "scheduler").rmdir()
        assert opened(tmp_path / "home", "org/name", endpoint=endpoint) == found
        assert (snapshot / lost).exists()


def test_an_interrupted_download_is_completed(server: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, root, _ = server
    snapshot = fill_cache(tmp_path / "home", write_checkpoint(root, ARRAYS, shards=2))
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert opened(tmp_path / "home", "org/name", endpoint=endpoint)[:2] == [SHA, list(ARRAYS)]


def test_pickles_are_refused_before_they_are_downloaded(server: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, root, asked = server
    (root / "model.ckpt").write_bytes(b"\x80\x04.")
    message = refused(tmp_path / "home", "org/name", endpoint=endpoint)
    assert "pickles" in message and "model.ckpt" in message
    assert not any("model.ckpt" in path for path in asked)


def test_weights_in_torchs_format_are_fetched_only_where_there_are_no_others(
    server: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    import torch

    endpoint, root, asked = server
    torch.save({"x": torch.ones(2)}, root / "pytorch_model.bin")
    (root / "training_args.bin").write_bytes(b"\x80\x04.")
    assert opened(tmp_path / "home", "org/name", endpoint=endpoint)[1] == ["x"]
    assert opened(tmp_path / "home", "org/name")[1] == ["x"]
    write_checkpoint(root, ARRAYS)
    asked.clear()
    assert opened(tmp_path / "another home", "org/name", endpoint=endpoint)[1] == list(ARRAYS)
    assert not any(".bin" in path for path in asked)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [(("org/name", "v9"), "check the revision"), (("org/nobody",), "check the spelling")],
)
def test_remedies(arguments: tuple[str, ...], remedy: str, server: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    endpoint, root, _ = server
    write_checkpoint(root, ARRAYS)
    assert remedy in refused(tmp_path / "home", *arguments, endpoint=endpoint)


@pytest.mark.parametrize(
    ("reference", "is_id"),
    [
        ("google/siglip2-so400m-patch14-384", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("org/name.safetensors", False),
        ("org/name.bin", False),
        ("./name", False),
        ("../name", False),
        ("/org/name", False),
        ("~/name", False),
        ("name", False),
        ("a/b/c", False),
        ("org/", False),
        ("org/na me", False),
    ],
)
def test_what_an_id_looks_like(reference: str, is_id: bool) -> None:
    assert is_hub_id(reference) is is_id


def test_of_an_adapter_its_weights_are_taken_and_what_makes_it_refused(tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.bin", "README.md", "checkpoint-1/adapter_model.bin"]
    assert _weights(tmp_path, names) == ["adapter_model.bin"]
    names += ["adapter_model.safetensors", "non_lora_trainables.bin"]
    assert _weights(tmp_path, names) == ["adapter_model.safetensors", "non_lora_trainables.bin"]
