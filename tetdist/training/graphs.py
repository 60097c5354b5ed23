"""CUDA graphs: what a GPU does for a micro-batch is taken down once, and then started as a whole.

Every kernel costs the host some microseconds to start, and a micro-batch has about 500. Where they
are short, because the micro-batch is small, the GPU waits for the host. A graph starts them all at
once, in the memory in which they ran when it was taken down ("captured"). So:

* images, targets and what is dropped (nn/dropout.py) are copied to where the graph reads them;
* gradients are added to tensors that stay where they are, which the engine sets to 0 and keeps;
* the scale of a float16 loss is a number on the device (`LossScale.factor`);
* random numbers that a network draws itself are drawn from the seed that torch's generator has when
  the graph is started, so the trainer seeds it before each micro-batch, as without graphs;
* what Python does is done once. Of that only the count of recorded batches matters
  (`BatchNorm.pending_count`), which is put right here.

Learning rate, averages over processes, the update and running statistics are outside of the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm

# Calls before the capture: libraries choose algorithms and take memory, kernels are compiled, and
# gradients come to where they stay. torch's documentation takes three.
WARM_UPS = 3

# A result, and what has it computed anew.
Captured = tuple[Tensor, Callable[[], None]]


class Graphed:
    """A function of a micro-batch, captured when it is first called, and replayed from then on.

    It is captured anew where a tensor that it is given has another shape than before, as in an
    epoch whose images are larger.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        model: nn.Module,
        agree: Callable[[Callable[[], None]], None] = lambda action: action(),
    ) -> None:
        """
        Args:
            function: Of images, targets and maybe other tensors; adds the gradients of the model's
                parameters, and returns a tensor.
            model: Whose parameters and buffers the function changes, and nothing else.
            agree: Runs an action that may fail on this process; see `World.run_on_all`.
        """
        self._function, self._model, self._agree = function, model, agree
        self._norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self._inputs: tuple[Tensor, ...] = ()
        self._records: list[int] = []
        self._captured: Captured | None = None

    def __call__(self, *given: Tensor) -> Tensor:
        """Return what the function does, in a tensor that the next call overwrites.

        Raises:
            UserError: The function cannot be captured.
        """
        if list(map(_layout, given)) != list(map(_layout, self._inputs)):
            self._agree(lambda: self._capture(given))
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        assert self._captured is not None
        result, replay = self._captured
        replay()
        for norm, records in zip(self._norms, self._records, strict=True):
            norm.pending_count += records
        return result

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        # A graph keeps its memory, which the next one may need.
        self._captured = None
        self._inputs = ()
        inputs = tuple(tensor.clone() for tensor in given)
        parameters = list(self._model.parameters())
        # What the calls before the capture change is put back: this micro-batch counts once.
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        counts = before = [norm.pending_count for norm in self._norms]

        def once() -> Tensor:
            nonlocal before
            before = [norm.pending_count for norm in self._norms]
            return self._function(*inputs)

        device = given[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._captured = capture(once)
        after = [norm.pending_count for norm in self._norms]
        self._records = [now - then for now, then in zip(after, before, strict=True)]
        for norm, count in zip(self._norms, counts, strict=True):
            norm.pending_count = count
        for buffer, values in buffers:
            buffer.copy_(values)
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.grad is not None:
                # In place, for there the graph adds to it.
                parameter.grad.copy_(torch.zeros_like(parameter.grad) if grad is None else grad)
        self._inputs = inputs


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def capture(function: Callable[[], Tensor]) -> Captured:
    """Capture a function as a CUDA graph.

    Args:
        function: Launches the same kernels on the same memory at every call.

    Returns:
        The function's result, in the graph's own memory, and what has the GPU do all of it again.

    Raises:
        UserError: Something in it cannot be captured, such as asking the device for a number.
    """
    graph = torch.cuda.CUDAGraph()
    present, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(present)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
        try:
            # The thread that brings batches to the device goes on meanwhile: what it does there, on
            # a stream of its own, would else make the capture fail.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
    """The first line of what went wrong first: to end a capture that failed fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
