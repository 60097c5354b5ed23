"""Counts the kernels that a training step would launch on a GPU, without one.

    PYTHONPATH=.:tests python tests/gpu_without_a_gpu/count.py sew_resnet34 engine=torch

with further KEY=VALUE of the configuration. It is computed, not measured: launches.py says how.
"""

import sys
import tempfile
from pathlib import Path

import worker


def main(arguments: list[str]) -> int:
    """Print a table of the phases of a step, and of the kernels in each."""
    model, *overrides = arguments
    with tempfile.TemporaryDirectory() as folder, worker.started(Path(folder)) as running:
        # The second step: the first would capture a graph.
        answer = running.ask(model, *overrides, steps=2)
    if answer["error"]:
        print(answer["error"], file=sys.stderr)
        return 1
    for phase in answer["launches"]:
        print(f"{phase:12} {worker.launches(answer, phase):5}")
        for name, number in answer["launches"][phase].items():
            if number:
                print(f"    {name:36} {number:5}")
    for wait in answer["waits"]:
        print(f"the host would wait: {wait}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
