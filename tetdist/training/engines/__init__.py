"""Engines (DeepSpeed, plain torch): backward pass, averaging over processes, clipping, update."""

from collections.abc import Callable

from tetdist.training.engines.base import Engine, EngineParts
from tetdist.training.engines.deepspeed_engines import DeepSpeedEngine, ZeroEngine
from tetdist.training.engines.torch_engine import TorchEngine

# By engine and ZeRO stage; config/checks.py refuses other combinations.
ENGINES: dict[tuple[str, int], Callable[[EngineParts], Engine]] = {
    ("torch", 0): TorchEngine,
    ("deepspeed", 0): DeepSpeedEngine,
    ("deepspeed", 1): ZeroEngine,
    ("deepspeed", 2): ZeroEngine,
}


def make_engine(parts: EngineParts) -> Engine:
    """Make the configured engine for one phase."""
    return ENGINES[parts.config.engine, parts.config.zero_stage](parts)
