"""Published weights: their table, and their download from hosts on the loopback."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hub_stand_in
import pytest
import timm
import tiny
import torch
from huggingface_hub import constants
from published import Published, sew_layout

from tetdist.apps.weights import published
from tetdist.apps.weights.sources import SOURCES
from tetdist.config.names import NETWORKS
from tetdist.errors import UserError
from tetdist.storage import checkpoint, files, foreign_files

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = b"\xef\xbb\xbf<!DOCTYPE html><html>sign in</html>"
ARTICLE = "/v2/articles/14752998/files?page_size=1000"


class Host(ThreadingHTTPServer):
    """A host of files.

    Attributes:
        files: Content by path, or the status of its refusal; other paths do not exist.
        cuts: Bytes after which the next answer for a path breaks off.
        states: What answers state of a file: its length, and a tag of its content.
        asked: Path and range of each request for content.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes | int] = {}
        self.cuts: dict[str, int] = {}
        self.states = ["Content-Length", "ETag"]
        self.asked: list[tuple[str, str | None]] = []

    def publish(self, name: str, content: bytes, md5: str | None = "") -> None:
        """Show a file at the root, and as one of the article."""
        self.files[f"/{name}"] = content
        md5 = hashlib.md5(content).hexdigest() if md5 == "" else md5
        found = {"name": name, "download_url": f"{self.url}/{name}", "computed_md5": md5}
        self.files[ARTICLE] = json.dumps([found]).encode()


