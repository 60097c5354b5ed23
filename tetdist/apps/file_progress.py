"""The progress of a command that treats many files."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tetdist.wording import counted, duration, rate

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def file_progress(title: str, unit: str = "file") -> Iterator[Callable[[int, int], None]]:
    """Show files done, with rate and time left: a bar on a terminal, elsewhere a line now and then.

    Call the result with the numbers of files done and of all.
    """
    bar: tqdm[Any] | None = None
    started = last_line = time.monotonic()

    def on_terminal(done: int, total: int) -> None:
        from tqdm import tqdm

        nonlocal bar
        bar = bar or tqdm(desc=title, unit=unit, total=total, initial=done, smoothing=0.05)
        bar.update(done - bar.n)

    def in_log(done: int, total: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        # Work of less than a second needs no line.
        is_due = now - last_line > _SECONDS_BETWEEN_LINES if done < total else now - started > 1
        if not is_due:
            return
        last_line, per_second = now, done / max(now - started, 1e-6)
        line = f"{title}: {done:,} of {counted(total, unit)}, {rate(per_second, unit)}"
        if done < total:
            line += f", {duration((total - done) / per_second)} left"
        print(line, file=sys.stderr, flush=True)

    try:
        yield on_terminal if sys.stderr.isatty() else in_log
    finally:
        if bar is not None:
            bar.close()
