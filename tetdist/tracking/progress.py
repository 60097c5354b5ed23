"""The progress of a run for a person: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

from tqdm import tqdm


class RunProgress:
    """Progress of the whole run, on standard error.

    Args:
        step, last_step: Optimiser steps done, and in all.
        steps_per_epoch: The run's.
        global_batch: Samples a step.
        silent: Show nothing (all processes but one).
    """

    def __init__(
        self, step: int, last_step: int, steps_per_epoch: int, global_batch: int, *, silent: bool
    ) -> None:
        self.silent = silent
        self.on_terminal = sys.stderr.isatty()
        self.last_step, self.steps_per_epoch = last_step, steps_per_epoch
        self.first_step, self.started = step, time.monotonic()
        self.bar = tqdm(
            total=last_step * global_batch,
            initial=step * global_batch,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=silent or not self.on_terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, num_samples: int) -> None:
        self.bar.update(num_samples)

    def report_training(self, step: int, values: dict[str, Any]) -> None:
        if self.silent:
            return
        loss, lr = f"{values['loss']:.3f}", f"{values['lr']:.2g}"
        if self.on_terminal:
            self.bar.set_description(f"epoch {values['epoch']:.1f}")
            self.bar.set_postfix_str(f"loss {loss}, top-1 {values['top1']:.1f} %, lr {lr}")
            return
        pace = (time.monotonic() - self.started) / max(step - self.first_step, 1)
        rate = values["samples_per_s"]
        eta = timedelta(seconds=round((self.last_step - step) * pace))
        print(
            f"epoch {values['epoch']:.2f}  step {step}/{self.last_step}  loss {loss}  "
            f"top-1 {values['top1']:.1f} %  lr {lr}  {rate:.{0 if rate >= 10 else 1}f} images/s  "
            f"data wait {values['data_wait']:.0f} %  ETA {eta}",
            file=sys.stderr,
            flush=True,
        )

    def report_evaluation(self, step: int, values: dict[str, Any]) -> None:
        if self.silent:
            return
        by_timestep = " ".join(f"{top1:.1f}" for top1 in values["per_timestep_top1"])
        tqdm.write(
            f"evaluation at epoch {values['epoch']:g}, step {step}: top-1 {values['top1']:.2f} %  "
            f"top-5 {values['top5']:.2f} %  loss {values['loss']:.3f}  "
            f"by timestep {by_timestep} %  ({values['samples']} images)",
            file=sys.stderr,
        )


def sample_bar(total: int, title: str, *, silent: bool) -> "tqdm[Any]":
    """A bar over samples on a terminal, nothing elsewhere."""
    return tqdm(
        total=total,
        desc=title,
        unit="img",
        dynamic_ncols=True,
        disable=silent or not sys.stderr.isatty(),
        leave=False,
    )


class FileProgress:
    """Files done, with rate and time left: a bar on a terminal, elsewhere a line now and then."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def titled(self, title: str, unit: str = "file") -> Callable[[int, int], None]:
        """Begin with other files; the result is called with the files done and in all."""
        self._close()
        started = last_line = time.monotonic()

        def on_terminal(done: int, total: int) -> None:
            if self._bar is None:
                self._bar = tqdm(desc=title, unit=unit, total=total, smoothing=0.05)
            self._bar.update(done - self._bar.n)

        def in_log(done: int, total: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            if done < total and now - last_line <= self._SECONDS_BETWEEN_LINES:
                return
            last_line = now
            rate = done / max(now - started, 1e-6)
            print(
                f"{title}: {done}/{total} {unit}s, {rate:.0f} {unit}s/s, "
                f"{(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

        return on_terminal if sys.stderr.isatty() else in_log
