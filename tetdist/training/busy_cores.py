"""A warning where bfloat16 is slow because other programs want the same cores.

oneDNN computes a convolution's weight gradient in bfloat16 by threads that wait for each other
several times an image, and wait by spinning: no setting of OpenMP reaches that loop. It costs
nothing while each thread has a core. Once the system takes the core of one of them, for
milliseconds each time, the others spin for so long, on processor time.

Measured with sew_resnet18 at 32 pixels, T=4, torch 2.13 on an AMD EPYC with AVX-512, its two cores
shared with several other programs: two threads took 171 ms of processor time an image in bfloat16
and 25 in float32, one thread 15 and 23. Most of a step passed in oneDNN's kernel for that gradient,
`jit_bf16:avx512_core_bf16`: 274 ms a layer, where float32's took 2.4.
"""

import time
from pathlib import Path

import torch

# How long the thread that reads it has run, and has waited for a core while it could have run, both
# in nanoseconds.
SCHEDULE = Path("/proc/thread-self/schedstat")
# Seconds to look at before anything is said, and the share of them that is too much.
WATCHED, TOO_MUCH = 5.0, 0.2


class BusyCores:
    """Watches how long the thread that trains waits for a core.

    Args:
        device: Where the network computes.
        precision: The configured one.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self._watching = (
            device.type == "cpu" and precision == "bf16" and torch.get_num_threads() > 1
        )
        self._since, self._waited = time.monotonic(), waited_for_a_core()

    def warning(self) -> str | None:
        """What a person should know, once; None: nothing, or not yet.

        To be asked now and then by the thread that trains, which has to be the one that made this.
        """
        seconds = time.monotonic() - self._since
        if not self._watching or seconds < WATCHED:
            return None
        waited = waited_for_a_core()
        if waited is None or self._waited is None:
            self._watching = False
            return None
        share = (waited - self._waited) / seconds
        self._since, self._waited = time.monotonic(), waited
        if share < TOO_MUCH:
            return None
        self._watching = False
        return (
            f"precision=bf16 suffers from other programs here: in {100 * share:.0f} % of the last "
            f"{seconds:.0f} s this one could have computed and had no core. oneDNN's threads wait "
            "for each other many times a layer in bfloat16, and hold their cores while they do. "
            "With one thread a process (OMP_NUM_THREADS=1) the run goes on without that, and a new "
            "run may take precision=fp32; or leave it cores of its own"
        )


def waited_for_a_core() -> float | None:
    """Seconds that this thread has waited for a core so far; None where Linux does not say."""
    try:
        return int(SCHEDULE.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
