"""Contestants that take turns, each in its own process with the settings that suit it best.

The way threads wait (OMP_WAIT_POLICY) must be set before a process loads torch: asleep, or spinning
first. Which is faster depends on the network and the machine, so each contestant is tried with both
and competes with the better one; tetdist's waits as its commands do.
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

# OMP_WAIT_POLICY by its name in the report. The second is torch's default.
WAITING = {"asleep": "PASSIVE", "spinning": None}
_TRIALS = 3  # steps of each policy for the choice
_OPTIONS = "TETDIST_BENCH"


def ratio(values: Iterable[float], others: Iterable[float]) -> float:
    """Return the median ratio by round, since any slowdown of the machine affects both."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


class TimedProcess:
    """Process that runs steps on command, and returns the seconds that they took."""

    def __init__(self, module: str, options: argparse.Namespace, **environment: str | None) -> None:
        """Start ``python -m module``, which reads the options, as JSON, by `parent_options`; a
        variable of the environment that is None is removed.
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
            # Only the parent receives Ctrl-C; it ends this process, too.
            start_new_session=True,
        )

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        # `seconds` reports a process that has ended.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def seconds(self) -> float:
        """Wait for the process's answer, and return it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SystemExit(f"error: a process of the benchmark ended with status {status}")
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


def parent_options() -> argparse.Namespace:
    """Return the options from the parent process."""
    return argparse.Namespace(**json.loads(os.environ[_OPTIONS]))


def serve(step: Callable[[], object]) -> None:
    """Run the number of steps in each line of standard input, and print the seconds a step."""
    for line in sys.stdin:
        steps = int(line)
        started = time.perf_counter()
        for _ in range(steps):
            # Keep output of libraries out of the answer.
            with contextlib.redirect_stdout(sys.stderr):
                step()
        answered = f"{(time.perf_counter() - started) / steps}\n".encode()
        try:
            os.write(1, answered)
        except BrokenPipeError:
            return  # The parent has ended.


class Contestant:
    """Network that is measured in its own process."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        options = argparse.Namespace(**vars(options) | {"contestant": name})
        # tetdist waits as in training.
        ways = ["asleep"] if name.startswith("tetdist") else list(WAITING)
        self._processes: dict[str, TimedProcess] = {}
        try:
            # Its key of `WAITING`, and the seconds of its first two steps.
            self.waiting, self.warm_up, best = "", 0.0, float("inf")
            for waiting in ways:
                policy = WAITING[waiting]
                self._processes[waiting] = TimedProcess(__name__, options, OMP_WAIT_POLICY=policy)
                first_two = 2 * self._seconds(waiting, 2)
                # The first process builds kernels, so its time is that of a first start.
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
        self._processes[waiting].send(str(steps))
        return self._processes[waiting].seconds()

    def step(self) -> float:
        """Make a step, and return its seconds."""
        return self._seconds(self.waiting)

    def end(self) -> None:
        for process in self._processes.values():
            process.end()


@contextlib.contextmanager
def contestants(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Contestant]]:
    """Yield the contestants by name, and end their processes afterwards."""
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

    options = parent_options()
    choose_algorithms(options.precision)
    serve(step_of(options, contestants_of(options)[options.contestant]()))


if __name__ == "__main__":
    main()
