"""Show how exact the promises are kept: the same run at any world size, ZeRO stage and stop.

    python docs/make/exactness.py --data data/digits --output docs/exactness.md

Trains a small SEW-ResNet for 30 steps again and again, each time in real processes (on the CPU,
over gloo), stops some of them by real signals, and writes how far the results are apart. Takes some
ten minutes on two cores. The data must be indexed (tools/images.py index, or make quickstart).
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tetdist.distributed.starters import as_starter
from tetdist.reports.compare import OF_THE_CLOCK
from tetdist.reports.tables import markdown

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 30
TERM, KILL, INT, USR1 = signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1
START_LIMIT = 300  # seconds that a run may take to come to the step where it is stopped

CONFIG: dict[str, Any] = {
    "model": {"name": "sew_resnet18", "arguments": {"width": 8}},
    "data": {"image_size": 32, "resize": 32, "threads": 1},
    # 12 micro-batches a step: 1, 2, 3 and 4 processes can share them.
    "batch": {"global": 24, "micro": 2, "eval": 50},
    "phases": [{"epochs": 1000, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.02}}],
    "precision": "fp32",
    "execution": "reference",
    "log_every": 1,
    "max_steps": STEPS,
    "record_samples": True,
    "save": {"every_steps": 5},
    "tracking": {"mlflow": False},
}
FLOAT64 = ("engine=torch", "precision=fp64")
# Trains with weights laid out as in ZeRO's flat buffers, and with nothing else of ZeRO.
CONTIGUOUS = (
    "import sys; from tetdist.training.engines import torch_engine; "
    "torch_engine.lay_out = lambda *_: None; "
    "from tetdist.cli.train import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Stop:
    """A signal to some of the processes when a step is on record."""

    step: int
    signal: signal.Signals
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        who = "all" if len(self.ranks) > 1 else f"rank {self.ranks[0]}"
        return f"{self.signal.name} to {who} after step {self.step}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="docs/make/exactness.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="an indexed folder of images")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.md", help="write the report there, too"
    )
    parser.add_argument("--quick", action="store_true", help="a few of the runs only")
    options = parser.parse_args(arguments)
    if not (options.data / "index" / "train.npz").is_file():
        print(
            f"error: --data: {options.data} is not indexed; python tools/images.py index "
            f"{shlex.quote(str(options.data))} does it",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
        runs = Runs(Path(folder), options.data)
        report = "\n\n".join(
            [
                heading(options),
                world_sizes(runs, options.quick),
                stages(runs, options.quick),
                stops(runs, options.quick),
            ]
        )
    print(report)
    if options.output:
        options.output.write_text(report + "\n")
    return 0


class Runs:
    """Make runs, each in a folder of its own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        values = CONFIG | {"runs_dir": str(folder)}
        values["data"] = CONFIG["data"] | {"root": str(data.resolve())}
        self.config = folder / "exactness.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def __call__(
        self,
        name: str,
        *overrides: str,
        world: int = 1,
        stop: Stop | None = None,
        threads: int = 1,
        contiguous: bool = False,
    ) -> Path:
        """Train on ``world`` processes, to the end or to where ``stop`` ends it."""
        started = time.monotonic()
        run = self.folder / name
        environment = {
            **os.environ,
            **as_starter(),
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        program = ["-c", CONTIGUOUS] if contiguous else [str(PROJECT / "tetdist" / "train.py")]
        command = [sys.executable, *program]
        command += ["--config", str(self.config), f"name={name}", "device=cpu", *overrides]
        with (self.folder / f"{name}.log").open("a") as log:
            processes = [
                subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(world)
            ]
            try:
                if stop:
                    wait_for(lambda: last_step(run) >= stop.step, processes)
                    for rank in stop.ranks:
                        processes[rank].send_signal(stop.signal)
                statuses = [process.wait(START_LIMIT) for process in processes]
            finally:
                for process in processes:
                    process.kill()
        expected = "stopped" if stop else "finished"
        if stop is None and any(statuses):
            raise SystemExit(f"{name} failed: {(self.folder / f'{name}.log').read_text()[-3000:]}")
        seconds = time.monotonic() - started
        print(f"{name}: {expected} at step {last_step(run)}, {seconds:.0f} s", file=sys.stderr)
        return run


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], bool], processes: "list[subprocess.Popen[bytes]]") -> None:
    end = time.monotonic() + START_LIMIT
    while not condition() and all(process.poll() is None for process in processes):
        if time.monotonic() > end:
            raise SystemExit(f"no such step within {START_LIMIT} s")
        time.sleep(0.005)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.is_file() else []
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run, "train")), default=0)


