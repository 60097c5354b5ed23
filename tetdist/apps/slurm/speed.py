"""The throughput of one process for the plan: as given, as measured, or by the roofline.

A GPU's speed is never taken from a CPU's. What tools/check_gpu.py or tools/bench.py measured comes
first. If that was another network, precision or size, the roofline says how their work compares,
so that what counts is the share of the roofline that was reached. If nothing was measured, the
roofline alone is the estimate, for the kind of GPU that the cluster's facts name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import timm

from tetdist import models
from tetdist.apps.roofline import cards
from tetdist.apps.roofline.cards import Card
from tetdist.apps.roofline.count import CONVOLUTIONS, Work, count
from tetdist.apps.roofline.estimate import (
    BANDWIDTH_SHARE,
    LAUNCH_SECONDS,
    Estimate,
    arithmetic_share,
    estimate,
)
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.config.sections.phase import PhaseSection
from tetdist.errors import UserError, typed
from tetdist.nn import neurons
from tetdist.optimizers import kind_of


@dataclass(frozen=True)
class Speed:
    """The speed at which one process trains.

    Attributes:
        images_per_s: The rate of one process alone.
        timesteps: T of the measurement.
        of_phases: The rate in each of the configuration's phases, where that is known; else it is
            taken to fall with T.
        source: Where that comes from.
        details: Further lines of the plan, each of a name and a text.
    """

    images_per_s: float
    timesteps: int
    of_phases: tuple[float, ...] = ()
    source: str = "as given"
    details: tuple[tuple[str, str], ...] = ()

    def rate(self, phase: int, timesteps: int) -> float:
        """Samples a second in a phase of the configuration, with its T."""
        if self.of_phases:
            return self.of_phases[phase]
        return self.images_per_s * self.timesteps / timesteps


@dataclass(frozen=True)
class Network:
    """The network of a run and what it is shown.

    Attributes:
        model: Its weights are not needed.
        frames: T, height and width of recordings; None for images.
    """

    model: Any  # a SpikingModel that is a module
    frames: tuple[int, int, int] | None

    def shape(self, batch: int, size: int) -> tuple[int, ...]:
        """The shape of a batch of images of that size, or of recordings."""
        if self.frames is None:
            return (batch, 3, size, size)
        timesteps, height, width = self.frames
        return (batch, timesteps, 2, height, width)


@dataclass(frozen=True)
class Case:
    """Return the subject of a benchmark: network, kind of neuron, pixels, precision."""

    model: str
    neuron: str
    size: int
    precision: str


def speed_of(
    config: RunConfig,
    cluster: ClusterSection,
    network: Network,
    *,
    images_per_s: float | None = None,
    file: str | None = None,
) -> Speed | str:
    """The speed of one process, or one sentence on why it is not known.

    Args:
        config: The run's.
        cluster: The facts.
        network: What the run trains.
        images_per_s: The flag of that name.
        file: Of a benchmark, a JSON object; see `measured`.

    Raises:
        UserError: The file is not of a benchmark, or not of one that says something about this run.
    """
    if images_per_s is not None:
        if not 0 < images_per_s < math.inf:
            raise UserError(f"--images-per-s: {images_per_s:g} must be above 0")
        return Speed(images_per_s, config.phases[config.start_phase].timesteps)
    card = None if cluster.gpu is None else cards.named(cluster.gpu, "cluster.gpu")
    if file is not None:
        return measured(file, config, cluster, network, card)
    if not cluster.gpus_per_node:
        return "give --images-per-s X, or --benchmark FILE of tools/bench.py"
    if card is None:
        return (
            f"name the kind of GPU, --gpu {'|'.join(cards.CARDS)}, for an estimate, or give "
            "--benchmark FILE of tools/check_gpu.py, or --images-per-s X"
        )
    return computed(config, network, card)


# --- by the roofline ------------------------------------------------------------------------------


def computed(config: RunConfig, network: Network, card: Card) -> Speed | str:
    """The speed by the roofline, or why there is none."""
    try:
        phases = [_estimates(config, phase, network, card) for phase in config.phases]
    except UserError as error:
        return f"{error}; give --benchmark FILE, or --images-per-s X"
    if None in (one for phase in phases for one, _ in phase):
        return (
            f"the plan knows no arithmetic of a {card.name} for precision={config.precision}; take "
            "another precision, or give --benchmark FILE"
        )
    # Of images that grow, the mean of the first and the last.
    rates = [_mean([one.images_per_s for one, _ in phase if one]) for phase in phases]
    first = config.start_phase
    found, work = phases[first][-1]
    assert found is not None
    timesteps = config.phases[first].timesteps
    return Speed(
        rates[first],
        timesteps,
        of_phases=tuple(rates),
        source=f"computed, not measured, for an {card.name}",
        details=_details(config, network, card, found, work),
    )


def _estimates(
    config: RunConfig, phase: PhaseSection, network: Network, card: Card
) -> list[tuple[Estimate | None, Work]]:
    """The work and time of a micro-batch of each image size that begins or ends a phase."""
    before = network.model.timesteps
    network.model.set_timesteps(phase.timesteps)
    try:
        found = []
        for size in dict.fromkeys(phase_image_sizes(config, phase)):
            shape = network.shape(config.batch.micro, size)
            work = count(network.model, shape, config.precision)
            found.append((estimate(work, card, as_graph=config.cuda_graphs), work))
        return found
    finally:
        network.model.set_timesteps(before)


def _details(
    config: RunConfig, network: Network, card: Card, found: Estimate, work: Work
) -> tuple[tuple[str, str], ...]:
    of_convolutions = found.by_kind.get(CONVOLUTIONS, 0.0) / sum(found.by_kind.values())
    busy = found.memory + found.arithmetic
    peak = card.arithmetic(config.precision)
    assert peak is not None
    match found.bound:
        case "memory" | "arithmetic":
            of_memory = 100 * found.memory / busy
            waits = f"its memory bounds {of_memory:.0f} % of that, arithmetic the rest"
        case "launches":
            waits = f"the host's starting of kernels bounds it; they run for {1e3 * busy:.1f} ms"
            if not config.cuda_graphs:
                waits += ", which cuda_graphs=true (with engine=torch) would come nearer to"
        case other:
            assert_never(other)
    lines = [
        f"{card.name}, computed, not measured: {1e3 * found.seconds:.1f} ms a micro-batch of "
        f"{found.batch}, {found.images_per_s:.0f} samples/s",
        f"{waits}; {100 * of_convolutions:.0f} % of the GPU's time is convolutions",
        f"at {100 * BANDWIDTH_SHARE:.0f} % of {card.bandwidth / 1e3:.3g} TB/s, "
        f"{100 * arithmetic_share(card, config.precision):.0f} % of {peak:.3g} TFLOP/s, and "
        f"{1e6 * LAUNCH_SECONDS:.0f} us to start a kernel; loss, update and loading are left out",
    ]
    parameters = sum(p.numel() for p in network.model.parameters())
    moments = max(kind_of(phase.optimizer.kind).moments for phase in config.phases)
    averages = 0 if config.ema.decay is None else 1
    weights = 4 * parameters * (2 + moments + averages) / 1e9
    total = weights + work.peak_bytes / 1e9
    fits = "" if total < card.memory_gb else ": too much; take a smaller batch.micro, or recompute"
    memory = (
        f"about {total:.1f} GB of the {card.memory_gb:g}{fits}; {weights:.1f} of it weights, their "
        f"gradients, {'average ' if averages else ''}and the optimiser's, and without what cuDNN "
        "works in"
    )
    return (("a GPU", "\n".join(lines)), ("memory", memory))


def _mean(values: list[float]) -> float:
    return len(values) / sum(1 / value for value in values)


# --- as measured ----------------------------------------------------------------------------------


def measured(
    file: str, config: RunConfig, cluster: ClusterSection, network: Network, card: Card | None
) -> Speed:
    """The speed by a benchmark's file.

    It is a JSON object with ``images_per_s``, of ``processes`` together if they were several, and
    what was measured: ``model``, ``size``, ``precision``, ``timesteps``, ``device``. What is absent
    is taken to be as in the configuration. ``by_batch`` has rates by size of the micro-batch.

    Raises:
        UserError: It is none, it was measured on a CPU and the job is for GPUs, or it is about
            another network and the kind of GPU is not known.
    """
    try:
        values = json.loads(Path(file).read_text())
        speed = _speed_in(values, config)
    except OSError as error:
        raise UserError(f"--benchmark: {file} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--benchmark: {file} does not give images_per_s as a number above 0 ({error!r})"
        ) from error
    if cluster.gpus_per_node and values.get("device") == "cpu":
        raise UserError(
            f"--benchmark: {file} was measured on a CPU, which says nothing about a GPU's speed; "
            f"measure there, with `{typed('check_gpu', '--json', 'FILE')}`, or leave the flag away "
            "for an estimate"
        )
    case, own = _case_in(values, config, network), _case_of(config, network)
    measured_on = _card_in(values)
    other_card = None not in (card, measured_on) and card != measured_on
    if case == own and config.recompute == "none" and not other_card:
        return speed
    if not cluster.gpus_per_node:
        if case == own:
            return speed
        raise UserError(
            f"--benchmark: {file} measured {_text(case)}, and this run trains {_text(own)}: "
            "measure that, or give --images-per-s X"
        )
    card = card or measured_on
    return _by_roofline(file, speed, case, config, network, card, measured_on or card)


def _speed_in(values: dict[str, Any], config: RunConfig) -> Speed:
    rate, text = float(values["images_per_s"]) / max(1, int(values.get("processes", 1))), ""
    by_batch = {int(batch): float(one) for batch, one in values.get("by_batch", {}).items()}
    if by_batch:
        smaller = [batch for batch in by_batch if batch <= config.batch.micro]
        batch = max(smaller) if smaller else min(by_batch)
        rate, text = by_batch[batch], f" in batches of {batch}"
    if not 0 < rate < math.inf:
        raise ValueError(rate)
    timesteps = int(values.get("timesteps", config.phases[config.start_phase].timesteps))
    return Speed(rate, timesteps, source=f"measured{text}")


def _case_of(config: RunConfig, network: Network) -> Case:
    first = config.phases[config.start_phase]
    size = network.frames[1] if network.frames else phase_image_sizes(config, first)[1]
    kind = neurons.kind_of(config.model.neuron)
    return Case(config.model.name, kind, size, config.precision)


def _case_in(values: dict[str, Any], config: RunConfig, network: Network) -> Case:
    own = _case_of(config, network)
    model, precision = values.get("model", own.model), values.get("precision", own.precision)
    size = values.get("size")
    if size is None:
        # A benchmark takes a network's own size if none was named.
        size = (_own_size(model) if "model" in values else None) or own.size
    # A benchmark takes a network as it is registered.
    neuron = values.get("neuron", _own_neuron(model) if "model" in values else own.neuron)
    return Case(model, neuron, size, precision)


def _own_neuron(model: str) -> str:
    return neurons.kind_of(models.default_neuron(model)) if timm.is_model(model) else "lif"


def _own_size(model: str) -> int | None:
    if not timm.is_model(model):
        return None
    return int(timm.get_pretrained_cfg(model).input_size[-1])


def _card_in(values: dict[str, Any]) -> Card | None:
    machine = values.get("machine")
    return cards.find(str(machine.get("device", ""))) if isinstance(machine, dict) else None


def _text(case: Case) -> str:
    neuron = "" if case.neuron == _own_neuron(case.model) else f" of {case.neuron} neurons"
    return f"{case.model}{neuron} at {case.size} pixels in {case.precision}"


def _by_roofline(
    file: str,
    speed: Speed,
    case: Case,
    config: RunConfig,
    network: Network,
    card: Card | None,
    measured_on: Card | None,
) -> Speed:
    """The roofline of this run, times the share of its own that the measured network reached."""
    command = typed("bench", "model", "--model", config.model.name, "--device", "cuda")
    said = f"--benchmark: {file} measured {_text(case)}, and this run trains " + _text(
        _case_of(config, network)
    )
    way_out = (
        f"measure this with `{command} --precision {config.precision} --json FILE`, or give "
        "--images-per-s X"
    )
    if card is None or measured_on is None:
        raise UserError(f"{said}: name the kind of GPU, --gpu NAME, to compare the two, {way_out}")
    own = computed(config, network, card)
    theirs = _estimate_of(case, speed.timesteps, config, measured_on)
    if isinstance(own, str) or theirs is None:
        raise UserError(f"{said}, which the roofline of an {card.name} cannot compare: {way_out}")
    share = speed.images_per_s / theirs.images_per_s
    if share > 1.25:
        raise UserError(
            f"{said}: that is {100 * share:.0f} % of what the roofline of an {measured_on.name} "
            f"allows, so the file is not of one, or not of {_text(case)}; {way_out}"
        )
    return Speed(
        share * own.images_per_s,
        own.timesteps,
        of_phases=tuple(share * rate for rate in own.of_phases),
        source=f"by the roofline of an {card.name}; {_text(case)} was measured to reach "
        f"{100 * share:.0f} % of that of an {measured_on.name}",
        details=own.details,
    )


def _estimate_of(case: Case, timesteps: int, config: RunConfig, card: Card) -> Estimate | None:
    if case.model not in models.names():
        return None
    kind: dict[str, Any] = {"kind": case.neuron}
    if "timesteps" in neurons.class_of(case.neuron).__dataclass_fields__:
        kind["timesteps"] = timesteps
    model: Any = timm.create_model(case.model, timesteps=timesteps, neuron=kind)
    frames = (timesteps, case.size, case.size) if model.input_kind == "events" else None
    shape = Network(model, frames).shape(config.batch.micro, case.size)
    return estimate(count(model, shape, case.precision), card)
