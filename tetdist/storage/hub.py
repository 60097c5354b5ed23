"""Networks by name: fetching weights, from the Hugging Face hub or the package, and pushing.

Only the weight file of a repository is fetched; its other files are never read. The token is the
one that huggingface_hub finds; it is written nowhere.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tetdist.errors import UserError
from tetdist.storage import bundled

HF = "hf:"  # before the name of a repository, where a path could stand
NAMED = (HF, bundled.TETDIST)
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_NAME = re.compile(rf"{HF}(?P<repo>{_REPOSITORY})(?:@(?P<revision>.+))?")
_TIMEOUT = 30.0  # seconds without a byte of a response
# Files that the hub itself adds to a new repository; a README.md is replaced by the card.
_HUB_FILES = frozenset({".gitattributes", "LICENSE"})


class Pushed(NamedTuple):
    """A push: the address of its page, and its commit."""

    url: str
    commit: str


def is_repository(name: str) -> bool:
    """Return whether a text is ORG/NAME, the name of a repository of the hub."""
    return re.fullmatch(_REPOSITORY, name) is not None


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
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name} is not of the form {HF}ORG/NAME or {HF}ORG/NAME@REVISION")
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo, revision = found["repo"], found["revision"]
    with _explained(name), names_checked(name):
        try:
            if try_to_load_from_cache(repo, file, revision=revision) is None:
                # Without a network, a download retries for 20 seconds; this request fails at once.
                try:
                    found_there = HfApi().get_hf_file_metadata(
                        url=hf_hub_url(repo, file, revision=revision)
                    )
                except (HfHubHTTPError, ValueError):
                    raise  # the hub was reached, or the name is invalid
                except Exception as error:  # of other classes in each version
                    raise _unreachable(name, error) from error
                if found_there.etag is None or found_there.commit_hash is None:
                    raise UserError(
                        f"{_endpoint()} does not answer like a hub for {name}; check HF_ENDPOINT, "
                        "and whether your network has a login page"
                    )
            return Path(HfApi().hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError as error:  # one of EntryNotFoundError's
            raise _unreachable(name, error) from error
        except EntryNotFoundError as error:
            others = ", ".join(sorted(HfApi().list_repo_files(repo, revision=revision)))
            raise UserError(
                f"{name} has no {file}, only {others or 'no file at all'}; choose one with it, "
                "since other weight files may hold code"
            ) from error


@contextmanager
def names_checked(name: str) -> Iterator[None]:
    """Refuse responses of a hub that would make huggingface_hub write outside its cache.

    huggingface_hub uses a response's ETag and commit as names of files and folders.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.errors import HfHubHTTPError

    original = file_download.get_hf_file_metadata

    def check(*values: str | None) -> None:
        for value in values:
            if value and not re.fullmatch(r"[^./\\][^/\\]*", value):
                raise UserError(
                    f"{_endpoint()} gives the path {value!r} as ETag or commit of {name}, which "
                    "would lead out of the cache; fetch it from another HF_ENDPOINT"
                )

    def checked_metadata(*args: Any, **kwargs: Any) -> Any:
        try:
            found = original(*args, **kwargs)
        except HfHubHTTPError as error:
            # The cache also records that a commit lacks a file.
            check(error.response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT))
            raise
        check(found.etag, found.commit_hash)
        return found

    # huggingface_hub requests the metadata anew for each download, so each response is checked.
    file_download.get_hf_file_metadata = checked_metadata
    try:
        yield
    finally:
        file_download.get_hf_file_metadata = original


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} is not in the cache of huggingface_hub, and {_endpoint()} cannot be reached "
        f"({_reason(error)}); fetch it once with a network, or give a file or folder"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def push(folder: Path, repo: str, *, private: bool, message: str) -> Pushed:
    """Upload a folder's files as one commit to a repository, which is made if missing.

    Args:
        folder: Folder of the files, which are then the only ones in the repository.
        private: Make a new repository private; an existing one keeps its setting.

    Raises:
        UserError: The repository holds other files, or it cannot be written to.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"--push: there is no token for {_endpoint()}; log in with `hf auth login`, or set the "
            "variable HF_TOKEN"
        )
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        present = set(api.list_repo_files(repo)) - _HUB_FILES
        others = sorted(present - {path.name for path in folder.iterdir()})
        if others:
            raise UserError(
                f"{repo} holds files that are not of an export ({', '.join(others[:3])}); remove "
                "them there, or choose another --push ORG/NAME"
            )
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return Pushed(destination(repo), str(made.oid))


def destination(repo: str) -> str:
    """Return the destination of a push, for messages."""
    return f"{_endpoint()}/{repo}"


def _endpoint() -> str:
    # The hub, a mirror or a private hub, as set for huggingface_hub.
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into a `UserError`, and silence its warnings."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_session
    from huggingface_hub.utils import logging as hub_logging

    # Without a timeout it waits for a response forever.
    session = get_session()
    timeout, session.timeout = session.timeout, _TIMEOUT
    verbosity = hub_logging.get_verbosity()
    # It warns of each attempt, once in its own handler and once in the command's.
    hub_logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{name} has terms that you must accept first; do so on its page at {_endpoint()}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {name} at {_endpoint()}, or it is private: check the name, and that the "
            "user of `hf auth whoami` can read it"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the repository has no such revision; give one of its branches, tags or "
            "commits after the @, or leave that out"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{_endpoint()} refuses this user's token for {name} (status {status}); check `hf "
                "auth whoami`, and that the token has write permission"
            ) from error
        raise UserError(
            f"{_endpoint()} failed for {name} (status {status}); try again later"
        ) from error
    except Exception as error:  # network errors have other classes in each version
        raise UserError(
            f"{_endpoint()} cannot be reached for {name} ({_reason(error)}); check the network, "
            "and try again"
        ) from error
    finally:
        session.timeout = timeout
        hub_logging.set_verbosity(verbosity)
