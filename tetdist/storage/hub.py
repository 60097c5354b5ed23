"""Networks on the Hugging Face hub: their weights fetched by name, a folder pushed as a repository.

Of a repository one file is fetched, that of its weights; what else lies there is never looked at.
The token is the one that huggingface_hub finds where its users keep it; it is nowhere written.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tetdist.errors import UserError

HF = "hf:"  # before the name of a repository, where a path could stand
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"
_NAME = re.compile(rf"{HF}(?P<repo>{_REPOSITORY})(?:@(?P<revision>.+))?")
_PATIENCE = 30.0  # seconds without a byte of an answer
# What a repository that was made on the hub's pages may hold; a README.md is replaced by the card.
_OF_THE_HUB = frozenset({".gitattributes", "LICENSE"})


class Pushed(NamedTuple):
    """A push: the address of its page, and its commit."""

    url: str
    commit: str


def is_repository(name: str) -> bool:
    """Return whether a text is ORG/NAME, the name of a repository of the hub."""
    return re.fullmatch(_REPOSITORY, name) is not None


def fetch(name: str, file: str) -> Path:
    """Download a file of a repository, unless the cache of huggingface_hub has it.

    Args:
        name: ``hf:ORG/NAME``, or ``hf:ORG/NAME@REVISION`` for a branch, a tag or a commit.
        file: Its path in the repository.

    Returns:
        Where it lies in the cache.

    Raises:
        UserError: There is no such thing, or it cannot be reached.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name} is not of the form {HF}ORG/NAME or {HF}ORG/NAME@REVISION")
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    repo, revision = found["repo"], found["revision"]
    with _explained(name), names_checked(name):
        try:
            if try_to_load_from_cache(repo, file, revision=revision) is None:
                # To download what is not in the cache tries again for 20 seconds where there is no
                # network; this asks once.
                try:
                    found_there = HfApi().get_hf_file_metadata(
                        url=hf_hub_url(repo, file, revision=revision)
                    )
                except (HfHubHTTPError, ValueError):
                    raise  # it was reached, or the name is none
                except Exception as error:  # of other classes in each version
                    raise _unreachable(name, error) from error
                if found_there.etag is None or found_there.commit_hash is None:
                    raise UserError(
                        f"{_endpoint()} answers for {name}, but not as a hub does: is it a login "
                        "page of your network, or HF_ENDPOINT wrong?"
                    )
            return Path(HfApi().hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError as error:  # one of EntryNotFoundError's
            raise _unreachable(name, error) from error
        except EntryNotFoundError as error:
            others = ", ".join(sorted(HfApi().list_repo_files(repo, revision=revision)))
            raise UserError(
                f"{name} has no {file}, but {others or 'no file at all'}: only such weights are "
                "taken, since other files may hold code"
            ) from error


@contextmanager
def names_checked(name: str) -> Iterator[None]:
    """Refuse answers of a hub that would have huggingface_hub write outside of its cache.

    It takes the ETag and the commit, as the hub says them, for names of files and folders.

    Raises:
        UserError: One of them is no name.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.errors import HfHubHTTPError

    ask = file_download.get_hf_file_metadata

    def check(*answers: str | None) -> None:
        for answer in answers:
            if answer and not re.fullmatch(r"[^./\\][^/\\]*", answer):
                raise UserError(
                    f"{_endpoint()} names the path {answer!r} as ETag or commit of {name}, which "
                    "would lead out of the cache; fetch it from another HF_ENDPOINT"
                )

    def ask_and_check(*args: Any, **kwargs: Any) -> Any:
        try:
            found = ask(*args, **kwargs)
        except HfHubHTTPError as error:
            # If a commit has no such file, the cache keeps that, too.
            check(error.response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT))
            raise
        check(found.etag, found.commit_hash)
        return found

    # huggingface_hub asks for each download itself, so that no earlier answer can be relied on.
    file_download.get_hf_file_metadata = ask_and_check
    try:
        yield
    finally:
        file_download.get_hf_file_metadata = ask


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} is not in the cache of huggingface_hub, and {_endpoint()} cannot be reached "
        f"({_reason(error)}); fetch it once where there is a network, or give a file or folder"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def push(folder: Path, repo: str, *, private: bool, message: str) -> Pushed:
    """Upload a folder's files as one commit, to a repository that is made if there is none.

    Args:
        folder: Its files, and no others, are what the repository then holds.
        repo: ``ORG/NAME``.
        private: Whether a new repository is; one that exists stays as it is.
        message: Of the commit.

    Raises:
        UserError: The repository holds something else, or it cannot be written to.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"--push: there is no token of {_endpoint()}; log in with `hf auth login`, or set the "
            "variable HF_TOKEN"
        )
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        present = set(api.list_repo_files(repo)) - _OF_THE_HUB
        others = sorted(present - {path.name for path in folder.iterdir()})
        if others:
            raise UserError(
                f"{repo} holds other files than an export ({', '.join(others[:3])}), which would "
                "stay beside it; remove them there, or choose another --push ORG/NAME"
            )
        made = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return Pushed(destination(repo), str(made.oid))


def destination(repo: str) -> str:
    """Return the destination of a push, for messages."""
    return f"{_endpoint()}/{repo}"


def _endpoint() -> str:
    # A mirror or a hub of one's own, as for huggingface_hub itself.
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a sentence, which its warnings are left out before.

    Raises:
        UserError: Something was raised.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_session
    from huggingface_hub.utils import logging as hub_logging

    # Without a timeout it waits for an answer forever.
    session = get_session()
    timeout, session.timeout = session.timeout, _PATIENCE
    verbosity = hub_logging.get_verbosity()
    # It warns of each attempt, once by its own handler and once by that of the command.
    hub_logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{name} asks its users to agree to something first: do so on its page at {_endpoint()}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no {name} at {_endpoint()}, or it is private: see that the name is right, "
            "and that `hf auth whoami` says somebody who may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the repository has no such revision; leave out what is after the @, or name "
            "a branch, a tag or a commit of it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{_endpoint()} does not let this user's token do that to {name} (status "
                f"{status}); see `hf auth whoami`, and that the token is one that may write"
            ) from error
        raise UserError(
            f"{_endpoint()} did not answer as it should for {name} (status {status}); try again "
            "later"
        ) from error
    except Exception as error:  # those of the network are of other classes in each version
        raise UserError(
            f"{_endpoint()} could not be asked for {name} ({_reason(error)}); see that there is a "
            "network, and try again"
        ) from error
    finally:
        session.timeout = timeout
        hub_logging.set_verbosity(verbosity)
