"""Measure training steps on this machine's CPU, and write the tables of docs/performance.md.

    python docs/make/performance.py                        # what is not recorded yet
    python docs/make/performance.py --again sew_resnet34   # some entries anew

docs/performance/results.json has the record. The page names machine and day of the first table by
hand. Each contestant of an entry is a process of its own,
since OMP_WAIT_POLICY, the way in which threads wait for one another, is read once by torch. tetdist
waits as its commands do, and each other contestant in the way that is faster for it.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pages
import zeros
from other_networks import relu_network, spikingjelly_network
from torch import Tensor, nn

from tetdist.apps.benchmarks import bench
from tetdist.apps.benchmarks.bench import MIB
from tetdist.apps.benchmarks.made_up import MadeUp, Repeated
from tetdist.nn.fast import native_zeros
from tetdist.storage.files import write_json
from tetdist.tables import markdown
from tetdist.training.memory import SavedBytes

DOCS = Path(__file__).resolve().parents[1]
RECORD, PAGE = DOCS / "performance/results.json", DOCS / "performance.md"
PRECISIONS = ("fp32", "bf16")
FIXED = {"device": "cpu"}
PEER = "spikingjelly, eager"
# OMP_WAIT_POLICY by its name in the record. The second is torch's default.
WAITING = {"asleep": "PASSIVE", "spinning": None}
TRIALS = 3  # steps of each way of waiting, for the choice


class Entry(NamedTuple):
    """Network and its contestants, measured in both precisions."""

    model: str
    timesteps: int = 4
    batch: int = 4
    size: int | None = None  # None: the network's own
    modes: tuple[str, ...] = ("none",)
    repeats: int = 7
    has_peer: bool = False


STEP = "sew_resnet34"
RECOMPUTED: dict[str, Any] = {"modes": ("none", "blocks"), "repeats": 5}
RESNETS = {
    "spiking_resnet34-T4": Entry("spiking_resnet34"),
    "spiking_resnet34-T6": Entry("spiking_resnet34", timesteps=6),
    "preact_resnet34": Entry("preact_resnet34"),
    "ms_resnet34": Entry("ms_resnet34", batch=2),
    "psn_sew_resnet34": Entry("psn_sew_resnet34", batch=2),
    "vggsnn": Entry("vggsnn", timesteps=10, batch=8),
    "spiking_resnet19": Entry("spiking_resnet19", batch=16),
    "psn_sew_resnet18": Entry("psn_sew_resnet18", batch=2, **RECOMPUTED),
    "sew_resnet18-96px": Entry("sew_resnet18", size=96, batch=8, **RECOMPUTED),
}
TRANSFORMERS = {
    "qkformer_10_384": Entry("qkformer_10_384", **RECOMPUTED),
    "sdt_8_384": Entry("sdt_8_384", **RECOMPUTED),
    "maxformer_10_384": Entry("maxformer_10_384", batch=2, **RECOMPUTED),
    "espikeformer_s": Entry("espikeformer_s", timesteps=1, **RECOMPUTED),
}
ALL_MODES = ("none", "blocks", "timesteps")
ENTRIES = {STEP: Entry(STEP, modes=ALL_MODES, has_peer=True)} | RESNETS | TRANSFORMERS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", nargs="+", choices=ENTRIES, default=[], metavar="ENTRY")
    again = parser.parse_args(arguments).again
    record: dict[str, Any] = json.loads(RECORD.read_text())
    for name, entry in ENTRIES.items():
        for precision in PRECISIONS:
            key = f"{name}-{precision}"
            if name in again or key not in record:
                print(f"measuring {key}", file=sys.stderr, flush=True)
                record[key] = measured(entry, precision)
                write_json(RECORD, record)
    PAGE.write_text(page(record))
    print(f"wrote {PAGE}")


# --- what is compared -----------------------------------------------------------------------------


def contestants_of(options: argparse.Namespace) -> dict[str, Callable[[], MadeUp]]:
    """Return constructors of the contestants, by name."""
    makers: dict[str, Callable[[], MadeUp]] = {}
    if (baseline := relu_network(options.model)) is not None:
        makers["relu"] = partial(bench.step_of, options, instead=Repeated(baseline))
    for mode in options.modes:
        recompute = bench.RECOMPUTED[mode]
        makers[f"tetdist, {mode}"] = partial(bench.step_of, options, recompute=recompute)
    if options.has_peer:
        makers[PEER] = lambda: bench.step_of(options, instead=spikingjelly(options))
    return makers


def spikingjelly(options: argparse.Namespace) -> nn.Module:
    """Make spikingjelly's SEW-ResNet with our neuron."""
    model = spikingjelly_network(options.model)
    assert model is not None

    def logits(images: Tensor) -> Tensor:
        result: Tensor = model(images.expand(options.timesteps, *images.shape))
        return result

    return Repeated(model, logits)


