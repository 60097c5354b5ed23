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

# What the bench calls a training step of tetdist that recomputes nothing.
OWN = "tetdist, none"

Status = Literal["ok", "bad", "left out"]

# GPUs of one kind differ by some percent; one that is slower than that slows all of a run.
SLOWER = 0.1
SLOW = (
    "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,CLOCK on that rank's host says what holds its GPU "
    "back, and nvidia-smi what else runs there"
)
UNLIKE = "give all hosts the same driver and the same environment of Python"


@dataclass(frozen=True)
class Finding:
    """The finding of a check on one process.

    Attributes:
        status: "left out" where the machine lacks what the check is about.
        text: A line of the table.
        remedy: What mends it; None: there is nothing to mend, or nobody knows.
        numbers: For the JSON file.
        speed: What all GPUs should have in common, such as images a second; larger is better.
        same: What has to be the same on all processes, by what it is.
    """

    status: Status
    text: str
    remedy: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    speed: float | None = None
    same: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """The machine that the checks run on.

    Attributes:
        world: All processes.
        small: Whether sizes are those for a CPU, where figures mean nothing, but the checks run.
        folder: Of this process, removed at the end.
    """

    world: World
    small: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def limit(self) -> float:
        """Seconds that a check may take; on a CPU others may have the cores, too."""
        return 300.0 if self.small else 150.0


Check = Callable[[Machine], Finding]


@contextlib.contextmanager
def on(world: World, *, small: bool) -> Iterator[Machine]:
    """The machine with a folder for the checks' files, in this context."""
    # A check that hangs may go on writing there while all else ends.
    made = tempfile.TemporaryDirectory(prefix="tetdist-check-", ignore_cleanup_errors=True)
    with made as folder:
        yield Machine(world, small, Path(folder))


# --- of all processes -----------------------------------------------------------------------------


def compared(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by rank, in which one that is slower than most, or unlike them, is bad."""
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
    """A process's finding beside what is usual among all."""
    if found.status != "ok":
        return found
    for name, value in common.items():
        own = found.same.get(name)
        if own != value:
            text = f"{name} is {own} there, and {value} on other processes"
            return dataclasses.replace(found, status="bad", text=text, remedy=UNLIKE)
    if found.speed is not None and not found.speed >= (1 - SLOWER) * usual:
        text = f"{1 - found.speed / usual:.0%} slower than most: {found.text}"
        return dataclasses.replace(found, status="bad", text=text, remedy=SLOW)
    return found


@dataclass(frozen=True)
class Result:
    """A check's findings on all processes.

    Attributes:
        name: The check's.
        findings: By rank.
        seconds: How long it took.
    """

    name: str
    findings: list[Finding]
    seconds: float

    @functools.cached_property
    def worst(self) -> Finding:
        """The finding that is shown: a bad one, else the slowest."""
        order = ("bad", "ok", "left out")

        def rank(found: Finding) -> tuple[int, float]:
            return order.index(found.status), float("inf") if found.speed is None else found.speed

        return min(self.findings, key=rank)

    @property
    def text(self) -> str:
        """The text of the table: where the result is bad, and how processes differ in speed."""
        where, spread = "", ""
        bad = [rank for rank, found in enumerate(self.findings) if found.status == "bad"]
        if bad and len(bad) < len(self.findings):
            where = f"rank {', '.join(map(str, bad))}: "
        speeds = [found.speed for found in self.findings if found.speed is not None]
        if len(speeds) > 1:
            spread = f" (the slowest process {min(speeds):.4g}, the fastest {max(speeds):.4g})"
        return f"{where}{self.worst.text}{spread}"

    def line(self) -> str:
        return f"{self.worst.status:8}  {self.name:22} {self.text}"


@dataclass
class Report:
    """The findings so far.

    Attributes:
        machine: What `benchmarks.bench.machine` says of rank 0's.
        device: Type of the processes' devices, ``cpu`` or ``cuda``.
        processes: Their number.
        small: See `Machine`.
        not_reached: Checks that have not been made (yet).
        results: Of those that have.
        hangs: Whether the last of them is still going on somewhere, so that no other may begin.
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
        """Return the advice on what to repair first, if anything; later checks depend on earlier
        ones."""
        missing = f"; not reached: {', '.join(self.not_reached)}" if self.not_reached else ""
        if self.bad:
            first = self.bad[0]
            remedy = first.worst.remedy or "this looks like a fault of tetdist's: please report it"
            more = f" ({len(self.bad) - 1} more after that)" if len(self.bad) > 1 else ""
            return f"to mend: {first.name}: {remedy}{more}{missing}"
        if self.not_reached:
            return f"the time was too short{missing}; --only NAME makes one of them alone"
        left_out = [r.name for r in self.results if r.worst.status == "left out"]
        also = f"; left out: {', '.join(left_out)}" if left_out else ""
        if self.small:
            return f"no GPU: the checks work on this CPU, and say nothing about a GPU{also}"
        return f"all is well{also}"

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 1 if self.bad or self.not_reached else 0

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
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
        """Return the numbers for `slurm --benchmark`; each process has measured its own GPU."""
        measured = [
            found.numbers
            for result in self.results
            for found in result.findings
            if result.name == "rates" and "images_per_s" in found.numbers
        ]
        if not measured:
            return {"device": self.device}
        # A step of all processes takes as long as that of the slowest.
        slowest = min(measured, key=lambda numbers: float(numbers["images_per_s"]))
        by_batch = {
            batch: rows[OWN]["images_per_s"]
            for batch, rows in slowest["by_batch"].items()
            if "images_per_s" in rows[OWN]
        }
        keys = ("timesteps", "model", "size", "precision")
        return {
            "device": self.device,
            "images_per_s": slowest["images_per_s"] * self.processes,
            "by_batch": by_batch,  # of one process
        } | {key: slowest[key] for key in keys if key in slowest}
