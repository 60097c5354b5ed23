"""Order of the work of a pretended GPU, and uses of memory without an order.

Host threads (names) and streams (numbers) are actors. Each has a vector clock: how far every actor
is sure to have got when the actor's next piece of work begins. A launch, an event, a wait and a
result that one thread takes from another carry clocks on. Two uses of the same bytes, one of which
writes, need an order; so do the last use of memory by a foreign stream and its next allocation.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Actor = int | str
Clock = dict[Actor, int]
HOST, TRAINING = "host", 0  # the thread and the stream that train


class _Where(NamedTuple):
    actor: Actor
    first: int
    end: int  # of the bytes
    writes: bool


class _Use(NamedTuple):
    tick: int
    what: str


@dataclass
class _Memory:
    weak: StorageWeakRef
    stream: int | None  # that it was allocated on; None: the host's, or a graph's own
    about: str
    uses: dict[_Where, _Use] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class _Part(NamedTuple):
    memory: _Memory
    first: int
    end: int
    writes: bool


@dataclass
class Graph:
    """Work that was captured on a stream."""

    stream: int
    work: list[tuple[list[_Part], str]] = field(default_factory=list)
    events: set[int] = field(default_factory=set)


class Order:
    """Takes down what actors do.

    Attributes:
        faults: Uses without an order, a sentence each.
        host: Name of the running host thread.
    """

    def __init__(self, current: Callable[[], int]) -> None:
        """``current`` returns the running thread's current stream."""
        self.faults: list[str] = []
        self.host = HOST
        self._current = current
        self._clocks: defaultdict[Actor, Clock] = defaultdict(dict)
        self._memories: dict[int, _Memory] = {}
        self._events: dict[int, Clock] = {}
        self._graph: Graph | None = None

    # --- who waits for whom ---

    def reached(self, actor: Actor | None = None) -> Clock:
        """Return an actor's clock after its work so far; by default the current stream's."""
        actor = self._current() if actor is None else actor
        return _joined(self._clocks[actor], self._clocks[self.host])

    def wait(self, clock: Clock, actor: Actor | None = None) -> None:
        """Have an actor's further work, by default the host's, come after a clock."""
        self.find_freed()
        actor = self.host if actor is None else actor
        self._clocks[actor] = _joined(self._clocks[actor], clock)

    def record(self, event: int, stream: int) -> None:
        self._events[event] = self.reached(stream)
        if self._graph is not None and stream == self._graph.stream:
            self._graph.events.add(event)

    def block(self, event: int, stream: int, place: str) -> None:
        """Have a stream wait for an event."""
        graph = self._graph
        if graph is not None and (event in graph.events) != (stream == graph.stream):
            self._fault(f"a wait between captured work and stream {stream} at {place}")
        self.wait(self._events[event], stream)

    def wait_for_event(self, event: int) -> None:
        """Have the host wait for an event; if it was never recorded, CUDA waits for nothing."""
        self.wait(self._events.get(event, {}))

    @contextlib.contextmanager
    def acting(self, host: str, after: Clock) -> Iterator[None]:
        """A context in which a thread of that name works, after a clock."""
        self.find_freed()
        self.host, before = host, self.host
        try:
            self.wait(after)
            yield
        finally:
            self.find_freed()
            self.host = before

    # --- memory ---

    def use(
        self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor], *, on: Actor
    ) -> None:
        """Take down that an actor uses tensors."""
        parts = [self._part(x, False) for x in reads] + [self._part(x, True) for x in writes]
        if self.host != HOST and on == TRAINING:
            self._fault(f"{what} runs on the stream that trains")
        if self._graph is not None and on != self.host:
            if on != self._graph.stream:
                self._fault(f"{what} runs on stream {on} during a capture")
            self._graph.work.append((parts, what))
        else:
            self._use(parts, what, on)

    def _use(self, parts: list[_Part], what: str, actor: Actor) -> None:
        clock = self._clocks[actor] = self.reached(actor)
        tick = clock[actor] = clock.get(actor, 0) + 1
        for memory, first, end, writes in parts:
            for where, (then, earlier) in memory.uses.items():
                ordered = where.actor == actor or clock.get(where.actor, 0) >= then
                apart = where.end <= first or end <= where.first
                if not (ordered or apart) and (writes or where.writes):
                    verbs = ["is written" if one else "is read" for one in (where.writes, writes)]
                    self._fault(
                        f"{memory.about} {verbs[0]} by {earlier} on {_named(where.actor)} and "
                        f"{verbs[1]} by {what} on {_named(actor)}, which does not wait for it"
                    )
            if end > first:
                memory.uses[_Where(actor, first, end, writes)] = _Use(tick, what)

    def _part(self, x: Tensor, writes: bool) -> _Part:
        memory = self.memory(x)
        first = x.storage_offset() * x.element_size()
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        end = first + extent * x.element_size() if x.numel() else first
        return _Part(memory, first, end, writes)

    def memory(self, x: Tensor) -> _Memory:
        """Return a tensor's memory; if it is new, the current stream has allocated it."""
        storage = x.untyped_storage()
        if storage._cdata not in self._memories:
            on_host = x.device.type == "cpu" or self._graph is not None
            about = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
            stream = None if on_host else self._current()
            self._memories[storage._cdata] = _Memory(StorageWeakRef(storage), stream, about)
        return self._memories[storage._cdata]

    def find_freed(self) -> None:
        """Check memory that has been freed: its stream may get it again for its next work."""
        for address, memory in list(self._memories.items()):
            if not memory.weak.expired():
                continue
            del self._memories[address]
            if memory.stream is None:
                continue
            sure = self.reached(memory.stream)
            for where, use in memory.uses.items():
                if (
                    isinstance(where.actor, int)
                    and where.actor not in {memory.stream, *memory.recorded}
                    and sure.get(where.actor, 0) < use.tick
                ):
                    self._fault(
                        f"{memory.about} of {_named(memory.stream)} is freed while {use.what} on "
                        f"{_named(where.actor)} may still use it"
                    )

    def _fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    # --- graphs ---

    @contextlib.contextmanager
    def capturing(self, stream: int) -> Iterator[Graph]:
        self._graph = graph = Graph(stream)
        try:
            yield graph
        finally:
            self._graph = None

    def replay(self, graph: Graph) -> None:
        """Do captured work again, on the current stream, with the memory that is still there."""
        for parts, what in graph.work:
            there = [part for part in parts if not part.memory.weak.expired()]
            self._use(there, what, self._current())


def _joined(one: Clock, other: Clock) -> Clock:
    return {actor: max(one.get(actor, 0), other.get(actor, 0)) for actor in one | other}


def _named(actor: Actor) -> str:
    return f"stream {actor}" if isinstance(actor, int) else f"the {actor}"
