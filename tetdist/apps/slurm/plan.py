"""The cost of a run: steps, images, checkpoints and, from a measured speed, hours.

The model of communication. All processes average the gradient once a step, in float32. It is
counted as if it began after the last micro-batch; in truth most of it is done during that one's
backward pass, so that the plan is an upper bound. For P parameters, g processes on each of n nodes
and rings within and between the nodes, it takes

    4 P * 2 (g - 1) / g / link_in_node  +  4 P * 2 (n - 1) / n / link_between_nodes

seconds (links in bytes a second). A step's computing is its share of the micro-batches at the
speed that speed.py knows. Evaluations run at three times the training speed. Loading data is taken
to keep up.
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

EVALUATION_SPEED = 3.0  # forward only, against forward and backward
TABLE_NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Plan:
    """The work of a run, whatever the speed.

    Attributes:
        micro_batches: Micro-batches of a step, over all processes.
        steps_per_epoch: Optimiser steps.
        first_step, last_step: The run's; the first is not 0 where it begins with a later phase.
        evaluations: How often the whole validation split is evaluated, by weights and average.
        train_images, val_images: Sizes of the splits.
        parameters: The model's.
        checkpoint_bytes: Size of one checkpoint.
    """

    config: RunConfig
    cluster: ClusterSection
    micro_batches: int
    steps_per_epoch: int
    first_step: int
    last_step: int
    evaluations: int
    train_images: int
    val_images: int
    parameters: int
    checkpoint_bytes: int

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    @property
    def images(self) -> int:
        return self.steps * self.config.batch.global_

    @property
    def average_bytes(self) -> int:
        """The bytes that the processes average at each step."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Cost:
    """The cost of the run on a job of one size.

    Attributes:
        hours: Time of computing, without waiting in a queue.
        communication: Its share of a training step.
        periods: The number of time limits that the run takes.
    """

    nodes: int
    processes: int
    hours: float
    gpu_hours: float
    communication: float
    periods: int
    images_per_s: float


def make(
    config: RunConfig,
    cluster: ClusterSection,
    *,
    train_images: int,
    val_images: int,
    parameters: int,
    buffers: int,
) -> Plan:
    """The plan of a run; ``buffers`` are the model's numbers that are not parameters.

    Raises:
        UserError: The processes cannot share a step, or an epoch has no step.
    """
    batch = config.batch
    order.rank_micro_batches(0, cluster.processes, batch.global_, batch.micro)
    per_epoch = order.steps_per_epoch(train_images, batch.global_)
    phases = schedule_phases(config.phases, per_epoch, config.batch.global_)
    end = phases[-1].end_step
    last_step = min(end, config.max_steps or end)
    first_step = phases[config.start_phase].first_step
    every = config.evaluate_every * per_epoch
    moments = max(kind_of(phase.optimizer.kind).moments for phase in config.phases)
    copies = 1 if config.ema.decay is None else 2  # of the weights: with their moving average
    return Plan(
        config=config,
        cluster=cluster,
        micro_batches=batch.global_ // batch.micro,
        steps_per_epoch=per_epoch,
        first_step=first_step,
        last_step=last_step,
        evaluations=copies * math.ceil((last_step - first_step) / every),
        train_images=train_images,
        val_images=val_images,
        parameters=parameters,
        checkpoint_bytes=4 * (parameters * (copies + moments) + copies * buffers),
    )


def cost(plan: Plan, speed: Speed, nodes: int) -> Cost | None:
    """The cost on so many nodes; None where the micro-batches cannot be shared equally."""
    cluster, batch = plan.cluster, plan.config.batch
    in_node = cluster.processes_per_node
    processes = nodes * in_node
    if plan.micro_batches % processes:
        return None
    communication = communication_seconds(plan.average_bytes, nodes, in_node, cluster)
    share = batch.global_ / processes
    training = evaluating = waiting = 0.0
    phases = schedule_phases(plan.config.phases, plan.steps_per_epoch, plan.config.batch.global_)
    for number, phase in list(enumerate(phases))[plan.config.start_phase :]:
        steps = max(0, min(phase.end_step, plan.last_step) - phase.first_step)
        rate = speed.rate(number, phase.section.timesteps)
        training += steps * share / rate
        waiting += steps * communication
        part = plan.evaluations * steps / plan.steps
        evaluating += part * plan.val_images / processes / (rate * EVALUATION_SPEED)
    seconds = training + evaluating + waiting
    stretch = cluster.minutes * 60 - cluster.warn_before_end - RESTART_MINUTES * 60
    return Cost(
        nodes=nodes,
        processes=processes,
        hours=seconds / 3600,
        gpu_hours=seconds / 3600 * nodes * (cluster.gpus_per_node or 0),
        communication=waiting / (training + waiting),
        periods=max(1, math.ceil(seconds / stretch)) if stretch > 0 else 0,
        images_per_s=plan.images / (training + waiting),
    )