# --- comparisons -------------------------------------------------------------------------------


def samples(run: Path) -> dict[int, list[tuple[int, int]]]:
    """The samples of each step, (id, checksum of the augmented pixels), over all processes."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for path in run.glob("samples-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            pairs = zip(line["ids"], line["crc32"], strict=True)
            steps[line["step"]] = sorted([*steps.get(line["step"], []), *pairs])
    return steps


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = (run / "checkpoints" / "last").read_text().strip()
    return load_file(run / "checkpoints" / last / "model.safetensors")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def loss_difference(a: Path, b: Path, first: int, last: int) -> float:
    pairs = zip(lines(a, "train"), lines(b, "train"), strict=True)
    return max(
        abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in pairs if first <= x["step"] <= last
    )


def compare(a: Path, b: Path) -> list[str]:
    """Samples, losses, parameters, running statistics and evaluation of two runs, as cells."""
    ours, theirs = weights(a), weights(b)
    buffers = [key for key in ours if "running" in key]
    parameters = [key for key in ours if "running" not in key]
    answers = [
        [(line["samples"], line["per_timestep_top1"]) for line in lines(run, "val")]
        for run in (a, b)
    ]
    return [
        "the same" if samples(a) == samples(b) else "DIFFERENT",
        f"{loss_difference(a, b, 1, STEPS):.1e}",
        f"{max(relative(ours[key], theirs[key]) for key in parameters):.1e}",
        f"{max(relative(ours[key], theirs[key]) for key in buffers):.1e}",
        "the same" if answers[0] == answers[1] else "DIFFERENT",
    ]


def identical(a: Path, b: Path, *, but: tuple[str, ...] = ()) -> str:
    """Whether metrics, weights, running statistics and optimiser state are the same to the bit.

    Args:
        but: Names of metrics that may differ.
    """
    ignored = (*OF_THE_CLOCK, *but)
    for kind in ("train", "val"):
        ours, theirs = (
            [{k: v for k, v in line.items() if k not in ignored} for line in lines(run, kind)]
            for run in (a, b)
        )
        if ours != theirs:
            return "NO: metrics"
    ours, theirs = weights(a), weights(b)
    if any(not torch.equal(ours[key], theirs[key]) for key in theirs):
        return "NO: weights"
    states = []
    for run in (a, b):
        last = (run / "checkpoints" / "last").read_text().strip()
        file = run / "checkpoints" / last / "optimizer.pt"
        states.append(torch.load(file, weights_only=True)["state"])
    for number, state in states[0].items():
        for key, value in state.items():
            if not torch.equal(value, states[1][number][key]):
                return "NO: optimiser"
    return "to the bit" if samples(a) == samples(b) else "NO: samples"


# --- the report --------------------------------------------------------------------------------


def heading(options: argparse.Namespace) -> str:
    from tetdist.tracking.environment import environment

    found = environment()
    packages = ", ".join(f"{k} {v}" for k, v in found["packages"].items() if k != "tetdist")
    model, batch = CONFIG["model"], CONFIG["batch"]
    return f"""# Exactness, measured

Made by `python docs/make/exactness.py --data {options.data.name}` on
{datetime.date.today():%-d %B %Y}; {found["cpu"]}, {found["usable_cores"]} cores, Python
{platform.python_version()}, {packages}.

Every run below is {STEPS} steps of {model["name"]} (width {model["arguments"]["width"]}, T=2,
{CONFIG["data"]["image_size"]} pixels) with SGD and momentum, global batch {batch["global"]} in
micro-batches of {batch["micro"]}, in real processes over gloo, evaluated at the end. Differences
are the largest over all steps or all elements of a tensor, relative to the largest of the other."""


def world_sizes(runs: Runs, quick: bool) -> str:
    one = runs("float64-1", *FLOAT64)
    rows = [
        [str(world), *compare(runs(f"float64-{world}", *FLOAT64, world=world), one)]
        for world in ((2,) if quick else (2, 3, 4))
    ]
    again = []
    moves = [(1, 3, 7)] if quick else [(1, 3, 7), (4, 2, 12), (3, 4, 21)]
    for before, after, step in moves:
        name = f"moved-{before}-{after}"
        runs(name, *FLOAT64, world=before, stop=Stop(step, TERM, (before - 1,)))
        run = runs(name, *FLOAT64, world=after)
        again.append([f"{before}, then {after}", str(step), *compare(run, one)])
    columns = ["samples and pixels", "loss", "parameters", "running statistics", "evaluation"]
    return f"""## Any number of processes: float64

