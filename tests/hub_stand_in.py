"""A stand-in for the Hugging Face hub on this machine: the requests that huggingface_hub makes to
create a repository, commit files to it, list them and fetch them."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
from huggingface_hub import constants

TOKEN, OWNER = "hf_of_the_tests", "us"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>[a-z]+)/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """The files after each commit, by its hash."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.files("main") or {}
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = before | files
        return name

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.hash(revision) or "")

    def hash(self, revision: str) -> str | None:
        """The commit that a revision is; None: there is no such revision."""
        if revision == "main":
            return list(self.commits)[-1] if self.commits else None
        return revision if revision in self.commits else None


@dataclass
class Hub:
    """The repositories there are, and all requests so far as METHOD PATH."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def do_GET(self) -> None:
            path = self._path()
            if found := _FILE.fullmatch(path):
                self._file(**found.groupdict())
            elif found := _API.fullmatch(path):
                self._list(found["repo"], found["revision"])
            else:
                self._say(404, {"error": "no such page"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = self._path()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path == "/api/validate-yaml":
                self._say(200, {"errors": [], "warnings": []})
            elif not self._is_known():
                self._say(401, {"error": "who is that?"})
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif found := _API.fullmatch(path):
                self._write(found["repo"], found["what"], body)

        def _create(self, wanted: dict[str, Any]) -> None:
            owner = wanted.get("organization") or OWNER
            name = f"{owner}/{wanted['name']}"
            if owner != OWNER:
                self._say(403, {"error": "not yours"})
            elif name in hub.repositories:
                self._say(409, {"error": "is there", "url": f"{hub.url}/{name}"})
            else:
                private = wanted.get("private") or wanted.get("visibility") == "private"
                hub.repositories[name] = Repository(bool(private))
                hub.repositories[name].commit({".gitattributes": b""})
                self._say(200, {"url": f"{hub.url}/{name}"})

        def _write(self, repo: str, what: str, body: bytes) -> None:
            if what == "preupload":
                # The real one takes large files as objects of LFS, apart from the commit.
                rest = {"uploadMode": "regular", "shouldIgnore": False}
                files = [{"path": one["path"]} | rest for one in json.loads(body)["files"]]
                self._say(200, {"files": files})
                return
            values = [line["value"] for line in map(json.loads, body.splitlines())]
            sent = {
                one["path"]: base64.b64decode(one["content"]) for one in values if "path" in one
            }
            name = hub.repositories[repo].commit(sent)
            url = f"{hub.url}/{repo}/commit/{name}"
            self._say(200, {"success": True, "commitUrl": url, "commitOid": name})

        def _list(self, repo: str, revision: str) -> None:
            if (found := self._readable(repo, revision)) is not None:
                rest = {"type": "file", "size": 1, "oid": "0"}
                self._say(200, [{"path": path} | rest for path in found])

        def _file(self, repo: str, revision: str, path: str) -> None:
            found = self._readable(repo, revision)
            if found is None:
                return
            commit = {"X-Repo-Commit": hub.repositories[repo].hash(revision) or ""}
            if path not in found:
                self._say(404, {}, {"X-Error-Code": "EntryNotFound"} | commit)
                return
            etag = hashlib.sha256(found[path]).hexdigest()
            self._send(200, found[path], commit | {"ETag": f'"{etag}"'})

        def _readable(self, repo: str, revision: str) -> dict[str, bytes] | None:
            """The files of a revision; None after an answer of 404."""
            there = hub.repositories.get(repo)
            if there is None or (there.private and not self._is_known()):
                self._say(404, {}, {"X-Error-Code": "RepoNotFound"})
                return None
            files = there.files(revision)
            if files is None:
                self._say(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return files

        def _is_known(self) -> bool:
            return self.headers["Authorization"] == f"Bearer {TOKEN}"

        def _path(self) -> str:
            hub.requests.append(f"{self.command} {self.path}")
            return unquote(urlsplit(self.path).path)

        def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(value).encode(), headers or {})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """A hub on the loopback, which is huggingface_hub's for as long, with its cache and token.

    Args:
        home: Stands for the user's folder of huggingface_hub.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    point_to(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    # The package hf_xet, where it is installed, would speak another protocol.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    home.mkdir(exist_ok=True)
    (home / "token").write_text(TOKEN)
    with tiny.served(server):
        yield hub


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub, which read the environment when it was imported, use another hub."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
