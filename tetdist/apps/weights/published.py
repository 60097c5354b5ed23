"""Published weights that can be converted: the table of published.yaml, and their download.

Files are kept in the user's cache folder. The SHA-256 of the first download that could be read is
stored beside them, and every later use is compared with it.
"""

import contextlib
import hashlib
import io
import json
import textwrap
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError, typed, without_passwords
from tetdist.storage import files, hub
from tetdist.tables import aligned, number
from tetdist.wording import meant

TABLE = Path(__file__).with_name("published.yaml")
FIGSHARE = "https://api.figshare.com/v2/articles"
_ARTICLE = "figshare:"  # before the number of an article, as a host
LIMIT = 4e9  # bytes of a file; the largest network takes 1.3 GB with its optimiser's state
State = TypeVar("State")


@dataclass(frozen=True)
class Published:
    """A published network; published.yaml explains the fields.

    Attributes:
        top1: Published accuracy in percent; None: not stated.
        host: None: its files are downloaded by hand.
        link: Page of the file, if it is not ``page``.
        keys: Its keys of the configuration, as ``key=value``.
    """

    name: str
    page: str
    source: str
    data: str
    timesteps: int
    model: str
    file: str
    known: str
    top1: float | None = None
    host: str | None = None
    link: str | None = None
    keys: Sequence[str] = ()

    @property
    def claim(self) -> dict[str, Any]:
        """The claim that an evaluation shows beside its own result."""
        keys = ("top1", "timesteps", "data", "page", "known")
        return {key: getattr(self, key) for key in keys}

    def by_hand(self, file: Path) -> str:
        """Advice for a download by hand."""
        page = self.link or self.page
        return f"download it from {page}, save it as {file} and repeat the command"


@cache
def table() -> dict[str, Published]:
    """Return the published networks by name."""
    networks = {}
    for page, group in read_yaml(TABLE).items():
        for name, own in group.pop("networks").items():
            defaults = {"name": name, "page": page, "model": name, "file": f"{name}.pth"}
            networks[name] = Published(**defaults | group | own)
    return networks


def named(name: str) -> Published:
    if name not in table():
        near = meant(name, table(), f"{typed('convert', '--list')} lists them")
        raise UserError(f"--fetch: there is no published network {name}; {near}")
    return table()[name]


def listing() -> str:
    """Return the table as text."""
    parts = []
    for page, group in groupby(table().values(), key=lambda one: one.page):
        networks = list(group)
        rows = [("NAME", "T", "top-1 %", "file")]
        for one in networks:
            place = f"{one.host}/{one.file}" if one.host else f"by hand: {one.link or page}"
            rows.append((one.name, str(one.timesteps), number(one.top1, ".2f"), place))
        known = textwrap.fill(networks[0].known, 98, initial_indent="  ", subsequent_indent="  ")
        data = ", ".join(dict.fromkeys(one.data for one in networks))
        parts.append(f"{page} ({data})\n{aligned(rows, right=(1, 2))}\n{known}")
    return "\n\n".join(parts)


def obtain(one: Published, read: Callable[[Path], State]) -> tuple[Path, State]:
    """Return the file of a network, downloaded unless it is in the cache folder, and its contents.

    Args:
        read: Returns the contents; a file for which it raises a `UserError` is removed.

    Raises:
        UserError: It cannot be downloaded or read, or differs from the first download.
    """
    try:
        folder = files.own_cache() / "weights"
        folder.mkdir(exist_ok=True)
        file, digest = folder / one.file, folder / f"{one.file}.sha256"
        if not file.exists():
            file = _download(one, file)
        with files.open_file(file) as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            beginning = stream.read(40)
        if digest.exists() and files.read_text(digest) != checksum:
            raise UserError(
                f"{file} differs from the first download of {one.name}; remove it to download it "
                f"again, or remove {digest} to accept it"
            )
        try:
            state = read(file)
        except UserError as error:
            file.unlink()
            digest.unlink(missing_ok=True)
            raise UserError(
                f"{error}. It begins with {beginning!r} and was removed; repeat the command, or "
                f"{one.by_hand(file)}"
            ) from error
        files.write_text(digest, checksum)
    except OSError as error:
        raise UserError(
            f"weights cannot be kept ({error}); correct that, or set XDG_CACHE_HOME to a folder of "
            "your own"
        ) from error
    return file, state


class _Part(io.BufferedWriter):
    """Stream to the file of a download, which ends an answer without an end."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > LIMIT:
            self.truncate(0)
            raise OSError(f"it is larger than {LIMIT / 1e9:.0f} GB")
        return super().write(data)


def _download(one: Published, file: Path) -> Path:
    """Download a file, to ``file`` or the hub's cache; an interrupted download is continued."""
    by_hand = one.by_hand(file)
    if one.host is None:
        raise UserError(f"{one.name} has no address for programs; {by_hand}. {one.known}")
    if one.host.startswith(hub.HF):
        try:
            return hub.fetch(one.host, one.file)
        except UserError as error:
            raise UserError(f"{one.file}: {error}; {by_hand}") from error
    from huggingface_hub.file_download import http_get

    address, md5, begun = f"{one.host}/{one.file}", None, 0
    try:
        if one.host.startswith(_ARTICLE):
            address, md5 = _on_figshare(one)
        version = md5 or _etag(address)
        version_hash = hashlib.sha256(version.encode()).hexdigest()
        part = file.with_name(f"{file.name}.{version_hash[:16]}.part")
        for other in file.parent.glob(f"{file.name}*.part"):
            if not version or other != part:
                other.unlink()
        with _Part(part.open("ab", buffering=0)) as stream:
            begun = stream.tell()
            http_get(address, stream, resume_size=begun, displayed_filename=one.file)
    except Exception as error:  # network errors have other classes in each version
        is_complete = getattr(getattr(error, "response", None), "status_code", None) == 416
        if not (begun and is_complete):
            reason = without_passwords(str(error).partition("\n")[0]) or type(error).__name__
            raise UserError(
                f"{address} cannot be downloaded ({reason}); repeat the command to continue, or "
                f"{by_hand}"
            ) from error
    with part.open("rb") as stream:
        is_damaged = md5 not in (None, hashlib.file_digest(stream, "md5").hexdigest())
    if is_damaged:
        part.unlink()
        raise UserError(
            f"what {address} sent has another MD5 than figshare's; repeat the command, or {by_hand}"
        )
    return part.rename(file)


def _on_figshare(one: Published) -> tuple[str, str]:
    """Return the address and the MD5 of a file."""
    assert one.host is not None
    article = f"{FIGSHARE}/{one.host.removeprefix(_ARTICLE)}/files?page_size=1000"
    with urllib.request.urlopen(article, timeout=30) as answer:
        known = {each["name"]: each for each in json.load(answer)}
    if one.file not in known:
        raise ValueError(f"the article has {', '.join(known)} instead")
    if (md5 := known[one.file]["computed_md5"]) is None:
        raise ValueError("figshare has not computed its MD5")
    return known[one.file]["download_url"], md5


def _etag(address: str) -> str:
    """Return the host's tag of a file's version; empty if it states none."""
    request = urllib.request.Request(address, method="HEAD")
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
        return answer.headers["ETag"] or ""
    return ""
