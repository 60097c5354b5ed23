"""Cost of a run: steps, images, checkpoints and, from a measured speed, hours.

Model of communication: All processes average the gradient once a step, in float32. The plan counts
it as if it began after the last micro-batch; in fact most of it overlaps with that micro-batch's
backward pass, so the plan is an upper bound. For P parameters, g processes on each of n nodes and
rings within and between the nodes, it takes

    4 P * 2 (g - 1) / g / link_in_node  +  4 P * 2 (n - 1) / n / link_between_nodes

seconds (links in bytes a second). A process computes its part of the micro-batches at the speed
from speed.py. Evaluations run at three times the training speed. Data loading is assumed to keep
up.
"""

import math
from dataclasses import dataclass

from tetdist import order
from tetdist.apps.slurm.cluster import RESTART_MINUTES, ClusterSection
from tetdist.apps.slurm.speed import Speed
from tetdist.config.schema import RunConfig
from tetdist.optimizers import kind_of
from tetdist.training.schedule import schedule_phases
from tetdist.wording import counted

EVALUATION_SPEED = 3.0  # forward pass only, relative to forward and backward pass
TABLE_NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Plan:
    """Work of a run, independent of the speed."""

    config: RunConfig
    cluster: ClusterSection
    steps_per_epoch: int
    first_step: int  # not 0 if the run begins with a later phase
    last_step: int
    evaluations: int  # of the validation split, by weights and average
    train_images: int
    val_images: int
    origin: str  # source of these sizes
    parameters: int
    checkpoint_bytes: int  # of one checkpoint

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step, over all processes."""
        return self.config.batch.global_ // self.config.batch.micro

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def images(self) -> int:
        return self.steps * self.config.batch.global_

    @property
    def average_bytes(self) -> int:
        """Bytes that the processes average at each step."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Cost:
    """Cost of the run on a given number of nodes."""

    hours: float  # computing time, without waiting in a queue
    gpu_hours: float
    communication: float  # fraction of a training step
    periods: int  # time limits that the run needs; 0: the limit is too short
    images_per_s: float


def make(
    config: RunConfig,
    cluster: ClusterSection,
    *,
    train_images: int,
    val_images: int,
    parameters: int,
    buffers: int,
    origin: str = "in the split",
) -> Plan:
    """Return the plan of a run; ``buffers`` is the size of the model's buffers."""
    batch = config.batch
    order.rank_micro_batches(0, cluster.processes, batch.global_, batch.micro)
    per_epoch = order.steps_per_epoch(train_images, batch.global_)
    phases = schedule_phases(config.phases, per_epoch, config.batch.global_)
    last_step = min(phases[-1].end_step, config.max_steps or phases[-1].end_step)
    first_step = phases[config.start_phase].first_step
    every = config.evaluate_every * per_epoch
    moments = max(kind_of(phase.optimizer.kind).moments for phase in phases)
    copies = 1 if config.ema.decay is None else 2  # the weights, and their moving average
    return Plan(
        config=config,
        cluster=cluster,
        steps_per_epoch=per_epoch,
        first_step=first_step,
        last_step=last_step,
        evaluations=copies * math.ceil((last_step - first_step) / every),
        train_images=train_images,
        val_images=val_images,
        origin=origin,
        parameters=parameters,
        checkpoint_bytes=4 * (parameters * (copies + moments) + copies * buffers),
    )


def cost(plan: Plan, speed: Speed, nodes: int) -> Cost | None:
    """Return the cost on ``nodes`` nodes; None if the micro-batches do not divide equally."""
    cluster, batch = plan.cluster, plan.config.batch
    in_node = cluster.processes_per_node
    processes = nodes * in_node
    if plan.micro_batches % processes:
        return None
    communication = communication_seconds(plan.average_bytes, nodes, in_node, cluster)
    samples = batch.global_ / processes  # of one process, a step
    training = evaluating = waiting = 0.0
    phases = schedule_phases(plan.config.phases, plan.steps_per_epoch, plan.config.batch.global_)
    for phase in phases[plan.config.start_phase :]:
        steps = max(0, min(phase.end_step, plan.last_step) - phase.first_step)
        rate = speed.rate(phase.section.mean_timesteps)
        training += steps * samples / rate
        waiting += steps * communication
        part = plan.evaluations * steps / plan.steps
        evaluating += part * plan.val_images / processes / (rate * EVALUATION_SPEED)
    seconds = training + evaluating + waiting
    stretch = cluster.minutes * 60 - cluster.warn_before_end - RESTART_MINUTES * 60
    return Cost(
        hours=seconds / 3600,
        gpu_hours=seconds / 3600 * nodes * (cluster.gpus_per_node or 0),
        communication=waiting / (training + waiting),
        periods=max(1, math.ceil(seconds / stretch)) if stretch > 0 else 0,
        images_per_s=plan.images / (training + waiting),
    )


