"""Signals, as an agreement of all processes to stop after the same step."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tetdist.distributed.world import World


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Handle signals by a function, and at the end as before.

    Where SIGHUP is ignored, as under nohup, it stays so.
    """
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = [one for one in numbers if not (one == signal.SIGHUP and under_nohup)]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class StopRequest(ExitStack):
    """An agreement of all processes, upon a signal to any, to stop after the same step.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal closes), SIGUSR1 and SIGUSR2 to any process are
    requests to save and end. Before all is saved (`is_over`), a second SIGINT ends the process at
    once, from a thread: the main one may wait for a disk, a GPU or another process for ever.

    Attributes:
        before_end: Called one after another before that, for at most `PATIENCE` seconds.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    PATIENCE = 2.0

    def __init__(self, world: World) -> None:
        super().__init__()
        self.before_end: list[Callable[[], object]] = []
        self.signal: signal.Signals | None = None
        self.is_over = False
        self._world = world
        self._flag = torch.zeros(1)
        self._exchange: Any = None

    def __enter__(self) -> "StopRequest":
        self.enter_context(handling(self.SIGNALS, self._receive))
        # Python's handlers run when the main thread gets to it, and this pipe has each signal then.
        numbers, written = os.pipe()
        os.set_blocking(written, False)
        self.callback(os.close, written)
        self.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(written))
        threading.Thread(
            target=self._await_interrupts, args=(numbers,), name="interrupts", daemon=True
        ).start()
        # A launcher blocks these signals until a process is ready to receive them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT and not self.is_over:
            threading.Event().wait()  # for the end
        let_go_of_closed_streams()
        # The deepspeed launcher sends SIGTERM after the terminal's SIGINT: still one request. If
        # Slurm preempts without grace, it sends SIGTERM and the job's own signal together: the more
        # specific one counts, whichever is seen first.
        more_specific = self.signal == signal.SIGTERM and number in (signal.SIGUSR1, signal.SIGUSR2)
        if self.signal is None or more_specific:
            self.signal = signal.Signals(number)

    def _await_interrupts(self, numbers: int) -> None:
        interrupts = 0
        with open(numbers, "rb", buffering=0) as received:
            while number := received.read(1):
                interrupts += number[0] == signal.SIGINT
                if interrupts > 1 and not self.is_over:
                    self._end_at_once()

    def _end_at_once(self) -> None:
        status = 128 + signal.SIGINT
        threading.Timer(self.PATIENCE, os._exit, [status]).start()
        # Another thread may hold the lock of sys.stderr.
        text = b"interrupted; earlier checkpoints are kept\n"
        for action in (lambda: os.write(2, text), *self.before_end):
            with suppress(Exception):
                action()
        os._exit(status)

    def ask(self) -> None:
        """Request the same without a signal, from any thread."""
        self.signal = self.signal or signal.SIGTERM

    def agreed(self) -> bool:
        """Return whether all processes are to stop now; every process must ask equally often.

        Each call reads what the processes exchanged at the call before, so no process waits for the
        slowest one: all stop at the same call, one call later than possible.
        """
        if self._exchange is not None:
            self._exchange.wait()
        several = self._world.world_size > 1
        stops = self._flag.item() > 0 if several else self.signal is not None
        if stops:
            let_go_of_closed_streams()
        elif several:
            self._flag = torch.tensor([float(self.signal or 0)])
            self._exchange = dist.all_reduce(
                self._flag, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True
            )
        return stops

    @property
    def exit_status(self) -> int:
        """Exit status that a shell reports for a process ended by this signal."""
        number = self.signal or int(self._flag.item())
        return 128 + int(number)


def let_go_of_closed_streams(streams: Iterable[int] = (1, 2)) -> None:
    """Redirect standard output and error to nowhere if their other end is closed.

    Otherwise, after a terminal closes or Ctrl-C ends a `| tee`, the next printed line would raise
    an error, and nothing would be saved.
    """
    for stream in streams:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        closed = select.POLLERR | select.POLLHUP
        if any(event & closed for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
