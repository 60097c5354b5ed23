"""The progress of a run for a person: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self

from tqdm import tqdm

from tetdist.wording import counted, duration, rate


class RunProgress:
    """Progress of the whole run, on standard error.

    A log gets a line whenever metrics are logged, and another one after a time without lines: soon
    after the start, to show the pace, and later at least every minute.

    Args:
        step, last_step: Optimiser steps done, and in all.
        work: Returns the training images times T of the first steps; time left counts them.
        phases: Number of the run's phases; lines name the current one of several.
        settle: Waits for the device, which may lag behind the host by some steps.
        silent: Show nothing (all processes except one).
    """

    # Seconds without a line before the first line, and before later ones.
    FIRST, LATER = 5.0, 60.0

    def __init__(
        self,
        step: int,
        last_step: int,
        steps_per_epoch: int,
        global_batch: int,
        *,
        work: Callable[[int], float] = float,
        phases: int = 1,
        settle: Callable[[], None] = lambda: None,
        silent: bool,
    ) -> None:
        self.silent, self.settle, self.work = silent, settle, work
        self.on_terminal = sys.stderr.isatty()
        self.last_step, self.steps_per_epoch = last_step, steps_per_epoch
        self.global_batch, self.phases = global_batch, phases
        self.step = self.first_step = step
        self.started = self.steady_since = self.last_line = time.monotonic()
        self.silence = self.FIRST
        self.evaluated = 0  # samples of the evaluation that is going on
        self.bar = tqdm(
            total=last_step * global_batch,
            initial=step * global_batch,
            unit=" samples",
            unit_scale=True,
            dynamic_ncols=True,
            # A bar of variable width would have only one character at 110 columns.
            bar_format="{desc} {percentage:.0f} %|{bar:10}| {remaining} left, {rate_fmt}{postfix}",
            disable=silent or not self.on_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count one more step."""
        self.step += 1
        self.bar.update(self.global_batch)
        is_first = self.step == self.first_step + 1
        if is_first:
            self.steady_since = time.monotonic()
        if self._silent_for_long():
            self.settle()
            now = time.monotonic()
            if is_first:
                took = duration(now - self.started)
                pace = f"the first step took {took}: it compiles kernels that are not cached yet"
            else:
                samples = (self.step - self.first_step - 1) * self.global_batch
                pace = rate(samples / max(now - self.steady_since, 1e-6))
                pace += f" since the first step  ETA {_clock(self.seconds_left())}"
            epoch = self.step / self.steps_per_epoch
            self._print(f"epoch {epoch:.2f}  step {self.step}/{self.last_step}  {pace}")

    def report_training(self, step: int, values: dict[str, Any]) -> None:
        """Show the logged metrics of training."""
        if self.silent:
            return
        learned = [
            f"loss {values['loss']:.3f}",
            f"top-1 {values['top1']:.1f} %",
            f"lr {values['lr']:.2g}",
        ]
        machine = [f"data wait {values['data_wait']:.0f} %"]
        # Phases are counted from 0 here as everywhere.
        phase = f"phase {values['phase']}  " if self.phases > 1 else ""
        if self.on_terminal:
            self.bar.set_description_str(f"{phase}epoch {values['epoch']:.1f}")
            self.bar.set_postfix_str(", ".join([*learned, *machine]))
            return
        parts = [f"{phase}epoch {values['epoch']:.2f}", f"step {step}/{self.last_step}", *learned]
        parts += [rate(values["samples_per_s"]), *machine, *slowest_rank(values)]
        self._print("  ".join([*parts, f"ETA {_clock(values['eta_s'])}"]))

    def advance_evaluation(self, samples: int, total: int) -> None:
        """Count ``samples`` more of ``total`` as evaluated on this process."""
        self.evaluated += samples
        if self._silent_for_long():
            share = min(100 * self.evaluated / total, 100)
            self._print(f"evaluating after step {self.step}: {share:.0f} % of the samples")

    def report_evaluation(
        self, step: int, values: dict[str, Any], *, of_average: bool = False
    ) -> None:
        """Show the result of an evaluation, of the weights or of their moving average."""
        self.evaluated = 0
        if self.silent:
            return
        by_timestep = " ".join(f"{top1:.1f}" for top1 in values["per_timestep_top1"])
        # A network that is not causal has only the result of all timesteps.
        by_timestep = f"by timestep {by_timestep} %  " if by_timestep else ""
        what = "evaluation of the moving average" if of_average else "evaluation"
        # With five classes or fewer, it is always 100 %.
        top5 = f"top-5 {values['top5']:.2f} %  " if values["top5"] < 100 else ""
        tqdm.write(
            f"{what} at epoch {values['epoch']:g}, step {step}: top-1 {values['top1']:.2f} %  "
            f"{top5}loss {values['loss']:.3f}  {by_timestep}"
            f"({counted(values['samples'], f'{held_out(values)}sample')})",
            file=sys.stderr,
        )
        self._note_line()

    def _silent_for_long(self) -> bool:
        if self.silent or self.on_terminal:
            return False
        return time.monotonic() - self.last_line >= self.silence

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self._note_line()

    def _note_line(self) -> None:
        self.last_line, self.silence = time.monotonic(), self.LATER

    def seconds_left(self) -> float:
        """Compute the time to the last step at the pace since the first one, evaluations included.

        The first step, which compiles and warms up, may take as long as a hundred others.
        """
        done = self.step - self.first_step
        since, first = (self.steady_since, 1) if done > 1 else (self.started, 0)
        before, now = self.work(self.first_step + first), self.work(self.step)
        pace = (time.monotonic() - since) / (now - before)
        return (self.work(self.last_step) - now) * pace


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def held_out(evaluation: Mapping[str, Any]) -> str:
    """Return "held-out " for an evaluation of held-out training samples, else an empty text."""
    return "held-out " if "-held-out-" in evaluation.get("data_split", "") else ""


def slowest_rank(values: Mapping[str, Any]) -> list[str]:
    """Describe the slowest rank in a line of training; empty for a single process."""
    if "slowest" not in values:
        return []
    rank = values["slowest"]
    return [
        f"slowest rank {rank['rank']} on {values['slowest_host']}: "
        f"{rank['step_seconds']:.3g} s/step (mean {values['step_seconds']:.3g} s), "
        f"data wait {rank['data_wait']:.0f} %"
    ]


def sample_bar(total: int, title: str, *, silent: bool) -> "tqdm[Any]":
    """Make a progress bar over samples, which appears only on a terminal."""
    return tqdm(
        total=total,
        desc=title,
        unit=" samples",
        dynamic_ncols=True,
        disable=silent or not sys.stderr.isatty(),
        leave=False,
    )
