"""Rendezvous of a run's processes, and the torch stores in which they report their state.

A torch store answers anybody who reaches its port, lists its keys and accepts any value. So rank 0
listens on the loopback interface if all processes are on one host, else only at the address that
the others use. Processes sign what they write and ignore unsigned values (`SignedStore`). The
rendezvous succeeds only if they belong to the same run, configuration and launch.
"""

import contextlib
import hmac
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from tetdist.distributed.launchers import launchers
from tetdist.errors import PEER_FAILED, PeerFailed, UserError
from tetdist.storage.files import own_cache
from tetdist.wording import and_more

# Variable with the secret of a run, where the program that starts its processes sets one.
TOKEN = "TETDIST_TOKEN"
LOOPBACK = "127.0.0.1"
_POLL = 0.2  # seconds between two questions to the store
_GRACE = 10.0  # seconds within which rank 0 reports the missing ranks
# Matches torch's errors about a process that it can no longer reach.
CONNECTION = re.compile(r"gloo|nccl|connection|peer|timed out|socket", re.IGNORECASE)
_ALL, _VERDICT, _MARK = "all", "verdict", "tetdist"


def address() -> str:
    """Return the address at which rank 0 listens, or which leads to it."""
    return LOOPBACK if _on_one_host() else os.environ["MASTER_ADDR"]


def _on_one_host() -> bool:
    master = os.environ["MASTER_ADDR"]
    return master == "localhost" or _is_loopback(master) or _is_one_launch()


def _is_one_launch() -> bool:
    """Return whether a launcher on this host has started all processes of the run."""
    # The first is torchrun's name, the second that of the deepspeed launcher.
    on_host = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return on_host == os.environ["WORLD_SIZE"]


def _choose_interface(rank: int, addresses: Sequence[str]) -> None:
    """Have gloo use the interface to the other hosts; within one host, the loopback interface.

    By itself gloo announces the address of the host's own name, which is 127.0.1.1 on many hosts.

    Args:
        addresses: Address of each rank's host on the way to rank 0; a loopback address on rank 0's
            own host.
    """
    own, others = addresses[rank], [one for one in addresses if not _is_loopback(one)]
    if _is_loopback(own) and others:
        own = _address_towards(others[0])
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _address_towards(host: str) -> str:
    """Return the address from which this host reaches another."""
    family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as s:
        s.connect(there)  # sends nothing, because it is a datagram socket
        return str(s.getsockname()[0]).partition("%")[0]


class SignedStore:
    """A torch store whose values can only be written by processes that know a secret.

    Each value is preceded by an HMAC of its key and itself; a value with a wrong HMAC counts as
    missing. Nothing is encrypted.

    Attributes:
        store: The torch store for code that signs nothing, such as gloo; its keys begin with a
            digest of the secret.
    """

    def __init__(self, store: Any, secret: str) -> None:
        self._secret = secret
        self.store: Any = dist.PrefixStore(_code(secret)[:16], store)

    def set(self, key: str, value: str) -> None:
        """Sign and write a value."""
        self.store.set(key, _signed(self._secret, key, value))

    def get(self, key: str) -> str | None:
        """Return the value of a key; None if no process with the secret has written one."""
        if not self.store.check([key]):
            return None
        return _verified(self._secret, key, self.store.get(key))


def _signed(secret: str, key: str, value: str) -> str:
    return _code(secret, key, value) + value


def _verified(secret: str, key: str, signed: bytes) -> str | None:
    value = signed[len(_code(secret)) :].decode(errors="replace")
    return value if hmac.compare_digest(signed, _signed(secret, key, value).encode()) else None


def _code(secret: str, *parts: str) -> str:
    return hmac.new(secret.encode(), "\0".join(parts).encode(), "sha256").hexdigest()


def open_store(port: int = 0, seconds: float = 60) -> Any:
    """Open a store of torch on rank 0, by default at any free port."""
    # torch itself would listen on all interfaces.
    listener = _listen(port)
    return dist.TCPStore(
        address(),
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listener.detach(),
    )


