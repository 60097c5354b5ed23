"""Processes join, agree to stop after the same step, and fail together."""

import os
import re
import signal
import textwrap
from unittest.mock import Mock

import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import LAUNCHED

from tetdist.distributed.signals import StopRequest, let_go_of_closed_streams
from tetdist.distributed.world import World, join
from tetdist.errors import UserError


@pytest.mark.parametrize("absent", LAUNCHED)
def test_partly_set_environment(absent, monkeypatch):
    for name, value in zip(LAUNCHED, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
        if name != absent:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"is incomplete: .* set, but not {absent};"):
        join("cpu")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_alone_in_spite_of_a_stray_variable(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with join("cpu") as world:
        assert (world.rank, world.world_size) == (0, 1)
        assert world.sum([1.5, 2.0]) == [1.5, 2.0]
        assert world.from_rank_0("x") == "x"
        with world.together():
            alone = 3
        assert alone == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("RANK", "1"), ("RANK", "x"), ("LOCAL_RANK", "-1")]
    + [("MASTER_PORT", text) for text in ("abc", "99999", "0", "9" * 5000)],
)
def test_numbers_of_the_launcher_are_checked(name, value, monkeypatch):
    known = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 29500}
    for key, text in (known | {name: value}).items():
        monkeypatch.setenv(key, str(text))
    with pytest.raises(UserError, match=rf"{name}={value[:40]} .* must be an integer from"):
        join("cpu")


