"""Benchmark of scaling: several processes that average their gradients, in turns with one alone.

Each process has its own cores (or GPU), and takes the trainer's step with the same engine as runs.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from torch import Tensor

import tetdist.models  # noqa: F401  # registers them
from tetdist.apps.benchmarks.bench import in_turns, ratio, row_of
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.distributed.meeting import free_port
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.nn import batch_norm
from tetdist.nn.precision import choose_algorithms, parameter_type
from tetdist.optimizers import make_optimizer
from tetdist.tables import aligned
from tetdist.training.engines.base import EngineParts
from tetdist.training.engines.create import make_engine
from tetdist.training.step import LOSS, SAMPLES, Step

# --- the processes ------------------------------------------------------------------------------


class Worker:
    """Process that takes steps on command; it ends when this process does.

    Args:
        make: Function that the process calls with ``arguments``; it returns the step.
        environment: Variables that the process starts with; None: without this one.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[], object]],
        *arguments: Any,
        **environment: str | None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(
            target=_work, args=(other_end, make, *arguments), daemon=True
        )
        before = dict(os.environ)
        try:
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other_end.close()

    def begin(self, steps: int) -> None:
        """Have the process take so many steps."""
        # `seconds` reports a process that has ended.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(steps)

    def seconds(self) -> float:
        """Wait until the steps are taken, and return the seconds of one."""
        try:
            return float(self._pipe.recv())
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise UserError(
                f"a process of the benchmark ended with status {self._process.exitcode}; its error "
                "is above"
            ) from error

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
    """Take the number of steps in each message, and answer with the seconds a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process ends this one
    os.dup2(2, 1)  # DeepSpeed prints, and only the table belongs into the output
    step = make(*arguments)
    # Without the starting process there is nothing to receive.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            steps = pipe.recv()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            pipe.send((time.perf_counter() - started) / steps)


def worker_of(options: argparse.Namespace, rank: int, world_size: int, port: int) -> Worker:
    """Start a process that makes training steps."""
    cores = sorted(os.sched_getaffinity(0))
    own = cores[rank :: options.processes] if len(cores) >= options.processes else cores
    return Worker(
        synthetic_step,
        options,
        own,
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
        worker.begin(steps)
    return max([worker.seconds() for worker in workers])


@contextlib.contextmanager
def processes(options: argparse.Namespace) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """Yield a process alone, and all that train together; each has built its kernels."""
    count, workers = options.processes, []
    try:
        workers.append(worker_of(options, 0, 1, free_port()))
        together(workers, 2)
        port = free_port()
        workers.extend(worker_of(options, rank, count, port) for rank in range(count))
        together(workers[1:], 2)
        yield workers[:1], workers[1:]
    finally:
        for worker in workers:
            worker.end()


def synthetic_step(options: argparse.Namespace, cores: list[int]) -> Callable[[], None]:
    """Join the processes of the environment, and return a training step on these cores."""
    os.sched_setaffinity(0, cores)
    world = join(options.device)
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
        world.wait_for_device()

    return one


# --- what is measured ---------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step of one process, and of all together, in turns."""
    with processes(options) as (one, group):
        steps = {
            "alone": partial(together, one, options.steps),
            "together": partial(together, group, options.steps),
        }
        seconds = in_turns(steps, options.repeats)
    images, count = options.batch * options.accumulation, options.processes
    rows = [
        row_of(name, seconds, images * (count if name == "together" else 1)) for name in seconds
    ]
    keys = ("model", "size", "timesteps", "batch", "accumulation", "precision", "device", "engine")
    return {key: getattr(options, key) for key in keys} | {
        "rows": rows,
        "efficiency": ratio(seconds["alone"], seconds["together"]),
        # Keys that `slurm --benchmark` reads.
        "images_per_s": rows[-1]["images_per_s"],
        "processes": count,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    rows = [["processes", "s", "images/s"]]
    rows += [
        [name, f"{row['seconds']:.3f}", f"{row['images_per_s']:.2f}"]
        for name, row in zip(("1", str(result["processes"])), result["rows"], strict=True)
    ]
    return (
        f"{result['model']}, T={result['timesteps']}, {result['accumulation']} x batch "
        f"{result['batch']} a process, {result['precision']}, {result['engine']}, "
        f"{result['device']}: a step with its update\n\n{aligned(rows, right=(1, 2))}\n\n"
        f"efficiency {100 * result['efficiency']:.1f} %"
    )


# --- the training step --------------------------------------------------------------------------


def training_step(
    world: World,
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


def initial(config: RunConfig) -> Any:
    """Return the network of a configuration, the same each time, as it begins to train."""
    torch.manual_seed(0)
    model = timm.create_model(config.model.name, timesteps=config.phases[0].most_timesteps)
    batch_norm.defer_running_statistics(model)
    return model.to(parameter_type(config.precision)).train()


class MadeUp:
    """The trainer's step on three batches in turn, again and again."""

    def __init__(self, step: Step, size: int) -> None:
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
        given = itertools.islice(self._batches, len(self.step.micro_batches))
        _, sums = self.step.take(next(self._numbers), given, lr)
        return sums[LOSS] / sums[SAMPLES]

    def close(self) -> None:
        """Release the engine."""
        self.step.engine.close()