def connect(host: str, port: int, seconds: float = 60) -> Any:
    """Connect to a store of rank 0; see `open_store`."""
    limit = timedelta(seconds=max(seconds, 1))
    return dist.TCPStore(host, port, wait_for_workers=False, timeout=limit)


def _listen(port: int) -> socket.socket:
    for family, own in _own_addresses():
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((own, port))
            listener.listen(4096)
        except BaseException:
            listener.close()
            raise
        return listener
    # The others reach this host by an address that is not its own, as with NAT, or that its host
    # name does not resolve to.
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)


def _own_addresses() -> Iterator[tuple[socket.AddressFamily, str]]:
    """Yield the addresses of this host (rank 0's) at which the others connect."""
    if _on_one_host():
        yield socket.AF_INET, LOOPBACK
        return
    for family, kind, _, _, found in socket.getaddrinfo(
        os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM
    ):
        own = str(found[0])
        # Many hosts resolve their own name to 127.0.1.1, which no other host can reach.
        if _is_loopback(own):
            continue
        with socket.socket(family, kind) as attempt, contextlib.suppress(OSError):
            attempt.bind((own, 0))
            yield family, own


def join(
    rank: int, world_size: int, seconds: float, shared_folder: Path | None, run: Mapping[str, Any]
) -> Any:
    """Wait until all processes of the run are there; return a store of torch for them all.

    Args:
        seconds: Time limit until the last process has joined.
        shared_folder: A folder of the run that all hosts share.
        run: Values that all processes of the run have in common, by name.

    Raises:
        UserError: The port is in use, the processes do not share a token, or rank 0 is of another
            run or launch.
        PeerFailed: Some processes have not joined; the text names them.
        SystemExit: Some processes have not joined, and rank 0 names them.
    """
    token = _token(shared_folder)
    # Different hosts may mount the folder at different paths.
    folder = shared_folder.absolute() if shared_folder and _on_one_host() else shared_folder
    launch = launchers() if _is_one_launch() else []
    about = {**run, "number of processes": world_size, "run folder": folder, "launch": launch}
    with limited(seconds + 2 * _GRACE, "rank 0 is lost during the rendezvous"):
        store = _main_store(rank, token, seconds, about)
        _wait_for_all(store, rank, world_size, seconds)
    return store.store


