"""Processes of a host compile each of Triton's kernels once, on its own disk."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_runs import needs_triton
from tiny import wait_until

needs_triton()

import triton  # noqa: E402  # needs Triton
from gpu_code import compiled, packing  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_cache, triton_kernels  # noqa: E402  # needs Triton
from tetdist.nn.fast.triton_cache import CompiledOnce  # noqa: E402  # needs Triton


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path / f"tetdist-{os.getuid()}"


def is_locked(folder):
    with (folder / "compiling").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def blocked():
    """Return how many threads of this process wait for a lock."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sum("->" in lock and str(os.getpid()) in lock for lock in locks)


@pytest.mark.parametrize("of_kernel", [True, False])
def test_others_wait_for_what_one_compiles(of_kernel):
    """A kernel's files, or a library by which it is launched."""
    triton_cache.use()

    def get(cache):
        return cache.get_group("a.json") if of_kernel else cache.get_file("a.json")

    first = CompiledOnce("kernel")
    folder = Path(first.cache_dir)
    assert get(first) is None
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(lambda: get(CompiledOnce("kernel"))) for _ in range(2)]
        # Another kernel is not waited for; a compilation that failed is left to the next one.
        for _ in range(2):
            assert get(CompiledOnce("other")) is None
        # One that asked after the file is there would not wait.
        wait_until(lambda: blocked() == 2, 60)
        made = first.put("{}", "a.json")
        if of_kernel:
            first.put_group("a.json", {"a.json": made})
            made = {"a.json": made}
        assert is_locked(folder)
        assert not any(one.done() for one in waiting)
        del first
        assert [one.result(timeout=60) for one in waiting] == [made, made]
    assert not is_locked(folder)


def test_a_disk_without_locks_is_used_all_the_same(monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(triton_cache.fcntl, "flock", refuse)
    triton_cache.use()
    kernel = CompiledOnce("kernel")
    assert kernel.get_group("a.json") is None
    kernel.put_group("a.json", {"a.json": kernel.put("{}", "a.json")})
    assert CompiledOnce("kernel").get_group("a.json")


def test_triton_takes_kernels_from_there(folder, monkeypatch):
    locked, hits = [], []
    put_group = CompiledOnce.put_group

    def note(self, *arguments):
        locked.append(is_locked(Path(self.cache_dir)))
        return str(put_group(self, *arguments))

    monkeypatch.setattr(CompiledOnce, "put_group", note)
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )
    monkeypatch.setattr(triton_kernels, "unpack", lambda values, *_: values / 4)
    triton_kernels.check(torch.device("cpu"))
    for _ in range(2):
        compiled(packing()[0], 90)
        assert not any(is_locked(file.parent) for file in folder.glob("triton/*/compiling"))
    assert (locked, hits) == ([True], [False, True])
    assert list((folder / "triton").glob("*/*.cubin"))
    assert not folder.stat().st_mode & 0o077


def test_a_folder_of_others_or_without_execution_is_not_used(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
        triton_cache.use()
    assert "TRITON_CACHE_DIR" not in os.environ
    folder.rmdir()
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    folder.symlink_to(own)
    triton_cache.use()
    assert "TRITON_CACHE_DIR" not in os.environ
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    triton_cache.use()
    assert "TRITON_CACHE_DIR" not in os.environ
