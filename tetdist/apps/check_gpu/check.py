"""Findings of a check on each process, and the conclusion from all of them."""

import collections
import contextlib
import dataclasses
import datetime
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tetdist.distributed.world import World

Status = Literal["ok", "bad", "left out"]
# GPUs of one kind differ by some percent; a slower one slows the whole run down.
SLOWER = 0.1
THROTTLED = (
    "run nvidia-smi -q -d PERFORMANCE,TEMPERATURE,CLOCK on that rank's host to see what throttles "
    "its GPU, and nvidia-smi to see what else runs there"
)
UNLIKE = "give all hosts the same driver and the same Python environment"


@dataclass(frozen=True)
class Finding:
    """Finding of a check on one process.

    Attributes:
        status: "left out" if the check does not apply to the machine.
        text: A line of the table.
        remedy: The remedy; None: none is needed, or none is known. One that is ok may have advice.
        numbers: Numbers for the JSON file.
        speed: Speed that all GPUs should share, such as images a second; larger is better.
        same: Values that must be equal on all processes, by name.
    """

    status: Status
    text: str
    remedy: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    speed: float | None = None
    same: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Machine that the checks run on.

    Attributes:
        small: True if the checks run small sizes on a CPU, where their figures are meaningless.
        folder: Folder of this process, removed at the end.
    """

    world: World
    small: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def alone(self) -> World:
        """World of this process alone: it averages nothing, and decodes all images."""
        return dataclasses.replace(self.world, rank=0, world_size=1)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def limit(self) -> float:
        """Seconds at one place after which a check hangs; a CPU may also compile there."""
        return 300.0 if self.small else 150.0


Check = Callable[[Machine], Finding]


@contextlib.contextmanager
def on(world: World, *, small: bool) -> Iterator[Machine]:
    """Yield the machine with a folder for the checks' files, which is removed at the end."""
    # A hanging check may still write there while the process exits.
    made = tempfile.TemporaryDirectory(prefix="tetdist-check-", ignore_cleanup_errors=True)
    with made as folder:
        yield Machine(world, small, Path(folder))


# --- of all processes -----------------------------------------------------------------------------


