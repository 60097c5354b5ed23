"""The checks in their order, what they share, and what is made of their findings."""

import contextlib
import datetime
import functools
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tetdist.benchmarks.bench import machine
from tetdist.distributed.world import World

Status = Literal["ok", "bad", "left out"]


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        status: "left out" where the machine lacks what the check is about.
        text: A line of the table.
        remedy: What mends it; None: there is nothing to mend.
        numbers: For the JSON file.
    """

    status: Status
    text: str
    remedy: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What the checks run on.

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


Check = Callable[[Machine], Finding]


@dataclass(frozen=True)
class Result:
    """A check's findings on all processes."""

    name: str
    findings: list[Finding]  # by rank
    seconds: float

    @functools.cached_property
    def worst(self) -> Finding:
        order = ("bad", "ok", "left out")
        return min(self.findings, key=lambda found: order.index(found.status))

    def where(self) -> str:
        """The ranks that found something bad, where others did not."""
        bad = [rank for rank, found in enumerate(self.findings) if found.status == "bad"]
        if not bad or len(bad) == len(self.findings):
            return ""
        return f"rank {', '.join(map(str, bad))}: "

    def line(self) -> str:
        worst = self.worst
        return f"{worst.status:8}  {self.name:22} {self.where()}{worst.text}"


@dataclass
class Report:
    machine: dict[str, str]
    device: str
    processes: int
    results: list[Result] = field(default_factory=list)

    @property
    def bad(self) -> list[Result]:
        return [result for result in self.results if result.worst.status == "bad"]

    def conclusion(self) -> str:
        """What to mend first, if anything; the checks are in the order of what depends on what."""
        if not self.bad:
            left_out = [r.name for r in self.results if r.worst.status == "left out"]
            return "all is well" + (f"; left out: {', '.join(left_out)}" if left_out else "")
        first = self.bad[0]
        remedy = first.worst.remedy or "this looks like a fault of tetdist's: please report it"
        more = f" ({len(self.bad) - 1} more after that)" if len(self.bad) > 1 else ""
        return f"to mend: {first.name}: {remedy}{more}"

    def as_dict(self) -> dict[str, Any]:
        return {
            **self._speed(),
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
            "processes": self.processes,
            "checks": {
                result.name: {
                    "status": result.worst.status,
                    "text": result.where() + result.worst.text,
                    "remedy": result.worst.remedy,
                    "seconds": round(result.seconds, 1),
                    **result.worst.numbers,
                }
                for result in self.results
            },
        }

    def _speed(self) -> dict[str, Any]:
        """What `slurm --benchmark` reads; each process has measured its own GPU."""
        rates = next((one.worst.numbers for one in self.results if one.name == "rates"), {})
        keys = ("images_per_s", "timesteps", "model", "size", "precision")
        by_batch = {
            batch: rows["tetdist, none"]["images_per_s"]
            for batch, rows in rates.get("by_batch", {}).items()
        }
        return {"device": self.device, "by_batch": by_batch} | {
            key: rates[key] for key in keys if key in rates
        }


@contextlib.contextmanager
def on(world: World, *, small: bool) -> Iterator[Machine]:
    """The machine with a folder for the checks' files, in this context."""
    with tempfile.TemporaryDirectory(prefix="tetdist-check-") as folder:
        yield Machine(world, small, Path(folder))


def run_checks(
    checks: dict[str, Check], here: Machine, show: Callable[[str], None] = lambda _: None
) -> Report:
    """Run checks one after the other on all processes.

    Args:
        checks: By name, in an order in which the first that fails explains those after it.
        here: What they run on.
        show: Given each result's line, on rank 0.
    """
    report = Report(machine(here.device.type), here.device.type, here.world.world_size)
    for name, check in checks.items():
        started = time.monotonic()
        found = _finding_of(check, here)
        result = Result(name, here.world.gather(found), time.monotonic() - started)
        report.results.append(result)
        if here.world.rank == 0:
            show(result.line())
    return report


def _finding_of(check: Check, here: Machine) -> Finding:
    try:
        return check(here)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return Finding("bad", text[:300], None, {"traceback": traceback.format_exc()})
