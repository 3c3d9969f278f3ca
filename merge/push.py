"""A merged checkpoint goes to Hugging Face: what the merge wrote, and nothing else that lies in its folder.

All files arrive in one commit, so that a repository holds the whole model or none of it. A second call after a broken
upload goes on where that one stopped: the storage takes no file again, and with hf_xet no chunk of a file, that it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ggez_merge import __version__
from ggez_merge.carry import CARRIED_SUFFIXES, content
from ggez_merge.errors import Failed, Interrupted, Problem, Refused, UserError
from ggez_merge.hub import first_line, is_hub_id
from ggez_merge.layout import INDEX
from ggez_merge.local_paths import short_names, shortened
from ggez_merge.progress import Silent, progress_for
from ggez_merge.untrusted import printable, some
from ggez_merge.verify import verify
from ggez_merge.write import REPORT, unfinished

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", INDEX)
MODELS = (*WEIGHTS, ".gguf", ".pth", ".pt", ".ckpt", ".onnx", ".h5", ".msgpack")  # what a repository may hold already
AGAIN = "Run the same command again: what has arrived is not sent a second time."


@dataclass(frozen=True)
class Pushed:
    """`files` are at `url`; `removed` were there before; `left_out` stay in the folder: no merge wrote them."""

    url: str
    private: bool
    changed: bool
    files: tuple[str, ...]
    n_bytes: int
    removed: tuple[str, ...]
    left_out: tuple[str, ...]


def push(folder: Path, repo: str, *, private: bool | None, overwrite: bool, quiet: bool) -> Pushed:
    """Upload a merged checkpoint to the model repository `organisation/name`, which is made if need be.

    The folder is verified first; nothing is sent unless all of it is as written. Sent are the files of the report, the
    report and the model card, in these two the absolute paths of this machine by their last parts. A new repository is
    private unless `private` is False, one that exists must be what `private` says. `overwrite` replaces the model that
    it holds: what a loader could read there and the new one lacks is removed in the same commit. Progress is shown on a
    terminal only.
    Raises Refused (also where Hugging Face does not let the user in), Failed or Interrupted.
    """
    shown = sys.stderr.isatty() and not quiet
    with progress_for(not shown) as progress:
        files = _checked(Path(os.path.abspath(folder)), repo, progress)
    import huggingface_hub as hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if hub.get_token() is None:
        raise Refused(
            Problem("you are not logged in to Hugging Face", remedy="run `hf auth login`, or set HF_TOKEN to a token")
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not shown:
        disable_progress_bars()
    try:
        return _send(hub.HfApi(), folder, repo, files, private, overwrite)
    except UserError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"{repo}: interrupted. {AGAIN}", signal.SIGINT) from None
    except Exception as error:  # huggingface_hub lets the exceptions of its HTTP library through, whichever that is
        raise _told(error, repo) from error


def _checked(folder: Path, repo: str, progress: Silent) -> dict[str, Path | bytes]:
    """What to send: name in the repository -> file, or content. Refused with everything that is wrong here."""
    problems = []
    if not is_hub_id(repo):
        problems.append(
            Problem(
                "this does not name a repository",
                expected="organisation/name; the first may be your user name",
                found=printable(repo),
                remedy="write both, in letters, digits, `-`, `_` and `.`, without an address before them",
            )
        )
    if unfinished(folder):
        problems.append(
            Problem(
                "an interrupted merge is waiting beside this folder",
                place=f"{folder}.partial",
                remedy="finish it with --resume, or delete it if the folder itself is what you want",
            )
        )
    told = [name for name in (CARD, REPORT) if (folder / name).exists()]
    problems += [
        Problem(
            "a link might publish a file from elsewhere", place=str(folder / name), remedy="put a copy in its place"
        )
        for name in told
        if (folder / name).is_symlink()
    ]
    intact: tuple[str, ...] = ()
    try:
        verdict = verify(folder, progress)
        intact = verdict.intact
        problems += verdict.problems
    except Refused as refused:
        problems += refused.problems
    if problems:
        raise Refused(problems)
    names = short_names(json.loads(content(folder / REPORT)))
    return {
        **{name: folder / name for name in intact},
        **{name: shortened(content(folder / name), names, as_json=name == REPORT) for name in told},
    }


def _send(
    api: HfApi, folder: Path, repo: str, files: dict[str, Path | bytes], private: bool | None, overwrite: bool
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    before = _repository(api, repo, private)
    removed = _in_the_way(before, files, overwrite)
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationAdd(name, file) for name, file in files.items()),
            *(CommitOperationDelete(name) for name in removed),
        ],
        commit_message=f"Upload a merge by ggez-merge {__version__}",
        parent_commit=before.sha,  # nobody else's commit slips in between
    )
    after = _sizes(api.model_info(repo, revision=commit.oid, files_metadata=True))
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    lacking = [name for name, size in sizes.items() if after.get(name) != size]
    if lacking:  # a .gitignore there makes the Hub skip files without a word
        raise Failed(f"{repo}: not all has arrived: {some(lacking, 6)}. Does a .gitignore in the repository name them?")
    return Pushed(
        url=f"{api.endpoint}/{repo}",
        private=bool(before.private),
        changed=commit.oid != before.sha,
        files=tuple(files),
        n_bytes=sum(sizes.values()),
        removed=tuple(removed),
        left_out=tuple(sorted(_names(folder) - {*files})),
    )


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _sizes(info: ModelInfo) -> dict[str, int | None]:
    return {file.rfilename: file.size for file in info.siblings or ()}


def _repository(api: HfApi, repo: str, private: bool | None) -> ModelInfo:
    """The repository as it is now, made if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private is not False)
        return api.model_info(repo, files_metadata=True)
    if private is not None and info.private != private:
        raise Refused(
            Problem(
                f"the repository exists and is {'private' if info.private else 'public'}",
                place=f"{api.endpoint}/{repo}",
                expected="private" if private else "public",
                remedy="change it in the repository's settings, leave the option out, or choose another name",
            )
        )
    return info


