"""A log says soon how fast a run is, whatever it logs of it, and never nothing for minutes."""

import fcntl
import json
import re
import sys

import pytest
from tiny import expect

from tetdist.apps.file_progress import file_progress
from tetdist.apps.reports.run_status import read_status
from tetdist.tracking import progress
from tetdist.tracking.progress import RunProgress


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (progress, sys.modules[file_progress.__module__]):
        monkeypatch.setattr(module, "time", clock)
    return clock


TRAINED = {"epoch": 0.1, "loss": 1.0, "top1": 50.0, "lr": 0.1, "samples_per_s": 16.0}
TRAINED |= {"data_wait": 3.0, "eta_s": 2000.0}


def test_the_first_line_comes_soon_and_others_after_a_minute(clock, capsys):
    settled = []
    shown = RunProgress(0, 1000, 100, 32, settle=lambda: settled.append(clock.now), silent=False)
    lines = {}
    with shown:
        for step in range(1, 101):
            clock.now += 2
            shown.advance()
            if step == 40:
                shown.report_training(step, TRAINED)
            if text := capsys.readouterr().err:
                lines[step] = text.strip()
    # 2 s a step: after 5 s, and 60 s after each line that there was.
    assert list(lines) == [3, 33, 40, 70, 100]
    assert lines[3] == ("epoch 0.03  step 3/1000  16 samples/s since the first step  ETA 0:33:14")
    assert lines[40].startswith("epoch 0.10  step 40/1000  loss 1.000")
    # A GPU is waited for only where its pace is reported.
    assert len(settled) == 4


def test_the_first_step_tells_nothing_of_the_pace(clock, capsys):
    shown = RunProgress(100, 200, 100, 32, silent=False)
    for seconds in (185, 60, 1):
        clock.now += seconds
        shown.advance()
    shown.report_training(103, TRAINED | {"eta_s": shown.seconds_left()})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == (
        "epoch 1.01  step 101/200  the first step took 3 min 5 s: it compiles kernels that are not "
        "cached yet"
    )
    assert second == "epoch 1.02  step 102/200  0.5 samples/s since the first step  ETA 1:38:00"
    assert third.endswith("ETA 0:49:18")  # 97 steps at 30.5 s


def test_a_long_evaluation_says_how_far_it_is(clock, capsys):
    shown = RunProgress(0, 10, 5, 8, silent=False)
    for _ in range(4):
        clock.now += 31
        shown.advance_evaluation(25, 100)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating after step 0: 25 % of the samples",
        "evaluating after step 0: 75 % of the samples",
    ]


def test_status_has_the_time_left_of_the_log(main, tiny_config, tmp_path):
    text = expect(main(tiny_config(), "log_every=2", "max_steps=7"))
    shown = re.findall(r"step (\d+)/7  loss .*ETA (\d+):(\d+):(\d+)", text)
    run = tmp_path / "runs" / "tiny"
    # The file's last lines, when the process was at each of these steps.
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for step, *clock in shown:
        until = [line for line in lines if json.loads(line)["step"] <= int(step)]
        (run / "metrics.jsonl").write_text("".join(until))
        with (run / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            eta = read_status(run).eta_s
        hours, minutes, seconds = map(int, clock)
        assert round(eta) == 3600 * hours + 60 * minutes + seconds
    assert [int(step) for step, *_ in shown] == [2, 4, 5, 6, 7]


def test_files_are_counted_in_words_and_human_time(clock, capsys):
    with file_progress("val", "recording") as done:
        clock.now += 20
        done(2, 2000)
        clock.now += 4
        done(3, 2000)
        clock.now += 16
        done(1002, 2000)
        done(2000, 2000)
    with file_progress("train", "image") as done:
        clock.now += 0.5
        done(1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "val: 2 of 2,000 recordings, 0.1 recordings/s, 5 h 33 min left",
        "val: 1,002 of 2,000 recordings, 25 recordings/s, 40 s left",
        "val: 2,000 of 2,000 recordings, 50 recordings/s",
    ]
