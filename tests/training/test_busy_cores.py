"""Whoever trains in bfloat16 on cores that others use is told why it is slow, once."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from tetdist.training import busy_cores
from tetdist.training.busy_cores import BusyCores, waited_for_a_core

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def waiting(two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of ours, and what Linux says of the thread: [now, seconds waited]."""
    del two_threads
    values = [100.0, 3.0]
    file = tmp_path / "schedstat"
    monkeypatch.setattr(busy_cores, "SCHEDULE", file)

    class Clock:
        @staticmethod
        def monotonic() -> float:
            file.write_text(f"123456789 {int(values[1] * 1e9)} 77\n")
            return values[0]

    monkeypatch.setattr(busy_cores, "time", Clock)
    return values


def test_a_crowded_thread_is_told_once(waiting: list[float]) -> None:
    cores = BusyCores(CPU, "bf16")
    waiting[:] = [104.9, 7.0]
    assert cores.warning() is None  # too short to know
    waiting[:] = [110.0, 3.1]
    assert cores.warning() is None  # its own
    waiting[:] = [120.0, 8.1]
    text = cores.warning()
    assert text is not None
    # Of the time since the last question, and not of all of it.
    assert "in 50 % of the last 10 s this one could have computed and had no core" in text
    assert "OMP_NUM_THREADS=1" in text
    assert "precision=fp32" in text
    waiting[:] = [130.0, 18.0]
    assert cores.warning() is None


@pytest.mark.parametrize(
    ("device", "precision", "threads"),
    [("meta", "bf16", 2), ("cpu", "fp32", 2), ("cpu", "bf16", 1)],
)
def test_nothing_is_said_of_what_does_not_suffer(
    device: str, precision: str, threads: int, waiting: list[float]
) -> None:
    torch.set_num_threads(threads)
    cores = BusyCores(torch.device(device), precision)
    waiting[:] = [110.0, 12.0]
    assert cores.warning() is None


def test_a_system_that_does_not_say_is_no_mistake(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del two_threads
    monkeypatch.setattr(busy_cores, "SCHEDULE", tmp_path / "nothing")
    monkeypatch.setattr(busy_cores, "WATCHED", 0.0)
    assert BusyCores(CPU, "bf16").warning() is None


def test_linux_says_how_long_a_thread_waited(tmp_path: Path) -> None:
    """For real: this thread and another process, both busy, on one core."""
    cores = os.sched_getaffinity(0)
    before = waited_for_a_core()
    if before is None:
        assert not os.environ.get("CI"), "CI's kernel says it"
        pytest.skip(f"this kernel has no {busy_cores.SCHEDULE}")
    busy = "import os; os.sched_setaffinity(0, [{}])\nprint('busy', flush=True)\nwhile True: pass"
    with tiny.started(tiny.python("-c", busy.format(min(cores))), tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        os.sched_setaffinity(0, [min(cores)])
        try:
            end = time.monotonic() + 30
            while (waited_for_a_core() or 0) - before < 0.05 and time.monotonic() < end:
                pass
        finally:
            os.sched_setaffinity(0, cores)
    assert (waited_for_a_core() or 0) - before >= 0.05


def test_run_says_it(
    main: Callable[..., tiny.Outcome],
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BusyCores, "warning", lambda _: "the cores are busy")
    outcome = main(tiny_config({"max_steps": 1, "precision": "bf16"}))
    assert outcome.status == 0, outcome.text
    assert "the cores are busy" in outcome.text
