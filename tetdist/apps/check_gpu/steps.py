"""Check of steps: every engine trains without making the host wait for the device."""

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tetdist.apps.benchmarks.scaling import training_step
from tetdist.apps.check_gpu.check import Finding, Machine

STEPS = 3
REPORT = "train with the other engine, and report this with the JSON file"
# Engine, ZeRO stage, and whether a step must be free of synchronisation: at stages 1 and 2
# DeepSpeed itself reads from the device whether the gradient is finite.
ENGINES = (
    ("torch", 0, True),
    ("deepspeed", 0, True),
    ("deepspeed", 1, False),
    ("deepspeed", 2, False),
)


def check_steps(here: Machine) -> Finding:
    """Run three steps of each engine and ZeRO stage; on a GPU a synchronisation is an error."""
    numbers: dict[str, Any] = {}
    for engine, stage, asynchronous in ENGINES:
        name = f"{engine} ZeRO {stage}" if stage else engine
        step, close = training_step(
            here.world,
            "sew_resnet18",
            size=33 if here.small else 64,
            batch=2 if here.small else 4,
            precision="bf16",
            engine=engine,
            zero_stage=stage,
        )
        step()  # Build kernels and allocate memory.
        try:
            with refusing_synchronisation(here.on_gpu and asynchronous):
                losses = [step() for _ in range(STEPS)]
        except RuntimeError as error:
            if "synchronizing" not in str(error).lower():
                raise
            where = traceback.extract_tb(error.__traceback__)[-2]
            numbers |= {"traceback": traceback.format_exc()}
            text = f"{name}: a step makes the host wait for the device"
            text = f"{text} ({Path(where.filename).name}, line {where.lineno}): {error}"
            return Finding("bad", text, REPORT, numbers)
        finally:
            close()
        numbers[name] = values = [float(loss) for loss in losses]
        if not all(map(math.isfinite, values)):
            return Finding("bad", f"{name}: the losses {values} are not finite", REPORT, numbers)
    what = "without a synchronisation" if here.on_gpu else "on the CPU"
    return Finding("ok", f"{STEPS} steps of {', '.join(numbers)}, {what}", None, numbers)


# Functions that make the host wait without notice of torch's sync_debug_mode.
_WAITS: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.accelerator, "synchronize"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
)


@contextlib.contextmanager
def refusing_synchronisation(refused: bool) -> Iterator[None]:
    """Make everything raise, in this context, that makes the host wait for the device."""
    if not refused:
        yield
        return

    def wait(*_: Any, **__: Any) -> None:
        raise RuntimeError("a call of synchronize(), which is a synchronizing CUDA operation")

    before = [getattr(owner, name) for owner, name in _WAITS]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for owner, name in _WAITS:
            setattr(owner, name, wait)
        yield
    finally:
        for (owner, name), function in zip(_WAITS, before, strict=True):
            setattr(owner, name, function)
        torch.cuda.set_sync_debug_mode("default")