def communication_seconds(
    num_bytes: int, nodes: int, in_node: int, cluster: ClusterSection
) -> float:
    """Return the seconds to average ``num_bytes`` over all processes; see the module's model."""
    inside = 2 * (in_node - 1) / in_node * num_bytes / (cluster.link_in_node * 1e9)
    between = 2 * (nodes - 1) / nodes * num_bytes / (cluster.link_between_nodes * 1e9)
    return inside + between


# --- as text --------------------------------------------------------------------------------------


def describe(plan: Plan, speed: Speed | str) -> str:
    """Return the plan as text; without a speed, with the reason."""
    config, cluster, batch = plan.config, plan.cluster, plan.config.batch
    # The newest, and the best of the weights and of their moving average.
    kept = config.save.keep_last + (1 if config.ema.decay is None else 2)
    phases = config.phases[config.start_phase :]
    timesteps = " then ".join(phase.timesteps_as_text for phase in phases)
    epochs = " + ".join(str(phase.epochs) for phase in phases)
    devices = counted(cluster.gpus_per_node, "GPU") if cluster.gpus_per_node else "no GPU"
    lines = [
        f"processes    {cluster.processes}: {counted(cluster.nodes, 'node')} x "
        f"{cluster.processes_per_node} ({devices} a node)",
        f"CPUs         {_cpus(config.data.threads, cluster.cpus_per_task)}",
        f"a step       {counted(batch.global_, 'sample')} in "
        f"{counted(plan.micro_batches, 'micro-batch')} of {batch.micro}, "
        f"{plan.micro_batches // cluster.processes} a process",
        f"steps        {plan.steps_per_epoch} an epoch, {plan.steps} in total ({epochs} epochs)",
        f"samples      {plan.images} to train on ({plan.train_images} {plan.origin}), "
        f"{counted(plan.evaluations, 'evaluation')} of {plan.val_images}; T = {timesteps}",
        f"model        {plan.parameters / 1e6:.2f} million parameters",
        f"checkpoints  {_size(plan.checkpoint_bytes)} each, {kept} kept: "
        f"{_size(kept * plan.checkpoint_bytes)}",
        f"time limit   {cluster.time}; saves and requeues {cluster.warn_before_end} s before it",
    ]
    if isinstance(speed, str):
        return "\n".join([*lines, f"hours        unknown: {speed}"])
    if speed.peak_mib is not None:
        measured, weights = speed.peak_mib * 2**20, plan.checkpoint_bytes
        lines.append(
            f"memory       {_size(measured + weights)} a GPU: {_size(measured)} as measured for "
            f"activations and gradients, {_size(weights)} for weights and optimiser state"
        )
    own = cost(plan, speed, cluster.nodes)
    assert own is not None, "make() checks it"
    lines += [
        f"hours        {own.hours:.1f}, {own.hours * plan.steps_per_epoch / plan.steps:.2g} an "
        f"epoch, GPU-hours {own.gpu_hours:.0f}, time limits {own.periods or 'too short'} "
        f"({own.images_per_s:.0f} samples/s)",
        "",
        f"By number of nodes, from {speed.images_per_s:.4g} samples/s a process at "
        f"T={speed.timesteps:g} ({speed.source}),",
        f"{_size(plan.average_bytes)} averaged a step over {cluster.link_in_node:g} GB/s in a node "
        f"and {cluster.link_between_nodes:g} GB/s between nodes, without overlap,",
        f"and {RESTART_MINUTES:g} minutes a restart:",
        "",
        "nodes  processes  samples/s   hours  GPU-hours  averaging  time limits",
    ]
    lines += [_row(plan, speed, nodes) for nodes in sorted({*TABLE_NODES, cluster.nodes})]
    return "\n".join(lines)


def _cpus(threads: int, given: int | None) -> str:
    if given is not None and given >= threads:
        return f"{given} a process, of which data.threads={threads} load samples"
    found = "the cluster's default a process, often 1" if given is None else f"{given} a process"
    return (
        f"warning: {found}, but {threads} threads load samples (data.threads); give "
        f"cluster.cpus_per_task={threads}"
    )


def _row(plan: Plan, speed: Speed, nodes: int) -> str:
    """Return a row of the table; if this number of nodes is impossible, with a remedy."""
    processes, batch = nodes * plan.cluster.processes_per_node, plan.config.batch
    found = cost(plan, speed, nodes)
    if found is not None:
        return (
            f"{nodes:5}  {processes:9}  {found.images_per_s:9.0f}  {found.hours:6.1f}  "
            f"{found.gpu_hours:9.0f}  {100 * found.communication:7.1f} %  "
            f"{found.periods or 'too short':>11}"
        )
    each = math.ceil(plan.micro_batches / processes)
    advice = f"batch.global={each * processes * batch.micro}"
    if batch.global_ % processes == 0:
        advice = f"batch.micro={batch.global_ // processes}, or {advice}"
    return (
        f"{nodes:5}  {processes:9}  {plan.micro_batches} micro-batches do not divide equally; "
        f"a new run could use {advice}"
    )


def _size(num_bytes: float) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
