"""Cost of a run: steps, images, checkpoints and, from a measured speed, hours.

Each process trains its part of the micro-batches at the given images a second, and evaluates at
three times that speed. The time to average gradients is left out unless that speed includes it, as
a run's does. Data loading is assumed to keep up; the plan says what that takes.
"""

import math
from dataclasses import dataclass

from tetdist import order
from tetdist.apps.slurm.cluster import RESTART_MINUTES, ClusterSection
from tetdist.config.schema import RunConfig
from tetdist.errors import typed
from tetdist.optimizers import kind_of
from tetdist.training.schedule import Phase, schedule_phases
from tetdist.wording import counted, duration

# Loading an image of ImageNet at 224 pixels (docs/data.md): milliseconds of a core, mean bytes of
# the file, and the milliseconds that data.auto_augment adds.
LOADING_MS = 1.77
LOADING_BYTES = 110_000
POLICY_MS = {"trivial": 0.3, "cifar10": 0.4, "imagenet": 0.4, "3a": 0.6, "rand": 0.6}
# Assumed speed of an evaluation, which has no backward pass, relative to training.
EVALUATION = 3.0


@dataclass(frozen=True)
class Plan:
    """Work of a run, independent of the speed.

    Raises:
        UserError: The processes cannot share a step, or there are too few samples for one.
    """

    config: RunConfig
    cluster: ClusterSection
    train_images: int
    val_images: int
    pixels: int  # side of a sample
    parameters: int
    buffers: int  # size of the model's buffers
    origin: str = "in the split"  # source of these sizes
    sample_bytes: float | None = None  # mean size of a training sample's file; None if unknown

    def __post_init__(self) -> None:
        batch = self.config.batch
        order.rank_micro_batches(0, self.cluster.processes, batch.global_, batch.micro)
        order.steps_per_epoch(self.train_images, batch.global_)

    @property
    def micro_batches(self) -> int:
        """Micro-batches a step, over all processes."""
        return self.config.batch.global_ // self.config.batch.micro

    @property
    def steps_per_epoch(self) -> int:
        return order.steps_per_epoch(self.train_images, self.config.batch.global_)

    @property
    def phases(self) -> list[Phase]:
        """Phases that the run trains, from ``start_phase`` on."""
        config = self.config
        phases = schedule_phases(config.phases, self.steps_per_epoch, config.batch.global_)
        return phases[config.start_phase :]

    @property
    def last_step(self) -> int:
        return min(self.phases[-1].end_step, self.config.max_steps or self.phases[-1].end_step)

    @property
    def steps(self) -> int:
        return self.last_step - self.phases[0].first_step

    @property
    def images(self) -> int:
        return self.steps * self.config.batch.global_

    @property
    def copies(self) -> int:
        """Copies of the weights that are saved and evaluated: their moving average is one."""
        return 1 if self.config.ema.decay is None else 2

    @property
    def evaluations(self) -> int:
        """Evaluations of the validation split, by weights and average."""
        every = self.config.evaluate_every * self.steps_per_epoch
        return self.copies * math.ceil(self.steps / every)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint."""
        moments = max(kind_of(phase.optimizer.kind).moments for phase in self.phases)
        return 4 * (self.parameters * (self.copies + moments) + self.copies * self.buffers)


def seconds_of(plan: Plan, images_per_s: float) -> float:
    """Return the computing time of the run, without waiting in a queue.

    Args:
        images_per_s: Training speed of one process at the first phase's T.
    """
    seconds = 0.0
    for phase in plan.phases:
        steps = max(0, min(phase.end_step, plan.last_step) - phase.first_step)
        images = plan.evaluations * steps / plan.steps * plan.val_images / EVALUATION
        images += steps * plan.config.batch.global_
        # The rate at another T than the first phase's.
        mean = phase.section.mean_timesteps
        rate = images_per_s * plan.phases[0].section.mean_timesteps / mean
        seconds += images / plan.cluster.processes / rate
    return seconds


# --- as text --------------------------------------------------------------------------------------


def describe(plan: Plan, images_per_s: float | None) -> str:
    """Return the plan as text; without a speed, with the command that measures it."""
    config, cluster, batch = plan.config, plan.cluster, plan.config.batch
    # The newest, and the best of the weights and of their moving average.
    kept = config.save.keep_last + plan.copies
    phases = config.phases[config.start_phase :]
    timesteps = " then ".join(phase.timesteps_as_text for phase in phases)
    epochs = " + ".join(counted(phase.epochs, "epoch") for phase in phases)
    limit = duration(cluster.minutes * 60)
    note = f" ({cluster.time} is minutes; hours: {cluster.time}:00:00)" * cluster.time.isdigit()
    stretch = cluster.minutes * 60 - cluster.warn_before_end - RESTART_MINUTES * 60
    short = f"; warning: a start may take {RESTART_MINUTES:g} minutes, so give a longer --time"
    devices = counted(cluster.gpus_per_node, "GPU") if cluster.gpus_per_node else "no GPU"
    lines = [
        f"processes    {cluster.processes}: {counted(cluster.nodes, 'node')} x "
        f"{cluster.processes_per_node} ({devices} a node)",
        f"CPUs         {_cpus(config.data.threads, cluster.cpus_per_task)}",
        f"a step       {counted(batch.global_, 'sample')} in "
        f"{counted(plan.micro_batches, 'micro-batch')} of {batch.micro}, "
        f"{plan.micro_batches // cluster.processes} a process; "
        f"possible numbers of processes: {order.process_counts(plan.micro_batches)}",
        f"steps        {plan.steps_per_epoch:,} an epoch, {plan.steps:,} in total "
        f"({'max_steps, of ' if plan.last_step == config.max_steps else ''}{epochs})",
        f"samples      {plan.images:,} to train on ({plan.train_images:,} {plan.origin}), "
        f"{counted(plan.evaluations, 'evaluation')} of {plan.val_images:,}; T = {timesteps}",
        f"model        {plan.parameters / 1e6:.2f} million parameters",
        f"checkpoints  {_size(plan.checkpoint_bytes)} each, {kept} kept: "
        f"{_size(kept * plan.checkpoint_bytes)}",
        f"time limit   {limit}{note}; saves and requeues {cluster.warn_before_end} s before it"
        f"{short if stretch <= 0 else ''}",
    ]
    if images_per_s is None:
        return "\n".join([*lines, f"duration     unknown: {_how_to_measure(plan)}"])
    seconds = seconds_of(plan, images_per_s)
    unit = "GPU" if cluster.gpus_per_node else "node"
    hours = seconds / 3600 * cluster.nodes * (cluster.gpus_per_node or 1)
    number = math.ceil(seconds / stretch) if stretch > 0 else 0
    starts = counted(number, "start") if number else "too many starts"
    starts += f" of the job ({limit} each, {RESTART_MINUTES:g} minutes a restart)"
    in_all = duration(seconds + 60 * RESTART_MINUTES * (number - 1))
    starts += f"; with restarts {in_all}" if number > 1 else ""
    lines += [
        f"duration     {duration(seconds)}, "
        f"{duration(seconds * plan.steps_per_epoch / plan.steps)} an epoch, {unit}-hours "
        f"{hours:,.{0 if hours >= 10 else 2}f}, {starts}",
        f"             from {images_per_s:.4g} samples/s a process at "
        f"T={phases[0].mean_timesteps:g}, without the time to average gradients unless the "
        "measurement included it",
    ]
    is_known = config.data.image_size >= 128  # small images load much faster
    if config.data.kind == "images" and config.data.device == "cpu" and is_known:
        lines.append(_loading(plan, images_per_s))
    return "\n".join(lines)


def _how_to_measure(plan: Plan) -> str:
    config = plan.config
    if config.imports:  # bench measures tetdist's networks alone
        return (
            "train on a node with max_steps=100, then give the --images-per-s that "
            f"`{typed('status')}` prints of the run"
        )
    options = {
        "--model": config.model.name,
        "--size": plan.pixels,
        "--timesteps": round(config.phases[config.start_phase].mean_timesteps),
        "--batch": config.batch.micro,
        "--precision": config.precision,
        "--device": "cuda" if plan.cluster.gpus_per_node else "cpu",
    }
    if config.recompute == "blocks":
        options["--modes"] = "blocks"
    command = typed("bench", "step", *(word for option in options.items() for word in option))
    return f"measure it on a node with `{command}`, which prints --images-per-s"


def _cpus(threads: int, given: int | None) -> str:
    cpus = "the cluster's default a process, often 1" if given is None else f"{given} a process"
    if (given or 1) >= threads:
        return f"{cpus}, of which data.threads={threads} load samples"
    return (
        f"warning: {cpus}, but {threads} threads load samples (data.threads); give "
        f"--cpus-per-task {threads}"
    )


def _loading(plan: Plan, rate: float) -> str:
    """Return what loading takes on a node whose processes train ``rate`` images a second each."""
    processes, cpus = plan.cluster.processes_per_node, plan.cluster.cpus_per_task or 1
    policy = plan.config.data.auto_augment.partition("-")[0]
    milliseconds, size = LOADING_MS + POLICY_MS.get(policy, 0.0), plan.sample_bytes or LOADING_BYTES
    images = processes * rate
    warning = advice = ""
    # The line "CPUs" warns of fewer CPUs than threads.
    if (threads := math.ceil(rate * milliseconds / 1000)) > plan.config.data.threads:
        warning, advice = "warning: ", f"; give data.threads={threads}"
        advice += f" and --cpus-per-task {threads}" if threads > cpus else ""
    return (
        f"loading      {warning}{images * milliseconds / 1000:.1f} cores a node, of "
        f"{processes * cpus} ({cpus} a process), for {images:,.0f} images/s at "
        f"{milliseconds:.3g} ms each; {_size(images * size)}/s at {_size(size)} each{advice}"
    )


def _size(num_bytes: float) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"