class Answer(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        content = self.server.files.get(self.path, 404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if not isinstance(content, int) and start > 0 and start >= len(content):
            content = 416
        if isinstance(content, int):
            self.send_error(content)
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.describe(content, start)
        self.wfile.write(content[start : self.server.cuts.pop(self.path, len(content))])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.describe(self.server.files.get(self.path, b""), 0)

    def describe(self, content: bytes, start: int) -> None:
        about = {"Content-Length": len(content) - start, "ETag": hashlib.md5(content).hexdigest()}
        for name in self.server.states:
            self.send_header(name, str(about[name]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """Stands for figshare, the hub and GitHub, whose networks have T=3 here."""
    server = Host()
    rows = published.table()
    here = rows | {
        name: replace(row, host=server.url, timesteps=3 if "github" in row.host else row.timesteps)
        for name, row in rows.items()
        if row.host and "figshare" not in row.host
    }
    monkeypatch.setattr(published, "table", lambda: here)
    monkeypatch.setattr(published, "FIGSHARE", f"{server.url}/v2/articles")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tiny.served(server):
        yield server


def test_table_names_networks_that_are_converted_and_is_listed(output_of):
    rows = published.table()
    assert {row.model for row in rows.values()} <= set(NETWORKS)
    assert {row.source for row in rows.values()} <= set(SOURCES)
    assert all(row.top1 is None or 40 < row.top1 < 95 for row in rows.values())
    assert all(row.page.startswith("https://") for row in rows.values())
    assert len({(row.host, row.file) for row in rows.values()}) == len(rows)
    for arguments, complaint in (
        ([], "give FILE, --model and --output, or --fetch NAME, or --list"),
        (["--fetch", "sew_resnet18", "--model", "sew_resnet18"], "leave out --model and --from"),
    ):
        printed = output_of("convert", *arguments, status=2)
        assert complaint in printed
    printed = output_of("convert", "--list")
    assert re.search(r"  sew_resnet34 +4 +66\.66  figshare:14752998/sew34_checkpoint_319", printed)
    assert re.search(r"  sdt_8_384 +4 +72\.28  by hand: https://drive", printed)
    assert "a user measured 74.20 %" in printed
    assert "they were not tried here" in printed
    known = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert set(rows) <= set(known)


@pytest.mark.parametrize(
    ("name", "file", "claim"),
    [
        ("spiking_resnet18", "spiking_resnet_18_checkpoint_319.pth", "61.95 % for ImageNet at T=4"),
        ("maxformer_10_384", "10-384-T4.pth.tar", "77.78 % for ImageNet at T=3"),
        ("i2e_msnet18_cifar10", "cifar10_augmentation.pth.tar", "89.23 % for CIFAR-10 at T=8"),
    ],
)
def test_two_commands_fetch_and_evaluate(name, file, claim, host, output_of, tiny_root, tmp_path):
    if name == "spiking_resnet18":
        torch.manual_seed(0)
        narrow = timm.create_model("resnet18", channels=(4, 8, 16, 32), num_classes=4)
        state, keys = sew_layout(narrow.state_dict(), sew=False), {"width": 4}
    else:
        case = Published("maxformer" if name == "maxformer_10_384" else "i2e_msnet")
        state, keys = case.state(), case.arguments
    torch.save({"model": state, "epoch": 319}, tmp_path / file)
    host.publish(file, (tmp_path / file).read_bytes())
    output = tmp_path / "it.safetensors"
    keys = [f"model.arguments.{key}={value}" for key, value in keys.items()]
    command = ["--fetch", name, *keys, "data.image_size=32", "data.resize=32", "--output"]
    printed = output_of("convert", *command, output)
    assert f"evaluate it: python tools/eval.py {output} --data FOLDER_OF_" in printed
    data = checkpoint.load_model_file(output)[1].config["data"]
    assert data["image_size"] == 32
    assert (data["images_as_events"] or {}).get("ratio") == (0.07 if "i2e" in name else None)
    result = tmp_path / "result.json"
    # In a cache of their own, fused kernels would be compiled anew.
    arguments = ["--data", tiny_root, "--execution", "reference", "--json", result]
    printed = output_of("eval", output, *arguments)
    assert f"published: top-1 {claim} (https://github.com/" in printed
    found = json.loads(result.read_text())
    assert found["published"] == published.named(name).claim
    assert found["timesteps"] == found["published"]["timesteps"]
    number = len(host.asked)
    output_of("convert", *command, tmp_path / "again.safetensors")
    assert len(host.asked) == number


def test_interrupted_downloads_continue_if_the_file_is_the_same(host, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    one, content = published.named("maxformer_10_768"), bytes(range(1, 256)) * 1000
    host.publish(one.file, content)
    host.cuts[f"/{one.file}"] = 100_000
    file, read = published.obtain(one, Path.read_bytes)
    assert read == content
    assert host.asked[0][1] is None
    begun = int(host.asked[1][1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < begun <= 100_000

    def ranges_after(length):
        """Continue where a command was killed that had this much of the first content."""
        part = file.with_name(f"{file.name}.{hashlib.sha256(tag).hexdigest()[:16]}.part")
        part.write_bytes(content[:length])
        file.unlink()
        file.with_name(f"{file.name}.sha256").unlink()
        host.asked.clear()
        assert published.obtain(one, Path.read_bytes)[1] == host.files[f"/{one.file}"]
        assert not list(file.parent.glob("*.part"))
        return [asked for _, asked in host.asked]

    tag = hashlib.md5(content).hexdigest().encode()
    assert ranges_after(70_000) == ["bytes=70000-"]
    assert ranges_after(len(content)) == [f"bytes={len(content)}-"]  # killed before it renamed it
    host.publish(one.file, content[::-1])
    assert ranges_after(70_000) == [None]
    host.states.remove("ETag")
    tag = b""
    assert ranges_after(70_000) == [None]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no article", r"figshare:14752998/sew18_check\S+ cannot be downloaded \(HTTP Error 404"),
        ("other files", r"\(the article has sew34\.pth instead\); repeat .* save it as \S*sew18"),
        ("no file", r"sew18_checkpoint_319\.pth cannot be downloaded \(.*404"),
        (
            "a page by hand",
            r"sdt_8_384\.pth holds more than .* was removed; .*, or download it from",
        ),
        ("no MD5", r"cannot be downloaded \(figshare has not computed its MD5\)"),
        ("416", r"sew18\S+ cannot be downloaded \(.*416 .*; repeat the command to continue, or"),
        ("endless", r"sew18\S+ cannot be downloaded \(it is larger than 0 GB\)"),
        ("damaged", r"sent has another MD5 than figshare's; repeat the command, or download it"),
        ("by hand", r"^sdt_8_384 has no address for programs; download it from https://drive"),
        ("unknown", r"there is no published network sew_resnet35; did you mean sew_resnet50\?"),
        (
            "no cache",
            r"weights cannot be kept \(.*; correct that, or set XDG_CACHE_HOME to a folder",
        ),
    ],
)
def test_failed_downloads_say_what_to_do(name, complaint, host, monkeypatch, tmp_path):
    wanted = "sdt_8_384" if "by hand" in name else "sew_resnet18"
    wanted = "sew_resnet35" if name == "unknown" else wanted
    file = "sew18_checkpoint_319.pth"
    match name:
        case "other files":
            host.publish("sew34.pth", b"weights")
        case "no file":
            host.publish(file, b"weights")
            del host.files[f"/{file}"]
        case "a page by hand":
            folder = files.own_cache() / "weights"
            folder.mkdir()
            (folder / "sdt_8_384.pth").write_bytes(PAGE)
        case "damaged":
            host.publish(file, b"weights", hashlib.md5(b"others").hexdigest())
        case "no MD5":
            host.publish(file, b"weights", None)
        case "416":
            host.publish(file, b"weights")
            host.files[f"/{file}"] = 416
        case "endless":
            host.publish(file, b"weights")
            monkeypatch.setattr(published, "LIMIT", 6)
        case "no cache":
            (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=complaint):
        published.obtain(published.named(wanted), foreign_files.read)
    assert len(host.asked) <= 2
    left = [path for path in tmp_path.rglob("*.*") if path.stat().st_size]
    assert left == []


@pytest.mark.parametrize("ending", ["", ".sha256"])
def test_a_folder_in_the_place_of_a_file_is_named(ending, host):
    one = published.named("maxformer_10_768")
    host.publish(one.file, b"weights")
    folder = files.own_cache() / "weights" / f"{one.file}{ending}"
    folder.mkdir(parents=True)
    complaint = rf"kept \(.* a folder, not a file: '{folder}'\); correct that, or set"
    with pytest.raises(UserError, match=complaint):
        published.obtain(one, Path.read_bytes)


@pytest.mark.parametrize("answer", ["empty", "cut", "an error", "a page"])
def test_a_download_that_is_no_weights_is_neither_kept_nor_remembered(answer, host, tmp_path):
    one = published.named("maxformer_10_768")
    torch.save({"model": {"weight": torch.ones(9)}}, tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    host.states.remove("Content-Length")
    bodies = {"empty": b"", "cut": content[:-99], "an error": b'{"error": 1}', "a page": PAGE}
    host.publish(one.file, bodies[answer])
    begins = re.escape(repr(bodies[answer][:20])[:-1])
    with pytest.raises(
        UserError, match=rf"{one.file} .*begins with {begins}.* was removed; repeat"
    ):
        published.obtain(one, foreign_files.read)
    assert list((files.own_cache() / "weights").iterdir()) == []
    host.publish(one.file, content)
    file, state = published.obtain(one, foreign_files.read)
    assert state["weight"].tolist() == [1] * 9
    digest = file.with_name(f"{one.file}.sha256").read_text()
    assert digest == hashlib.sha256(content).hexdigest()


def test_hub_is_a_host(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = replace(published.named("sew_resnet18"), host="hf:lab/weights", file="it.pth.tar")
    with hub_stand_in.serving(monkeypatch, tmp_path / "home") as hub:
        hub.repositories["lab/weights"] = hub_stand_in.Repository()
        hub.repositories["lab/weights"].commit({"it.pth.tar": b"weights"})
        assert published.obtain(one, Path.read_bytes)[1] == b"weights"
        with pytest.raises(UserError, match=r"lacks this file.*; download it from https:"):
            published.obtain(replace(one, file="other.pth.tar"), Path.read_bytes)


def test_later_uses_are_compared_with_the_first_download(host):
    one = published.named("maxformer_10_768")
    host.publish(one.file, b"weights")
    file, _ = published.obtain(one, Path.read_bytes)
    file.write_bytes(b"weights, damaged")
    differs = rf"{re.escape(str(file))} differs from the first download of maxformer_10_768; remove"
    with pytest.raises(UserError, match=differs):
        published.obtain(one, Path.read_bytes)
    file.unlink()
    host.publish(one.file, b"new weights")
    with pytest.raises(UserError, match=differs):
        published.obtain(one, Path.read_bytes)
    file.with_name(f"{file.name}.sha256").unlink()
    assert published.obtain(one, Path.read_bytes)[1] == b"new weights"
