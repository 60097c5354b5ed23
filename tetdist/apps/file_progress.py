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
# After the first files; with fewer seconds a rate would be a guess.
_SECONDS_OF_A_RATE = 5.0


@contextmanager
def file_progress(title: str, unit: str = "file") -> Iterator[Callable[[int, int], None]]:
    """Show files done, with rate and time left: a bar on a terminal, elsewhere a line now and then.

    Call the result with the numbers of files done and of all. Rate and time left ignore the first
    files, which waited for processes to start, and appear some seconds later. The last line's rate
    is that of all files.
    """
    bar: tqdm[Any] | None = None
    started = last_line = time.monotonic()
    first: tuple[int, float] | None = None  # the files done at the first call, and its time

    def on_terminal(done: int, total: int) -> None:
        from tqdm import tqdm

        nonlocal bar
        bar = bar or tqdm(desc=title, unit=unit, total=total, initial=done, smoothing=0.05)
        bar.update(done - bar.n)

    def in_log(done: int, total: int) -> None:
        nonlocal last_line, first
        now = time.monotonic()
        first = first or (done, now)
        if done < total and now - last_line <= _SECONDS_BETWEEN_LINES:
            return
        last_line = now
        line = f"{title}: {done:,} of {counted(total, unit)}"
        files, seconds = done - first[0], now - first[1]
        if done >= total:
            line += f", {rate(done / max(now - started, 1e-6), unit)}"
        elif files and seconds >= _SECONDS_OF_A_RATE:
            left = duration((total - done) * seconds / files)
            line += f", {rate(files / seconds, unit)}, {left} left"
        print(line, file=sys.stderr, flush=True)

    try:
        yield on_terminal if sys.stderr.isatty() else in_log
    finally:
        if bar is not None:
            bar.close()