# --- measuring ------------------------------------------------------------------------------------


def measured(entry: Entry, precision: str) -> dict[str, Any]:
    """Return the figures of all contestants, which take turns step by step."""
    options = argparse.Namespace(**entry._asdict() | FIXED | {"precision": precision})
    makers, waiting = contestants_of(options), {}
    with contextlib.ExitStack() as stack:
        steps = {}
        for name in makers:
            worker, waiting[name] = stack.enter_context(fastest(options, name))
            steps[name] = partial(worker.seconds, 1)
        seconds = bench.in_turns(steps, entry.repeats)
    rows = [
        bench.row_of(name, seconds, entry.batch)
        | {"waiting": waiting[name], "kept_mib": kept_mib(options, make)}
        for name, make in makers.items()
    ]
    day = f"{datetime.date.today():%-d %B %Y}"
    about = {key: getattr(options, key) for key in ("model", "timesteps", "batch", "precision")}
    return about | {"day": day, "machine": bench.machine("cpu"), "rows": rows}


class Worker:
    """Process that takes a contestant's steps on command; it ends when this process does.

    Args:
        policy: OMP_WAIT_POLICY of the process; None: without this variable.
    """

    def __init__(self, options: argparse.Namespace, name: str, policy: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_work, args=(other_end, options, name), daemon=True)
        with mock.patch.dict(os.environ):
            os.environ.pop("OMP_WAIT_POLICY", None)
            os.environ |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
            self._process.start()
        other_end.close()

    def seconds(self, steps: int) -> float:
        """Have the process take so many steps, and return the seconds of one."""
        self._pipe.send(steps)
        return float(self._pipe.recv())

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, options: argparse.Namespace, name: str) -> None:
    """Take the number of steps in each message, and answer with the seconds a step."""
    native_zeros.agree(frozenset())  # zeros.py measures skipping
    step = contestants_of(options)[name]().take
    # Without the starting process there is nothing to receive.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(bench.seconds_of(step, pipe.recv()))


@contextlib.contextmanager
def fastest(options: argparse.Namespace, name: str) -> Iterator[tuple[Worker, str]]:
    """Yield a contestant's process, with the way of waiting that is faster for it."""
    workers: dict[str, Worker] = {}
    try:
        seconds = {}
        for way in ["asleep"] if name.startswith("tetdist") else WAITING:
            workers[way] = Worker(options, name, WAITING[way])
            workers[way].seconds(2)  # builds kernels
            seconds[way] = statistics.median(workers[way].seconds(1) for _ in range(TRIALS))
        best = min(seconds, key=seconds.__getitem__)
        for way in seconds.keys() - {best}:
            workers.pop(way).end()
        yield workers[best], best
    finally:
        for worker in workers.values():
            worker.end()


