"""Results of a study: means, standard deviations and paired differences over seeds."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.studies.plan import (
    BLANK,
    StudyRun,
    StudySection,
    evaluation,
    is_trained,
    lines,
    runs_of,
)
from tetdist.errors import UserError
from tetdist.storage.files import parse_json
from tetdist.tracking.metrics_file import restored
from tetdist.training import schedule
from tetdist.training.schedule import Phase, schedule_phases

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values; the latter is NaN for a single value."""

    n: int
    mean: float
    std: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return ""
        return f"{self.mean:.2f}" + ("" if math.isnan(self.std) else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Difference:
    """Mean difference of n pairs, with 95 % interval and the paired t-test's two-sided p; these are
    NaN for fewer than two pairs or if all pairs differ equally.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "" if math.isnan(self.mean) else signed(self.mean)
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}]"


@dataclass(frozen=True)
class Result:
    """Result of one run; accuracies in percent."""

    run: StudyRun
    top1: float  # of the last epoch, as by_timestep and loss
    best_top1: float  # NaN if training evaluated other samples or weights than the result's
    best_epoch: float
    by_timestep: list[float]  # top-1 of the time-mean up to timestep 1, 2, ...
    loss: float
    samples: int  # size of the validation split
    data_split: str | None  # of recordings, if there are several
    curve: list[tuple[float, float, float]]  # epoch, loss, top-1 of every evaluation
    image_timesteps: int  # training images times T, of this run alone
    seconds: float  # of training this run alone, without evaluations
    ended: float  # Unix time in seconds
    commands: list[str]  # training and, if it is separate, evaluation
    chosen_exit: dict[str, Any] | None = None  # see `tetdist.evaluation.suite`; None: not chosen
    early_exit: Sequence[tuple[float, float, float]] = ()  # threshold, top-1, average timesteps

    def as_dict(self) -> dict[str, Any]:
        named = {"name": self.run.name, "entry": self.run.entry, "seed": self.run.seed}
        named |= {"timesteps": self.run.timesteps}
        return named | {key: value for key, value in vars(self).items() if key != "run"}


# --- the numbers ----------------------------------------------------------------------------------


def result_of(run: StudyRun) -> Result | None:
    """Return the result of a run; None until it is finished and evaluated."""
    if not is_trained(run):
        return None
    found = evaluation(run)
    if found is None:
        return None
    validations = lines(run, "val")
    last = validations[-1]
    evaluated = lines(run, "val_ema") if run.average else validations
    best = max(validations, key=lambda line: line["top1"])
    return Result(
        run=run,
        top1=found["top1"],
        best_top1=math.nan if run.is_judged_apart else best["top1"],
        best_epoch=best["epoch"],
        by_timestep=list(found["per_timestep_top1"]),
        loss=found["loss"],
        chosen_exit=found.get("chosen_exit"),
        early_exit=[
            (point["threshold"], point["top1"], point["mean_timesteps"])
            for point in (found["early_exit"] if "chosen_exit" in found else ())
        ],
        samples=found["samples"],
        data_split=found.get("data_split"),
        curve=[(line["epoch"], line["loss"], line["top1"]) for line in evaluated],
        image_timesteps=image_timesteps(run, last),
        seconds=training_seconds(run),
        ended=last["time"],
        commands=[
            str(run.train_command),
            *([str(run.eval_command)] if run.is_evaluated_again else []),
        ],
    )


def phases_of(run: StudyRun, line: dict[str, Any]) -> list[Phase]:
    """Return the phases that the run trains, given step and epoch of a line of its metrics."""
    config = run.config
    steps_per_epoch = round(line["step"] / line["epoch"])
    phases = schedule_phases(config.phases, steps_per_epoch, config.batch.global_)
    return phases[config.start_phase :]


def image_timesteps(run: StudyRun, last: dict[str, Any]) -> int:
    """Return the number of training images times T, up to a line of the metrics."""
    phases, batch = phases_of(run, last), run.config.batch.global_
    return round(schedule.image_timesteps(phases, last["step"], batch))


def training_seconds(run: StudyRun) -> float:
    """Return the time of all steps, by the rates in the run's metrics."""
    train = lines(run, "train")
    first_step = phases_of(run, train[-1])[0].first_step
    steps = np.diff([line["step"] for line in train], prepend=first_step)
    rates = np.array([line["samples_per_s"] for line in train])
    return float(np.sum(steps * run.config.batch.global_ / rates))


def run_environment(run: StudyRun) -> dict[str, Any]:
    try:
        values = parse_json((run.folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def spread(values: list[float]) -> Spread:
    """Return mean and standard deviation of at least one value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(len(values), float(np.mean(values)), std)


def signed(value: float) -> str:
    """Format a number with two decimals and a sign; a number that rounds to zero gets +."""
    return f"{round(value, 2) + 0.0:+.2f}"


def paired_difference(values: list[float], control: list[float]) -> Difference:
    """Return the mean difference of pairs of equal seed, its t interval and the t-test's p."""
    from scipy import stats

    differences = np.subtract(values, control)
    n, mean = len(differences), float(np.mean(differences)) if values else math.nan
    # Differences that are equal up to rounding would give an interval of width zero.
    if n < 2 or np.ptp(differences) < 1e-9:
        return Difference(n, mean, math.nan, math.nan, math.nan)
    test = stats.ttest_rel(values, control)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(n, mean, float(low), float(high), float(test.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method; NaN, no test, stays NaN."""
    tested = sorted(p for p in values if not math.isnan(p))
    scaled = [min(1.0, (len(tested) - i) * p) for i, p in enumerate(tested)]
    return [max(scaled[: tested.index(p) + 1]) if p in tested else math.nan for p in values]


Value = Callable[[Result], float]


@dataclass(frozen=True)
class Numbers:
    """All results of a study, by entry and seed."""

    study: StudySection
    runs: list[StudyRun]
    results: dict[str, dict[int, Result]]
    environments: list[dict[str, Any]]  # the distinct ones

    @property
    def missing(self) -> list[str]:
        return [run.name for run in self.runs if run.seed not in self.results[run.entry]]

    @property
    def entries(self) -> list[str]:
        """Entries with a result."""
        return [name for name in self.study.entries if self.results[name]]

    def of(self, entry: str) -> list[Result]:
        return list(self.results[entry].values())

    def timesteps(self, entry: str) -> int:
        """T at the end of training."""
        return self.of(entry)[0].run.timesteps

    def spread(self, entry: str, value: Value) -> Spread:
        """Return the spread over seeds of a value of each result."""
        return spread(list(map(value, self.of(entry))))

    def pairs(self, entry: str, control: str | None = None) -> list[tuple[Result, Result]]:
        """Return results of equal seed, of an entry and another, by default its control."""
        other = control or self.study.entries[entry].control
        ours, theirs = self.results[entry], self.results[other] if other else {}
        return [(result, theirs[seed]) for seed, result in ours.items() if seed in theirs]

    def difference(self, entry: str, value: Value, control: str | None = None) -> Difference:
        """Return the difference in a value of each of the `pairs`; without any, its n is 0."""
        pairs = self.pairs(entry, control)
        return paired_difference(*([value(pair[i]) for pair in pairs] for i in (0, 1)))

    def at_equal_top1(self, entry: str, control: str | None = None) -> dict[str, Difference]:
        """Return the differences of timesteps at equal top-1, for each of `EQUAL`: with early exit
        at any threshold, and with all samples stopped at one t.
        """
        most, within = max(self.study.test_timesteps), self.study.exit_within or 0.0
        found = [timesteps_at_equal(pair, most, within) for pair in self.pairs(entry, control)]
        return {
            key: paired_difference(*([values[i][j] for values in found] for j in (0, 1)))
            for i, key in enumerate(EQUAL)
        }

    @property
    def answer(self) -> str:
        """The study's answer, its blanks filled in; empty while runs are missing."""

        def filled(blank: re.Match[str]) -> str:
            entry, control, key = blank.groups()
            if key in EQUAL:
                return str(self.at_equal_top1(entry, control)[key])
            value = at(int(key)) if key and key.isdigit() else VALUES[key or "top1"]
            if control is None:
                return str(self.spread(entry, value))
            return str(self.difference(entry, value, control))

        return "" if self.missing else BLANK.sub(filled, " ".join(self.study.answer.split()))

    def cost(self, entry: str) -> tuple[float, float]:
        """Return image-timesteps and training seconds, medians over seeds, with needed runs."""
        counted = [self.of(name) for name in self.with_needed(entry) if self.results[name]]
        image_timesteps = [np.median([r.image_timesteps for r in results]) for results in counted]
        seconds = [np.median([r.seconds for r in results]) for results in counted]
        return float(sum(image_timesteps)), float(sum(seconds))

    def epochs_before(self, entry: str) -> int:
        """Return the number of epochs for which the entry's initial weights were trained."""
        run, before = self.of(entry)[0].run, 0
        # A run that begins with a later phase includes the earlier phases' epochs itself.
        while run.init is not None and run.config.start_phase == 0:
            run = run.init
            before += sum(phase.epochs for phase in run.config.phases)
        return before

    def with_needed(self, entry: str) -> list[str]:
        """Return the entry, its init, its teacher, and so on recursively."""
        section = self.study.entries[entry]
        needed = [name for name in (section.init, section.teacher) if name is not None]
        return list(dict.fromkeys([entry, *(n for name in needed for n in self.with_needed(name))]))

    def as_dict(self) -> dict[str, Any]:
        exits = EXIT_VALUES if self.study.exit_within is not None else {}
        by_t = {t: at(t) for t in self.study.test_timesteps}
        entries, differences = {}, {}
        for entry in self.entries:
            values = {"top1": last, "best_top1": best, "loss": loss, **exits}
            image_timesteps, seconds = self.cost(entry)
            entries[entry] = {
                **{key: vars(self.spread(entry, value)) for key, value in values.items()},
                "by_timestep": {t: vars(self.spread(entry, value)) for t, value in by_t.items()},
                "image_timesteps": image_timesteps,
                "seconds": seconds,
            }
            if not (top1 := self.difference(entry, last)).n:
                continue
            differences[entry] = {
                "control": self.study.entries[entry].control,
                "top1": vars(top1),
                **{key: vars(self.difference(entry, value)) for key, value in exits.items()},
                **({k: vars(v) for k, v in self.at_equal_top1(entry).items()} if exits else {}),
                "by_timestep": {t: vars(self.difference(entry, of)) for t, of in by_t.items()},
            }
        results = [result for entry in self.entries for result in self.of(entry)]
        return {
            "study": self.study.model_dump(mode="json"),
            "answer": self.answer,
            "missing": self.missing,
            "entries": entries,
            "differences": differences,
            "runs": [result.as_dict() for result in results],
            "environments": self.environments,
        }


last: Value = attrgetter("top1")
best: Value = attrgetter("best_top1")
loss: Value = attrgetter("loss")


def at(timesteps: int) -> Value:
    return lambda result: result.by_timestep[timesteps - 1]


def exit_timesteps(result: Result) -> float:
    """Return the average timesteps a sample, with early exit at the chosen threshold."""
    assert result.chosen_exit is not None
    return float(result.chosen_exit["mean_timesteps"])


def exit_top1(result: Result) -> float:
    assert result.chosen_exit is not None
    return float(result.chosen_exit["top1"])


EXIT_VALUES = {"exit_timesteps": exit_timesteps, "exit_top1": exit_top1}
# Values that an answer may name (`plan.IN_ANSWERS`).
VALUES = {"top1": last, "loss": loss, **EXIT_VALUES}
EQUAL = ("exit_timesteps_at_equal_top1", "timesteps_at_equal_top1")


def exit_curve(
    by_timestep: Sequence[float], points: Iterable[Sequence[float]], most: int
) -> list[tuple[float, float]]:
    """Return (average timesteps a sample, top-1), from all decided at T=1 to all at the last T.

    Between them are the points (threshold, top-1, timesteps) of early exit, in ascending
    thresholds.
    """
    between = [(spent, top1) for _, top1, spent in points]
    return [(1.0, by_timestep[0]), *between, (float(most), by_timestep[most - 1])]


def timesteps_for(curve: list[tuple[float, float]], top1: float) -> float:
    """Return the timesteps at which an `exit_curve`, interpolated, first reaches an accuracy.

    NaN if it never does.
    """
    before = curve[0]
    for point in curve:
        if point[1] >= top1:
            weight = (top1 - before[1]) / (point[1] - before[1]) if before[1] < top1 else 0.0
            return before[0] + weight * (point[0] - before[0])
        before = point
    return math.nan


def timesteps_at_equal(
    pair: tuple[Result, Result], most: int, within: float
) -> list[Sequence[float]]:
    """Return the timesteps of both results with early exit, and with one t for all samples.

    Their accuracy is that of the less accurate one at the last timestep, less ``within``.
    """
    top1 = min(one.by_timestep[most - 1] for one in pair) - within
    curves = [exit_curve(one.by_timestep, one.early_exit, most) for one in pair]
    numbered = [enumerate(one.by_timestep, start=1) for one in pair]
    first = [next(t for t, of_t in one if of_t >= top1) for one in numbered]
    return [[timesteps_for(curve, top1) for curve in curves], first]


def detectable(difference: Difference) -> float:
    """Return the smallest true difference that a paired t-test of n pairs finds at 80 % power.

    The observed spread is taken as the true one. NaN for a single pair.
    """
    from scipy import optimize, stats

    if math.isnan(difference.low):
        return math.nan
    freedom = difference.n - 1
    limit = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))
    error = (difference.high - difference.low) / 2 / limit

    def lacking(size: float) -> float:
        return POWER - float(stats.nct.sf(limit, freedom, size))

    # In standard errors; two seeds need the most, 16.
    return error * float(optimize.brentq(lacking, 0.1, 100.0))


def gather(study: StudySection, runs: list[StudyRun]) -> Numbers:
    results: dict[str, dict[int, Result]] = {name: {} for name in study.entries}
    for run in runs:
        result = result_of(run)
        if result is not None:
            results[run.entry][run.seed] = result
    ran = [run for run in runs if run.seed in results[run.entry]]
    return Numbers(study, runs, results, distinct(list(map(run_environment, ran))))


def read(file: Path) -> dict[str, Any]:
    """Read the numbers of a study, of a search, or of a page by a script in docs/make."""
    try:
        values = restored(parse_json(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); run its study again") from None
    of_one = ({"entries", "differences"}, {"candidates"}, {"answer", "n"})
    if not isinstance(values, dict) or not any(
        {"study", *keys} <= values.keys() for keys in of_one
    ):
        raise UserError(f"{file} has no numbers of a study; run its study again")
    return values


def recorded(file: Path, study: StudySection, output: Path, more: list[str]) -> Numbers:
    """Return the numbers that an earlier report has written.

    Title, question and answer are the given study's; all else is as it was run.
    """
    values = read(file)
    words = study.model_dump(mode="json", include={"title", "question", "answer"})
    as_run = StudySection.model_validate_json(json.dumps(values["study"] | words))
    runs = {run.name: run for run in runs_of(as_run, output, more)}
    results: dict[str, dict[int, Result]] = {name: {} for name in as_run.entries}
    for found in values["runs"]:
        # The numbers of a study without early exit may be older than it.
        kept = {field.name: found[field.name] for field in fields(Result) if field.name in found}
        results[found["entry"]][found["seed"]] = Result(run=runs[found["name"]], **kept)
    return Numbers(as_run, list(runs.values()), results, values["environments"])


def distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct environments: each machine and state of the code once."""
    found: list[dict[str, Any]] = []
    for value in values:
        git = value.get("git") or {}
        kept = {
            key: value.get(key) for key in ("python", "packages", "cpu", "usable_cores", "gpus")
        }
        kept |= {"commit": git.get("commit"), "dirty": git.get("dirty")}
        if kept not in found:
            found.append(kept)
    return found
