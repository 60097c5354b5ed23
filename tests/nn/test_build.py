"""Libraries of kernels in the user's cache: built once, and loaded only if they can be trusted."""

import os
import shutil
import tempfile
from ctypes import CDLL

import pytest
from kernel_runs import needs_compiler

from tetdist.nn.fast import build


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The sources, of which one is tiny; the cache; and what serves where there is no cache."""
    needs_compiler(shutil.which("g++"))
    sources, passing = tmp_path / "kernels", tmp_path / "passing"
    sources.mkdir()
    passing.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "KERNELS", sources)
    monkeypatch.setattr(tempfile, "tempdir", str(passing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build._warn_of.cache_clear()
    return tmp_path / "tetdist", passing


def test_a_library_is_built_once_while_it_is_whole_and_ours(folders, monkeypatch, caplog):
    cache, passing = folders
    caplog.set_level("INFO")
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(fsync(file)))

    def load(**environment):
        caplog.clear()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert build.load_library("one").one() == 1
        return caplog.messages

    compiling = f"compiling kernels/one.cpp, once (into {cache})"
    assert load() == [compiling]
    (library,) = cache.iterdir()
    assert (library.suffix, library.stat().st_mode & 0o777) == (".so", 0o700)
    assert load() == []
    assert load(CXX="no-such-compiler") == []
    beginning = library.read_bytes()[:1000]  # what a full disk leaves of it; to load it is a crash
    library.unlink()
    library.write_bytes(beginning)
    assert load() == [f"{library} is damaged and is rebuilt", compiling]
    library.chmod(0o777)
    assert load() == [f"{library} is writable by other users and is rebuilt", compiling]
    assert load(CXX="env g++") == [compiling]  # another command
    (build.KERNELS / "types.h").write_text("// new")
    assert load() == [compiling]
    with monkeypatch.context() as patch:  # machines may share a home folder
        patch.setattr(build, "processor", lambda: "flags: avx2")
        assert load() == [compiling]
    assert len(synced) == 6
    cache.chmod(0o777)
    warning, last = load()
    assert warning == (
        f"{cache} can be changed by other users, so kernels are not loaded from it but compiled at "
        f"every start; set XDG_CACHE_HOME to a folder of your own, or run `chmod go-w {cache}`, "
        "if it is yours"
    )
    assert last.startswith(f"compiling kernels/one.cpp, once (into {passing}/tetdist-kernels-")
    assert list(passing.iterdir()) == []


def test_a_link_that_another_user_exchanges_leads_to_no_other_code(folders, monkeypatch, caplog):
    own, _ = folders
    assert build.load_library("one").one() == 1
    (library,) = own.iterdir()
    planted, link, load = own.with_name("planted"), own.with_name("link") / "tetdist", CDLL
    planted.mkdir()
    (planted / "two.cpp").write_text('extern "C" int one() { return 2; }')
    build._run("g++", "-shared", str(planted / "two.cpp"), "-o", str(planted / library.name))
    link.parent.mkdir()
    link.symlink_to(own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link.parent))

    def exchange_and_load(path):
        link.unlink()
        link.symlink_to(planted)
        return load(path)

    with monkeypatch.context() as patch:  # after the check of the library
        patch.setattr(build.ctypes, "CDLL", exchange_and_load)
        assert build.load_library("one").one() == 1
    planted.chmod(0o777)
    monkeypatch.setattr(build, "own_cache", lambda: link)  # after its check of the folder
    assert build.load_library("one").one() == 1
    assert f"{link} can be changed by other users" in caplog.text
