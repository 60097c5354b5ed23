"""A GPU that is not there, for a process into which the library of cuda_guard.cpp was preloaded.

`install` answers, in Python, what torch and DeepSpeed ask of a device. Tensors on it are fake:
they have a shape, a type and strides, but no numbers. `Recorder` takes down what is done to them:
which kernels would be launched, what would have the host wait for the device, whether a CUDA graph
would do the same at every replay, and, with an `Order`, what streams use without waiting.
"""

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import itertools
import os
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from happens_before import HOST, Graph, Order
from launches import is_refused_if_deterministic, num_launches
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.cuda import graphs as torchs_graphs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

DEVICE = torch.device("cuda", 0)


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec.origin is not None
    return f"{Path(spec.origin).parent}{os.sep}"


# The whole path, since the checkout may be in a folder of that name, too.
FOLDERS = {package: _folder_of(package) for package in ("tetdist", "deepspeed")}
# Their callers are who did it.
_NOT_TO_BLAME = ("data/transfer.py", "nn/fast/triton_kernels.py", "cuda_accelerator.py")


class Properties:
    """What `torch.cuda.get_device_properties` says of an H100."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = 80 << 30
    multi_processor_count = 132
    max_threads_per_multi_processor, warp_size = 2048, 32
    regs_per_multiprocessor = 65536
    shared_memory_per_block, shared_memory_per_block_optin = 48 << 10, 227 << 10
    shared_memory_per_multiprocessor = 228 << 10
    L2_cache_size = 50 << 20
    is_integrated = is_multi_gpu_board = False
    gcnArchName = ""


# Number of kernels that keep the device busy for a few milliseconds.
MUCH_WORK = 200
# The recorder that is active, if any: what is patched below reports to it.
_active: "Recorder | None" = None


def waited(what: str) -> None:
    """Take down that the host would wait for the device."""
    if _active is not None:
        _active.wait(f"{what} at {_place()}")


def launched(name: str, arguments: Any = ()) -> None:
    """Take down a kernel that no operation of torch launches, and what it is given."""
    if _active is not None:
        _active.note_captured(name, arguments, None)
        _active.count(name)


def seeded(*_: Any) -> None:
    """Take down that the device's random numbers would be seeded, which a graph cannot do."""
    if _active is not None:
        _active.refuse_in_graph("a seed")


def _set_draws(state: int, *_: Any) -> None:
    if _active is not None:
        _active.draws = state


