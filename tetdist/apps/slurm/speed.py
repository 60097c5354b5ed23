"""Throughput of one process for the plan: as given, or as measured by bench, check_gpu or a run.

A GPU's speed is never taken from a CPU's, and none is computed.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from tetdist import models
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config import loading
from tetdist.config.schema import RunConfig
from tetdist.errors import UserError, typed
from tetdist.nn import neurons
from tetdist.storage.checkpoint import STATE_FILE
from tetdist.storage.files import checkpoint_at, parse_json, read_text
from tetdist.tracking.metrics_file import read_metrics

# Lines of a run's metrics that its rate is the median of.
LINES = 100


@dataclass(frozen=True)
class Speed:
    """Training speed of one process."""

    images_per_s: float  # of one process alone
    timesteps: float  # T of the measurement; a mean, if steps draw their T
    source: str = "as given"
    peak_mib: float | None = None  # of a step's activations and gradients on a GPU

    def rate(self, timesteps: float) -> float:
        """Return the samples a second at another T, with which the rate falls."""
        return self.images_per_s * self.timesteps / timesteps


def speed_of(
    config: RunConfig,
    cluster: ClusterSection,
    frames: tuple[int, ...] | None,
    *,
    images_per_s: float | None = None,
    benchmark: str | None = None,
) -> Speed | str:
    """Return the speed of one process, or a sentence that says how to measure it.

    Args:
        frames: Shape of the run's recordings, (T, 2, H, W); None for images.
        benchmark: File of bench or check_gpu, or folder of a run.

    Raises:
        UserError: The benchmark cannot be read, or measured something else than this run trains.
    """
    first = config.phases[config.start_phase]
    size = frames[2] if frames else config.data.image_size
    if images_per_s is not None:
        return Speed(images_per_s, first.mean_timesteps)
    command = _command(config, cluster, size)
    if benchmark is None:
        if config.imports:  # bench measures tetdist's networks alone
            return "train on a node with max_steps=100 name=speed, then give --benchmark runs/speed"
        return (
            f"measure it on a node with `{command}`, then give --benchmark FILE; the folder of a "
            "run that trains the same serves, too"
        )
    folder = Path(benchmark)
    try:
        values = _of_run(folder) if folder.is_dir() else _of_file(folder)
        speed = _speed_in(values, config)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--benchmark: {benchmark} does not give images_per_s as a number above 0 "
            f"({type(error).__name__}: {error})"
        ) from error
    if unlike := _unlike(values, config, cluster, size):
        ways = "give the folder of a run that trains the same, or --images-per-s X"
        # bench measures networks with their default neuron.
        if "neuron" not in unlike and isinstance(config.recompute, str):
            ways = f"measure this run's with `{command}`, or {ways}"
        raise UserError(f"--benchmark: {benchmark} measured {', '.join(unlike.values())}; {ways}")
    return speed


def _command(config: RunConfig, cluster: ClusterSection, size: int) -> str:
    """Return the command that measures the speed of a run."""
    options = {
        "--model": config.model.name,
        "--size": size,
        "--timesteps": config.phases[config.start_phase].most_timesteps,
        "--batch": config.batch.micro,
        "--precision": config.precision,
        "--device": "cuda" if cluster.gpus_per_node else "cpu",
        "--json": "FILE",
    }
    if config.recompute == "blocks":
        options["--modes"] = "blocks"
    return typed("bench", "step", *(word for option in options.items() for word in option))


def _of_file(file: Path) -> dict[str, Any]:
    """Read a benchmark's file.

    It is a JSON object with ``images_per_s`` (of all ``processes`` together) and what was measured:
    ``model``, ``size``, ``precision``, ``timesteps``, ``device``. Missing keys default to the
    configuration. ``by_batch`` has rates by size of the micro-batch.
    """
    try:
        values: dict[str, Any] = parse_json(read_text(file))
    except OSError as error:
        raise UserError(f"--benchmark: {file} cannot be read ({error.strerror})") from error
    return values


def _of_run(folder: Path) -> dict[str, Any]:
    """Return a run's rate, and what it trains, in the form of a benchmark's file."""
    try:
        metrics = list(read_metrics(folder / "metrics.jsonl"))
        lines = [one for one in metrics if one["kind"] == "train"]
        pairs = [(one["samples_per_s"], one["image_timesteps_per_s"]) for one in lines[-LINES:]]
        state = checkpoint_at(folder / "checkpoints" / "last") / STATE_FILE
        processes = parse_json(read_text(state))["world_size"]
        gpus = parse_json(read_text(folder / "environment.json"))["gpus"]
    except (OSError, KeyError) as error:
        of_study = [one.parent for one in sorted(folder.glob("*/metrics.jsonl"))]
        raise UserError(
            f"--benchmark: {folder} is not a run with metrics and a checkpoint; give "
            f"{[*of_study, 'another run'][0]}, or a file of `{typed('bench')}`"
        ) from error
    config = loading.load_written(folder / "config.yaml")
    images = config.data.kind == "images"
    rate = statistics.median(rate for rate, _ in pairs)
    return {
        "images_per_s": rate,
        "timesteps": statistics.median(of_timesteps / rate for rate, of_timesteps in pairs),
        "processes": processes,
        "model": config.model.name,
        "size": config.data.image_size if images else None,
        "precision": config.precision,
        "neuron": neurons.kind_of(config.model.neuron),
        "recompute": config.recompute,
        "device": "cuda" if gpus and config.device != "cpu" else "cpu",
    }


def _speed_in(values: dict[str, Any], config: RunConfig) -> Speed:
    rate, text = float(values["images_per_s"]) / max(1, int(values.get("processes", 1))), ""
    by_batch = {int(batch): float(one) for batch, one in values.get("by_batch", {}).items()}
    if by_batch:
        batch = max((b for b in by_batch if b <= config.batch.micro), default=min(by_batch))
        rate, text = by_batch[batch], f" in batches of {batch}"
    if not 0 < rate < math.inf:
        raise ValueError(rate)
    mean = config.phases[config.start_phase].mean_timesteps
    peak = values.get("peak_mib") if values.get("batch") == config.batch.micro else None
    how = "measured" if values.get("model") else "as given"
    return Speed(rate, float(values.get("timesteps", mean)), f"{how}{text}", peak)


def _unlike(
    values: dict[str, Any], config: RunConfig, cluster: ClusterSection, size: int
) -> dict[str, str]:
    """Return what a benchmark measured and this run does not train."""
    own: dict[str, Any] = {
        "model": config.model.name,
        "precision": config.precision,
        "size": size,
        "neuron": neurons.kind_of(config.model.neuron),
        "recompute": config.recompute,
    }
    there = {key: values[key] for key in own if values.get(key) is not None}
    model = there.get("model")
    if model is not None and timm.is_model(model):
        there.setdefault("size", int(timm.get_pretrained_cfg(model).input_size[-1]))
        there.setdefault("neuron", neurons.kind_of(models.default_neuron(model)))
        there.setdefault("recompute", "none")
    found = {
        key: f"{key} {value} instead of {own[key]}"
        for key, value in there.items()
        if value != own[key]
    }
    if cluster.gpus_per_node and values.get("device") == "cpu":
        found["device"] = "a CPU, which does not predict a GPU's speed"
    return found