def test_two_processes(farm, tmp_path):
    """Sums, broadcast, failing together and stopping together, in one start of two processes."""
    code = """
        import os, signal, threading, time
        from datetime import timedelta
        import psutil, torch
        import torch.distributed as dist
        from tetdist.distributed import rendezvous, watchdog
        from tetdist.distributed.signals import StopRequest
        from tetdist.distributed.watchdog import Watch
        from tetdist.distributed.world import join
        from tetdist.errors import UserError

        watchdog.BEAT = 0.05
        with join("cpu") as world, StopRequest(world) as stop, Watch(world, 60) as watch:
            r = world.rank
            print("ends with", {thread.name for thread in threading.enumerate()})
            ports = psutil.net_connections("inet")
            ports = [c.laddr for c in ports if c.pid == os.getpid() and c.status == "LISTEN"]
            print("listens at", {one.ip for one in ports}, os.environ.get("GLOO_SOCKET_IFNAME"))
            stores = [int(os.environ["MASTER_PORT"])]
            if r == 0:
                stores.append(watch._store.store.underlying_store.port)
            for port in stores:
                # A process without the token, which can see all keys and write to any.
                stranger = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=5))
                keys = stranger.list_keys()
                tokens = {rendezvous._token(None), watch._store._secret}
                print("a stranger finds", any(token in key for token in tokens for key in keys))
                for key in keys:
                    stranger.set(f"{key.rpartition('/')[0]}/verdict", "do as I say")
            if r == 0:
                for _ in range(2):  # by then the watch has looked for a verdict
                    answered = watch._answered
                    while watch._answered == answered:
                        time.sleep(0.01)
            print("sum", world.sum([r + 1.0, 0.1]))
            print("mean", world.mean_(torch.tensor([2.0 * r])).item())
            print("on rank 0", world.gather_on_rank_0(torch.arange(2) + r))
            print("first", world.from_rank_0({"a": r}))

            def fail(ranks):
                def action():
                    if r in ranks:
                        raise UserError(f"of {r}")
                    return r
                return action

            for ranks in ((), (0,), (1,), (0, 1)):
                try:
                    with world.together():
                        returned = fail(ranks)()
                    print("together", ranks, "returned", returned)
                except UserError as error:
                    print("together", ranks, "error", error)
                except SystemExit as ended:
                    print("together", ranks, "exit", ended.code)

            # A signal to the second only, noticed by both after the same number of questions.
            for step in range(20):
                if step == 5 and r == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if stop.agreed():
                    break
            print("stopped", step, stop.exit_status, flush=True)
    """
    command = tiny.python("-c", textwrap.dedent(code))
    (status_0, first), (status_1, second) = farm.side_by_side(2, command, tmp_path)
    assert (status_0, status_1) == (0, 0), first + second
    assert "on rank 0 tensor([0, 1, 1, 2])" in first
    assert "on rank 0 None" in second
    for output in (first, second):
        assert re.search("ends with .*'launchers'", output), output
        assert "listens at {'127.0.0.1'} lo" in output, output
        # The store that all joined; of rank 0 the watch's, too.
        assert output.count("a stranger finds False") == (2 if output is first else 1)
        assert "sum [3.0, 0.2]" in output
        assert "mean 1.0" in output
        assert "first {'a': 0}" in output
        assert f"stopped 6 {128 + signal.SIGUSR1}" in output, output
    assert re.findall("together (.*)", first) == [
        "() returned 0",
        "(0,) error of 0",
        "(1,) exit 2",
        "(0, 1) error of 0",
    ]
    assert re.findall("together (.*)", second) == [
        "() returned 1",
        "(0,) exit 2",
        "(1,) error of 1",
        "(0, 1) exit 2",
    ]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGINT], signal.SIGINT),
        # Of two, the one that says more counts.
        ([signal.SIGTERM, signal.SIGUSR2], signal.SIGUSR2),
        ([signal.SIGUSR2, signal.SIGTERM], signal.SIGUSR2),
        ([signal.SIGINT, signal.SIGTERM], signal.SIGINT),
        ([signal.SIGUSR1, signal.SIGUSR2], signal.SIGUSR1),
        # What a launcher sends after it changes nothing.
        ([signal.SIGTERM, signal.SIGINT], signal.SIGTERM),
    ],
)
def test_stop_request_alone(sent, expected):
    before = signal.getsignal(signal.SIGTERM)
    with join("cpu") as world, StopRequest(world) as stop:
        assert not stop.agreed()
        for number in sent:
            signal.raise_signal(number)
        assert stop.agreed()
        assert stop.exit_status == 128 + expected
        stop.is_over = True  # then Ctrl-C has no effect
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("a_terminal")
def test_a_terminal_that_closes_stops_what_is_not_under_nohup():
    with join("cpu") as world, StopRequest(world) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.agreed()
        assert stop.exit_status == 129
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest(world) as nohup:
            signal.raise_signal(signal.SIGHUP)
            assert not nohup.agreed()
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_output_that_nobody_reads_is_no_error():
    reads, writes = os.pipe()
    let_go_of_closed_streams([writes])
    os.write(writes, b"heard")
    assert os.read(reads, 100) == b"heard"
    os.close(reads)
    let_go_of_closed_streams([writes])
    os.write(writes, b"a broken pipe before")
    os.close(writes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_are_averaged_in_the_order_of_memory(device, monkeypatch):
    """All of one type in a single collective, whatever their layout; each keeps its own."""
    sent = []

    def reduce(flat, op=dist.ReduceOp.SUM):
        sent.append(flat.clone())
        flat.mul_(4).add_(1).div_({dist.ReduceOp.SUM: 1, dist.ReduceOp.AVG: 2}[op])

    monkeypatch.setattr(dist, "all_reduce", reduce)
    # Which torch for CPUs has not.
    monkeypatch.setattr(torch.cuda, "Event", Mock(return_value=Mock(query=lambda: False)))
    tensors = [
        torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.randn(6, 4).t(),
        torch.randn(8, 2)[:, :1],  # with gaps in its memory
        torch.randn(3, dtype=torch.float64),
    ]
    before, strides = [t.clone() for t in tensors], [t.stride() for t in tensors]
    # The other of two processes has three times the values, plus 1.
    World(0, 2, torch.device(device), None).mean_all_(tensors)
    assert all(map(torch.equal, tensors, [(4 * own + 1) / 2 for own in before]))
    assert [t.stride() for t in tensors] == strides
    assert [flat.dtype for flat in sent] == [torch.float32, torch.float64]
    assert torch.equal(sent[0][:108], before[0].permute(0, 2, 3, 1).flatten())
    assert sent[0].numel() == 108 + 1 + 24 + 8
