"""Runs that checks train, each by the command `train` in processes of its own."""

import os
import subprocess
import sys
from typing import Any

from tetdist.apps.check_gpu.check import Machine
from tetdist.distributed.meeting import free_port
from tetdist.distributed.starters import as_starter


def run_train(
    here: Machine, *arguments: str, alone: bool, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Train, by one process, or by as many as there are here; all of these must then call this."""
    # These processes hold the launcher's port.
    port = free_port() if alone else here.world.from_rank_0(free_port())
    changes = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    if alone:
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        # The run ends with this process, even if that is killed.
        changes |= one | {"MASTER_ADDR": "127.0.0.1"} | as_starter()
    command = [sys.executable, "-m", "tetdist", "train", *arguments]
    return subprocess.run(command, env=os.environ | changes, text=True, check=False, **options)