def kept_mib(options: argparse.Namespace, make: Callable[[], MadeUp]) -> float:
    """Return the peak MiB an image that autograd holds from the forward to the backward pass."""
    held = []
    # The difference of two batch sizes is the cost of an image; costs that do not depend on the
    # batch, such as weights in bfloat16, cancel.
    before = options.batch
    for options.batch in (2, 3):
        made_up = make()
        (images, _), engine = made_up.batch_of(0, 0), made_up.step.engine
        saved = SavedBytes(made_up.step.model)
        with saved.counting():
            engine.backward(engine.forward(images).float().square().mean())
        held.append(saved.most)
    options.batch = before
    return (held[1] - held[0]) / MIB


# --- the page -------------------------------------------------------------------------------------


def rows_of(record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return an entry's rows by name."""
    return {row["name"]: row for row in record[key]["rows"]}


def cell(row: dict[str, Any] | None, key: str, spec: str) -> str:
    """Return a number of a row; empty if it was not measured."""
    value = (row or {}).get(key)
    return "" if value is None else format(value, spec)


def step_table(record: dict[str, Any]) -> str:
    """Return the table of all contestants of one network."""
    rows = []
    for precision in PRECISIONS:
        by_name = rows_of(record, f"{STEP}-{precision}")
        for name, row in by_name.items():
            kept = row["kept_mib"] / by_name["relu"]["kept_mib"]
            figures = [cell(row, "seconds", ".3f"), cell(row, "ratio", ".3f")]
            figures += [cell(row, "images_per_s", ".2f"), cell(row, "kept_mib", ".1f")]
            rows.append([precision, name.replace("relu", "ReLU"), *figures, f"{kept:.2f}"])
    return markdown(["", "", "s", "/ ReLU", "images/s", "MiB an image", "/ ReLU"], rows)


def resnet_table(record: dict[str, Any]) -> str:
    """Return the table of other networks, beside their ReLU networks."""
    rows = []
    for name in RESNETS:
        entry, figures = record[f"{name}-fp32"], []
        for precision in PRECISIONS:
            by_name = rows_of(record, f"{name}-{precision}")
            own, blocks = by_name["tetdist, none"], by_name.get("tetdist, blocks")
            figures += [cell(one, "seconds", ".3f") for one in (by_name["relu"], own)]
            figures.append(cell(own, "ratio", ".3f"))
            figures.append(f"{blocks['ratio'] / own['ratio']:.2f}" if blocks else "")
        model = entry["model"] + (f", {size} px" if (size := RESNETS[name].size) else "")
        rows.append([model, str(entry["timesteps"]), str(entry["batch"]), *figures])
    head = ["", "T", "batch"]
    for precision in PRECISIONS:
        head += [f"ReLU {precision}, s", "tetdist, s", "ratio", "blocks"]
    return markdown(head, rows)


def transformer_table(record: dict[str, Any]) -> str:
    """Return the table of transformers, without and with recomputation."""
    rows = []
    for name in TRANSFORMERS:
        for precision in PRECISIONS:
            entry, by_name = record[f"{name}-{precision}"], rows_of(record, f"{name}-{precision}")
            own, blocks, peer = (
                by_name.get(key) for key in ("tetdist, none", "tetdist, blocks", PEER)
            )
            kept = [cell(row, "kept_mib", ".1f") for row in (own, blocks, peer)]
            ratios = [cell(row, "ratio", ".2f") for row in (blocks, peer)]
            sizes = [str(entry["timesteps"]), precision, cell(own, "seconds", ".3f")]
            rows.append([name, *sizes, *ratios, *kept])
    head = ["", "T", "", "s", "blocks", "spikingjelly", "MiB an image", "blocks", "spikingjelly"]
    return markdown(head, rows)


def page(record: dict[str, Any]) -> str:
    """Return the page with new tables."""
    tables = [step_table(record), resnet_table(record), transformer_table(record)]
    tables += zeros.tables()
    return pages.with_tables(PAGE.read_text(), tables)


if __name__ == "__main__":
    main()
