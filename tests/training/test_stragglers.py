"""The slowest rank of each line of metrics, and ranks that stay slow: named rightly, and once."""

from unittest.mock import Mock

import pytest
import torch

from tetdist.distributed.waiting import Waiting
from tetdist.training.engines.base import Update
from tetdist.training.stragglers import RankTimes, Stragglers, compared
from tetdist.training.window import Window


def test_a_rank_is_named_after_ten_slow_lines_in_a_row():
    def line(slow):
        return [RankTimes("a", 1.0, 0.1), RankTimes("b", slow, 0.1), RankTimes("a", 0.9, 0.1)]

    ranks = Stragglers()
    named = [list(ranks.new(line(slow))) for slow in (*[1.2] * 9, 1.05, *[1.11] * 20, 1, *[2] * 12)]
    assert [len(texts) for texts in named] == [0] * 19 + [1] + [0] * 23
    assert "rank 1 on b" in named[19][0]
    assert "1.11 s instead of 1 s, mostly for computing; all ranks" in named[19][0]
    waiting = Stragglers()
    times = RankTimes("a", 1.0, 0.1), RankTimes("b", 1.6, 0.7)
    (text,) = (one for _ in range(20) for one in waiting.new(times))
    assert "1.6 s instead of 1 s, mostly for waiting for data" in text


def test_a_line_names_its_slowest_rank():
    found = compared([RankTimes("a", 1.0, 0.9), RankTimes("b", 1.6, 0.7)], 2.0)
    slowest = {"rank": 1, "step_seconds": 1.6, "data_wait": 35}
    assert found == {"data_wait": 40, "step_seconds": 1.3, "slowest": slowest, "slowest_host": "b"}
    assert compared([RankTimes("a", 1.0, 0.1)], 2.0) == {"data_wait": 5}


def test_waiting_for_the_others_is_not_a_ranks_own_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    waiting = Waiting(torch.device("cpu"))
    world = Mock(
        rank=0, device=torch.device("cpu"), waiting=waiting, gather=lambda host: [host] * 2
    )
    # The other rank needs the whole 4 s of both steps.
    world.gather_numbers = lambda own: [own, [*own[:3], 2.0, 0.5]]
    window = Window(8, world)
    for step in (1, 2):
        now += 1.0
        with waiting.measured():
            now += 1.0
        window.add(step, Update(torch.tensor(1.0), torch.tensor(True)), torch.ones(3), 2)
    values = window.close(0.0, None)
    assert values["step_seconds"] == 1.5
    assert values["slowest"] == {"rank": 1, "step_seconds": 2.0, "data_wait": 25}


def test_a_gpu_is_asked_only_of_what_it_has_finished(monkeypatch):
    clock, finished_at = iter([100.0, 150.0, 300.0, 320.0, 400.0, 401.0]), 0.0
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(clock)

        def query(self):
            return self.milliseconds <= finished_at

        def elapsed_time(self, end):
            asked.append(end.milliseconds - self.milliseconds)
            return asked[-1]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for _ in range(2):
        with waiting.measured():
            assert not asked
    assert not asked
    finished_at = 350.0
    with waiting.measured():
        pass
    assert asked == [50.0, 20.0]
    assert waiting.take() == pytest.approx(0.071)
    assert waiting.take() == 0
