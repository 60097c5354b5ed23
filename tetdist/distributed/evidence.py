"""Evidence that a hang leaves: each process's stacks, and the last collectives that it began."""

import contextlib
import faulthandler
import os
import threading
from pathlib import Path

import torch

SECONDS = 15.0  # in which a process must have written it; the first trace of torch takes up to 5
_OLD, _NEW = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"
# gloo and NCCL record apart. torch has no recorder of gloo before 2.8, and none of NCCL without it.
_RECORDERS = {"gloo": "_dump_fr_trace", "nccl": "_dump_nccl_trace"}


def record_collectives() -> None:
    """Record each group's last collectives from now on; call it before groups are made.

    A user's own size of the record takes precedence, also 0.
    """
    if not {_OLD, _NEW} & os.environ.keys():
        # torch 2.8 renamed it, and warns of the old name.
        renamed = hasattr(torch._C._distributed_c10d, _RECORDERS["gloo"])
        os.environ[_NEW if renamed else _OLD] = "2000"


def leave(folder: Path, rank: int) -> None:
    """Write a process's evidence into a folder, or end the attempt after some seconds."""
    # A file system that hangs stops the thread alone. A driver that hangs may stop all threads of
    # Python, in which case faulthandler's own thread ends the process.
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=2)
    writing = threading.Thread(target=_write, args=(folder, rank), daemon=True)
    writing.start()
    writing.join(SECONDS)
    faulthandler.cancel_dump_traceback_later()


def _write(folder: Path, rank: int) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"stacks_rank_{rank}").open("w") as file:
            faulthandler.dump_traceback(file)
        for backend, name in _RECORDERS.items():
            if dump := getattr(torch._C._distributed_c10d, name, None):
                (folder / f"{backend}_rank_{rank}").write_bytes(dump())