def communication_seconds(
    num_bytes: int, nodes: int, in_node: int, cluster: ClusterSection
) -> float:
    """Seconds to average ``num_bytes`` over all processes, by the model at the top."""
    inside = 2 * (in_node - 1) / in_node * num_bytes / (cluster.link_in_node * 1e9)
    between = 2 * (nodes - 1) / nodes * num_bytes / (cluster.link_between_nodes * 1e9)
    return inside + between


# --- as text --------------------------------------------------------------------------------------


def describe(plan: Plan, speed: Speed | str) -> str:
    """The plan as a person reads it; without a speed it says why there is none."""
    config, cluster = plan.config, plan.cluster
    per_process = plan.micro_batches // cluster.processes
    # The newest and the best, of the weights and of their moving average.
    kept = config.save.keep_last + (1 if config.ema.decay is None else 2)
    phases = config.phases[config.start_phase :]
    timesteps = " then ".join(str(phase.timesteps) for phase in phases)
    epochs = " + ".join(str(phase.epochs) for phase in phases)
    devices = counted(cluster.gpus_per_node, "GPU") if cluster.gpus_per_node else "no GPU"
    lines = [
        f"processes    {cluster.processes}: {counted(cluster.nodes, 'node')} x "
        f"{cluster.processes_per_node} ({devices} a node)",
        f"a step       {counted(config.batch.global_, 'sample')} in "
        f"{counted(plan.micro_batches, 'micro-batch')} of "
        f"{config.batch.micro}, {per_process} a process",
        f"steps        {plan.steps_per_epoch} an epoch, {plan.steps} in all ({epochs} epochs)",
        f"samples      {plan.images} to train on ({plan.train_images} in the split), "
        f"{counted(plan.evaluations, 'evaluation')} of {plan.val_images}; T = {timesteps}",
        f"model        {plan.parameters / 1e6:.2f} million parameters",
        f"checkpoints  {_size(plan.checkpoint_bytes)} each, {kept} kept: "
        f"{_size(kept * plan.checkpoint_bytes)}",
        f"time limit   {cluster.time}; saves and goes on {cluster.warn_before_end} s before it",
    ]
    if isinstance(speed, str):
        return "\n".join([*lines, f"hours        unknown: {speed}"])
    for name, text in speed.details:
        lines.append(f"{name:12} " + text.replace("\n", "\n" + 13 * " "))
    own = cost(plan, speed, cluster.nodes)
    assert own is not None, "make() has checked it"
    epochs_of_run = plan.steps / plan.steps_per_epoch
    lines += [
        f"hours        {own.hours:.1f}, {own.hours / epochs_of_run:.2g} an epoch, GPU-hours "
        f"{own.gpu_hours:.0f}, time limits {_periods(own)} ({own.images_per_s:.0f} samples/s)",
        "",
        f"By size, from {speed.images_per_s:.4g} samples/s a process at T={speed.timesteps} "
        f"({speed.source}),",
        f"{_size(plan.average_bytes)} averaged a step over {cluster.link_in_node:g} GB/s in a node "
        f"and {cluster.link_between_nodes:g} GB/s between nodes, counted as if nothing hid it;",
        f"{RESTART_MINUTES:g} minutes a restart:",
        "",
        "nodes  processes  samples/s   hours  GPU-hours  averaging  time limits",
    ]
    for nodes in sorted({*TABLE_NODES, cluster.nodes}):
        row = cost(plan, speed, nodes)
        count = nodes * cluster.processes_per_node
        if row is None:
            lines.append(
                f"{nodes:5}  {count:9}  {plan.micro_batches} micro-batches cannot be shared equally"
            )
            continue
        lines.append(
            f"{nodes:5}  {count:9}  {row.images_per_s:9.0f}  {row.hours:6.1f}  "
            f"{row.gpu_hours:9.0f}  {100 * row.communication:7.1f} %  {_periods(row):>11}"
        )
    return "\n".join(lines)


def _periods(cost: Cost) -> str:
    return str(cost.periods) if cost.periods else "too short"


def _size(num_bytes: int) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
