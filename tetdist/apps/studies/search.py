"""Search for values of a configuration, by successive halving, without the validation split.

Candidates are trained on a part of the training data and evaluated on the rest (`data.held_out`).
All of them start; the best at a rung (a number of epochs) continue to the next, as in Jamieson and
Talwalkar (https://arxiv.org/abs/1502.07943). The last remaining candidate is trained again on all
training data and evaluated once on the validation split.

A candidate is an ordinary run that `max_steps` ends at its rung. Its schedule is that of the whole
training, so it can resume from its checkpoint, and costs no more than the uninterrupted run. The
state of a search follows from its runs alone; there is no state file.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from tetdist.apps.studies.plan import (
    OWN_KEYS,
    QuestionSection,
    StudyRun,
    as_overrides,
    check_folder,
    check_inputs,
    is_trained,
    lines,
    make_run,
    read_section,
)
from tetdist.config.fields import Epochs, Section
from tetdist.config.overrides import joined, key_of
from tetdist.config.yaml_files import read_yaml
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.order import steps_per_epoch
from tetdist.training.health import NOT_FINITE
from tetdist.training.setup import open_data
from tetdist.wording import counted

FINAL = "final"
_OWN_KEYS = OWN_KEYS | {
    "name": "leave it out, runs are named cNN-seedN",
    "resume": "leave it out, a search always continues its runs",
    "max_steps": "set search.rungs instead",
    "data.held_out": "set search.held_out instead",
}


class RangeSection(Section):
    """Equidistant values including both ends, rounded to three digits; whole values are integers,
    which keys such as batch.micro require."""

    from_: float = Field(alias="from")
    to: float
    number: Annotated[int, Field(ge=2, le=1000)]
    log: bool = False
    """Use equal ratios instead of equal differences."""

    @property
    def values(self) -> list[float]:
        space = np.geomspace if self.log else np.linspace
        rounded = [float(f"{value:.3g}") for value in space(self.from_, self.to, self.number)]
        return [int(value) if value.is_integer() else value for value in rounded]


class SearchSection(Section):
    over: Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | RangeSection],
        Field(min_length=1),
    ]
    """Dotted keys of the configuration, each with a list of values or a range; candidates are all
    their combinations."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of each class's training samples on which candidates are evaluated."""
    rungs: Annotated[tuple[Epochs, ...], Field(min_length=1)]
    """Epochs after which candidates are compared, in ascending order."""
    eta: Annotated[int, Field(ge=2)] = 3
    """Reduction factor: 1/eta of the candidates continue, rounded up; after the last rung, one."""
    metric: Literal["top1", "loss"] = "top1"
    """Metric of the comparison, on held-out samples at the rung."""

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Values of every searched key."""
        return {
            key: axis.values if isinstance(axis, RangeSection) else list(axis)
            for key, axis in self.over.items()
        }

    @property
    def candidates(self) -> dict[str, dict[str, Any]]:
        """Values of every candidate, by its name."""
        combined = list(itertools.product(*self.axes.values()))
        width = max(2, len(str(len(combined))))
        return {
            f"c{number:0{width}}": dict(zip(self.over, one, strict=True))
            for number, one in enumerate(combined, start=1)
        }

    @property
    def at_rungs(self) -> list[tuple[int, int]]:
        """Each rung's epochs and number of candidates."""
        number, found = len(self.candidates), list[tuple[int, int]]()
        for epochs in self.rungs:
            found.append((epochs, number))
            number = self.kept(number)
        return found

    def kept(self, number: int) -> int:
        """Return how many of ``number`` candidates continue after a rung."""
        return math.ceil(number / self.eta)


class SearchStudy(QuestionSection):
    search: SearchSection


@dataclass(frozen=True)
class Rung:
    """Candidates at the epoch where they are compared.

    Attributes:
        scores: The metric of every seed, by candidate; None if the run has not reached the rung.
            Empty for a candidate with a run that ended because of non-finite gradients.
    """

    epochs: int
    scores: dict[str, list[float | None]]
    metric: str

    @property
    def is_complete(self) -> bool:
        return not any(score is None for scores in self.scores.values() for score in scores)

    @property
    def ranked(self) -> list[str]:
        """Candidates, best first; ties keep their order."""

        def demerit(candidate: str) -> float:
            mean = self.mean(candidate)
            if math.isnan(mean):
                return math.inf
            return -mean if self.metric == "top1" else mean

        return sorted(self.scores, key=demerit)

    def mean(self, candidate: str) -> float:
        known = [score for score in self.scores[candidate] if score is not None]
        return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Standing:
    """State of a search: the reached rungs, of which all but the last one are complete, and the
    best candidate of the last rung, once that is complete.
    """

    rungs: list[Rung]
    winner: str | None


