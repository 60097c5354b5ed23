"""Gradients averaged through shared memory: correct for any shapes, and nothing is left behind."""

import os
import textwrap

import pytest
import tiny
import torch

from tetdist.distributed import shared_memory

# In chunks so small that a tensor takes several, and that several tensors share one.
CODE = """
    import os, resource, socket, sys
    import torch
    from tetdist.distributed import shared_memory
    from tetdist.distributed.world import join

    shared_memory.CHUNK_BYTES = 256  # 32 or 64 numbers
    first = os.environ["RANK"] == "0"
    if sys.argv[1] == "full" and first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    if sys.argv[1] == "other-host" and not first:
        # There, the process of this number is another one, or none.
        socket.gethostname = lambda: "another"

    def tensors(rank, dtype):
        generator = torch.Generator().manual_seed(rank)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)
        image = draw(5, 3, 3, 3).to(memory_format=torch.channels_last)
        return [draw(), draw(7), image, draw(1, 64), draw(0), draw(200), draw(32).double()]

    with join("cpu") as world:
        print("shared", world.shared is not None)
        for dtype in (torch.float32, torch.float64) * 3:
            own = tensors(world.rank, dtype)
            pointers = [t.data_ptr() for t in own]
            groups = [own[:-1], own[-1:]] if world.shared is None else [own]
            for group in groups:
                world.mean_all_(group)
            of_all = [tensors(rank, dtype) for rank in range(world.world_size)]
            for mean, *parts in zip(own, *of_all):
                expected = sum(parts[1:], parts[0]) / world.world_size
                torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)
                assert world.shared is None or torch.equal(mean, expected)
                assert mean.stride() == parts[0].stride()
            assert pointers == [t.data_ptr() for t in own]
        world.mean_all_([torch.empty(0)])
"""


@pytest.mark.parametrize(
    ("processes", "case", "shared"),
    [
        pytest.param(3, "as-is", True, marks=pytest.mark.long),
        (2, "full", False),
        (2, "other-host", False),
    ],
)
def test_mean_over_processes(farm, processes, case, shared, tmp_path):
    command = tiny.python("-c", textwrap.dedent(CODE), case)
    for status, output in farm.side_by_side(processes, command, tmp_path):
        assert status == 0, output
        assert f"shared {shared}" in output


def test_no_file_of_another_host_is_opened(monkeypatch):
    """There, rank 0's process id may belong to another program."""
    opened = []
    monkeypatch.setattr(shared_memory, "_open", lambda path, *_: opened.append(path))
    here = shared_memory.place()
    for i in range(len(here)):
        there = (*here[:i], "another", *here[i + 1 :])
        assert shared_memory.share(1, 2, lambda own, there=there: [there, own]) is None
    assert shared_memory.share(1, 2, lambda own: [None, own]) is None
    assert opened == []


def test_what_is_no_file_of_rank_0_is_left_alone(tmp_path):
    token = bytes(range(16))
    (tmp_path / "small").write_bytes(token)
    with (tmp_path / "without-token").open("wb") as file:
        file.truncate(shared_memory._size(2))
    os.mkfifo(tmp_path / "nobody-writes")
    for name in ("small", "without-token", "nobody-writes", "not-there"):
        assert shared_memory._open(str(tmp_path / name), token, 1, 2) is None
    reads, writes = os.pipe()
    os.write(writes, token)
    assert shared_memory._open(f"/proc/self/fd/{reads}", token, 1, 2) is None
    assert os.read(reads, 100) == token
    os.close(reads)
    os.close(writes)


def test_chunks_of_any_number_of_processes_hold_whole_numbers():
    assert [
        n for n in range(1, 100) if shared_memory._chunk_bytes(n) % torch.float64.itemsize
    ] == []


def test_what_is_not_dense_is_refused():
    dense = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(shared_memory._in_memory_order(dense.transpose(0, 2)), torch.arange(24.0))
    with pytest.raises(RuntimeError):
        shared_memory._in_memory_order(dense[:, :2])
