"""Failures reported to the launcher, and exit statuses of a process."""

import contextlib
import signal
from unittest.mock import Mock

import pytest
import tiny

from tetdist.config.loading import parse
from tetdist.errors import PeerFailed, Stopped
from tetdist.training import run, run_record
from tetdist.training.run_record import Launcher

CONFIG = parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "/nowhere"}), "x")


def nobody(_watched):
    """No observers."""
    return ()


def test_launcher_hears_of_an_error_and_of_the_others_end(monkeypatch):
    reported = []
    shown = []

    def fail(_config, _world, _stop, watch):
        shown.append(watch.shows_errors)
        for action in watch.before_end:  # as the watch does when another process is gone
            action("rank 1 has died")
        raise ValueError("of this process")

    monkeypatch.setattr(run, "Trainer", fail)
    with pytest.raises(ValueError, match="of this process"):
        run.train(CONFIG, nobody, Launcher(on_failure=reported.append))
    assert [(type(error), str(error)) for error in reported] == [
        (PeerFailed, "rank 1 has died"),
        (ValueError, "of this process"),
    ]
    with pytest.raises(ValueError, match="of this process"):
        run.train(CONFIG, nobody)
    # A launcher shows errors in its own way; without one the watch does.
    assert shown == [False, True]


def test_launcher_hears_of_a_peer_that_is_lost_before_training(monkeypatch):
    reported = []
    lost = PeerFailed("rank 1 did not come")

    def fail(*_):
        raise lost

    monkeypatch.setattr(run, "join", fail)
    with pytest.raises(PeerFailed):
        run.train(CONFIG, nobody, Launcher(on_failure=reported.append))
    assert reported == [lost]


def test_status_is_that_of_the_signal(monkeypatch):
    reported = []

    class Trainer:
        step = 7
        folder = contextlib.nullcontext()

        def __init__(self, _config, _world, stop, _watch):
            self.stop = stop

        def run(self, *_):
            signal.raise_signal(signal.SIGUSR1)
            while not self.stop.agreed():
                pass
            raise Stopped

    monkeypatch.setattr(run, "Trainer", Trainer)
    assert run.train(CONFIG, nobody, Launcher(on_failure=reported.append)) == 128 + signal.SIGUSR1
    assert reported == []


@pytest.mark.parametrize(
    ("error", "number", "status"),
    [
        # Its launcher starts it again.
        (Stopped(), signal.SIGUSR2, "RUNNING"),
        (Stopped(), signal.SIGTERM, "KILLED"),
        (ValueError(), 0, "FAILED"),
    ],
)
def test_status_in_trackers_is_that_of_the_end(error, number, status, monkeypatch):
    tracker = Mock()
    monkeypatch.setattr(run_record, "Tracker", lambda *_: tracker)
    for name in ("_tags", "_note"):
        monkeypatch.setattr(run_record, name, lambda *_: {})
    prepared = Mock(config=CONFIG, world=Mock(rank=0, gather=lambda host: [host]))
    launcher, stop = Launcher(restarts_after=[signal.SIGUSR2]), Mock(exit_status=128 + number)
    with (
        pytest.raises(type(error)),
        run_record.recorded(prepared, launcher, 0, stop, finished=False),
    ):
        raise error
    tracker.close.assert_called_once_with(status)
