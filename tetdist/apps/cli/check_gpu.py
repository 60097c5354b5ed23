"""Check a machine with GPUs before training on it: versions, results, speed; some ten minutes.

The exit status is 1 if a check failed, and the last line says what to do. With --device cpu the
same checks run in minutes on small networks; this tests the checks themselves.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tetdist.apps.cli.common import add_local_rank, documented_parser, run_command, write_result
from tetdist.errors import PeerFailed, UserError
from tetdist.wording import speed_flag

# Names of the checks in apps/check_gpu/run.py, which is slow to import.
NAMES = ("versions", "numerics", "steps", "resume", "rates", "pixels")
KEPT = "interrupted; the file of --json has the findings so far"


def main(arguments: list[str] | None = None) -> int:
    parser = documented_parser("check_gpu", __doc__)
    known = ",".join(NAMES)
    text = "default: auto, a GPU if there is one"
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=text)
    parser.add_argument("--only", metavar=known, help="run only these checks; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    add_local_rank(parser)
    options = parser.parse_args(arguments)
    only = (options.only or known).split(",")
    if unknown := [name for name in only if name not in NAMES]:
        parser.error(f"--only: {unknown[0]!r} is not one of {known}")
    names = [name for name in NAMES if name in only]
    return run_command(lambda: check(options, names), interrupted=KEPT)


def check(options: argparse.Namespace, names: list[str]) -> int:
    """Run checks, print and write what they find, and return the exit status."""
    from tetdist.apps.benchmarks.bench import machine
    from tetdist.apps.check_gpu import remedies
    from tetdist.apps.check_gpu.check import Finding, Machine
    from tetdist.apps.check_gpu.run import LIMIT, conclusion, reported, run_checks
    from tetdist.distributed.signals import handling
    from tetdist.distributed.world import join

    keep_quiet()
    # torch reads it once, at the first matrix product; some checks have to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    is_first = os.environ.get("RANK", "0") == "0"
    checks: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"device": options.device, "checks": checks}

    def keep() -> None:
        report["not_reached"] = [name for name in names if name not in checks]
        report["conclusion"] = conclusion(checks, report["not_reached"], report["device"])
        if options.json and is_first:
            write_result(options.json, report)

    def add(name: str, findings: list[Finding]) -> None:
        checks[name] = finding = reported(findings)
        speed = finding.pop("speed", {})
        report.update(speed)
        if is_first:
            print(f"{finding['status']:8}  {name:10} {finding['text']}", flush=True)
            if speed:
                print(f"{'':20} for slurm: {_flag(report)}", flush=True)
        keep()

    keep()  # find out now, not after ten minutes, if the file cannot be written
    with handling([signal.SIGTERM], lambda number, _: sys.exit(128 + number)):
        try:
            world = join(options.device, timeout=LIMIT, run=vars(options) | {"local_rank": None})
        except (UserError, PeerFailed) as error:
            if not is_first:
                raise
            add("device", [Finding("bad", str(error), remedies.of(error))])
        else:
            device = world.device.type
            report |= {"device": device, "processes": world.world_size, "machine": machine(device)}
            if device == "cpu" and is_first:
                print("no GPU: the checks run small networks on the CPU; ignore their figures")
            with world, tempfile.TemporaryDirectory(prefix="tetdist-check-") as folder:
                run_checks(names, Machine(world, Path(folder)), add)
    if is_first:
        print(f"\n{report['conclusion']}", flush=True)
    return 1 if report["not_reached"] or any(x["status"] == "bad" for x in checks.values()) else 0


def _flag(report: dict[str, Any]) -> str:
    """Return the measured speed of one process as slurm's flag."""
    return speed_flag(
        report["images_per_s"] / report["processes"],
        model=report["model"],
        pixels=report["size"],
        precision=report["precision"],
        processes=report["processes"],
        timesteps=report["timesteps"],
    )


def keep_quiet() -> None:
    """Keep libraries' deprecation warnings and logs out of the table."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    for name in ("DeepSpeed", "torch.distributed"):
        # DeepSpeed's import resets its logger's level but not its filters.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
