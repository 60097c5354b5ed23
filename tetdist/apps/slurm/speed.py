"""Throughput of one process for the plan: as given, as measured, or by the roofline.

A GPU's speed is never taken from a CPU's. A measurement by tools/check_gpu.py or tools/bench.py
comes first. Without one the roofline is the estimate, for the kind of GPU that the cluster's
settings name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import timm

from tetdist import models
from tetdist.apps.roofline import cards
from tetdist.apps.roofline.cards import Card
from tetdist.apps.roofline.count import Work, count
from tetdist.apps.roofline.estimate import Estimate, estimate
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.config.sections.phase import PhaseSection
from tetdist.errors import UserError, typed
from tetdist.nn import neurons
from tetdist.optimizers import kind_of
from tetdist.storage.files import parse_json, read_text


@dataclass(frozen=True)
class Speed:
    """Training speed of one process."""

    images_per_s: float  # of one process alone
    timesteps: float  # T of the measurement; a mean, if steps draw their T
    of_phases: tuple[float, ...] = ()  # rate in each phase; if unknown, it falls with T
    source: str = "as given"
    details: tuple[tuple[str, str], ...] = ()  # further lines of the plan: name and text

    def rate(self, phase: int, timesteps: float) -> float:
        """Return the samples a second in a phase of the configuration, with its T."""
        if self.of_phases:
            return self.of_phases[phase]
        return self.images_per_s * self.timesteps / timesteps


@dataclass(frozen=True)
class Network:
    """Network of a run, and the shape of its recordings, (T, 2, H, W); None for images."""

    model: Any  # a SpikingModel and a module
    frames: tuple[int, ...] | None

    def count(self, batch: int, size: int, precision: str) -> Work:
        """Count the work for a batch of images of that size, or of recordings."""
        return count(self.model, (batch, *(self.frames or (3, size, size))), precision)


def speed_of(
    config: RunConfig,
    cluster: ClusterSection,
    network: Network,
    *,
    images_per_s: float | None = None,
    file: str | None = None,
) -> Speed | str:
    """Return the speed of one process, or a sentence that says how to provide it."""
    if images_per_s is not None:
        if not 0 < images_per_s < math.inf:
            raise UserError(f"--images-per-s must be above 0, not {images_per_s:g}")
        return Speed(images_per_s, config.phases[config.start_phase].mean_timesteps)
    card = cards.find(cluster.gpu or "")
    if file is not None:
        return measured(file, config, cluster, network)
    if not cluster.gpus_per_node:
        return "give --images-per-s X, or --benchmark FILE of tools/bench.py"
    if card is None:
        return (
            f"give --gpu {'|'.join(cards.CARDS)} for an estimate, or "
            "--benchmark FILE of tools/check_gpu.py, or --images-per-s X"
        )
    try:
        return computed(config, network, card)
    except UserError as error:
        return f"{error}, or give --benchmark FILE or --images-per-s X"


# --- as measured ----------------------------------------------------------------------------------


def measured(file: str, config: RunConfig, cluster: ClusterSection, network: Network) -> Speed:
    """Return the speed by a benchmark's file.

    The file is a JSON object with ``images_per_s`` (of all ``processes`` together) and what was
    measured: ``model``, ``size``, ``precision``, ``timesteps``, ``device``. Missing keys default to
    the configuration. ``by_batch`` has rates by size of the micro-batch.
    """
    try:
        values = parse_json(read_text(Path(file)))
        speed = _speed_in(values, config)
    except OSError as error:
        raise UserError(f"--benchmark: {file} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--benchmark: {file} does not give images_per_s as a number above 0 ({error!r})"
        ) from error
    if unlike := _unlike(values, config, cluster, network):
        ways = "give --images-per-s X, or leave out the flag for an estimate"
        # bench measures networks as they are by default.
        if not unlike.keys() & {"neuron", "recompute"}:
            device = "cuda" if cluster.gpus_per_node else "cpu"
            size: list[object] = ["--size", _size(config, network), "--precision", config.precision]
            named = ("--model", config.model.name, *size, "--device", device, "--json", "FILE")
            ways = f"measure this run's with `{typed('bench', 'model', *named)}`, {ways}"
        raise UserError(f"--benchmark: {file} measured {', '.join(unlike.values())}; {ways}")
    return speed


def _size(config: RunConfig, network: Network) -> int:
    first = config.phases[config.start_phase]
    return network.frames[2] if network.frames else phase_image_sizes(config, first)[1]


def _unlike(
    values: dict[str, Any], config: RunConfig, cluster: ClusterSection, network: Network
) -> dict[str, str]:
    """Return what a benchmark measured and this run does not train."""
    model, size = values.get("model", config.model.name), _size(config, network)
    own = {"model": config.model.name, "precision": config.precision, "size": size}
    there = {key: values[key] for key in own if values.get(key) is not None}
    if timm.is_model(model) and "model" in there:
        there.setdefault("size", int(timm.get_pretrained_cfg(model).input_size[-1]))
        own["neuron"] = neurons.kind_of(config.model.neuron)
        there["neuron"] = neurons.kind_of(models.default_neuron(model))
    found = {
        key: f"{key} {value} instead of {own[key]}"
        for key, value in there.items()
        if value != own[key]
    }
    machine = values.get("machine")
    card = cards.find(str(machine.get("device", ""))) if isinstance(machine, dict) else None
    if cluster.gpus_per_node and values.get("device") == "cpu":
        found["device"] = "a CPU, which does not predict a GPU's speed"
    elif cluster.gpus_per_node and card is not None and card.name != (cluster.gpu or card.name):
        found["device"] = f"an {card.name} instead of an {cluster.gpu}"
    if config.recompute != "none" and "model" in there:
        found["recompute"] = "no recomputation"
    return found


def _speed_in(values: dict[str, Any], config: RunConfig) -> Speed:
    rate, text = float(values["images_per_s"]) / max(1, int(values.get("processes", 1))), ""
    by_batch = {int(batch): float(one) for batch, one in values.get("by_batch", {}).items()}
    if by_batch:
        batch = max((b for b in by_batch if b <= config.batch.micro), default=min(by_batch))
        rate, text = by_batch[batch], f" in batches of {batch}"
    if not 0 < rate < math.inf:
        raise ValueError(rate)
    mean = config.phases[config.start_phase].mean_timesteps
    timesteps = float(values.get("timesteps", mean))
    return Speed(rate, timesteps, source=f"measured{text}")


# --- by the roofline ------------------------------------------------------------------------------


def computed(config: RunConfig, network: Network, card: Card) -> Speed:
    """Return the speed by the roofline.

    Raises:
        UserError: The network cannot be counted, or the card does not support its precision.
    """
    phases = [_estimates(config, phase, network, card) for phase in config.phases]
    # If the image size grows, take the mean of the first and the last.
    rates = [
        harmonic_mean([found.images_per_s for found, _ in of_sizes])
        * (phase.most_timesteps / phase.mean_timesteps)
        for phase, of_sizes in zip(config.phases, phases, strict=True)
    ]
    first = config.start_phase
    found, work = phases[first][-1]
    limit = (
        f"the GPU needs {1e3 * found.memory:.1f} ms for memory and {1e3 * found.arithmetic:.1f} ms "
        f"for arithmetic, the host meanwhile {1e3 * found.launches:.1f} ms to launch all kernels"
    )
    if found.seconds == found.launches and not config.cuda_graphs:
        limit += "; cuda_graphs=true (with engine=torch) shortens that"
    gpu = (
        f"{card.name}, computed, not measured: {1e3 * found.seconds:.1f} ms a micro-batch of "
        f"{found.batch}, {found.images_per_s:.0f} samples/s\n{limit}\n"
        "without loss, update and loading"
    )
    return Speed(
        rates[first],
        config.phases[first].mean_timesteps,
        of_phases=tuple(rates),
        source=f"computed, not measured, for an {card.name}",
        details=(("a GPU", gpu), ("memory", _memory(config, network, card, work.peak_bytes))),
    )


def _estimates(
    config: RunConfig, phase: PhaseSection, network: Network, card: Card
) -> list[tuple[Estimate, Work]]:
    """Return time and work of a micro-batch at the largest T of a phase, for its first and last
    image size."""
    before = network.model.timesteps
    network.model.set_timesteps(phase.most_timesteps)
    try:
        sizes = dict.fromkeys(phase_image_sizes(config, phase))
        works = [network.count(config.batch.micro, size, config.precision) for size in sizes]
    finally:
        network.model.set_timesteps(before)
    return [(estimate(work, card, as_graph=config.cuda_graphs), work) for work in works]


def _memory(config: RunConfig, network: Network, card: Card, peak_bytes: int) -> str:
    parameters = sum(p.numel() for p in network.model.parameters())
    kinds = (config.optimizer_of(i).kind for i in range(len(config.phases)))
    moments = max(kind_of(kind).moments for kind in kinds)
    averages = 0 if config.ema.decay is None else 1
    weights = 4 * parameters * (2 + moments + averages) / 1e9
    total = weights + peak_bytes / 1e9
    fits = "" if total < card.memory_gb else ": too much; use a smaller batch.micro, or recompute"
    return (
        f"about {total:.1f} GB of the {card.memory_gb:g}{fits}; {weights:.1f} of it for weights, "
        f"gradients, {'average ' if averages else ''}and optimiser state, without cuDNN's "
        "workspace"
    )
