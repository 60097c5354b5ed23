"""Ends this process when the launcher or study that started it ends.

A launcher that is killed, or whose terminal closes, cannot notify the processes it started, and
they would train on at full load. So each command checks once a second whether its launchers still
run; if one does not, the command ends as upon SIGTERM, and training saves first. A shell does not
count as a launcher: commands started by hand go on without it, as with nohup or setsid.

This module imports nothing heavy, because commands import it first.
"""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

# Variable that describes the process with which a started command is to end.
VARIABLE = "TETDIST_WORKS_FOR"

BEAT = 1.0  # seconds between two checks
SAVE_LIMIT = 300.0  # seconds that a process has to save before it is ended anyway

# Launchers of torch and DeepSpeed, by program or module, and tetdist's own torchrun.
_LAUNCHER = re.compile(
    r"(?:.*/)?(?:deepspeed|ds|torchrun(?:\.py)?|tetdist)"
    r"|(?:.*/)?deepspeed[./]launcher[./](?:launch|runner)(?:\.py)?"
    r"|(?:.*/)?torch[./]distributed[./](?:run|launch)(?:\.py)?"
)
# The part of DeepSpeed's launcher that its command starts on each host.
_STARTED_LAUNCHER = re.compile(r"(?:.*/)?deepspeed[./]launcher[./]launch(?:\.py)?")
# Programs, besides process 1, that adopt the children of an ended process.
_INITS = ("systemd", "init", "tini", "docker-init", "dumb-init", "catatonit")


class Process(NamedTuple):
    """A process, distinguished by its start time from a later one with the same id."""

    pid: int
    started: int  # in clock ticks since the host's start

    @property
    def is_there(self) -> bool:
        """True if the process has not ended."""
        facts = _facts(self.pid)
        return facts is not None and facts.started == self.started and facts.state not in "ZX"


# Stands for a process that ended before the first check.
GONE = Process(0, 0)


class _Facts(NamedTuple):
    state: str
    parent: int
    started: int


def _facts(pid: int) -> _Facts | None:
    """Return the kernel's record of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in brackets, may itself contain brackets and spaces.
    fields = text.rpartition(")")[2].split()
    return _Facts(fields[0], int(fields[1]), int(fields[19]))


def place() -> tuple[str, ...] | None:
    """Return an identity of the process namespace: host, its start, and namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        # /proc may belong to another namespace, where this process has another id or none.
        if int(str(Path("/proc/self").readlink())) != os.getpid():
            return None
    except (OSError, ValueError):
        return None
    # Copies of a running virtual machine have the same boot id.
    return (socket.gethostname(), boot, namespace)


def as_launcher() -> dict[str, str]:
    """Return environment variables that make a command end when this process does."""
    facts, here = _facts(os.getpid()), place()
    if facts is None or here is None:
        return {}
    return {VARIABLE: json.dumps([here, os.getpid(), facts.started])}


def launchers() -> list[Process]:
    """Return the launchers and the study on this host that started this process."""
    return [*_named_launcher(), *_launching_ancestors()]


@functools.cache  # one thread serves the process
def end_with_launchers() -> None:
    """Start a thread that ends this process when one of its launchers ends; see the module."""
    if started_by := launchers():
        threading.Thread(target=_watch, args=(started_by,), name="launchers", daemon=True).start()


def _named_launcher() -> list[Process]:
    try:
        there, pid, started = json.loads(os.environ[VARIABLE])
    except (KeyError, ValueError, TypeError):
        return []
    # Slurm copies environment variables to other hosts.
    return [Process(pid, started)] if tuple(there) == place() else []


def _launching_ancestors() -> list[Process]:
    """Return the launchers among this process's ancestors."""
    launchers: list[Process] = []
    if "RANK" not in os.environ or place() is None:
        return launchers
    pid = os.getppid()
    # The launcher may have been killed before this process checked, or even existed.
    if "TORCHELASTIC_RUN_ID" in os.environ and _is_init(pid):
        return [GONE]
    while pid > 0 and (facts := _facts(pid)) is not None:
        program = _program(pid)
        if _LAUNCHER.fullmatch(program):
            launchers.append(Process(pid, facts.started))
        if _STARTED_LAUNCHER.fullmatch(program) and _is_init(facts.parent):
            return [GONE]
        pid = facts.parent
    return launchers


def _is_init(pid: int) -> bool:
    """Return whether a process adopts children whose parent has ended."""
    if _LAUNCHER.fullmatch(_program(pid)):
        return False  # the first process of a container
    return pid == 1 or Path(_program(pid)).name in _INITS


def _program(pid: int) -> str:
    """Return the program of a process: for Python, its script or module."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if not Path(words[0]).name.startswith("python"):
        return words[0]
    return next((word for word in words[1:] if not word.startswith("-")), "")


def _watch(launchers: list[Process]) -> None:
    while all(launcher.is_there for launcher in launchers):
        time.sleep(BEAT)
    if os.environ.get("RANK", "0") == "0":
        gone = next(launcher.pid for launcher in launchers if not launcher.is_there)
        # The terminal, or the reader of this output, may have ended as well.
        with contextlib.suppress(OSError, ValueError):
            launcher = f"process {gone}" if gone else "the launcher"
            print(f"{launcher}, which started this command, has ended: stopping", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_LIMIT)
    os._exit(128 + signal.SIGTERM)