In float64 rounding flips no spike, so what differs beyond 1e-9 would be a fault. Against the run on
one process, with the plain torch engine:

{markdown(["processes", *columns], rows)}

Stopped (SIGTERM to one process) after the given step and continued on another number:

{markdown(["processes", "stopped after", *columns], again)}"""


def stages(runs: Runs, quick: bool) -> str:
    one = runs("float32-0-1")
    cases = [(0, 2), (1, 1)] if quick else [(0, 2), (0, 4), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4)]
    found = [
        (
            f"stage {stage}, {world} process" + "es" * (world > 1),
            runs(f"float32-{stage}-{world}", f"zero_stage={stage}", world=world),
        )
        for stage, world in cases
    ]
    found += [
        ("control: 1 process, 2 threads", runs("control-threads", threads=2)),
        ("control: 1 process, weights contiguous", runs("control-contiguous", contiguous=True)),
    ]
    fused = runs("control-fused", "execution=fused")
    found.append(("control: 1 process, fused kernels", fused))
    rows = [
        [name]
        + [
            f"{loss_difference(run, one, first, last):.1e}"
            for first, last in ((1, 3), (4, 10), (11, 20), (21, STEPS))
        ]
        for name, run in found
    ]
    head = ["DeepSpeed, float32", "loss, steps 1-3", "4-10", "11-20", f"21-{STEPS}"]
    twin, stage1 = runs.folder / "control-contiguous", runs.folder / "float32-1-1"
    # Its norm of the gradient is DeepSpeed's own sum, in another order.
    same = identical(stage1, twin, but=("grad_norm",))
    return f"""## DeepSpeed's stages: float32

Against stage 0 on one process with one thread. In float32 a membrane within rounding of the
threshold flips a spike sooner or later, and from there on two runs drift apart. The controls change
rounding alone, on one process at stage 0: the number of threads (no bit of it, where tensors are as
small as here), the memory layout of the weights, the kernels of normalisation and neuron.

{markdown(head, rows)}

More processes round otherwise, and drift no further than the controls. Stages 1 and 2 stand apart
from stage 0 as their weights are views of flat buffers, not channels_last, and the convolutions run
other kernels. That this is all: stage 1 on one process against stage 0 with contiguous weights,
whole runs (all but the last bit of the gradient's norm, which DeepSpeed adds up in another order):
{same}."""


def stops(runs: Runs, quick: bool) -> str:
    straight = {stage: runs.folder / f"float32-{stage}-2" for stage in (0, 1, 2)}
    cases = [
        (0, Stop(1, TERM, (0,))),
        (0, Stop(7, KILL, (0, 1))),
        (0, Stop(13, KILL, (1,))),
        (0, Stop(16, USR1, (1,))),
        (0, Stop(STEPS, TERM, (0,))),  # during the evaluation
        (0, Stop(STEPS, KILL, (0, 1))),
        (1, Stop(8, INT, (0, 1))),
        (1, Stop(17, KILL, (0,))),
        (2, Stop(11, TERM, (1,))),
        (2, Stop(22, KILL, (0, 1))),
    ]
    rows = []
    for number, (stage, stop) in enumerate(cases[:2] if quick else cases):
        name = f"stopped-{number}"
        runs(name, f"zero_stage={stage}", world=2, stop=stop)
        run = runs(name, f"zero_stage={stage}", world=2)
        rows.append([str(stage), str(stop), identical(run, straight[stage])])
    return f"""## Stopped and continued: float32, DeepSpeed, two processes

Against the same run that nothing stopped: metrics, weights, running statistics, optimiser, samples.

{markdown(["stage", "stop", "the same"], rows)}"""


if __name__ == "__main__":
    sys.exit(main())
