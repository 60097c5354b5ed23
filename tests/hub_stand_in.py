"""A stand-in for the Hugging Face hub on this machine: the requests that huggingface_hub makes to
create a repository, commit files to it, list them and fetch them. As the real one it takes and
gives weights as LFS objects: by their checksum, beside the commits."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN, OWNER = "hf_of_the_tests", "us"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>[a-z]+)/(?P<revision>[^/]+))?")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})(?P<verify>/verify)?")
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
    """The repositories there are, all requests so far as METHOD PATH, what lies beside them,
    headers that are not as they should be, and a status and headers that answer every request; to
    status 0 nothing is answered until the hub ends."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by their SHA-256
    url: str = ""
    lies: dict[str, str] = field(default_factory=dict)
    broken: tuple[int, dict[str, str]] | None = None
    ended: Event = field(default_factory=Event)

    @property
    def storage(self) -> str:
        """Where objects are: a host of another name, as the real one's."""
        return self.url.replace("127.0.0.1", "localhost")


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def parse_request(self) -> bool:
            if not super().parse_request() or hub.broken is None:
                return hub.broken is None
            status, headers = hub.broken
            if status:
                self._send(status, b"<html></html>", headers | {"Connection": "close"})
            else:
                hub.ended.wait()
                self.close_connection = True
            return False

        def do_GET(self) -> None:
            self._answer_get()

        def do_HEAD(self) -> None:
            self._answer_get()

        def _answer_get(self) -> None:
            path = self._path()
            if found := _OBJECT.fullmatch(path):
                self._send(200, hub.objects[found["oid"]], {})
            elif found := _FILE.fullmatch(path):
                self._file(found["repo"], found["revision"], found["path"])
            elif (found := _API.fullmatch(path)) and found["what"] in (None, "revision", "tree"):
                self._about(found["repo"], found["what"], found["revision"] or "main")
            else:
                self._say(404, {"error": "no such page"})

        def do_POST(self) -> None:
            path = self._path()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path == "/api/validate-yaml":
                self._say(200, {"errors": [], "warnings": []})
            elif not self._is_known():
                self._say(401, {"error": "who is that?"})
            elif found := _BATCH.fullmatch(path):
                self._say_where_to_upload(json.loads(body)["objects"])
            elif found := _OBJECT.fullmatch(path):
                size = len(hub.objects.get(found["oid"], b""))
                self._say(200 if size == json.loads(body)["size"] else 404, {})
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif (found := _API.fullmatch(path)) and found["what"] in ("preupload", "commit"):
                self._write(found["repo"], found["what"], body)
            else:
                self._say(404, {"error": "no such page"})

        def do_PUT(self) -> None:
            found = _OBJECT.fullmatch(self._path())
            data = self.rfile.read(int(self.headers["Content-Length"]))
            # The address is proof enough, as it is of the storage of the real one.
            if found is None or hashlib.sha256(data).hexdigest() != found["oid"]:
                self._say(400, {"error": "no such object"})
                return
            hub.objects[found["oid"]] = data
            self._say(200, {})

        def _say_where_to_upload(self, wanted: list[dict[str, Any]]) -> None:
            """Answer for each object where it is put and verified; nothing where it is there."""
            answers = []
            for one in wanted:
                url = f"{hub.storage}/lfs/{one['oid']}"
                actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
                is_new = one["oid"] not in hub.objects
                answers.append(one | ({"actions": actions} if is_new else {}))
            self._say(200, {"transfer": "basic", "objects": answers})

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
            if not repo.startswith(f"{OWNER}/"):
                self._say(403, {"error": "not yours"})
            elif what == "preupload":
                self._say(
                    200,
                    {
                        "files": [
                            {
                                "path": one["path"],
                                "uploadMode": "lfs" if _is_large(one["path"]) else "regular",
                                "shouldIgnore": False,
                            }
                            for one in json.loads(body)["files"]
                        ]
                    },
                )
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                } | {
                    line["value"]["path"]: hub.objects[line["value"]["oid"]]
                    for line in lines
                    if line["key"] == "lfsFile"
                }
                name = hub.repositories[repo].commit(files)
                url = f"{hub.url}/{repo}/commit/{name}"
                self._say(200, {"success": True, "commitUrl": url, "commitOid": name})

        def _about(self, repo: str, what: str | None, revision: str) -> None:
            found = self._readable(repo, revision)
            if found is None:
                return
            if what == "tree":
                self._say(
                    200,
                    [
                        {
                            "type": "file",
                            "path": path,
                            "size": len(data),
                            "oid": hashlib.sha1(data).hexdigest(),
                        }
                        for path, data in found.items()
                    ],
                )
            else:
                files = [{"rfilename": path} for path in found]
                sha = hub.repositories[repo].hash(revision)
                self._say(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": files})

        def _file(self, repo: str, revision: str, path: str) -> None:
            found = self._readable(repo, revision)
            if found is None:
                return
            commit = {"X-Repo-Commit": hub.repositories[repo].hash(revision) or ""}
            if path not in found:
                self._say(404, {}, {"X-Error-Code": "EntryNotFound"} | commit | hub.lies)
                return
            oid = hashlib.sha256(found[path]).hexdigest()
            if _is_large(path):
                hub.objects[oid] = found[path]
                facts = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(found[path]))}
                facts |= {"Location": f"{hub.storage}/lfs/{oid}"} | commit | hub.lies
                self._send(302, b"", facts)
            else:
                self._send(200, found[path], commit | {"ETag": f'"{oid}"'})

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
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    # huggingface_hub has read the environment when it was imported.
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    # The package hf_xet, where it is installed, would speak another protocol.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    home.mkdir(exist_ok=True)
    (home / "token").write_text(TOKEN)
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