def _in_the_way(before: ModelInfo, files: dict[str, Path | bytes], overwrite: bool) -> list[str]:
    """What a loader would find there and is not the new model's, if the repository holds another one.

    Refused then, unless `overwrite`. The same report there means that an earlier push of this very merge got through.
    """
    report = files[REPORT]
    same = isinstance(report, bytes) and hashlib.sha1(b"blob %d\0%b" % (len(report), report)).hexdigest()
    there = {file.rfilename: file.blob_id for file in before.siblings or ()}
    weights = [name for name in there if name.endswith(MODELS)]
    if not weights or there.get(REPORT) == same:
        return []
    if not overwrite:
        raise Refused(
            Problem(
                "the repository holds a model already",
                place=before.id,
                found=some(weights, 6),
                remedy="replace it with --overwrite (its history stays), or choose another name",
            )
        )
    folders = {PurePosixPath(name).parent for name in files}
    left = sorted(name for name in there if name not in files and PurePosixPath(name).parent in folders)
    return [name for name in left if name.endswith(WEIGHTS + CARRIED_SUFFIXES)]


def _told(error: Exception, repo: str) -> UserError:
    """The error in words that help: Refused where the user is not let in, Failed where it may work the next time."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or first_line(error)
    if status == 401:
        remedy = "log in anew with `hf auth login`, or set HF_TOKEN to a token that is valid"
        return Refused(Problem("Hugging Face does not accept your access token", repo, found=said, remedy=remedy))
    if status == 403:
        remedy = "take a token that may write there, or a name of your own (`hf auth whoami` shows yours)"
        return Refused(Problem(f"Hugging Face does not let you write to {repo}", found=said, remedy=remedy))
    if isinstance(error, ValueError) and CARD in said:
        found = " ".join(str(error).split())
        remedy = "mend what stands between the two `---` of the card"
        return Refused(Problem("Hugging Face refuses the model card", CARD, found=found, remedy=remedy))
    cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    return Failed(f"{repo}: not uploaded: {said}{cause}\n{AGAIN}")
