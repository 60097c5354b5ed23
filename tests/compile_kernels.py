"""Compile every kernel of GPUs with the Triton that Python imports, and print what fails.

`make test-triton` runs this with each version of Triton, outside pytest: the versions exclude each
other. The exit status is 1 if a family fails that `triton_kernels.OLDEST` declares to work, or if
one compiles that it excludes.
"""

import itertools
import sys

import gpu_code
import torch
import triton
from gpu_code import Launch

from tetdist.nn.fast.triton_kernels import OLDEST
from tetdist.nn.integer_neurons import NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.parallel_neurons import PSN, SlidingPSN

CAPABILITIES = (80, 90, 100, 120)  # A100, H100, B200, RTX 5090
KINDS = (LIF(), PLIF(decay_input=True), NILIF(most_spikes=8))


def neurons() -> list[list[Launch]]:
    """Return the launches of layers of neurons and norms, and of bytes."""
    plain = [gpu_code.neurons(kind) for kind in (*KINDS, PSN(timesteps=4), SlidingPSN(order=2))]
    full = [gpu_code.neurons(kind, full=True) for kind in KINDS]
    return [*plain, *full, gpu_code.stream(shortcut="normalised"), gpu_code.packing()]


def attention() -> list[list[Launch]]:
    """Return the launches of attention, with most and with few membranes in registers."""
    cases = itertools.product(KINDS, (4, 8), (False, True))
    most = [gpu_code.attention(kind, timesteps=t, carries=carries) for kind, t, carries in cases]
    few = gpu_code.attention(KINDS[2], channels=24, values=96, carries=True, dtype=torch.float16)
    return [*most, few]


FAMILIES = {"neurons": neurons, "pooling": lambda: [gpu_code.pooling()], "attention": attention}


def failures(family: str, capability: int) -> tuple[int, list[str]]:
    """Compile a family's kernels; return their number and what fails."""
    kinds, failed = {}, []
    for launch in itertools.chain.from_iterable(FAMILIES[family]()):
        types = [getattr(one, "dtype", one) for one in launch.arguments]
        kinds[str((launch.name, types, launch.known))] = launch
    for launch in kinds.values():
        try:
            gpu_code.compiled(launch, capability)
        except Exception as error:  # Triton raises its own types, which versions change
            failed.append(f"{launch.name}: {type(error).__name__}")
    return len(kinds), failed


def main() -> int:
    """Print a line for each family and kind of GPU."""
    own, wrong = tuple(map(int, triton.__version__.split(".")[:2])), 0
    for family in FAMILIES:
        failing = 0
        for capability in CAPABILITIES:
            count, failed = failures(family, capability)
            failing += len(failed)
            where = f"Triton {triton.__version__}, sm_{capability}, {family}"
            print(f"{where}: {count - len(failed)} of {count} compile", flush=True)
            for name in sorted(set(failed)):
                print(f"  {failed.count(name)} fail: {name}")
        wrong |= (own >= OLDEST[family]) == bool(failing)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
