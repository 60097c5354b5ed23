"""Contestants that take turns, each in a process of its own, under the settings that suit it best.

How threads wait for each other is set before a process loads torch (OMP_WAIT_POLICY): asleep, or
spinning for a while first. Which is faster depends on the network and on the machine, so each
contestant is tried with both, and competes with the better one; but ours as its commands run it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

# OMP_WAIT_POLICY by what the report calls it. The second is torch's own when nothing is set.
WAITING = {"asleep": "PASSIVE", "spinning": None}
_TRIALS = 3  # steps of each by which the better one is found
_OPTIONS = "TETDIST_BENCH"


def ratio(values: Iterable[float], others: Iterable[float]) -> float:
    """Return the median ratio, round by round, since whatever slows the machine slows both."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


class Told:
    """A process that does something when told to, and answers with the seconds that it took."""

    def __init__(self, module: str, options: argparse.Namespace, **environment: str | None) -> None:
        """
        Args:
            module: Run by ``python -m``; it finds the options by `options_told`.
            options: What can be said in JSON.
            environment: What differs from this process's; None: not set.
        """
        variables = os.environ | {_OPTIONS: json.dumps(vars(options) | {"json": None})}
        for name, value in environment.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the one who tells; it ends this process, too.
            start_new_session=True,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        # One that has ended says so by its answer.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def seconds(self) -> float:
        """The answer, once it is there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a process of the benchmark ended ({self.process.wait()})")
        return float(line)

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def options_told() -> argparse.Namespace:
    """The options of the one that started this process."""
    return argparse.Namespace(**json.loads(os.environ[_OPTIONS]))


def answer(step: Callable[[], object]) -> None:
    """Make as many steps as each line of the standard input says; print the seconds of one."""
    for line in sys.stdin:
        steps = int(line)
        started = time.perf_counter()
        for _ in range(steps):
            # What libraries print is not an answer.
            with contextlib.redirect_stdout(sys.stderr):
                step()
        answered = f"{(time.perf_counter() - started) / steps}\n".encode()
        try:
            os.write(1, answered)
        except BrokenPipeError:
            return  # Nobody is there any more.


class Contestant:
    """One network's steps in a process of its own.

    Attributes:
        waiting: The key of `WAITING` with which it competes.
        warm_up: Seconds of the first two steps.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        options = argparse.Namespace(**vars(options) | {"contestant": name})
        # Ours waits as in training.
        ways = ["asleep"] if name.startswith("tetdist") else list(WAITING)
        self._processes: dict[str, Told] = {}
        try:
            self.waiting, self.warm_up, best = "", 0.0, float("inf")
            for waiting in ways:
                self._processes[waiting] = Told(__name__, options, OMP_WAIT_POLICY=WAITING[waiting])
                first_two = 2 * self._seconds(waiting, 2)
                # Kernels are built by the first process, so that its time is that of a first start.
                self.warm_up = self.warm_up or first_two
                found = statistics.median(self._seconds(waiting) for _ in range(_TRIALS))
                if found < best:
                    self.waiting, best = waiting, found
            for waiting in ways:
                if waiting != self.waiting:
                    self._processes.pop(waiting).end()
        except BaseException:
            self.end()
            raise

    def _seconds(self, waiting: str, steps: int = 1) -> float:
        self._processes[waiting].tell(str(steps))
        return self._processes[waiting].seconds()

    def step(self) -> float:
        """Make a step; its seconds."""
        return self._seconds(self.waiting)

    def end(self) -> None:
        for process in self._processes.values():
            process.end()


@contextlib.contextmanager
def contestants(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Contestant]]:
    """Processes of contestants by name, ended afterwards."""
    started: dict[str, Contestant] = {}
    try:
        for name in names:
            started[name] = Contestant(name, options)
            one = started[name]
            print(
                f"{name}: first two steps {one.warm_up:.1f} s, faster when waiting {one.waiting}",
                file=sys.stderr,
                flush=True,
            )
        yield started
    finally:
        for one in started.values():
            one.end()


def main() -> None:
    """Make steps of the contestant that the options name."""
    from tetdist.apps.benchmarks.contestants import contestants_of, step_of
    from tetdist.nn.precision import choose_algorithms

    options = options_told()
    choose_algorithms(options.precision)
    answer(step_of(options, contestants_of(options)[options.contestant]()))


if __name__ == "__main__":
    main()
