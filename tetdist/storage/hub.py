"""Networks by name: fetching weights, from the Hugging Face hub or the package, and pushing.

Only the weight file of a repository is fetched; its other files are never read. The token is the
one that huggingface_hub finds; it is written nowhere.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub  # which loads its parts when they are used
from huggingface_hub import constants

from tetdist.errors import UserError, typed
from tetdist.storage import bundled
from tetdist.wording import meant_path

HF = "hf:"  # before the name of a repository, where a path could stand
NAMED = (HF, bundled.TETDIST)
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_NAME = re.compile(rf"{HF}(?P<repo>{_REPOSITORY})(?:@(?P<revision>.+))?")
# Files that the hub itself adds to a new repository; a README.md is replaced by the card.
_HUB_FILES = frozenset({".gitattributes", "LICENSE"})


class Pushed(NamedTuple):
    """A push: the address of its page, and its commit."""

    url: str
    commit: str


def is_repository(name: str) -> bool:
    """Return whether a text is ORG/NAME, the name of a repository of the hub."""
    return re.fullmatch(_REPOSITORY, name) is not None


def check_source(path: Path) -> Path:
    """Refuse what is no checkpoint, without the hub; return the path, or tetdist:NAME's folder."""
    if str(path).startswith(bundled.TETDIST):
        return bundled.folder(str(path))
    if not str(path).startswith(HF):
        give = "give a run folder or a .safetensors file"
        if not path.exists():
            near = meant_path(Path("runs", path.name), meant_path(path, give))
            if (name := f"{bundled.TETDIST}{path.name}") in bundled.names():
                near = f"did you mean {name}?"
            raise UserError(f"there is no checkpoint {path}; {near}")
        if runs := [str(one.parent) for one in sorted(path.glob("*/checkpoints"))]:
            raise UserError(f"{path} holds runs; give one, such as {', '.join(runs[:9])}")
        if Path(path, "train").is_dir() or Path(path, "val").is_dir():
            raise UserError(f"{path} is a data folder, no checkpoint; {give}")
        if path.is_file() and path.suffix != ".safetensors":
            converts = f"`{typed('convert')}` converts other libraries' weights"
            raise UserError(f"{path} is no checkpoint; {give} ({converts})")
    return path


def fetch(name: str, file: str) -> Path:
    """Return a file of a network; one of a repository is downloaded unless it is in the cache.

    Args:
        name: ``tetdist:NAME``, ``hf:ORG/NAME``, or ``hf:ORG/NAME@REVISION`` for a branch, a tag or
            a commit.
        file: Its path in the folder or repository.

    Raises:
        UserError: It does not exist, or cannot be reached.
    """
    if name.startswith(bundled.TETDIST):
        return bundled.folder(name) / file
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"{name} is not of the form {HF}ORG/NAME or {HF}ORG/NAME@REVISION")
    with _explained(name):
        fetched = huggingface_hub.hf_hub_download(parts["repo"], file, revision=parts["revision"])
    return Path(fetched)


def push(folder: Path, repo: str, *, private: bool, message: str) -> Pushed:
    """Upload a folder's files as one commit to a repository, which is made if missing.

    Args:
        folder: Folder of the files, which are then the only ones in the repository.
        private: Make a new repository private; an existing one keeps its setting.

    Raises:
        UserError: The repository holds other files, or it cannot be written to.
    """
    api = huggingface_hub.HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        present = set(api.list_repo_files(repo)) - _HUB_FILES
    if others := sorted(present - {path.name for path in folder.iterdir()}):
        raise UserError(
            f"{repo} holds files that are not of an export ({', '.join(others[:3])}); remove "
            "them there, or choose another --push ORG/NAME"
        )
    with _explained(repo):
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return Pushed(destination(repo), str(made.oid))


def destination(repo: str) -> str:
    """Return the destination of a push, for messages."""
    # The hub, a mirror or a private hub, as set for huggingface_hub.
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into a `UserError`."""
    from huggingface_hub import errors

    # The first kind that fits counts; the later ones are more general.
    advice = {
        errors.GatedRepoError: "has terms that you must accept first; do so on its page",
        errors.RepositoryNotFoundError: "does not exist, or is private: check the name, and that "
        "the user of `hf auth whoami` can read it",
        errors.RevisionNotFoundError: "has no such revision; give one of its branches, tags or "
        "commits after the @, or leave that out",
        errors.LocalEntryNotFoundError: "is not in the cache of huggingface_hub, and cannot be "
        "fetched; fetch it once with a network, or give a file or folder",
        errors.EntryNotFoundError: "lacks this file; choose a repository with it, since other "
        "weight files may hold code",
        errors.HfHubHTTPError: "refuses this; check `hf auth whoami`, and that the token has write "
        "permission",
        Exception: "cannot be reached; check the network, and try again",
    }
    try:
        yield
    except Exception as error:  # network errors have other classes in each version
        what = next(text for kind, text in advice.items() if isinstance(error, kind))
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{destination(name.removeprefix(HF))} {what} ({reason})") from error
