"""Where processes meet: at which address, and with which secret."""

import socket
import stat
import threading
from pathlib import Path

import pytest
import tiny

from tetdist.distributed import meeting
from tetdist.errors import UserError


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", meeting.TOKEN):
        monkeypatch.delenv(name, raising=False)
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
def test_address(variables: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, **variables)
    assert meeting.address() == address


def test_rank_0_listens_where_the_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, MASTER_ADDR="node1", LOCAL_SIZE="2")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # Nothing is sent.
            own = s.getsockname()[0]
        except OSError:
            own = ""

    def known_as(*addresses: str) -> str:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with meeting._listen(0) as listener:
            return str(listener.getsockname()[0])

    # Neither what no other host reaches nor what is not this host's.
    assert known_as("127.0.1.1", "192.0.2.1") in ("::", "0.0.0.0")
    if own:
        assert known_as("127.0.1.1", "192.0.2.1", own) == own


def test_a_secret_is_made_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / ".token"
    token = meeting._kept(file)
    assert len(token) == 32
    assert meeting._kept(file) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]
    assert meeting._kept(tmp_path / "other") != token
    file.chmod(0o640)
    with pytest.raises(UserError, match=r"\.token can be read or changed by others"):
        meeting._kept(file)


def test_where_the_secret_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launched(monkeypatch, MASTER_ADDR="127.0.0.1")
    here = meeting._token(tmp_path / "run")
    assert here == (tmp_path / "cache" / "tetdist" / "token").read_text()
    assert not (tmp_path / "run").exists()
    launched(monkeypatch, MASTER_ADDR="node1")
    several = meeting._token(tmp_path / "run")
    assert several == (tmp_path / "run" / ".token").read_text() != here
    monkeypatch.setenv(meeting.TOKEN, "given")
    assert meeting._token(tmp_path / "run") == "given"


def test_processes_of_other_tokens_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(tiny.free_port()))
    stores: list[object] = []
    rank_0 = threading.Thread(target=lambda: stores.append(meeting._main_store(0, "one", 30)))
    rank_0.start()
    with pytest.raises(UserError, match=r"do not have the same token.*TETDIST_TOKEN"):
        meeting._main_store(1, "another", 30)
    rank_0.join()
    assert meeting._main_store(1, "one", 30).check(["here/0"]) is False
