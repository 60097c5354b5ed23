"""Run the checks in order on all processes, and report what they find."""

import dataclasses
import faulthandler
import gc
import shutil
from collections.abc import Callable, Sequence
from traceback import format_exc
from typing import Any

import torch

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.numerics import check_numerics
from tetdist.apps.check_gpu.rates import check_rates
from tetdist.apps.check_gpu.runs import check_pixels, check_resume
from tetdist.apps.check_gpu.steps import check_steps
from tetdist.apps.check_gpu.versions import check_versions
from tetdist.distributed.watchdog import Watch

# Ordered so that the first failure explains later ones: a step computes with kernels, and runs and
# rates take steps.
CHECKS: dict[str, Callable[[Machine], Finding]] = {
    "versions": check_versions,
    "numerics": check_numerics,
    "steps": check_steps,
    "resume": check_resume,
    "rates": check_rates,
    "pixels": check_pixels,
}
# Checks whose processes exchange data.
TOGETHER = ("versions", "steps", "rates")
# Seconds without progress after which a check hangs. The watch then names the process to blame; a
# lone process, which has no watch, ends with its stack a minute later.
LIMIT, LAST_RESORT = 300.0, 360.0


def run_checks(
    names: Sequence[str], here: Machine, add: Callable[[str, list[Finding]], None]
) -> None:
    """Run checks in order, and call ``add`` with each one's name and its findings by rank.

    A check of `TOGETHER` that fails on one of several processes ends the command, because the
    others may wait for this process in a collective operation.
    """
    name = ""

    def add_lost(what: str) -> None:
        # The watch ends the process, so that nothing else removes the folder.
        shutil.rmtree(here.folder, ignore_errors=True)
        remedy = remedies.of(RuntimeError(what)) or remedies.DEAD
        add(name, [Finding("bad", what.partition("; peer_timeout")[0], remedy)])

    def progress(where: str) -> None:
        watch.progress(f"{name}: {where}")
        faulthandler.dump_traceback_later(LAST_RESORT, exit=True, file=2)

    with Watch(here.world, LIMIT, after="the findings so far are kept") as watch:
        watch.before_end.append(add_lost)
        for name in names:
            progress("the start")
            try:
                finding = CHECKS[name](dataclasses.replace(here, progress=progress))
                here.world.wait_for_device()
            except Exception as error:
                watch.await_verdict(error)  # does not return if a lost process is the cause
                place = watch.where.removeprefix(f"{name}: ")
                text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                text = text if place == "the start" else f"{place}: {text}"
                finding = Finding("bad", text, remedies.of(error), {"traceback": format_exc()})
                if here.world.world_size > 1 and name in TOGETHER:
                    add(name, [finding])
                    raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            add(name, here.world.gather(finding))
            if here.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()  # for the next check


def reported(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return a check's findings by rank for the report: one that is bad, else one with advice."""
    order = ("bad", "ok", "left out")
    worst = min(findings, key=lambda x: (order.index(x.status), x.remedy is None))
    bad = [str(rank) for rank, finding in enumerate(findings) if finding.status == "bad"]
    where = f"rank {', '.join(bad)}: " if 0 < len(bad) < len(findings) else ""
    shown = {"status": worst.status, "text": where + worst.text, "remedy": worst.remedy}
    by_rank = [{"status": one.status, "text": one.text, **one.numbers} for one in findings]
    return {**shown, **worst.numbers, "by_rank": by_rank}


def conclusion(checks: dict[str, dict[str, Any]], not_reached: Sequence[str], device: str) -> str:
    """Return what to fix first, if anything; later checks depend on earlier ones."""
    missing = f"; not reached: {', '.join(not_reached)}" if not_reached else ""
    if bad := [name for name, one in checks.items() if one["status"] == "bad"]:
        remedy = checks[bad[0]]["remedy"] or "this looks like a bug in tetdist; please report it"
        more = f" (then {len(bad) - 1} more)" if len(bad) > 1 else ""
        return f"to fix: {bad[0]}: {remedy}{more}{missing}"
    if missing:
        return f"the command ended before all was done{missing}; {remedies.ENDED}"
    left_out = [name for name, one in checks.items() if one["status"] == "left out"]
    also = f"; left out: {', '.join(left_out)}" if left_out else ""
    if device == "cpu":
        return f"no GPU: the checks work on this CPU, but tell nothing about a GPU{also}"
    advice = [f"{name}: {x['remedy']}" for name, x in checks.items() if x["remedy"]]
    if advice:
        return f"all results are right, but {'; '.join(advice)}{also}"
    return f"no problem found{also}"
