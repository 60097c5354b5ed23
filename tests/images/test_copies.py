"""Copies of shards on a host's own disk: made, verified and read, or the original is read."""

import contextlib
import errno
import os
import platform
import signal
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import tiny

from tetdist.apps.images import copies
from tetdist.apps.images.shards import shard_split
from tetdist.datasets import index as ix
from tetdist.datasets import reader
from tetdist.storage.files import only_writer


@pytest.fixture(scope="module")
def shards(tiny_root, tmp_path_factory):
    dest = tmp_path_factory.mktemp("shards") / "data"
    for split in ("train", "val"):
        file = ix.index_file(tiny_root / "index", split)
        shard_split(file, tiny_root, dest, seed=0, max_bytes=16 * 1024, workers=1)
    return dest


@pytest.fixture
def opened(monkeypatch):
    """Archives that samples were read from."""
    files = []
    actual = os.open

    def spy(path, *options):
        files.append(Path(path))
        return actual(path, *options)

    monkeypatch.setattr(reader, "os", SimpleNamespace(**vars(os) | {"open": spy}))
    return files


def tars(folder):
    found = sorted(folder.rglob("*.tar"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def test_a_host_reads_verified_copies_and_trains_the_same(
    farm, main, tiny_config, shards, tmp_path, opened, monkeypatch
):
    file = tiny_config({"data.root": str(shards)})
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert farm(file, "name=plain", world=2).status == 0
    outcome = farm(file, f"data.cache={tmp_path}/scratch", "name=copied", world=2)
    assert (outcome.status, "were not copied" in outcome.text) == (0, False), outcome.text
    tiny.assert_same_run(tmp_path / "runs/plain", tmp_path / "runs/copied")
    (folder,) = (tmp_path / "scratch").iterdir()
    assert folder.name.startswith("data-")
    assert tars(folder) == tars(shards)
    # Another start of the same run may have other copies, or none.
    outcome = main(file, "name=third", "max_steps=3", "data.cache=$SCRATCH")
    assert outcome.status == 0, outcome.text
    assert {path.is_relative_to(folder) for path in opened} == {True}
    opened.clear()
    outcome = main(file, "name=third", "max_steps=4")
    assert outcome.status == 0, outcome.text
    assert {path.is_relative_to(shards) for path in opened} == {True}


def copy(shards, folder):
    done = []
    reason = copies._copy_all(shards, folder, list(tars(shards)), Event(), done)
    assert reason or sum(done[1:]) == done[0] == sum(map(len, tars(shards).values()))
    return reason


def test_damaged_old_and_unfinished_copies_are_made_again(shards, tmp_path, caplog):
    source, folder = tmp_path / "source", tmp_path / "copies"
    for name, data in tars(shards).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    folder.mkdir()
    assert copy(source, folder) is None
    kept, damaged, old, gone, *_ = tars(folder)
    written = {name: (folder / name).stat().st_mtime_ns for name in tars(folder)}
    with (folder / damaged).open("r+b") as stream:
        stream.write(b"\xff")
    (source / old).write_bytes((source / old).read_bytes()[::-1])
    (folder / gone).unlink()
    (folder / "train" / ".train-000000.tar.1.tmp").write_bytes(b"of a killed process")
    assert copy(source, folder) is None
    (message,) = caplog.messages
    assert message.startswith(f"{platform.node()}: {folder / damaged} has changed since it was")
    assert tars(folder) == tars(source)
    assert not list(folder.rglob(".*.tmp"))
    again = [name for name in written if (folder / name).stat().st_mtime_ns != written[name]]
    assert (kept in again, again) == (False, [damaged, old, gone])


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (("shutil.disk_usage", lambda _: SimpleNamespace(free=100)), "MB, but its disk has 0.0 MB"),
        (("tetdist.storage.files.settle", no_space), "cannot be written (No space left on device)"),
        (
            ("tetdist.storage.files.settle", lambda stream: os.truncate(stream.name, 5)),
            "differs from what was written: its disk is faulty",
        ),
        (None, "another process is writing to "),
    ],
)
def test_a_host_that_cannot_copy_reads_the_original(
    fault, words, shards, tmp_path, monkeypatch, main, tiny_config, opened
):
    file = tiny_config({"data.root": str(shards), "data.cache": str(tmp_path / "scratch")})
    folder = copies._folder(shards, str(tmp_path / "scratch"))
    if fault:
        monkeypatch.setattr(*fault)
    with contextlib.nullcontext() if fault else only_writer(folder):
        outcome = main(file, "max_steps=1")
    assert outcome.status == 0, outcome.text
    assert f"the data are read from {shards}, since they were not copied: " in outcome.text
    assert words in outcome.text
    assert {path.is_relative_to(shards) for path in opened} == {True}
    assert tars(folder) == {}


@pytest.mark.parametrize(
    ("root", "cache", "words"),
    [
        ("tiny_root", "/scratch", "data.cache copies tar files, and "),
        ("shards", "scratch", "data.cache=scratch is not an absolute path on "),
        ("shards", "$NOT_SET/x", "data.cache=$NOT_SET/x is not an absolute path on "),
        ("shards", "/proc/x", "cannot be written ("),
    ],
)
def test_what_cannot_be_copied_or_written_to_is_refused(
    root, cache, words, request, main, tiny_config
):
    file = tiny_config({"data.root": str(request.getfixturevalue(root))})
    outcome = main(file, f"data.cache={cache}")
    assert (outcome.status, words in outcome.text) == (2, True), outcome.text


def test_stopped_while_it_copies(shards, tmp_path, monkeypatch, main, tiny_config):
    """A slow disk; the job's requeueing needs the status of the signal."""

    def wait(_):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopped.wait(60)

    stopped = Event()
    monkeypatch.setattr("tetdist.storage.files.settle", wait)
    monkeypatch.setattr(copies, "Event", lambda: stopped)
    file = tiny_config({"data.root": str(shards), "data.cache": str(tmp_path / "scratch")})
    outcome = main(file)
    assert outcome.status == 128 + signal.SIGUSR1, outcome.text
    assert "stopped at step 0, all saved; the same command continues" in outcome.text
    monkeypatch.undo()
    assert not list((tmp_path / "scratch").rglob("*.t*"))
