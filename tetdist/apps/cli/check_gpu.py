"""Check a machine with GPUs before training on it: versions, results, speed; at most ten minutes.

The exit status is 1 if a check failed, and the last line says what to do. With --device cpu the
same checks run in minutes on small networks; this tests the checks themselves.
"""

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tetdist.apps.cli.common import add_local_rank, fail, program, run_command, write_result
from tetdist.errors import PeerFailed, UserError
from tetdist.storage.files import check_writable

if TYPE_CHECKING:
    from tetdist.apps.check_gpu.check import Report

# Names of the checks in apps/check_gpu/checks.py, which is slow to import.
NAMES = ("versions", "numerics", "steps", "graphs", "resume", "rates", "pixels")

MEETING = 120.0  # seconds within which all processes must have joined
# Seconds after which this process exits, even if it hangs; the checks end earlier by themselves.
LAST_RESORT = 1500.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("check_gpu"), description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--only", metavar=",".join(NAMES), help="run only these checks; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings as JSON")
    add_local_rank(parser)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",") if options.only else NAMES
    if unknown := [name for name in options.only if name not in NAMES]:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(NAMES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: check(options))


def check(options: argparse.Namespace) -> int:
    """Run the checks and return the exit status."""
    from tetdist.apps.check_gpu.check import Report, on
    from tetdist.apps.check_gpu.checks import CHECKS
    from tetdist.apps.check_gpu.run import run_checks
    from tetdist.distributed.world import join

    _find_other_tasks_of_srun()
    # torch reads it once, at the first matrix product; some checks have to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    checks = {name: CHECKS[name] for name in NAMES if name in options.only}
    # Find out now, not after ten minutes, if the file cannot be written.
    names = list(checks)
    _keep(options, Report({}, options.device, 0, small=False, not_reached=names))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ending_on_signals(options))
        stack.enter_context(_quiet())
        try:
            world = stack.enter_context(
                join(options.device, timeout=MEETING, run=vars(options) | {"local_rank": None})
            )
        except (UserError, PeerFailed) as error:
            return _no_start(options, error, names)
        else:
            small = world.device.type == "cpu"
            if small and world.rank == 0:
                print("no GPU: the checks run small networks on the CPU; ignore their figures")
            with on(world, small=small) as here:
                report = run_checks(checks, here, lambda report: _show(options, report))
            if world.rank == 0:
                print(f"\n{report.conclusion()}", flush=True)
            if report.hangs:
                _leave(report.status)
    return report.status


def _no_start(options: argparse.Namespace, error: Exception, names: list[str]) -> int:
    """Report, as the first finding, a missing device or that this process met no others."""
    from tetdist.apps.benchmarks.bench import machine
    from tetdist.apps.check_gpu import remedies
    from tetdist.apps.check_gpu.check import Finding, Report, Result

    if not _is_first():
        return fail(error)
    remedy = "start all processes, and read the launcher's output of those that ended"
    if isinstance(error, UserError):
        # The error names its own remedy, except for the driver.
        sees_none = "torch sees no GPU" in str(error) or "torch does not see it" in str(error)
        seen = remedies.driver_and_gpu()  # by nvidia-smi
        has_gpu = seen != (None, None)
        remedy = remedies.torch_for(*seen) if sees_none and has_gpu else str(error)
    found = Finding("bad", str(error), remedy)
    report = Report(machine("cpu"), "cpu", 1, small=False, not_reached=names)
    report.results.append(Result("device", [found], 0.0))
    _show(options, report)
    print(f"\n{report.conclusion()}", flush=True)
    return report.status


def _find_other_tasks_of_srun() -> None:
    """Set the launcher's environment variables if srun has started several tasks."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return
    from tetdist.apps.slurm.placement import export_place

    export_place()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show(options: argparse.Namespace, report: "Report") -> None:
    """Print the last finding, and keep all."""
    print(report.results[-1].line(), flush=True)
    _keep(options, report)


def _keep(options: argparse.Namespace, report: "Report") -> None:
    """Write the findings so far, on rank 0."""
    if options.json and _is_first():
        check_writable("--json", options.json)
        write_result(options.json, report.as_dict())


# --- the end --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ending_on_signals(options: argparse.Namespace) -> Iterator[None]:
    """Print where the findings so far are upon Ctrl-C or SIGTERM, and exit in any case."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        # A launcher may send several signals; the exit itself must not be interrupted.
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    from tetdist.distributed.signals import handling

    faulthandler.dump_traceback_later(LAST_RESORT, exit=True, file=2)  # standard error
    try:
        with handling((signal.SIGINT, signal.SIGTERM), interrupt):
            yield
    except KeyboardInterrupt as interrupted:
        if _is_first():
            kept = f"{options.json} has the findings so far" if options.json else "no --json"
            print(f"interrupted; {kept}", file=sys.stderr)
        _leave(128 + interrupted.args[0])
    finally:
        faulthandler.cancel_dump_traceback_later()


def _leave(status: int) -> NoReturn:
    """Exit at once, because a thread may be stuck in a collective operation."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' deprecation warnings and logs out of the table."""
    import logging

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # DeepSpeed's import resets its logger's level but not its filters.
    loud = [logging.getLogger(name) for name in ("DeepSpeed", "torch.distributed")]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        for one in loud:
            one.addFilter(is_error)
            stack.callback(one.removeFilter, is_error)
        yield
