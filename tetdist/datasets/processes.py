"""Work on many files in several processes, which end with their parent process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

from tetdist.errors import UserError

# Takes the number of tasks (or samples) done, and of all.
ReportProgress = Callable[[int, int], None]

_SAMPLES_PER_TASK = 64

_Result = TypeVar("_Result")


def run_on_samples(
    work: Callable[[Any], _Result],
    samples: Sequence[Any],
    workers: int,
    progress: ReportProgress | None = None,
) -> Iterator[_Result]:
    """Yield the results of `work(samples[i : i + 64])`, in order, by `run_tasks`."""
    starts = range(0, len(samples), _SAMPLES_PER_TASK)
    tasks = [samples[i : i + _SAMPLES_PER_TASK] for i in starts]
    for start, task, result in zip(starts, tasks, run_tasks(work, tasks, workers), strict=True):
        yield result
        if progress is not None:
            progress(start + len(task), len(samples))


def run_tasks(
    work: Callable[[Any], _Result],
    tasks: Sequence[Any],
    workers: int,
    progress: ReportProgress | None = None,
) -> Iterator[_Result]:
    """Yield the results of `work(task)`, in order; one worker or task runs in this process."""
    for done, result in enumerate(_results(work, tasks, workers), 1):
        if progress is not None:
            progress(done, len(tasks))
        yield result


def _results(
    work: Callable[[Any], _Result], tasks: Sequence[Any], workers: int
) -> Iterator[_Result]:
    if workers == 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    # A fork would copy the locks of the caller's threads (DALI's, torch's) as they are.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(work, "func", work).__module__])
    # The resource tracker removes the pool's semaphores when this process is killed. It inherits
    # the signal mask, and must survive SIGHUP, which a closing terminal sends to all processes.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    resource_tracker.ensure_running()
    # Ctrl-C reaches every process of the terminal; only the parent handles it and ends the workers.
    signal.pthread_sigmask(signal.SIG_SETMASK, before | {signal.SIGINT})
    os.environ["TETDIST_COMMAND"] = "worker"
    forkserver.ensure_running()
    del os.environ["TETDIST_COMMAND"]
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, end_with_parent)
    try:
        # Ctrl-C interrupts only the main thread. If it interrupted a worker's start, nothing would
        # wait for that worker, which needs the semaphores that this process removes at its end.
        with ThreadPoolExecutor(1) as starter:
            results = starter.submit(pool.map, work, tasks).result()
        yield from results
    except (BrokenProcessPool, EOFError, ConnectionError) as error:
        raise UserError(
            "a worker process died, most often for lack of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process when its parent has ended.

    A killed parent sends no message, so its workers would wait for tasks forever.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