def compared(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings by rank, with those bad that are slower than or unlike the others."""
    speeds = [one.speed for one in findings if one.status == "ok" and one.speed is not None]
    known = [speed for speed in speeds if not math.isnan(speed)]
    usual = statistics.median_high(known) if len(speeds) > 1 and known else 0.0
    names = dict.fromkeys(name for one in findings if one.status == "ok" for name in one.same)
    common: dict[str, Any] = {}
    for name in names:
        values = [one.same[name] for one in findings if name in one.same]
        common[name] = collections.Counter(values).most_common(1)[0][0]
    return [_beside_others(one, usual, common) for one in findings]


def _beside_others(found: Finding, usual: float, common: Mapping[str, Any]) -> Finding:
    """Compare a process's finding with the median speed and the most common values."""
    if found.status != "ok":
        return found
    for name, value in common.items():
        own = found.same.get(name)
        if own != value:
            text = f"{name} is {own}, but {value} on other processes"
            return dataclasses.replace(found, status="bad", text=text, remedy=UNLIKE)
    if found.speed is not None and not found.speed >= (1 - SLOWER) * usual:
        text = f"{1 - found.speed / usual:.0%} slower than most: {found.text}"
        return dataclasses.replace(found, status="bad", text=text, remedy=THROTTLED)
    return found


@dataclass(frozen=True)
class Result:
    """Findings of a check on all processes, by rank."""

    name: str
    findings: list[Finding]
    seconds: float

    @functools.cached_property
    def worst(self) -> Finding:
        """Finding to show: a bad one, else one with advice, else the slowest."""
        order = ("bad", "ok", "left out")

        def rank(found: Finding) -> tuple[int, bool, float]:
            speed = float("inf") if found.speed is None else found.speed
            return order.index(found.status), found.remedy is None, speed

        return min(self.findings, key=rank)

    @property
    def text(self) -> str:
        """Text of the table, with the bad ranks and the range of speeds."""
        where, spread = "", ""
        bad = [rank for rank, found in enumerate(self.findings) if found.status == "bad"]
        if bad and len(bad) < len(self.findings):
            where = f"rank {', '.join(map(str, bad))}: "
        speeds = [found.speed for found in self.findings if found.speed is not None]
        if len(speeds) > 1:
            spread = f" (slowest process {min(speeds):.4g}, fastest {max(speeds):.4g})"
        return f"{where}{self.worst.text}{spread}"

    def line(self) -> str:
        return f"{self.worst.status:8}  {self.name:22} {self.text}"


@dataclass
class Report:
    """Findings so far.

    Attributes:
        machine: Description of rank 0's machine by `benchmarks.bench.machine`.
        device: Type of the processes' devices, ``cpu`` or ``cuda``.
        not_reached: Checks that have not run (yet).
        hangs: True if the last check still runs on a process, so that no other may start.
    """

    machine: dict[str, str]
    device: str
    processes: int
    small: bool
    not_reached: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    hangs: bool = False

    @property
    def bad(self) -> list[Result]:
        return [result for result in self.results if result.worst.status == "bad"]

    def conclusion(self) -> str:
        """Return what to fix first, if anything; later checks depend on earlier ones."""
        missing = f"; not reached: {', '.join(self.not_reached)}" if self.not_reached else ""
        if self.bad:
            first = self.bad[0]
            remedy = first.worst.remedy or "this looks like a bug in tetdist; please report it"
            more = f" (then {len(self.bad) - 1} more)" if len(self.bad) > 1 else ""
            return f"to fix: {first.name}: {remedy}{more}{missing}"
        if self.not_reached:
            ended = f"the command ended before all was done{missing}"
            return f"{ended}; run it again, with --only NAME for fewer checks and more time"
        left_out = [r.name for r in self.results if r.worst.status == "left out"]
        also = f"; left out: {', '.join(left_out)}" if left_out else ""
        slow = [f"{r.name} is slow: {r.worst.remedy}" for r in self.results if r.worst.remedy]
        if self.small:
            return f"no GPU: the checks work on this CPU, but tell nothing about a GPU{also}"
        if slow:
            return f"all results are right, but {'; '.join(slow)}{also}"
        return f"no problem found{also}"

    @property
    def status(self) -> int:
        """Exit status of the command."""
        return 1 if self.bad or self.not_reached else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report for a JSON file."""
        return {
            **self._speed(),
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "conclusion": self.conclusion(),
            "not_reached": self.not_reached,
            "machine": self.machine,
            "processes": self.processes,
            "checks": {
                result.name: {
                    "status": result.worst.status,
                    "text": result.text,
                    "remedy": result.worst.remedy,
                    "seconds": round(result.seconds, 1),
                    **result.worst.numbers,
                    "by_rank": [
                        {"status": found.status, "text": found.text, **found.numbers}
                        for found in result.findings
                    ],
                }
                for result in self.results
            },
        }

    def _speed(self) -> dict[str, Any]:
        """Return the numbers for `slurm --benchmark`; each process measured its own GPU."""
        measured = [
            found.numbers
            for result in self.results
            for found in result.findings
            if result.name == "rates" and "images_per_s" in found.numbers
        ]
        if not measured:
            return {"device": self.device}
        # All processes together are as fast as the slowest.
        slowest = min(measured, key=lambda numbers: float(numbers["images_per_s"]))
        by_batch = {
            batch: rows["tetdist"]["images_per_s"]
            for batch, rows in slowest["by_batch"].items()
            if "images_per_s" in rows["tetdist"]
        }
        keys = ("timesteps", "model", "size", "precision")
        return {
            "device": self.device,
            "images_per_s": slowest["images_per_s"] * self.processes,
            "by_batch": by_batch,  # rates of one process
        } | {key: slowest[key] for key in keys if key in slowest}
