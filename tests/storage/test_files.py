"""Files and folders are written whole or not at all, and nothing is left beside them."""

import json
import os
from pathlib import Path

import pytest

from tetdist.errors import UserError
from tetdist.storage import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path, sync: bool) -> None:
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


def test_after_an_error_all_is_as_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail() -> None:
        with files.explaining(file), files.replacing(file) as stream:
            stream.write(b"new")
            raise OSError(28, "disk full")

    def stop() -> None:
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


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    # What a process of the same number has left.
    leftover = tmp_path / f".b.{os.getpid()}.tmp.x"
    (leftover / "old").mkdir(parents=True)
    with files.made_aside(folder, ending=".x") as aside:
        assert aside == leftover
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("text")
        assert not folder.exists()
    assert names(folder) == ["inner"]
    assert names(tmp_path) == ["b"]
    with pytest.raises(OSError, match="not empty"), files.made_aside(folder) as aside:
        aside.mkdir()
    assert names(tmp_path) == ["b"]
