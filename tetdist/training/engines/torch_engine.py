"""The engine in a few lines of plain torch: the check on DeepSpeed's result."""

from typing import Any

import torch
from torch import Tensor, nn

from tetdist.config.schema import RunConfig
from tetdist.distributed.world import World
from tetdist.nn.precision import autocast
from tetdist.training.engines.base import (
    GradientMean,
    LossScale,
    Update,
    lay_out,
    load_whole_state,
    scaled,
    start_momentum,
    tell,
    unscale_and_clip,
)
from tetdist.training.engines.clipping import Clipping


class TorchEngine:
    """Plain torch: autocast, accumulation, one average.

    The only engine for float64, which DeepSpeed does not reduce.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        world: World,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.accumulation, self.clipping = accumulation, Clipping(config, model)
        self.precision = config.precision
        self.loss_scale = LossScale.of(config.precision)
        self.mean = GradientMean(config, optimizer, world, accumulation)
        lay_out(model, torch.channels_last)
        start_momentum(optimizer)
        # A CUDA graph goes on adding to the gradients where it found them.
        self.keeps_gradients = config.cuda_graphs
        self.optimizer.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.model(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        with self.mean.backward_pass():
            (scaled(loss, self.loss_scale) / self.accumulation).backward()

    def update(self, lr: float) -> Update:
        update = unscale_and_clip(self.mean.average(), self.loss_scale, self.clipping)
        tell(self.optimizer, lr, update.applied)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return update

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        load_whole_state(self.optimizer, state)

    def close(self) -> None:
        self.mean.close()
