"""Published weights that can be converted: the table of published.yaml, and their download.

Files are kept in the user's cache folder. The SHA-256 of the first download is stored beside them,
and every later use is compared with it.
"""

import hashlib
import json
import re
import textwrap
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError, typed, without_passwords
from tetdist.storage import files, hub
from tetdist.tables import aligned, number
from tetdist.wording import meant

TABLE = Path(__file__).with_name("published.yaml")
FIGSHARE = "https://api.figshare.com/v2/articles"
_ARTICLE = "figshare:"  # before the number of an article, as a host
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


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


def obtain(one: Published) -> Path:
    """Return the file of a network; it is downloaded unless it is in the cache folder.

    Raises:
        UserError: It cannot be downloaded, or differs from the first download.
    """
    try:
        folder = files.own_cache() / "weights"
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"weights cannot be kept ({error}); set XDG_CACHE_HOME to a folder of your own"
        ) from error
    file, digest = folder / one.file, folder / f"{one.file}.sha256"
    if not file.exists():
        file = _download(one, file)
    with file.open("rb") as stream:
        if _WEB_PAGE.match(stream.read(100)):
            file.unlink()
            raise UserError(
                f"what was saved as {file} is a web page, not weights, and was removed; "
                f"{one.by_hand(file)}"
            )
        stream.seek(0)
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.exists():
        files.write_text(digest, checksum)
    elif digest.read_text() != checksum:
        raise UserError(
            f"{file} differs from the first download of {one.name}; remove it to download it "
            f"again, or remove {digest} to accept it"
        )
    return file


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

    part, address = file.with_name(f"{file.name}.part"), f"{one.host}/{one.file}"
    try:
        md5 = None
        if one.host.startswith(_ARTICLE):
            address, md5 = _on_figshare(one)
        with part.open("ab") as stream:
            http_get(address, stream, resume_size=stream.tell(), displayed_filename=one.file)
    except Exception as error:  # network errors have other classes in each version
        if getattr(getattr(error, "response", None), "status_code", None) == 416:
            part.unlink()  # Nothing follows it: it is complete, or the file is another one now.
            return _download(one, file)
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
    return known[one.file]["download_url"], known[one.file]["computed_md5"]
