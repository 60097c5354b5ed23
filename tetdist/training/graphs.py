"""CUDA graphs: a micro-batch's GPU work is captured once and then launched as a whole.

Each kernel launch costs the host some microseconds, and a micro-batch has about 500 kernels. If
they are short, because the micro-batch is small, the GPU waits for the host. A graph launches them
all at once, on the memory that they used during capture. So:

* images, targets and dropout masks (nn/dropout.py) are copied to where the graph reads them;
* gradients are added to tensors at fixed addresses, which the engine sets to 0 and keeps;
* the scale of a float16 loss is a number on the device (`LossScale.factor`);
* random numbers that a network of an imported file draws depend on the seed of torch's generator at
  the launch, so the trainer seeds it before each micro-batch, as without graphs;
* Python code runs only at capture. The only effect that matters is the count of recorded batches
  (`RunningState.pending_count`), which is corrected here.

Learning rate, averaging over processes, update and running statistics stay outside the graph.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.batch_norm import running_states

# Calls before the capture: libraries choose algorithms and allocate memory, kernels are compiled,
# and gradients get their final addresses. torch's documentation uses three.
WARM_UPS = 3

# A result, and a function that computes it again.
Captured = tuple[Tensor, Callable[[], None]]


class _Graph(NamedTuple):
    inputs: tuple[Tensor, ...]  # where the graph reads them
    records: list[int]  # batches that each norm records
    captured: Captured


class Graphed:
    """A function of a micro-batch, captured at the first call with each T and then replayed.

    The graphs share memory, because they run one after another and nothing else reads it. A pool
    gives a block only to the stream that it was allocated on, so they share the stream, too.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        model: SpikingNetwork,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            function: Function of images, targets and further tensors that adds to the gradients of
                the model's parameters and returns a tensor.
            model: Model whose parameters and buffers are all that the function changes.
            together: A context for what may fail on some processes; see `World.together`.
        """
        self._function, self._model, self._together = function, model, together
        self._states = running_states(model)
        self._graphs: dict[int, _Graph] = {}  # by T
        self._pool = functools.cache(torch.cuda.graph_pool_handle)
        self._stream = functools.cache(torch.cuda.Stream)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's result, in a tensor that the next call overwrites.

        Raises:
            UserError: The function cannot be captured.
        """
        graph = self._graphs.get(self._model.timesteps)
        if graph is None:
            with self._together():
                self._capture(inputs)
            graph = self._graphs[self._model.timesteps]
        for static, tensor in zip(graph.inputs, inputs, strict=True):
            static.copy_(tensor)
        result, replay = graph.captured
        replay()
        for state, records in zip(self._states, graph.records, strict=True):
            state.pending_count += records
        return result

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        inputs = tuple(tensor.clone() for tensor in given)
        parameters = list(self._model.parameters())
        # Restore what the calls before the capture change: this micro-batch counts once.
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        counts = before = [state.pending_count for state in self._states]

        def once() -> Tensor:
            nonlocal before
            before = [state.pending_count for state in self._states]
            return self._function(*inputs)

        device = given[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            captured = capture(once, self._pool, self._stream)
        after = [state.pending_count for state in self._states]
        records = [now - then for now, then in zip(after, before, strict=True)]
        for state, count in zip(self._states, counts, strict=True):
            state.pending_count = count
        for buffer, values in buffers:
            buffer.copy_(values)
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.grad is not None:
                # In place, because the graph adds to this memory.
                parameter.grad.copy_(torch.zeros_like(parameter.grad) if grad is None else grad)
        self._graphs[self._model.timesteps] = _Graph(inputs, records, captured)


def capture(
    function: Callable[[], Tensor],
    pool: Callable[[], Any],
    side_stream: Callable[[], torch.cuda.Stream],
) -> Captured:
    """Capture a function as a CUDA graph.

    Args:
        function: A function that launches the same kernels on the same memory at every call.
        pool: Returns the memory pool of torch that the graph shares with others.
        side_stream: Returns the stream of the capture, the same for all graphs that share a pool.

    Returns:
        The function's result, in the graph's own memory, and a function that replays the graph.

    Raises:
        UserError: Some operation cannot be captured, such as reading a number from the device.
    """
    graph = torch.cuda.CUDAGraph()
    present, stream = torch.cuda.current_stream(), side_stream()
    stream.wait_stream(present)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
        try:
            # The thread that copies batches to the device goes on meanwhile, on its own stream,
            # which would otherwise make the capture fail.
            with torch.cuda.graph(
                graph, pool=pool(), stream=stream, capture_error_mode="thread_local"
            ):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"cuda_graphs: a micro-batch cannot be captured ({_reason(error)}); set "
                "cuda_graphs=false"
            ) from error
    present.wait_stream(stream)
    return result, graph.replay


def _reason(error: BaseException) -> str:
    """Return the first line of the original error: ending a failed capture fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
