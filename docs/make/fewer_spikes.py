"""Makes docs/results/fewer_spikes.md, .json and .png: what a weight of loss.operations buys.

    python tools/study.py fewer_spikes_digits --jobs 2    # and so on, see STUDIES
    python docs/make/fewer_spikes.py

Operations and seconds are those of the first images of the validation split, on one thread. The
networks of a seed take turns.
"""

import statistics
import sys
from functools import partial
from itertools import product
from typing import Any

import pages
import torch

from tetdist.apps.benchmarks.bench import in_turns, machine, ratio, seconds_of
from tetdist.apps.reports import style
from tetdist.apps.studies import numbers as of_study
from tetdist.apps.studies import plan
from tetdist.apps.studies.numbers import gather, holm, paired_difference, spread
from tetdist.apps.studies.plan import StudyRun
from tetdist.apps.weights.trained import load
from tetdist.data.build import eval_loader
from tetdist.data.splits import open_split
from tetdist.distributed.world import World, join
from tetdist.evaluation.operations import OperationCounts
from tetdist.tables import markdown
from tetdist.training.objective import compute_loss
from tetdist.training.operations import SynapticOperations

PAGE = pages.RESULTS / "fewer_spikes.md"
STUDIES = {
    "fewer_spikes_digits": "digits",
    "fewer_spikes_nmnist": "N-MNIST",
    "fewer_spikes_fashion": "Fashion-MNIST",
}
WEIGHTS = {f"weight_{weight}": weight for weight in ("0", "0.3", "1", "3")}
CONTROL = "weight_0"
BATCH, ROUNDS = 32, 21
# Columns of the plot: name in the record, label.
COSTS = {
    "operations": "million synaptic operations a sample",
    "eval": "ms of evaluation, 32 samples",
    "step": "ms of a training step, 32 samples",
}


# --- numbers --------------------------------------------------------------------------------------


class Contestant:
    """Trained network of a run, with the loss that it was trained with."""

    def __init__(self, run: StudyRun, world: World) -> None:
        self.loss, self.model = run.config.loss, load(run.folder).model
        self.model.set_execution("fused")
        self._operations = SynapticOperations(self.model)
        with eval_loader(run.config, open_split(run.config.data, "val", world), world) as batches:
            batch = next(iter(batches))
        self.x, self.labels = batch.inputs(world.device, torch.float32), batch.labels.long()
        with OperationCounts(self.model) as counts, torch.inference_mode():
            self.model.eval()(self.x)
        # The first layer reads the input, which no training changes.
        layers = list(counts.total(world, len(self.x)).layers.values())[1:]
        self.operations = sum(layer.accumulates for layer in layers) / 1e6
        dense = self.model.timesteps * sum(layer.synapses for layer in layers) / 1e6
        self.density = 100 * self.operations / dense
        self.x, self.labels = self.x[:BATCH], self.labels[:BATCH]

    def eval(self) -> None:
        with torch.inference_mode():
            self.model.eval()(self.x)

    def step(self) -> None:
        """Run the forward and backward pass of a training step."""
        self.model.train().zero_grad()
        if not self.loss.operations:
            self._loss().backward()
            return
        with self._operations.counted():
            loss = self._loss()
            (loss + self.loss.operations * self._operations.share().float()).backward()

    def _loss(self) -> torch.Tensor:
        return compute_loss(self.loss, self.model(self.x, per_timestep=True), self.labels, None)


def measured(runs: list[StudyRun]) -> dict[str, dict[str, Any]]:
    """Return operations and seconds of one seed's runs, by entry."""
    with join("cpu") as world:
        contestants = {run.entry: Contestant(run, world) for run in runs}
    found: dict[str, dict[str, Any]] = {
        name: {"operations": one.operations, "density": one.density}
        for name, one in contestants.items()
    }
    for kind in ("eval", "step"):
        functions = {name: getattr(one, kind) for name, one in contestants.items()}
        timed = {name: partial(seconds_of, run) for name, run in functions.items()}
        in_turns(timed, 3)
        seconds = in_turns(timed, ROUNDS)
        for name, values in seconds.items():
            found[name][kind] = 1000 * statistics.median(values)
            found[name][f"{kind} ratio"] = ratio(values, seconds[CONTROL])
    return found


