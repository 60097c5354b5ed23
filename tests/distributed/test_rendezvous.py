"""Meeting of processes: address, secret, and recognition of their own run."""

import os
import socket
import stat
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny
import torch.distributed as dist

from tetdist.distributed import launchers, rendezvous
from tetdist.errors import PeerFailed, UserError


def launched(monkeypatch, **variables):
    store = "TORCHELASTIC_USE_AGENT_STORE"
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", store, rendezvous.TOKEN):
        monkeypatch.delenv(name, raising=False)
    # `join` sets this one, for all that follows in this process.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name, value in ({"RANK": "0", "WORLD_SIZE": "4"} | variables).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({"MASTER_ADDR": "localhost"}, "127.0.0.1"),
        ({"MASTER_ADDR": "node1", "LOCAL_SIZE": "4"}, "127.0.0.1"),
        ({"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "4"}, "127.0.0.1"),
        ({"MASTER_ADDR": "node1", "LOCAL_SIZE": "2"}, "node1"),
        ({"MASTER_ADDR": "node1"}, "node1"),
    ],
)
def test_address(variables, address, monkeypatch):
    launched(monkeypatch, **variables)
    assert rendezvous.address() == address


def test_rank_0_listens_where_the_others_come(monkeypatch):
    launched(monkeypatch, MASTER_ADDR="node1", LOCAL_SIZE="2")
    try:
        own = rendezvous._address_towards("192.0.2.1")
    except OSError:
        own = ""

    def known_as(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with rendezvous._listen(0) as listener:
            return str(listener.getsockname()[0])

    # Neither what no other host reaches nor what is not this host's.
    assert known_as("127.0.1.1", "192.0.2.1") in ("::", "0.0.0.0")
    if own:
        assert known_as("127.0.1.1", "192.0.2.1", own) == own


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gloo_gets_the_interface_to_the_other_hosts(rank, monkeypatch):
    """Rank 0's host, which has two processes, knows itself by its loopback address."""
    launched(monkeypatch, MASTER_ADDR="node1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    own = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.2%ib0"}
    found = {name: [types.SimpleNamespace(address=one)] for name, one in own.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(rendezvous, "_address_towards", {"10.1.0.2": "10.0.0.1"}.__getitem__)
    rendezvous._choose_interface(rank, ["127.0.0.1", "127.0.0.1", "10.1.0.2"])
    assert os.environ["GLOO_SOCKET_IFNAME"] == ("ib0" if rank == 2 else "eth0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    rendezvous._choose_interface(rank, ["127.0.0.1"] * 3)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_secret_is_made_once_and_read_by_its_owner_alone(tmp_path):
    file = tmp_path / "new" / ".token"
    token = rendezvous._kept(file)
    assert len(token) == 32
    assert rendezvous._kept(file) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]
    assert rendezvous._kept(tmp_path / "other") != token
    file.chmod(0o640)
    with pytest.raises(UserError, match=r"\.token can be read or changed by others"):
        rendezvous._kept(file)


def test_where_the_secret_comes_from(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launched(monkeypatch, MASTER_ADDR="127.0.0.1")
    here = rendezvous._token(tmp_path / "run")
    assert here == (tmp_path / "cache" / "tetdist" / "token").read_text()
    assert not (tmp_path / "run").exists()
    launched(monkeypatch, MASTER_ADDR="node1")
    several = rendezvous._token(tmp_path / "run")
    assert several == (tmp_path / "run" / ".token").read_text() != here
    monkeypatch.setenv(rendezvous.TOKEN, "given")
    assert rendezvous._token(tmp_path / "run") == "given"


@pytest.fixture
def rank_0():
    """A thread to be rank 0, beside that of the test."""
    with ThreadPoolExecutor(1) as thread:
        yield thread


def joined(rank, seconds=30, folder="runs/a", **run):
    return rendezvous.join(rank, 2, seconds, Path(folder), {"name": "a", "seed": 0} | run)


@pytest.mark.parametrize(
    ("variables", "run", "words"),
    [
        ({rendezvous.TOKEN: "another"}, {}, "do not have the same token.*TETDIST_TOKEN"),
        ({}, {"name": "b", "seed": 5}, "another run at 127.0.0.1, .* differs in name, seed; start"),
        ({}, {"teacher": "x"}, "differs in teacher; .*--master_port"),
        ({}, {"folder": "elsewhere/a"}, "differs in run folder; .*--master_port"),
        ({launchers.VARIABLE: "another"}, {}, "rank 1 reached .* differs in launch; "),
    ],
)
def test_run_is_met_by_its_own_processes_alone(variables, run, words, rank_0, monkeypatch):
    port = tiny.free_port()
    own = launchers.as_launcher() | {rendezvous.TOKEN: "one", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    launched(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **own)
    first = rank_0.submit(joined, 0)
    # By now it has read these variables.
    rendezvous._wait_for_port("127.0.0.1", port, 30)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        joined(1, **run)
    assert not first.done()
    for name in variables:
        monkeypatch.setenv(name, own[name])
    second = joined(1)
    second.set("by", "rank 1")
    assert first.result().get("by") == b"rank 1"
    with pytest.raises(UserError, match=r"another process has joined as rank 1 .* started twice"):
        joined(1)


def test_second_attempt_reads_nothing_of_the_first(rank_0, monkeypatch):
    """Under torchrun, whose store outlives the processes of one attempt."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(agent.port))
    for name, value in {"USE_AGENT_STORE": "True", "RUN_ID": "none"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(PeerFailed, match="rank 0 did not join within 1 s"):
            joined(1, seconds=1)
        first = rank_0.submit(joined, 0)
        second = joined(1)
        assert not second.check(["by"])
        second.set("by", attempt)
        assert first.result().get("by") == attempt.encode()
