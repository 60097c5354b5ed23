"""Benchmark of scaling: several processes compared with one.

Contestants take turns in one run: one process alone; all processes independently, which shows the
machine's limit; and all processes averaging their gradients. Each process has its own cores (or
GPU), and trains with the same engine as runs.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tetdist.apps.benchmarks.contestants import wait
from tetdist.apps.benchmarks.turns import TimedProcess, parent_options, ratio, serve
from tetdist.distributed.meeting import free_port
from tetdist.tables import aligned

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig
    from tetdist.distributed.world import World
    from tetdist.training.step import Step

# --- the processes ------------------------------------------------------------------------------


class Worker(TimedProcess):
    """Process that makes training steps on command."""

    def __init__(self, options: argparse.Namespace, rank: int, world_size: int, port: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[rank :: options.processes] if len(cores) >= options.processes else cores
        super().__init__(
            "tetdist.apps.benchmarks.scaling",
            argparse.Namespace(**vars(options) | {"cores": own}),
            # An independent process is its own group; local rank r still selects the r-th GPU.
            RANK=str(rank if world_size > 1 else 0),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS=str(options.threads or max(1, len(own))),
        )


def together(workers: list[Worker], steps: int) -> float:
    """Return the seconds a step of the slowest worker, when all run at the same time."""
    for worker in workers:
        worker.send(str(steps))
    return max([worker.seconds() for worker in workers])


@contextlib.contextmanager
def processes(options: argparse.Namespace) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """Yield independent processes, and as many that train together."""
    count = options.processes
    workers: list[Worker] = []
    try:
        # Start them in sequence, because the first may have to build kernels.
        for rank in range(count):
            workers.append(Worker(options, rank, 1, free_port()))
            together(workers[-1:], 2)
        port = free_port()
        workers += [Worker(options, rank, count, port) for rank in range(count)]
        together(workers[count:], 2)
        yield workers[:count], workers[count:]
    finally:
        for worker in workers:
            worker.end()


# --- what is measured ---------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"alone": [], "apart": [], "together": []}
    with processes(options) as (singles, group):
        for _ in range(options.repeats):
            seconds["alone"].append(together(singles[:1], options.steps))
            seconds["apart"].append(together(singles, options.steps))
            seconds["together"].append(together(group, options.steps))
    images = options.batch * options.accumulation
    rows = []
    for name, values in seconds.items():
        count, median = 1 if name == "alone" else options.processes, statistics.median(values)
        rows.append(
            {
                "name": name,
                "processes": count,
                "seconds": median,
                # The rate relative to as many independent processes.
                "efficiency": ratio(seconds["alone"], values),
                "of_apart": ratio(seconds["apart"], values),
                "images_per_s": count * images / median,
            }
        )
    keys = ("model", "size", "timesteps", "batch", "accumulation", "precision", "device", "engine")
    return {key: getattr(options, key) for key in keys} | {
        "rows": rows,
        # Keys that `slurm --benchmark` reads.
        "images_per_s": rows[-1]["images_per_s"],
        "processes": options.processes,
    }


def table(result: dict[str, Any]) -> str:
    count = result["processes"]
    names = {
        "alone": "one process",
        "apart": f"{count}, independent",
        "together": f"{count}, averaging",
    }
    rows = [["", "s", "images/s", f"/ {count} x alone", "/ apart"]]
    for row in result["rows"]:
        ratios = [f"{row[name]:.3f}" for name in ("efficiency", "of_apart")]
        rates = [f"{row['seconds']:.3f}", f"{row['images_per_s']:.2f}"]
        rows.append([names[row["name"]], *rates, *(["", ""] if row["name"] == "alone" else ratios)])
    return (
        f"{result['model']}, T={result['timesteps']}, {result['accumulation']} x batch "
        f"{result['batch']} a process, {result['precision']}, {result['engine']}, "
        f"{result['device']}: a step\n\n{aligned(rows, right=range(1, 5))}"
    )


# --- in one of the processes --------------------------------------------------------------------


def work() -> None:
    options = parent_options()
    os.sched_setaffinity(0, options.cores)
    from tetdist.distributed.world import join

    with join(options.device) as world:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            step = training_step(
                world,
                options.model,
                size=options.size,
                batch=options.batch,
                accumulation=options.accumulation,
                timesteps=options.timesteps,
                precision=options.precision,
                engine=options.engine,
            )

        def one() -> None:
            step()
            wait(world.device.type)

        serve(one)


def training_step(
    world: "World",
    name: str,
    *,
    size: int | None,
    batch: int,
    accumulation: int = 1,
    timesteps: int = 4,
    **settings: Any,
) -> "MadeUp":
    """Make the trainer's step, on made-up batches of ``batch`` samples a process and micro-batch.

    ``size`` is an image's side in pixels (None: the network's own); ``settings`` are other keys of
    the configuration, such as ``engine``.
    """
    from tetdist.config.loading import parse
    from tetdist.nn import batch_norm
    from tetdist.nn.precision import choose_algorithms
    from tetdist.optimizers import make_optimizer
    from tetdist.training.engines.base import EngineParts
    from tetdist.training.engines.create import make_engine
    from tetdist.training.step import Step

    optimizer = {"kind": "sgd", "lr": 0.01}
    values = {
        "name": "bench",
        "model": {"name": name},
        "data": {"root": "none"},
        "batch": {"global": batch * accumulation * world.world_size, "micro": batch},
        "phases": [{"epochs": 1, "timesteps": timesteps, "optimizer": optimizer}],
    }
    config = parse(values | settings, "the benchmark")
    choose_algorithms(config.precision)
    model = initial(config).to(world.device)
    if config.recompute == "blocks":
        model.set_grad_checkpointing(True)
    if config.batch_norm.sync:
        batch_norm.synchronize(model, world.mean_, world.world_size)
    made = make_optimizer(model, config.optimizer_of(0))
    engine = make_engine(EngineParts(config, model, made, accumulation, world))
    step = Step(config, model, engine, world, range(accumulation))
    return MadeUp(step, size or model.default_cfg["input_size"][-1])


def initial(config: "RunConfig") -> Any:
    """Return the network of a configuration, the same each time, as it begins to train."""
    import timm

    import tetdist.models  # noqa: F401  # registers them
    from tetdist.nn import batch_norm
    from tetdist.nn.precision import parameter_type

    torch.manual_seed(0)
    model = timm.create_model(config.model.name, timesteps=config.phases[0].most_timesteps)
    batch_norm.defer_running_statistics(model)
    return model.to(parameter_type(config.precision)).train()


class MadeUp:
    """The trainer's step on three batches in turn, again and again."""

    def __init__(self, step: "Step", size: int) -> None:
        self.step, self.size = step, size
        # Several, so that a graph that went on with those of its capture would show.
        self._batches = itertools.cycle([self.batch_of(step.world.rank, i) for i in range(3)])
        self._numbers = itertools.count()

    def batch_of(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of a process; each process has other ones."""
        config, model, device = self.step.config, self.step.model, self.step.world.device
        generator = torch.Generator(device).manual_seed(3 * rank + number)
        batch, channels = config.batch.micro, model.in_chans
        frames = (model.timesteps,) if model.input_kind == "events" else ()
        shape = (batch, *frames, channels, self.size, self.size)
        images = torch.rand(shape, device=device, generator=generator)
        layout = torch.contiguous_format if frames else torch.channels_last
        images = images.to(next(model.parameters()).dtype).contiguous(memory_format=layout)
        return images, (torch.arange(batch, device=device) + rank + number) % 10

    def __call__(self, lr: float = 0.01) -> Tensor:
        """Take a step; return its mean loss, (), without waiting for the device."""
        from tetdist.training.step import LOSS, SAMPLES

        given = itertools.islice(self._batches, len(self.step.micro_batches))
        _, sums = self.step.take(next(self._numbers), given, lr)
        return sums[LOSS] / sums[SAMPLES]

    def close(self) -> None:
        """Release the engine."""
        self.step.engine.close()


if __name__ == "__main__":
    work()