def within(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function during which a phase of the step runs."""

    def wrapped(*arguments: Any) -> Any:
        if _active is None:
            return call(*arguments)
        before, _active.phase = _active.phase, phase
        try:
            return call(*arguments)
        finally:
            _active.phase = before

    return wrapped


# cuda_guard.cpp's library, which has the current stream of each thread.
_library: Any = None
_NEW = itertools.count(1)  # numbers of streams and events
# The stream on which a process group computes sums.
NETWORK = -1


def current_stream() -> int:
    return int(_library.current_stream())


def order() -> Order | None:
    return None if _active is None else _active.order


@ctypes.CFUNCTYPE(None, ctypes.c_bool, ctypes.c_int64, ctypes.c_int64)
def _on_event(waits: bool, event: int, stream: int) -> None:
    """Report to the `Order` that a stream waits for an event, or else records it."""
    if (known := order()) is not None:
        known.block(event, stream, _place()) if waits else known.record(event, stream)


class _Stream:
    def __init__(self, *_: Any, number: int | None = None, **__: Any) -> None:
        self.device, self.device_index = DEVICE, 0
        self.number = self.cuda_stream = next(_NEW) if number is None else number

    def synchronize(self) -> None:
        waited("Stream.synchronize()")

    def wait_stream(self, other: "_Stream") -> None:
        event = _Event()
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event: "_Event") -> None:
        _on_event(True, event.number, self.number)


@contextlib.contextmanager
def stream(number: int = 0) -> Iterator[None]:
    """A context with another current stream."""
    before = current_stream()
    _library.set_stream(number)
    try:
        yield
    finally:
        _library.set_stream(before)


class _Event:
    _total = 0  # of kernels before it

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = -next(_NEW)  # the library's events have positive numbers

    def record(self, stream: _Stream | None = None) -> None:
        if _active is not None:
            self._total = _active.total
            _active.events.add(self)
            _active.num_events += 1
        _on_event(False, self.number, current_stream() if stream is None else stream.number)

    def synchronize(self) -> None:
        # After an event of long ago, the device still has enough work while the host waits.
        if not self.query():
            waited("Event.synchronize()")
        if (known := order()) is not None:
            known.wait_for_event(self.number)

    def query(self) -> bool:
        return _active is not None and _active.total - self._total >= MUCH_WORK

    def elapsed_time(self, end: "_Event") -> float:
        if not end.query():
            waited("Event.elapsed_time()")
        return 1.0


def _record_stream(tensor: Tensor, stream: _Stream) -> None:
    if (known := order()) is not None:
        known.memory(tensor).recorded.add(stream.number)


class _Work:
    """A sum over all processes, which a stream of the process group computes."""

    def __init__(self, known: Order, tensor: Tensor) -> None:
        self._known, self._tensor = known, tensor  # held, as NCCL does
        known.wait(known.reached(), NETWORK)
        known.use(f"all_reduce at {_place()}", [], [tensor], on=NETWORK)
        self._done = known.reached(NETWORK)

    def wait(self) -> None:
        self._known.wait(self._done, current_stream())


def _all_reduce(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(tensor: Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        work = all_reduce(tensor, *arguments, async_op=async_op, **options)
        if (known := order()) is not None and tensor.device.type == "cuda":
            work = _Work(known, tensor)
            if not async_op:
                work.wait()
        return work

    return wrapped


class _Graph:
    """A CUDA graph, whose replay is one launch."""

    captured: Graph | None = None

    def replay(self) -> None:
        if _active is not None:
            _active.replayed_at.append(_active.draws)
        launched("cuda.graph")
        if (known := order()) is not None and self.captured is not None:
            known.replay(self.captured)


@contextlib.contextmanager
def _graph(*arguments: Any, **options: Any) -> Iterator[None]:
    """What `torch.cuda.graph` does but once, before it captures: to wait, is not taken down."""
    given = inspect.signature(torchs_graphs.graph).bind(*arguments, **options).arguments
    graph, its_stream, mode = (
        given[name] for name in ("cuda_graph", "stream", "capture_error_mode")
    )
    if _active is not None:
        # Without a pool, torch makes one of its own for each graph.
        _active.captured_in.append((its_stream.number, given.get("pool") or next(_NEW)))
        if mode != "thread_local":
            _active.ungraphed.append(f"capture_error_mode={mode}: the batches' thread breaks it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream(its_stream.number))
        stack.enter_context(capturing())
        if (known := order()) is not None:
            graph.captured = stack.enter_context(known.capturing(its_stream.number))
        yield


def capturing(first: "_Capture | None" = None) -> contextlib.AbstractContextManager[None]:
    """A context in which all goes into a graph."""
    return contextlib.nullcontext() if _active is None else _active.capturing(first)


def compared(
    capture: Callable[..., tuple[Tensor, Callable[[], None]]],
) -> Callable[..., tuple[Tensor, Callable[[], None]]]:
    """A capture at whose replays the function runs once more, to be compared with what was
    captured; before it, libraries and kernels have to be loaded by other calls."""

    @functools.wraps(capture)
    def wrapped(function: Callable[[], Tensor], *where: Any) -> tuple[Tensor, Callable[[], None]]:
        calls = itertools.count()

        def counted() -> Tensor:
            next(calls)
            return function()

        result, replay = capture(counted, *where)
        first = _active.captures[-1] if _active is not None else None
        if (number := next(calls)) < 3 and _active is not None:
            _active.ungraphed.append(f"captured at call {number} of the function")

        def replayed() -> None:
            replay()
            with capturing(first):
                function()

        return result, replayed

    return wrapped


def install(library: Any) -> None:
    """Answer for the device, for as long as this process lives.

    Args:
        library: That of cuda_guard.cpp.
    """
    global _library
    _library = library
    library.current_stream.restype = ctypes.c_int64
    library.set_stream.argtypes = (ctypes.c_int64,)
    library.pretend(_on_event)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: Properties.name,
        "get_device_properties": lambda *_: Properties,
        "get_device_capability": lambda *_: (Properties.major, Properties.minor),
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: waited("torch.cuda.synchronize()"),
        "empty_cache": lambda: waited("torch.cuda.empty_cache()"),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda one: stream(current_stream() if one is None else one.number),
        "set_stream": lambda stream: library.set_stream(stream.number),
        "cudart": lambda: _Runtime,
        "check_error": lambda _status: None,
        "manual_seed": seeded,
        "manual_seed_all": seeded,
        "get_rng_state": lambda *_: 0 if _active is None else _active.draws,
        "set_rng_state": _set_draws,
        "CUDAGraph": _Graph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, next(_NEW)),
        "current_stream": lambda *_: _Stream(number=current_stream()),
        "default_stream": lambda *_: _Stream(number=0),
    }
    for name in ("allocated", "reserved"):
        answers[f"memory_{name}"] = answers[f"max_memory_{name}"] = lambda *_: 0
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.record_stream = _record_stream
    dist.all_reduce = _all_reduce(dist.all_reduce)
    FakeTensor.tolist = _fetched
    torch.nn.Module._apply = _apply
    _count_triton_kernels()


# Memory of the host that was pinned after it had been allocated: first and last byte.
_registered: set[tuple[int, int]] = set()
_Runtime = types.SimpleNamespace(
    cudaHostRegister=lambda first, size, _: _registered.add((first, first + size)) or 0,
    cudaHostUnregister=lambda first: (
        _registered.difference_update([one for one in _registered if one[0] == first]) or 0
    ),
)


def _apply(
    module: nn.Module, function: Callable[[Tensor], Tensor], _recurse: bool = True
) -> nn.Module:
    """Do what `nn.Module.to` does, whose way to exchange a tensor's insides fake ones refuse."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        changed = function(parameter.detach())
        if changed.device == parameter.device:
            parameter.data = changed
        else:
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    assert tensor.device.type == "cpu", f"only memory of the host is pinned, not {tensor.device}"
    pinned = tensor.clone()
    if _active is not None:
        _active.note_pinned(pinned)
        _active.refuse_in_graph("pinned memory")
    return pinned


def _fetched(tensor: Tensor) -> Any:
    """Numbers of a tensor, all zeros: of one on the device the host waits for them, once."""
    if tensor.device.type == "cuda":
        waited("numbers fetched")
        if (known := order()) is not None:
            known.use(f"tolist at {_place()}", [tensor], [], on=current_stream())
            known.wait(known.reached())
    numbers: Any = 0.0 if tensor.is_floating_point() else 0
    for size in reversed(tensor.shape):
        numbers = [numbers] * size
    return numbers


def _count_triton_kernels() -> None:
    """Have a Triton kernel that is called count as one launch, and do nothing else.

    Its outputs are tensors that were allocated before; they stay as they are.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        devices = {x.device.type for x in arguments if isinstance(x, Tensor)}
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        assert devices <= {"cuda"}, f"the Triton kernel {name} is given tensors on {devices}"
        options["grid"] = repr(options.get("grid"))
        launched(f"triton.{name}", (arguments, options))
        if (known := order()) is not None:
            tensors = [x for x in arguments if isinstance(x, Tensor)]
            known.use(f"{name} at {_place()}", [], tensors, on=current_stream())

    JITFunction.run = run
    Autotuner.run = run


class Recorder(TorchDispatchMode):
    """Takes down what is done to tensors on the device while it is active.

    Attributes:
        phase: The part of a step that is running; it is noted with `launches`.
        launches: Numbers of kernels by (phase, name).
        waits: All that would have the host wait for the device, with its place: (phase, what).
        refused: Operations that ``torch.use_deterministic_algorithms`` refuses on a GPU.
        layouts: Fused optimisers' tensors whose elements do not lie in the same order, and weights
            of convolutions that are not channels_last.
        captures: What was launched in each capture of a CUDA graph, one after another.
        captured_in: Stream and pool of each CUDA graph.
        draws: State of the device's generator: how many operations have drawn from it.
        replayed_at: That state at each replay.
        ungraphed: What a capture refuses, or does not do again at a replay.
        order: Checks the order of all uses of memory, if given.
    """

    def __init__(self, order: Order | None = None) -> None:
        super().__init__()
        self.order = order
        self.phase, self.total = "input", 0
        self.events, self.num_events = weakref.WeakSet[_Event](), 0  # kept, and recorded
        self.launches: Counter[tuple[str, str]] = Counter()
        self.waits: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.layouts: list[str] = []
        self.captures: list[_Capture] = []
        self.captured_in: list[tuple[Any, Any]] = []
        self.draws, self.replayed_at = 0, list[int]()
        self.ungraphed: list[str] = []
        self._capture: _Capture | None = None
        # Storages whose memory would be pinned; held, so that no other gets the address of one.
        self._pinned: dict[int, Any] = {}

    def __enter__(self) -> "Recorder":
        global _active
        assert _active is None
        _active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        global _active
        _active = None
        super().__exit__(*error)

    def wait(self, what: str, *, is_meant: bool = True) -> None:
        # A thread that brings batches may wait where it means to: others train meanwhile.
        if self.order is None or self.order.host == HOST or not is_meant:
            self.waits.append((self.phase, what))

    def waits_of(self, *phases: str) -> list[str]:
        """What the host would wait for in the given phases."""
        return [what for phase, what in self.waits if phase in phases]

    def count(self, name: str, number: int = 1) -> None:
        self.total += number
        if self._capture is None:
            self.launches[self.phase, name] += number

    @contextlib.contextmanager
    def capturing(self, first: "_Capture | None" = None) -> Iterator[None]:
        """A context whose launches go into a graph, and are compared with those of ``first``."""
        assert self._capture is None
        self._capture = capture = _Capture()
        try:
            yield
        finally:
            self._capture = None
        if first is not None and (difference := first.difference(capture)):
            self.ungraphed.append(f"capture {len(self.captures) + 1}: {difference}")
        self.captures.append(capture)

    def refuse_in_graph(self, what: str) -> None:
        if self._capture is not None:
            self.ungraphed.append(f"{what} at {_place()}")

    def note_captured(self, name: str, arguments: Any, results: Any) -> None:
        """Add an operation to the capture that is under way, if any."""
        if self._capture is not None:
            self._capture.add(name, arguments, results)

    def note_pinned(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        pins = bool(options.pop("pin_memory", None))
        name = str(function)
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        self._note_allocated(tensors)
        if name.startswith("aten._fused_"):
            # Fake tensors have no such kernels; they write into tensors and return nothing.
            self._check_layouts(name, arguments)
            self.note_captured(name, (arguments, options), None)
            self.count(name, num_launches(function, arguments))
            self._note_uses(function, arguments, options, [])
            return None
        if name == "aten._local_scalar_dense.default" and tensors[0].device.type == "cpu":
            self._note_uses(function, arguments, options, [])
            # One that came from the device is 0; others, of steps, divide.
            return 0.0 if tensors[0].untyped_storage()._cdata in self._pinned else 1.0
        if name == "aten._local_scalar_dense.default":
            self.wait(f"a number fetched at {(place := _place())}")
            self._note_uses(function, arguments, options, [], waits=True)
            if tensors[0].dtype == torch.bool:
                # DeepSpeed asks whether something is wrong, and tetdist whether all is well.
                return not place.startswith("deepspeed/")
            return 0.0 if tensors[0].is_floating_point() else 0
        if name == "aten.bincount.default" and tensors[0].device.type == "cuda":
            self.wait(f"bincount, which looks for the largest number, at {_place()}")
            least = arguments[2] if len(arguments) > 2 else options.get("minlength", 0)
            return torch.empty(least, dtype=torch.int64, device=DEVICE)
        waits = self._look_for_waits(name, arguments, options, tensors)
        if name == "aten.convolution.default":
            self._check_weight(*arguments[:2])
        result = function(*arguments, **options)
        if pins:
            self.note_pinned(result)
            self.refuse_in_graph("pinned memory")
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._note_allocated(results)
        if num_launches(function, arguments):
            self._note_uses(function, arguments, options, results, waits=waits)
        self.note_captured(name, (arguments, options), results)
        if any(x.device.type == "cpu" for x in results):
            self.refuse_in_graph(f"{name}, computed on the host,")
        if any(x.device.type == "cuda" for x in (*tensors, *results)):
            self.draws += torch.Tag.nondeterministic_seeded in function.tags
            self.count(name, num_launches(function, arguments))
            if is_refused_if_deterministic(name, result):
                self.refused.append(f"{name} at {_place()}")
        return result

    def _note_allocated(self, tensors: list[Tensor]) -> None:
        for tensor in tensors if self.order is not None else []:
            self.order.memory(tensor)

    def _note_uses(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        results: list[Tensor],
        *,
        waits: bool = False,
    ) -> None:
        """Take down which tensors an operation reads and writes, where, and if the host waits."""
        if self.order is None:
            return
        uses: dict[bool, list[Tensor]] = {False: [], True: list(results)}
        for number, parameter in enumerate(function._schema.arguments):
            given = arguments[number] if number < len(arguments) else options.get(parameter.name)
            alias = parameter.alias_info
            writes = alias is not None and alias.is_write
            uses[writes] += [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for both in uses.values() for x in both)
        what = f"{str(function).rpartition('.')[0]} at {_place()}"
        actor = current_stream() if on_device else self.order.host
        self.order.use(what, uses[False], uses[True], on=actor)
        if waits:
            self.order.wait(self.order.reached())

    def _look_for_waits(
        self, name: str, arguments: tuple[Any, ...], options: dict[str, Any], tensors: list[Tensor]
    ) -> bool:
        """Find copies between host and device for which the host would wait."""
        if name == "aten._to_copy.default":
            source, target = arguments[0], options.get("device") or arguments[0].device
            free = bool(options.get("non_blocking"))
        elif name == "aten.copy_.default":
            source, target = arguments[1], arguments[0].device
            free = bool(arguments[2] if len(arguments) > 2 else options.get("non_blocking"))
        elif name.startswith("aten.where.self"):
            # A number of the host is copied to the device first.
            devices = {x.device.type for x in tensors}
            if len(devices) > 1:
                self.wait(f"a copy of a number of the host at {_place()}")
            return False
        else:
            return False
        source_type, target_type = source.device.type, torch.device(target).type
        if (source_type, target_type) == ("cpu", "cuda"):
            pinned = self._is_pinned(source)
            self.refuse_in_graph("a copy to the device")
            if not (pinned and free):
                kind = "a blocking" if pinned else "a pageable"
                what = f"{kind} copy {_described(source)} to the device at {_place()}"
                self.wait(what, is_meant=not free)
                return True
        elif (source_type, target_type) == ("cuda", "cpu"):
            into_pinned = name.startswith("aten.copy_") and self._is_pinned(arguments[0])
            if not (into_pinned and free):
                self.wait(f"a copy {_described(source)} to the host at {_place()}")
                return True
        return False

    def _is_pinned(self, x: Tensor) -> bool:
        if x.untyped_storage()._cdata in self._pinned:
            return True
        # Only tensors with numbers have an address.
        return not isinstance(x, FakeTensor) and any(
            first <= x.data_ptr() < end for first, end in _registered
        )

    def _check_weight(self, x: Tensor, weight: Tensor) -> None:
        """See that cuDNN need not change the layout of a convolution's weight at every call."""
        is_laid_out = weight.is_contiguous(memory_format=torch.channels_last)
        if x.device.type == "cuda" and x.ndim == 4 and not is_laid_out:
            self.layouts.append(
                f"convolution: weight {tuple(weight.shape)} has strides {weight.stride()}"
                f" at {_place()}"
            )

    def _check_layouts(self, name: str, lists: tuple[Any, ...]) -> None:
        """Check what a fused optimiser goes through side by side, in the order of memory."""
        groups = [group for group in lists if isinstance(group, (list, tuple)) and group]
        first = groups[0][0]
        # Without the step that each tensor counts.
        groups = [group for group in groups if group[0].shape == first.shape]
        for number, same in enumerate(zip(*groups, strict=True)):
            what = f"{name}: tensor {number}, {tuple(same[0].shape)}"
            if any(x.device.type != "cuda" for x in same):
                self.layouts.append(f"{what}, is on {[str(x.device) for x in same]}")
            if len({_order(x) for x in same}) > 1:
                self.layouts.append(f"{what}, has strides {[x.stride() for x in same]}")


class _Capture:
    """Operations in their order, each with what it was given.

    A tensor is known by its memory. What is allocated in the capture has the same number in each
    that does the same; what was there before has to be the very same memory, for a replay finds it
    nowhere else.
    """

    def __init__(self) -> None:
        self._operations: list[tuple[str, tuple[Any, ...], str]] = []
        self._inside: dict[int, int] = {}
        # Held, so that no other memory gets the address of one.
        self._storages: list[Any] = []

    def add(self, name: str, arguments: Any, results: Any) -> None:
        leaves, structure = tree_flatten(arguments)
        given = tuple(self._known(leaf) for leaf in leaves)
        self._operations.append((name, (*given, str(structure)), _place()))
        before = {storage._cdata for storage in map(_storage, leaves) if storage is not None}
        for storage in map(_storage, tree_leaves(results)):
            if storage is not None and storage._cdata not in before:
                self._storages.append(storage)
                self._inside[storage._cdata] = len(self._inside)

    def _known(self, leaf: Any) -> Any:
        storage = _storage(leaf)
        if storage is None:
            return leaf if isinstance(leaf, (int, float, str)) else repr(leaf)
        self._storages.append(storage)
        number = self._inside.get(storage._cdata)
        memory = f"outside {storage._cdata}" if number is None else f"inside {number}"
        return memory, tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype

    def difference(self, other: "_Capture") -> str | None:
        """Say where another one parts from this one, if it does."""
        for number, (ours, theirs) in enumerate(
            zip(self._operations, other._operations, strict=False)
        ):
            if ours[:2] != theirs[:2]:
                return f"operation {number} was {ours}, and is {theirs}"
        numbers = len(self._operations), len(other._operations)
        return None if len(set(numbers)) == 1 else f"{numbers[1]} operations, not {numbers[0]}"


def _storage(leaf: Any) -> Any:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) else None


def _order(x: Tensor) -> tuple[int, ...]:
    """Strides, but of dimensions of a single element, whose stride means nothing."""
    return tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)


def _described(x: Tensor) -> str:
    return f"of {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _place() -> str:
    """The innermost line of tetdist that is running, or of DeepSpeed."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        for package, folder in FOLDERS.items():
            file = name.removeprefix(folder)
            if file != name and not file.endswith(_NOT_TO_BLAME):
                return f"{package}/{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


def failure(error: BaseException) -> str:
    """One line of an error, and where in tetdist it came from."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(f.filename).name}:{f.lineno}"
        for f in frames
        if f.filename.startswith(FOLDERS["tetdist"])
    ]
    return f"{text} at {' < '.join(reversed(places[-3:])) or frames[-1].filename}"
