"""Whether every engine takes steps on the device, without making the host wait for it."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from tetdist.benchmarks.scaling import training_step
from tetdist.device_check.check import Finding, Machine

STEPS = 3
# Engine, ZeRO stage, and whether a step is free of synchronisation: at stages 1 and 2 DeepSpeed
# itself asks the device whether the gradient is finite.
ENGINES = (
    ("torch", 0, True),
    ("deepspeed", 0, True),
    ("deepspeed", 1, False),
    ("deepspeed", 2, False),
)


def check_steps(here: Machine) -> Finding:
    """Three steps of each engine and ZeRO stage; on a GPU a synchronisation is an error."""
    numbers: dict[str, Any] = {}
    for engine, stage, asynchronous in ENGINES:
        name = f"{engine} ZeRO {stage}" if stage else engine
        options = argparse.Namespace(
            model="sew_resnet18",
            size=64,
            batch=4,
            accumulation=1,
            timesteps=4,
            precision="bf16",
            engine=engine,
        )
        step, close = training_step(options, here.world, stage)
        step()  # Kernels are built and memory is taken.
        try:
            with refusing_synchronisation(here.on_gpu and asynchronous):
                losses = [step() for _ in range(STEPS)]
        except RuntimeError as error:
            if "synchronizing" not in str(error).lower():
                raise
            return Finding(
                "bad", f"{name}: a step makes the host wait for the device: {error}", None, numbers
            )
        finally:
            close()
        numbers[name] = values = [float(loss) for loss in losses]
        if not all(map(math.isfinite, values)):
            return Finding("bad", f"{name}: losses {values}", None, numbers)
    what = "without a synchronisation" if here.on_gpu else "on the CPU"
    return Finding("ok", f"{STEPS} steps of {', '.join(numbers)}, {what}", None, numbers)


@contextlib.contextmanager
def refusing_synchronisation(refused: bool) -> Iterator[None]:
    """Have it be an error, if that is wanted, to wait for the device in this context."""
    if not refused:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
