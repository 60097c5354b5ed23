"""Files and folders are written whole or not at all, and nothing is left beside them."""

import json
import os
from pathlib import Path

import pytest

from tetdist.errors import UserError
from tetdist.storage import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path, sync):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with files.replacing(file, sync=sync) as stream:
        stream.write(b"new")
        assert names(tmp_path) == [f".a.txt.{os.getpid()}.tmp", "a.txt"]
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    files.write_text(file, "grün\n")
    assert file.read_bytes() == "grün\n".encode()
    files.write_json(file, {"a": [1]})
    assert json.loads(file.read_text()) == {"a": [1]}
    assert names(tmp_path) == ["a.txt"]


def test_after_an_error_all_is_as_before(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail():
        with files.explaining(file), files.replacing(file) as stream:
            stream.write(b"new")
            raise OSError(28, "disk full")

    def stop():
        with files.made_aside(tmp_path / "b") as aside:
            aside.mkdir()
            (aside / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(UserError, match=r"a\.txt cannot be written \(disk full\)"):
        fail()
    with pytest.raises(KeyboardInterrupt):
        stop()
    with pytest.raises(OSError, match="No such file"):
        files.write_text(tmp_path / "none" / "a.txt", "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path, monkeypatch):
    """All of it is on the disk before it has its name, and then the name is."""
    folder, synced, fsync = tmp_path / "b", [], os.fsync

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.relative_to(tmp_path).as_posix(), folder.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    # What a process of the same number has left.
    leftover = tmp_path / f".b.{os.getpid()}.tmp.x"
    (leftover / "old").mkdir(parents=True)
    with files.made_aside(folder, ending=".x") as aside:
        assert aside == leftover
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("text")
        assert not folder.exists()
    written = [leftover.name, f"{leftover.name}/inner", f"{leftover.name}/inner/file"]
    assert sorted(synced) == [(".", True), *((name, False) for name in written)]
    assert names(folder) == ["inner"]
    assert names(tmp_path) == ["b"]
    with pytest.raises(OSError, match="not empty"), files.made_aside(folder) as aside:
        aside.mkdir()
    assert names(tmp_path) == ["b"]


def test_links_are_followed_and_what_is_no_file_is_written_through(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, link, pipe = folder / "a.json", tmp_path / "link.json", tmp_path / "pipe.json"
    link.symlink_to(target)
    for values in ([1], [2]):  # the target is missing, then there
        files.check_writable("--json", link)
        files.write_json(link, values)
        assert json.loads(target.read_text()) == values
    assert link.is_symlink()
    assert names(folder) == ["a.json"]

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.check_writable("--json", pipe)
        files.write_json(pipe, [3])
        assert json.loads(os.read(reader, 100)) == [3]
    finally:
        os.close(reader)
    with pytest.raises(OSError, match="a pipe or a device"), files.made_aside(pipe):
        pass
    assert pipe.is_fifo()

    itself = tmp_path / "itself.json"
    itself.symlink_to(itself)
    for path in (itself, folder, tmp_path / "none" / "a.json"):
        with pytest.raises(UserError, match="--json: cannot write"):
            files.check_writable("--json", path)
    with pytest.raises(OSError, match="symbolic links"):
        files.write_json(itself, [5])
    assert names(tmp_path) == ["elsewhere", "itself.json", "link.json", "pipe.json"]


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files.own_cache().chmod(mode)
    with pytest.raises(files.OthersMayWrite):
        files.own_cache()