def _main_store(rank: int, token: str, seconds: float, about: Mapping[str, Any]) -> SignedStore:
    # torchrun's store may serve several runs, and outlives the processes of one attempt.
    of_torchrun = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    key = "/".join([_MARK, *(os.environ.get(name, "") for name in of_torchrun)])
    port = int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not by_torchrun:
        try:
            store = open_store(port, seconds)
        except OSError as error:
            raise UserError(
                f"no rendezvous is possible at {address()}, port {port} ({error.strerror}); if "
                "another run on this host uses the port, choose another one with the launcher's "
                "--master_port"
            ) from error
    else:
        host = os.environ["MASTER_ADDR"] if by_torchrun else address()
        _wait_for_port(host, port, seconds)
        store = connect(host, port, seconds)
    # Without the token these codes reveal only that something differs.
    codes = {
        name: _code(token, name, json.dumps(value, sort_keys=True, default=str))[:16]
        for name, value in about.items()
    }
    if rank == 0:
        # The random part makes each launch's secret different.
        mark = json.dumps({"about": codes, "random": secrets.token_hex(16)})
        store.set(key, _signed(token, key, mark))
    else:
        try:
            store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise PeerFailed(
                f"rank 0 did not join within {seconds:.0f} s, though a program listens at "
                f"{address()}, port {port}"
            ) from error
        verified = _verified(token, key, store.get(key))
        if verified is None:
            raise UserError(
                f"rank {rank} and rank 0, at {address()}, port {port}, do not have the same "
                f"token: rank 0 is of another run, or the hosts do not share files; set {TOKEN} "
                "to the same random text for all processes"
            )
        mark, others = verified, json.loads(verified)["about"]
        differing = sorted(n for n in codes | others if codes.get(n) != others.get(n))
        if differing:
            shown = ", ".join(differing[:8]) + and_more(differing, 8)
            raise UserError(
                f"rank {rank} reached rank 0 of another run at {address()}, port {port}, which "
                f"differs in {shown}; start all processes of a run with the same command, and "
                "give each run its own port with the launcher's --master_port"
            )
    return SignedStore(store, _code(token, "secret", mark))


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """Wait until a process listens; torch would wait, too, but could not be interrupted."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise PeerFailed(
                    f"rank 0 did not open {host}, port {port}, within {seconds:.0f} s "
                    f"({error.strerror or error}): it has ended, or a firewall blocks the port"
                ) from error
        time.sleep(_POLL)


def _wait_for_all(store: SignedStore, rank: int, world_size: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    # The random part distinguishes this process from another with its rank.
    this = f"{secrets.token_hex(8)} {_address_towards(address())}"
    store.set(f"here/{rank}", this)
    keys = [f"here/{other}" for other in range(world_size)]
    came: list[str | None] = []
    while rank == 0 and None in (came := [store.get(key) for key in keys]):
        if time.monotonic() > end:
            missing = [str(other) for other, one in enumerate(came) if one is None]
            shown = ", ".join(missing[:8]) + and_more(missing, 8)
            verdict = (
                f"of {world_size} processes rank {shown} did not join within {seconds:.0f} s: "
                "ended early, or never started; peer_timeout=SECONDS allows for more"
            )
            store.set(_VERDICT, verdict)
            # Give the others time to read it: the store ends with this process.
            time.sleep(5 * _POLL)
            raise PeerFailed(verdict)
        time.sleep(_POLL)
    if rank == 0:
        store.set(_ALL, json.dumps(came))
    while (taken := store.get(_ALL)) is None:
        if store.get(_VERDICT) is not None:
            raise SystemExit(PEER_FAILED)
        if time.monotonic() > end + _GRACE:
            raise PeerFailed(f"rank 0 did not confirm within {seconds:.0f} s that all have joined")
        time.sleep(_POLL)
    if json.loads(taken)[rank] != this:
        raise UserError(
            f"another process has joined as rank {rank} at {address()}, port "
            f"{os.environ['MASTER_PORT']}: the run was started twice and continues with that "
            "process; stop this one"
        )
    _choose_interface(rank, [one.partition(" ")[2] for one in json.loads(taken)])


@contextlib.contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """End this process with a message if the body of the context takes longer.

    Args:
        what: Message for that case, and for a broken connection.

    Raises:
        PeerFailed: A connection to another process broke.
    """
    done = threading.Event()

    def guard() -> None:
        if not done.wait(seconds):
            rank = os.environ["RANK"]
            prefix = "" if rank == "0" else f"rank {rank}: "
            print(f"{prefix}error: {what}: no answer for {seconds:.0f} s", file=sys.stderr)
            sys.stderr.flush()
            # The main thread waits in torch and cannot be interrupted otherwise.
            os._exit(PEER_FAILED)

    threading.Thread(target=guard, name="rendezvous", daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        if not CONNECTION.search(first):
            raise
        raise PeerFailed(f"{what} ({first})") from error
    finally:
        done.set()


# --- the token ------------------------------------------------------------------------------------


def _token(shared_folder: Path | None) -> str:
    """Return the secret of this user's processes; empty if they have no place to share one."""
    if token := os.environ.get(TOKEN):
        return token
    try:
        if _on_one_host() or shared_folder is None:
            return _kept(own_cache() / "token")
        return _kept(shared_folder / ".token")
    except OSError:
        return ""


def _kept(file: Path) -> str:
    """Return the secret in a file that only this user can read, creating the file if needed.

    Raises:
        OSError: The file cannot be created.
        UserError: Others can read or change the file.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, secrets.token_hex(16).encode())
            os.fsync(handle)
            # All processes get here at once; the first one's file is kept.
            with contextlib.suppress(FileExistsError):
                os.link(aside, file)
        finally:
            os.close(handle)
            aside.unlink()
    facts = file.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(f"{file} can be read or changed by others; remove it to get a new one")
    return file.read_text()
