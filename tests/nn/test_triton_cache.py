"""Triton keeps compiled kernels on the host's own disk."""

import os
from types import SimpleNamespace

import pytest
import torch
from kernel_runs import needs_triton

needs_triton()

import triton  # noqa: E402  # needs Triton
from gpu_code import compiled, packing  # noqa: E402  # needs Triton

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton
from tetdist.nn.fast.triton_kernels import keep_kernels_here  # noqa: E402  # needs Triton


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_kernels.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return tmp_path / f"tetdist-{os.getuid()}"


def test_triton_takes_kernels_from_there(folder, monkeypatch):
    hits = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )
    monkeypatch.setattr(triton_kernels, "unpack", lambda values, *_: values / 4)
    triton_kernels.check("neurons", torch.device("cpu"))
    for _ in range(2):
        compiled(packing()[0], 90)
    assert hits == [False, True]
    assert list((folder / "triton").glob("*/*.cubin"))
    assert not folder.stat().st_mode & 0o077


def test_a_folder_of_others_or_without_execution_is_not_used(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
        keep_kernels_here()
    assert "TRITON_CACHE_DIR" not in os.environ
    folder.rmdir()
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    folder.symlink_to(own)
    keep_kernels_here()
    assert "TRITON_CACHE_DIR" not in os.environ
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    keep_kernels_here()
    assert "TRITON_CACHE_DIR" not in os.environ
    # Another user exchanges a link for a folder after the first check.
    monkeypatch.setattr(triton_kernels, "make_private", lambda _: None)
    keep_kernels_here()
    assert "TRITON_CACHE_DIR" not in os.environ
