"""Results of a study: means, standard deviations and paired differences over seeds."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from tetdist.apps.studies.plan import (
    TEACHER_KEY,
    StudyRun,
    StudySection,
    as_text,
    evaluation,
    is_trained,
    lines,
)
from tetdist.config.overrides import flatten
from tetdist.config.schema import RunConfig
from tetdist.storage.files import parse_json
from tetdist.training import schedule
from tetdist.training.schedule import schedule_phases

CONFIDENCE = 0.95
POWER = 0.8
# Keys that a study sets itself, or that an entry's init and teacher set; imports are paths of this
# machine.
OF_THE_RUN = ("name", "seed", "init_checkpoint", TEACHER_KEY, "imports")


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

    name: str
    entry: str
    seed: int
    timesteps: int  # T at the end of training
    top1: float  # of the last epoch, as by_timestep and loss
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


def result_of(run: StudyRun) -> Result | None:
    """Return the result of a run; None until it is finished and evaluated."""
    if not is_trained(run):
        return None
    values = evaluation(run)
    if values is None:
        return None
    validations = lines(run, "val")
    evaluated = lines(run, "val_ema") if run.section.average else validations
    image_timesteps, seconds = spent(run)
    return Result(
        name=run.name,
        entry=run.entry,
        seed=run.seed,
        timesteps=run.timesteps,
        top1=values["top1"],
        by_timestep=list(values["per_timestep_top1"]),
        loss=values["loss"],
        chosen_exit=values.get("chosen_exit"),
        early_exit=[
            (point["threshold"], point["top1"], point["mean_timesteps"])
            for point in (values["early_exit"] if "chosen_exit" in values else ())
        ],
        samples=values["samples"],
        data_split=values.get("data_split"),
        curve=[(line["epoch"], line["loss"], line["top1"]) for line in evaluated],
        image_timesteps=image_timesteps,
        seconds=seconds,
        ended=validations[-1]["time"],
        commands=[
            str(run.train_command),
            *([str(run.eval_command)] if run.is_evaluated_again else []),
        ],
    )


def spent(run: StudyRun) -> tuple[int, float]:
    """Return training images times T, and the time of all steps by the rates in the metrics."""
    config, train = run.config, lines(run, "train")
    step, batch = train[-1]["step"], config.batch.global_
    phases = schedule_phases(config.phases, round(step / train[-1]["epoch"]), batch)
    own = phases[config.start_phase :]
    steps = np.diff([line["step"] for line in train], prepend=own[0].first_step)
    rates = np.array([line["samples_per_s"] for line in train])
    return round(schedule.image_timesteps(own, step, batch)), float(np.sum(steps * batch / rates))


def environment(run: StudyRun) -> dict[str, Any]:
    """Return machine, versions and commit of a run, as far as its folder records them."""
    try:
        recorded = parse_json((run.folder / "environment.json").read_text())
    except (OSError, ValueError):
        recorded = {}
    git = recorded.get("git") or {}
    kept = {key: recorded.get(key) for key in ("python", "packages", "cpu", "usable_cores", "gpus")}
    return kept | {"commit": git.get("commit"), "dirty": git.get("dirty")}


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
    """All results of a study, by entry and seed.

    Attributes:
        missing: Names of the runs without a result; ``NAME failed``, if it failed just now.
        configurations: Keys of the configuration that differ, as text, by entry.
        environments: Distinct machines and versions.
        command: Command of the study.
    """

    study: StudySection
    results: dict[str, dict[int, Result]]
    missing: list[str]
    configurations: dict[str, dict[str, str]]
    environments: list[dict[str, Any]]
    command: str

    @property
    def entries(self) -> list[str]:
        """Entries with a result."""
        return [name for name in self.study.entries if self.results[name]]

    def of(self, entry: str) -> list[Result]:
        return list(self.results[entry].values())

    def spread(self, entry: str, value: Value) -> Spread:
        """Return the spread over seeds of a value of each result."""
        return spread(list(map(value, self.of(entry))))

    def pairs(self, entry: str, control: str | None = None) -> list[tuple[Result, Result]]:
        """Return results of equal seed, of an entry and another, by default its control."""
        other = control or self.study.entries[entry].control
        ours, others = self.results[entry], self.results[other] if other else {}
        return [(result, others[seed]) for seed, result in ours.items() if seed in others]

    def difference(self, entry: str, value: Value, control: str | None = None) -> Difference:
        """Return the difference in a value of each of the `pairs`; without any, its n is 0."""
        pairs = self.pairs(entry, control)
        return paired_difference(*([value(pair[i]) for pair in pairs] for i in (0, 1)))

    @property
    def compared(self) -> dict[str, str]:
        """Controls of the entries that have results of equal seed."""
        controls = {entry: self.study.entries[entry].control for entry in self.entries}
        return {entry: one for entry, one in controls.items() if one and self.pairs(entry)}

    @property
    def of_exit(self) -> dict[str, Value]:
        """Values of early exit; empty if the study chooses no thresholds."""
        exits = {"exit_top1": exit_top1, "exit_timesteps": exit_timesteps}
        return {} if self.study.exit_within is None else exits

    def cost(self, entry: str) -> tuple[float, float]:
        """Return image-timesteps and training seconds, medians over seeds, with needed runs."""
        counted = [self.of(name) for name in self.with_needed(entry) if self.results[name]]
        image_timesteps = [np.median([r.image_timesteps for r in results]) for results in counted]
        seconds = [np.median([r.seconds for r in results]) for results in counted]
        return float(sum(image_timesteps)), float(sum(seconds))

    def with_needed(self, entry: str) -> list[str]:
        """Return the entry, its init, its teacher, and so on recursively."""
        section = self.study.entries[entry]
        needed = [name for name in (section.init, section.teacher) if name is not None]
        return list(dict.fromkeys([entry, *(n for name in needed for n in self.with_needed(name))]))

    def as_dict(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for entry in self.entries:
            cost = dict(zip(("image_timesteps", "seconds"), self.cost(entry), strict=True))
            entries[entry] = {**self._summary(partial(self.spread, entry)), **cost}
        differences = {
            entry: {"control": control, **self._summary(partial(self.difference, entry))}
            for entry, control in self.compared.items()
        }
        return {
            "study": self.study.model_dump(mode="json"),
            "missing": self.missing,
            "entries": entries,
            "differences": differences,
            "runs": [asdict(result) for entry in self.entries for result in self.of(entry)],
            "configurations": self.configurations,
            "environments": self.environments,
            "command": self.command,
        }

    def _summary(self, of: Callable[[Value], Spread | Difference]) -> dict[str, Any]:
        values = {"top1": last, "loss": loss, **self.of_exit}
        by_timestep = {t: asdict(of(at(t))) for t in self.study.test_timesteps}
        return {key: asdict(of(one)) for key, one in values.items()} | {"by_timestep": by_timestep}


last: Value = attrgetter("top1")
loss: Value = attrgetter("loss")


def at(timesteps: int) -> Value:
    return lambda result: result.by_timestep[timesteps - 1]


def of_exit(key: str) -> Value:
    """Return a value of early exit at the chosen threshold."""
    return lambda result: float((result.chosen_exit or {})[key])


exit_top1, exit_timesteps = of_exit("top1"), of_exit("mean_timesteps")


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


def gather(
    study: StudySection, runs: list[StudyRun], command: str, failed: Collection[str] = ()
) -> Numbers:
    """Gather the results of all finished runs; ``failed`` has the names of those that failed."""
    results: dict[str, dict[int, Result]] = {name: {} for name in study.entries}
    missing, environments = list[str](), list[dict[str, Any]]()
    for run in runs:
        if (result := result_of(run)) is None:
            missing.append(f"{run.name} failed" if run.name in failed else run.name)
            continue
        results[run.entry][run.seed] = result
        if (environment_of_run := environment(run)) not in environments:
            environments.append(environment_of_run)
    configs = {run.entry: run.config for run in runs if results[run.entry]}
    return Numbers(study, results, missing, differing(configs), environments, command)


def differing(configs: dict[str, RunConfig]) -> dict[str, dict[str, str]]:
    """Return the keys with different values in some of the configurations, also as defaults.

    A phase or section that some of them lack differs in all its keys; those that are set count.
    """
    flat = {entry: flatten(config.as_dict()) for entry, config in configs.items()}
    is_set = {
        key
        for config in configs.values()
        for key in flatten(config.model_dump(mode="json", exclude_unset=True))
    }
    keys = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if key not in OF_THE_RUN
        and len({str(values.get(key)) for values in flat.values()}) > 1
        and (key in is_set or all(key in values for values in flat.values()))
    ]
    return {
        entry: {key: as_text(values[key]) if key in values else "" for key in keys}
        for entry, values in flat.items()
    }
