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
from tetdist.storage import checkpoint, files

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = b"\n<!DOCTYPE html><html>sign in</html>"
ARTICLE = "/v2/articles/14752998/files?page_size=1000"


class Host(ThreadingHTTPServer):
    """A host of files.

    Attributes:
        files: Content by path; other paths do not exist.
        cuts: Bytes after which the next answer for a path breaks off.
        asked: Path and range of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []

    def publish(self, name: str, content: bytes, md5: str | None = None) -> None:
        """Show a file at the root, and as one of the article."""
        self.files[f"/{name}"] = content
        md5 = md5 or hashlib.md5(content).hexdigest()
        found = {"name": name, "download_url": f"{self.url}/{name}", "computed_md5": md5}
        self.files[ARTICLE] = json.dumps([found]).encode()


class Answer(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        if self.path not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cuts.pop(self.path, len(content))])

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


def test_interrupted_downloads_continue(host, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    one, content = published.named("maxformer_10_768"), bytes(range(1, 256)) * 1000
    host.publish(one.file, content)
    host.cuts[f"/{one.file}"] = 100_000
    file = published.obtain(one)
    assert file.read_bytes() == content
    assert host.asked[0][1] is None
    begun = int(host.asked[1][1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < begun <= 100_000

    # By another command, after the first one was killed.
    file.rename(file.with_name(f"{file.name}.part"))
    with file.with_name(f"{file.name}.part").open("r+b") as part:
        part.truncate(70_000)
    assert published.obtain(one).read_bytes() == content
    assert host.asked[-1][1] == "bytes=70000-"

    # By another command, which was killed before it renamed the complete file.
    file.rename(file.with_name(f"{file.name}.part"))
    assert published.obtain(one).read_bytes() == content
    assert [asked for _, asked in host.asked[-2:]] == [f"bytes={len(content)}-", None]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no article", r"figshare:14752998/sew18_check\S+ cannot be downloaded \(HTTP Error 404"),
        ("other files", r"\(the article has sew34\.pth instead\); repeat .* save it as \S*sew18"),
        ("no file", r"sew18_checkpoint_319\.pth cannot be downloaded \(.*404"),
        ("a page", r"sew18\S+ is a web page, not weights, and was removed; download it from"),
        ("a page by hand", r"sdt_8_384\.pth is a web page, not weights, and was removed; download"),
        ("damaged", r"sent has another MD5 than figshare's; repeat the command, or download it"),
        ("by hand", r"^sdt_8_384 has no address for programs; download it from https://drive"),
        ("unknown", r"there is no published network sew_resnet35; did you mean sew_resnet50\?"),
        ("no cache", r"weights cannot be kept \(.*; set XDG_CACHE_HOME to a folder of your own"),
    ],
)
def test_failed_downloads_say_what_to_do(name, complaint, host, tmp_path):
    wanted = "sdt_8_384" if "by hand" in name else "sew_resnet18"
    wanted = "sew_resnet35" if name == "unknown" else wanted
    file = "sew18_checkpoint_319.pth"
    match name:
        case "other files":
            host.publish("sew34.pth", b"weights")
        case "no file":
            host.publish(file, b"weights")
            del host.files[f"/{file}"]
        case "a page":
            host.publish(file, PAGE)
        case "a page by hand":
            folder = files.own_cache() / "weights"
            folder.mkdir()
            (folder / "sdt_8_384.pth").write_bytes(PAGE)
        case "damaged":
            host.publish(file, b"weights", hashlib.md5(b"others").hexdigest())
        case "no cache":
            (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=complaint):
        published.obtain(published.named(wanted))
    left = [path for path in tmp_path.rglob("*.*") if path.stat().st_size]
    assert left == []


def test_hub_is_a_host(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = replace(published.named("sew_resnet18"), host="hf:lab/weights", file="it.pth.tar")
    with hub_stand_in.serving(monkeypatch, tmp_path / "home") as hub:
        hub.repositories["lab/weights"] = hub_stand_in.Repository()
        hub.repositories["lab/weights"].commit({"it.pth.tar": b"weights"})
        assert published.obtain(one).read_bytes() == b"weights"
        with pytest.raises(UserError, match=r"lacks this file.*; download it from https:"):
            published.obtain(replace(one, file="other.pth.tar"))


def test_later_uses_are_compared_with_the_first_download(host):
    one = published.named("maxformer_10_768")
    host.publish(one.file, b"weights")
    file = published.obtain(one)
    file.write_bytes(b"weights, damaged")
    differs = rf"{re.escape(str(file))} differs from the first download of maxformer_10_768; remove"
    with pytest.raises(UserError, match=differs):
        published.obtain(one)
    file.unlink()
    host.publish(one.file, b"new weights")
    with pytest.raises(UserError, match=differs):
        published.obtain(one)
    file.with_name(f"{file.name}.sha256").unlink()
    assert published.obtain(one).read_bytes() == b"new weights"
