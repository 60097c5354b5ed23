"""The slowest rank of each line of metrics, and ranks that stay slow: named rightly, and once."""

import platform
import re

import pytest
import torch
from tiny import expect

from tetdist.apps.reports.run_status import as_text, read_status
from tetdist.distributed.waiting import Waiting
from tetdist.tracking.metrics_file import read_metrics
from tetdist.training.stragglers import RankTimes, Stragglers

# Every rank waits for data for 30 ms more than it needs, against which noise is small.
DELAYS = """
import os, time
from tetdist.training import feed
from tetdist.training.stragglers import Stragglers

Stragglers.LINES = 4  # lines of metrics in a row

class Loader:
    def __init__(self, *args):
        self.batches = make(*args)
        self.close = self.batches.close

    def __next__(self):
        time.sleep(0.18 if os.environ["RANK"] == "1" else 0.03)
        return next(self.batches)

make, feed.train_loader = feed.train_loader, Loader
"""


def test_a_slow_rank_is_named_with_its_reason(farm, tiny_config, tmp_path):
    (tmp_path / "delays.py").write_text(DELAYS)
    batch = {"batch.global": 6, "log_every": 2, "evaluate_every": 2}
    run = {"imports": [str(tmp_path / "delays.py")], "phases.0.epochs": 2} | batch
    text = expect(farm(tiny_config(run), world=3))
    host = platform.node()
    named = re.findall(r"rank (\d) on (\S+) is slow.*mostly for (.*); all ranks", text)
    lines = [x for x in read_metrics(tmp_path / "runs/tiny/metrics.jsonl") if x["kind"] == "train"]
    assert len(lines) == 8
    assert named == [("1", host, "waiting for data")]
    # Of 0.18 s on this rank, and 0.03 s on two others; a busy machine may spoil some lines.
    fits = [
        (line["slowest"]["rank"], line["slowest_host"]) == (1, host)
        and line["slowest"]["step_seconds"] > 1.3 * line["step_seconds"]
        and line["slowest"]["data_wait"] > 1.3 * line["data_wait"]
        for line in lines
    ]
    assert sum(fits) >= 5
    shown = as_text(read_status(tmp_path / "runs/tiny")) + text
    pattern = rf"slowest rank 1 on {re.escape(host)}: \S+ s/step \(mean \S+ s\), data wait"
    assert len(re.findall(pattern, shown)) == 1 + len(lines)


def test_a_rank_is_named_after_ten_slow_lines_in_a_row():
    def line(slow):
        return [RankTimes("a", 1.0, 0.1), RankTimes("b", slow, 0.1), RankTimes("a", 0.9, 0.1)]

    ranks = Stragglers()
    named = [list(ranks.new(line(slow))) for slow in (*[1.2] * 9, 1.05, *[1.11] * 20)]
    assert [len(texts) for texts in named] == [0] * 19 + [1] + [0] * 10
    assert "rank 1 on b" in named[19][0]
    assert "1.11 s instead of 1 s, mostly for computing; all ranks" in named[19][0]


def test_a_gpu_is_asked_only_at_the_end_of_a_window(monkeypatch):
    clock = iter([100.0, 150.0, 300.0, 320.0])
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(clock)

        def elapsed_time(self, end):
            asked.append(end.milliseconds - self.milliseconds)
            return asked[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for _ in range(2):
        with waiting.measured():
            assert not asked
    assert waiting.take() == pytest.approx(0.07)
    assert waiting.take() == 0
