"""Comparison of the ranks' speeds, which finds a slow process, GPU or disk."""

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean, median_low
from typing import Any, NamedTuple


class RankTimes(NamedTuple):
    """Seconds of a rank in a step, without waiting for other ranks; ``data``: waiting for data."""

    host: str
    step: float
    data: float


def compared(ranks: Sequence[RankTimes], seconds: float) -> dict[str, Any]:
    """Return the metrics of all ranks and of the slowest; ``seconds`` is the time of a step."""
    values: dict[str, Any] = {"data_wait": 100 * fmean(r.data for r in ranks) / seconds}
    if len(ranks) > 1:
        number, (host, step, data) = max(enumerate(ranks), key=lambda pair: pair[1].step)
        slowest = {"rank": number, "step_seconds": step, "data_wait": 100 * data / seconds}
        values["step_seconds"] = fmean(r.step for r in ranks)
        values |= {"slowest": slowest, "slowest_host": host}
    return values


class Stragglers:
    """Ranks that are slower than the median rank in several lines of metrics in a row."""

    LINES, PERCENT = 10, 10

    def __init__(self) -> None:
        self._slow_lines: Counter[int] = Counter()

    def new(self, ranks: Sequence[RankTimes]) -> Iterator[str]:
        """Add a line's times; describe each rank that has become a straggler, once."""
        step, data = (median_low(column) for column in list(zip(*ranks, strict=True))[1:])
        for number, rank in enumerate(ranks):
            if (before := self._slow_lines[number]) == self.LINES:
                continue
            is_slow = rank.step > (1 + self.PERCENT / 100) * step
            self._slow_lines[number] = before + 1 if is_slow else 0
            if self._slow_lines[number] == self.LINES:
                waits = rank.data - data > (rank.step - step) / 2
                yield (
                    f"rank {number} on {rank.host} is slow: in each of the last {self.LINES} lines "
                    f"its steps took over {self.PERCENT} % longer than the median rank's, now "
                    f"{rank.step:.3g} s instead of {step:.3g} s, mostly for "
                    f"{'waiting for data' if waits else 'computing'}; all ranks wait for it"
                )
