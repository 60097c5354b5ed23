"""The benchmark scaling: several processes against one.

Contestants take turns in one run: one process alone; as many as there are to be, each for itself,
which shows what the machine has to give; and the same averaging their gradients. Each process has
its own cores (or GPU), and trains by the engine that runs train by.
"""

import argparse
import contextlib
import itertools
import os
import socket
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tetdist.apps.benchmarks.contestants import wait
from tetdist.apps.benchmarks.turns import Told, answer, options_told

if TYPE_CHECKING:
    from tetdist.distributed.world import World

# --- the processes ------------------------------------------------------------------------------


class Worker(Told):
    """A process that makes steps when told to."""

    def __init__(self, options: argparse.Namespace, rank: int, world_size: int, port: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[rank :: options.processes] if len(cores) >= options.processes else cores
        super().__init__(
            "tetdist.apps.benchmarks.scaling",
            argparse.Namespace(**vars(options) | {"cores": own}),
            # Each that is alone is a group of its own; local rank r still means the r-th GPU.
            RANK=str(rank if world_size > 1 else 0),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS=str(options.threads or max(1, len(own))),
        )


def together(workers: list[Worker], steps: int) -> float:
    """The seconds of a step of the slowest, when all run at the same time."""
    for worker in workers:
        worker.tell(str(steps))
    return max([worker.seconds() for worker in workers])


@contextlib.contextmanager
def processes(options: argparse.Namespace) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """Processes that train each for itself, and as many that share their work."""
    count = options.processes
    workers: list[Worker] = []
    try:
        # They start one after the other, because the first may have kernels to build.
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- what is measured ---------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"alone": [], "apart": [], "together": []}
    with processes(options) as (singles, group):
        for _ in range(options.repeats):
            seconds["alone"].append(together(singles[:1], options.steps))
            seconds["apart"].append(together(singles, options.steps))
            seconds["together"].append(together(group, options.steps))
    images = options.batch * options.accumulation
    rows = [
        {
            "name": name,
            "processes": 1 if name == "alone" else options.processes,
            "seconds": statistics.median(values),
            # The share of the rate of as many independent processes, round by round.
            "efficiency": statistics.median(
                one / own for one, own in zip(seconds["alone"], values, strict=True)
            ),
            "of_apart": statistics.median(
                one / own for one, own in zip(seconds["apart"], values, strict=True)
            ),
            "images_per_s": (1 if name == "alone" else options.processes)
            * images
            / statistics.median(values),
        }
        for name, values in seconds.items()
    ]
    keys = ("model", "size", "timesteps", "batch", "accumulation", "precision", "device", "engine")
    return {key: getattr(options, key) for key in keys} | {
        "rows": rows,
        # With these two `slurm --benchmark` knows the speed of a process.
        "images_per_s": rows[-1]["images_per_s"],
        "processes": options.processes,
    }


def table(result: dict[str, Any]) -> str:
    count = result["processes"]
    lines = [
        f"{result['model']}, T={result['timesteps']}, {result['accumulation']} x batch "
        f"{result['batch']} a process, {result['precision']}, {result['engine']}, "
        f"{result['device']}: a step",
        "",
        f"                              s   images/s   / {count} x alone   / apart",
    ]
    names = {
        "alone": "one process",
        "apart": f"{count}, each for itself",
        "together": f"{count}, averaging",
    }
    for row in result["rows"]:
        apart = "" if row["name"] == "alone" else f"{row['of_apart']:10.3f}"
        efficiency = "" if row["name"] == "alone" else f"{row['efficiency']:14.3f}"
        lines.append(
            f"{names[row['name']]:22}{row['seconds']:9.3f}{row['images_per_s']:11.2f}"
            f"{efficiency}{apart}"
        )
    return "\n".join(lines)


# --- in one of the processes --------------------------------------------------------------------


def work() -> None:
    options = options_told()
    os.sched_setaffinity(0, options.cores)
    from tetdist.distributed.world import join

    with join(options.device) as world:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
            step, _ = training_step(options, world)

        def one() -> None:
            step()
            wait(world.device.type)

        answer(one)


def training_step(
    options: argparse.Namespace,
    world: "World",
    zero_stage: int = 0,
    *,
    cuda_graphs: bool = False,
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Make a training step on three batches in turn, again and again.

    Args:
        options: ``model``, ``size``, ``batch``, ``accumulation``, ``timesteps``, ``precision`` and
            ``engine``.
        world: All processes.
        zero_stage: DeepSpeed's.
        cuda_graphs: Whether a micro-batch is a CUDA graph.

    Returns:
        A function that takes a step and returns its mean loss, (), without waiting for the device;
        and one that lets go of the engine.
    """
    import timm

    import tetdist.models  # noqa: F401  # registers them
    from tetdist.config.loading import parse
    from tetdist.nn import batch_norm
    from tetdist.nn.precision import choose_algorithms
    from tetdist.optimizers import make_optimizer
    from tetdist.training.engines.create import make_engine
    from tetdist.training.step import LOSS, SAMPLES, Step

    choose_algorithms(options.precision)
    config = parse(
        {
            "name": "bench",
            "model": {"name": options.model},
            "data": {"root": "none"},
            "batch": {
                "global": options.batch * options.accumulation * world.world_size,
                "micro": options.batch,
            },
            "phases": [
                {
                    "epochs": 1,
                    "timesteps": options.timesteps,
                    "optimizer": {"kind": "sgd", "lr": 0.01},
                }
            ],
            "precision": options.precision,
            "engine": options.engine,
            "zero_stage": zero_stage,
            "cuda_graphs": cuda_graphs,
        },
        "the benchmark",
    )
    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=options.timesteps).to(world.device).train()
    batch_norm.defer_running_statistics(model)
    optimizer = make_optimizer(model, config.phases[0].optimizer)
    engine = make_engine(config, model, optimizer, options.accumulation, world)
    channels, size, _ = model.default_cfg["input_size"]
    size = options.size or size
    frames = (options.timesteps,) if model.input_kind == "events" else ()
    shape = (options.batch, *frames, channels, size, size)
    layout = torch.contiguous_format if frames else torch.channels_last
    order = torch.arange(options.batch, device=world.device)
    # Several, so that a graph that went on with those of its capture would show.
    batches = itertools.cycle(
        [
            (
                torch.rand(shape, device=world.device).contiguous(memory_format=layout),
                (order + i) % 10,
            )
            for i in range(3)
        ]
    )
    one = Step(config, model, engine, world, range(options.accumulation))
    numbers = itertools.count()

    def step() -> Tensor:
        given = itertools.islice(batches, options.accumulation)
        _, sums = one.take(next(numbers), given, 0.01)
        return sums[LOSS] / sums[SAMPLES]

    return step, engine.close


if __name__ == "__main__":
    work()