def of(study: str) -> dict[str, Any]:
    """Return the numbers of a study's runs, with what was measured of each."""
    runs = pages.runs_of(study)
    numbers = gather(plan.read(pages.STUDIES / f"{study}.yaml"), runs, "")
    by_seed = {
        seed: measured([run for run in runs if run.seed == seed]) for seed in numbers.study.seeds
    }
    entries = {}
    for name in WEIGHTS:
        own = {"top1": [of_study.last(one) for one in numbers.of(name)]}
        for key in by_seed[numbers.study.seeds[0]][name]:
            own[key] = [by_seed[seed][name][key] for seed in numbers.study.seeds]
        entries[name] = own
    return entries


# --- the page -------------------------------------------------------------------------------------


def table(studies: dict[str, Any]) -> str:
    pairs = [(study, name) for study, name in product(studies, WEIGHTS) if name != CONTROL]
    top1 = {
        (study, name): paired_difference(
            studies[study][name]["top1"], studies[study][CONTROL]["top1"]
        )
        for study, name in pairs
    }
    corrected = dict(zip(pairs, holm([top1[pair].p for pair in pairs]), strict=True))
    rows = []
    for study, name in product(studies, WEIGHTS):
        one = studies[study][name]
        row = [f"{STUDIES[study]}, {WEIGHTS[name]}", str(spread(one["top1"]))]
        row += [f"{top1[study, name]}, {corrected[study, name]:.2g}"] if name != CONTROL else [""]
        row += [f"{statistics.mean(one['density']):.1f} %"]
        for key in ("operations", "eval", "step"):
            row += [f"{statistics.mean(one[key]):.{2 if key == 'operations' else 1}f}"]
            if key != "operations":
                row += [ends(one[f"{key} ratio"])]
        rows.append(row)
    head = ["data, weight", "top-1", "minus weight 0, p (Holm)", "spikes", "operations, million"]
    head += ["evaluation, ms", "/ weight 0", "training step, ms", "/ weight 0"]
    return markdown(head, rows, numbers=True)


def ends(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def draw(studies: dict[str, Any]) -> Any:
    figure = style.new_figure(11, 9)
    axes = figure.subplots(len(studies), len(COSTS), sharey="row")
    for row, (study, entries) in zip(axes, studies.items(), strict=True):
        for axis, (key, label) in zip(row, COSTS.items(), strict=True):
            for colour, (name, weight) in zip(style.SERIES, WEIGHTS.items(), strict=False):
                one = entries[name]
                axis.plot(one[key], one["top1"], "o", ms=4, color=colour, alpha=0.6)
                means = statistics.mean(one[key]), statistics.mean(one["top1"])
                axis.plot(*means, "D", ms=9, color=colour, label=f"weight {weight}")
            axis.set_xlim(0)
            axis.set_xlabel(label)
            style.finish(
                axis, STUDIES[study], style.ACCURACY if axis is row[0] else "", legend=False
            )
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def answer_of(studies: dict[str, Any]) -> str:
    parts = []
    for study, entries in studies.items():
        one, control = entries["weight_1"], entries[CONTROL]
        spikes = (statistics.mean(each["density"]) for each in (control, one))
        parts.append(
            f"{STUDIES[study]}: {' to '.join(f'{share:.1f}' for share in spikes)} % spikes, "
            f"{ends(one['eval ratio'])} of the time of evaluation, {ends(one['step ratio'])} of a "
            f"training step's, {paired_difference(one['top1'], control['top1'])} points"
        )
    return f"A weight of 1, beside 0: {'; '.join(parts)}."


def main() -> int:
    pages.no_flags(__doc__)
    torch.set_num_threads(1)
    studies = {study: of(study) for study in STUDIES}
    n = min(len(one["top1"]) for entries in studies.values() for one in entries.values())
    values = {"machine": machine("cpu"), "studies": studies}
    pages.write(PAGE, answer_of(studies), n, values, [table(studies)], draw(studies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