def is_search(path: Path) -> bool:
    return "search" in read_yaml(path)


def read(path: Path) -> SearchStudy:
    """Read the file of a search."""
    study = read_section(path, SearchStudy)
    search, rungs = study.search, list(study.search.rungs)
    if rungs != sorted(set(rungs)):
        raise UserError(f"{path}: search.rungs: {rungs} must ascend without duplicates")
    for key, axis in search.over.items():
        if isinstance(axis, RangeSection) and axis.log and min(axis.from_, axis.to) <= 0:
            raise UserError(f"{path}: search.over.{key}: with log, both ends must be above 0")
        if isinstance(axis, RangeSection) and len(set(axis.values)) < axis.number:
            raise UserError(
                f"{path}: search.over.{key}: its {axis.number} values, rounded to three digits, "
                "have duplicates; use a smaller number, or a list"
            )
        if key in study.overrides:
            raise UserError(f"{path}: search.over.{key} is also in overrides; leave out one")
    for epochs, number in search.at_rungs:
        if number == 1:
            raise UserError(
                f"{path}: search.rungs: with eta {search.eta} only one candidate reaches epoch "
                f"{epochs}, so there is nothing to compare; leave out {epochs}"
            )
    return study


class Search:
    """Search and its runs, in the folder ``output``; ``more`` comes after the study's overrides."""

    def __init__(
        self, study: SearchStudy, output: Path, more: Sequence[str], imports: Sequence[str]
    ) -> None:
        self.study, self.output = study, output
        self.more, self.imports = list(more), imports
        self.candidates = study.search.candidates
        self._steps: dict[tuple[str, Path, int, int], int] = {}
        self._runs: dict[tuple[object, ...], StudyRun] = {}
        for override in more:
            if (key := key_of(override)) in study.search.over:
                raise UserError(f"{key} is a searched key; leave out {override}")
        last = study.search.rungs[-1]
        for candidate in self.candidates:
            config = self._run(candidate, study.seeds[0], candidate).config
            if config.start_phase:
                raise UserError("search: start_phase must be 0; candidates begin with that phase")
            if (epochs := sum(phase.epochs for phase in config.phases)) < last:
                raise UserError(
                    f"search.rungs: {last} exceeds the {counted(epochs, 'epoch')} of {candidate}'s "
                    "training; lower it, or raise phases.*.epochs"
                )

    # --- its runs ---------------------------------------------------------------------------------

    def run(self, candidate: str, seed: int, epochs: int) -> StudyRun:
        """Return the run of a candidate, up to a rung."""
        held_out = f"data.held_out={self.study.search.held_out:g}"
        config = self._run(candidate, seed, candidate, held_out).config
        # Pieces of one recording stay together, so the size may depend on the seed.
        key = (config.data.root, config.data.index_dir, seed, config.batch.global_)
        if key not in self._steps:
            train, _ = open_data(config, World(0, 1, torch.device("cpu"), control=None))
            self._steps[key] = steps_per_epoch(len(train), config.batch.global_)
        most = f"max_steps={epochs * self._steps[key]}"
        return self._run(candidate, seed, candidate, held_out, most)

    def final_runs(self, winner: str) -> list[StudyRun]:
        """Return the winner's runs on all data, which are evaluated only after the last epoch."""
        every = f"evaluate_every={self.epochs}"
        return [self._run(winner, seed, FINAL, every) for seed in self.study.seeds]

    def _run(self, candidate: str, seed: int, entry: str, *own: str) -> StudyRun:
        if (key := (candidate, seed, entry, *own)) not in self._runs:
            study, values = self.study, as_overrides(self.candidates[candidate])
            given = joined(as_overrides(study.overrides), self.more, values)
            try:
                self._runs[key] = make_run(
                    entry, seed, self.output, study.config, given, [*own], _OWN_KEYS, self.imports
                )
            except UserError as error:
                shown = ", ".join(values)
                raise UserError(f"the candidate {candidate} ({shown}): {error}") from error
        return self._runs[key]

    def check_inputs(self) -> None:
        """Check data, networks, MLflow and the folder for all candidates."""
        runs = [self.run(one, seed, 1) for one in self.candidates for seed in self.study.seeds]
        for run in runs:
            check_folder(run)
        check_inputs(runs, "the candidate ")

    # --- how far it is ----------------------------------------------------------------------------

    @cached_property
    def epochs(self) -> int:
        """Epochs of the recipe, and thus of the winner's final training."""
        first = self._run(next(iter(self.candidates)), self.study.seeds[0], FINAL).config
        return sum(phase.epochs for phase in first.phases)

    def standing(self) -> Standing:
        """Rank the candidates, rung by rung, by the evaluations of their runs."""
        search, left = self.study.search, list(self.candidates)
        rungs = list[Rung]()
        for epochs in search.rungs:
            scores = {one: self._scores(one, epochs) for one in left}
            rung = Rung(epochs, scores, search.metric)
            rungs.append(rung)
            if not rung.is_complete:
                return Standing(rungs, None)
            able = [one for one in rung.ranked if scores[one]]
            if not able:
                raise UserError(
                    f"search: no candidate reached epoch {epochs} with finite gradients; "
                    "search over smaller learning rates, or set gradient_clipping"
                )
            left = able[: search.kept(len(left))]
        for run in self.final_runs(left[0]):
            try:
                check_folder(run)
            except UserError as error:
                raise UserError(
                    f"{left[0]} is best now, but another candidate was already evaluated on the "
                    f"validation split, so a second evaluation would select by it: {error}"
                ) from error
        return Standing(rungs, left[0])

    def _scores(self, candidate: str, epochs: int) -> list[float | None]:
        """Return each seed's metric at the rung: None before it; empty if one is not finite."""
        runs = [self.run(candidate, seed, epochs) for seed in self.study.seeds]
        found = list[float | None]()
        for run in runs:
            most = run.config.max_steps
            at_rung = [one for one in lines(run, "val") if one["step"] == most]
            if not at_rung and is_trained(run):
                raise UserError(
                    f"{run.folder} was trained past step {most} without an evaluation there, with "
                    "other search.rungs; give another --output, or remove that folder"
                )
            if not at_rung and not_finite(run):
                return []
            found.append(float(at_rung[-1][self.study.search.metric]) if at_rung else None)
        return found

    def runs_of(self, standing: Standing) -> list[StudyRun]:
        """Return each candidate's run up to its last rung, and the final runs."""
        # The run of a rung continues the previous rung's, which has the same name.
        runs = {
            (candidate, seed): self.run(candidate, seed, rung.epochs)
            for rung in standing.rungs
            for candidate in rung.scores
            for seed in self.study.seeds
        }
        final = self.final_runs(standing.winner) if standing.winner is not None else []
        return [*runs.values(), *(run for run in final if is_trained(run))]

    def left_to_do(self, standing: Standing) -> list[StudyRun]:
        """Return the next runs of the search, which may be trained at the same time."""
        if standing.winner is not None:
            return [run for run in self.final_runs(standing.winner) if run.next_command()]
        rung = standing.rungs[-1]
        return [
            self.run(candidate, seed, rung.epochs)
            for candidate, scores in rung.scores.items()
            for seed, score in zip(self.study.seeds, scores, strict=False)
            if score is None
        ]

    # --- what it costs ----------------------------------------------------------------------------

    def budget(self) -> str:
        """Describe the total number of epochs of the search."""
        search, seeds = self.study.search, len(self.study.seeds)
        parts, total, before = list[str](), 0, 0
        for epochs, number in search.at_rungs:
            parts.append(f"{counted(number, 'candidate')} to epoch {epochs}")
            total += number * (epochs - before)
            before = epochs
        parts.append(f"the best again for {counted(self.epochs, 'epoch')} on all data")
        total = (total + self.epochs) * seeds
        return (
            f"{', '.join(parts)}, with {counted(seeds, 'seed')}: {counted(total, 'epoch')} in "
            f"total, equal to {total / self.epochs:.3g} full trainings"
        )


def not_finite(run: StudyRun) -> bool:
    """Return whether the run ended because of non-finite gradients, by the end of its log."""
    if not run.log.is_file():
        return False
    printed = run.log.read_text(errors="replace").splitlines()
    return bool(printed) and NOT_FINITE in printed[-1]
