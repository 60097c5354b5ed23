"""A minimal engine in plain torch, as a check on DeepSpeed's results."""

from torch import Tensor

from tetdist.nn.precision import autocast
from tetdist.training.engines.base import EngineParts, WholeEngine


class TorchEngine(WholeEngine):
    """Plain torch: autocast, accumulation, one average.

    The only engine for float64, which DeepSpeed cannot reduce.
    """

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self.model, self.accumulation = parts.model, parts.accumulation
        self.precision = parts.config.precision
        # A CUDA graph keeps adding to the gradients at their recorded addresses.
        self.keeps_gradients = parts.config.cuda_graphs
        self.optimizer.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.model(images, per_timestep=True)

    def _run_backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
