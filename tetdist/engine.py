"""Backward pass, gradient averaging and update: DeepSpeed, or the same in a few lines of torch.

The one file that knows DeepSpeed. Both engines do the same: a step is ``accumulation``
micro-batches, each ``forward`` then ``backward``; then ``update`` averages the gradients over
micro-batches and processes, clips them and applies them, unless a gradient is not finite, in which
case no process changes a parameter. Whether it was is a tensor on the device: the host does not
wait for it.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tetdist.config import OptimizerSection, RunConfig
from tetdist.distributed import World
from tetdist.errors import UserError
from tetdist.normalization import BatchNorm


class Update(NamedTuple):
    """What an update did, as tensors on the device.

    Attributes:
        grad_norm: Norm of the averaged gradient before clipping, ().
        applied: Whether the gradient was finite and the parameters changed, () bool.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    optimizer: torch.optim.Optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Logits per timestep, (T, B, K), in the configured precision."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    def update(self, lr: float) -> Update:
        """Apply the average gradient of the step's micro-batches, with learning rate ``lr``."""

    def close(self) -> None:
        """Let go of the model, which another engine may take over."""


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The phase's optimiser over all parameters, one fused kernel for all."""
    norms_and_biases: set[int] = set()
    if not section.decay_norms:
        for module in model.modules():
            if isinstance(module, BatchNorm):
                norms_and_biases |= {id(p) for p in module.parameters()}
            elif getattr(module, "bias", None) is not None:
                norms_and_biases.add(id(module.bias))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if id(p) not in norms_and_biases],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p in parameters if id(p) in norms_and_biases], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # fused: the kernels that can leave everything untouched when told on the device (found_inf).
    if section.kind == "sgd":
        return torch.optim.SGD(
            groups,
            lr=section.lr,
            momentum=section.momentum,
            nesterov=section.nesterov,
            fused=True,
        )
    cls = torch.optim.Adam if section.kind == "adam" else torch.optim.AdamW
    return cls(groups, lr=section.lr, betas=section.betas, fused=True)


def make_engine(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulation: int,
    world: World,
) -> Engine:
    """The configured engine for one phase.

    Args:
        config: Its ``engine``, ``precision``, ``batch`` and ``gradient_clipping`` are read.
        model: On its device, the same on every process.
        optimizer: From `make_optimizer`.
        accumulation: Micro-batches that this process contributes to each step.
        world: All processes.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    cls = DeepSpeedEngine if config.engine == "deepspeed" else TorchEngine
    return cls(config, model, optimizer, accumulation, world)


class TorchEngine:
    """Plain torch: autocast, accumulation, one flat all-reduce."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        world: World,
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.accumulation, self.max_norm = accumulation, config.gradient_clipping
        self.bf16 = config.precision == "bf16"
        _lay_out(model, torch.channels_last)
        self.optimizer.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        with _autocast(images.device, self.bf16):
            return self.model(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def update(self, lr: float) -> Update:
        grads = _gradients(self.optimizer)
        if self.world.world_size > 1:
            flat = self.world.mean_(torch.cat([grad.flatten() for grad in grads]))
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        update = _clip(grads, self.max_norm)
        _set(self.optimizer, lr, update.applied)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return update

    def close(self) -> None:
        pass


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0 with torch_autocast."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        world: World,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.batch.micro,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": 0},
            # Its default is 1.0. Clipping is ours, in update().
            "gradient_clipping": 0.0,
            "steps_per_print": 2**31,
        }
        if config.precision == "bf16":
            # The empty list: gradients are averaged as the float32 numbers they are. By default
            # those of convolutions would travel in bfloat16, and the result depend on the number
            # of processes.
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        # initialize broadcasts parameters through a view that channels_last weights do not have.
        _lay_out(model, torch.contiguous_format)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        _lay_out(model, torch.channels_last)
        self.optimizer, self.max_norm = optimizer, config.gradient_clipping

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # Inside a step this only counts; at its last micro-batch it would update, which is left to
        # update(), when the averaged gradient has been looked at.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def update(self, lr: float) -> Update:
        assert self.engine.is_gradient_accumulation_boundary()
        update = _clip(_gradients(self.optimizer), self.max_norm)
        _set(self.optimizer, lr, update.applied)
        self.engine.step()
        return update

    def close(self) -> None:
        self.engine.destroy()


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


def _autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


def _clip(grads: list[Tensor], max_norm: float | None) -> Update:
    """Scale the gradients in place to at most ``max_norm``, without asking the device."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return Update(norm, torch.isfinite(norm))


def _set(optimizer: torch.optim.Optimizer, lr: float, apply: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    # How torch's GradScaler tells fused optimisers to leave everything as it is; the attributes are
    # read there by name and declared nowhere.
    optimizer.found_inf = (~apply).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _import_deepspeed(device: torch.device) -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: pip install 'tetdist[train]', or train with engine=torch"
        )
    # DeepSpeed insists on it even where no launcher was.
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    level = logging.getLogger().level
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger().setLevel(level)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # A shared-memory reduction that init_distributed would compile for half a minute, or die
        # of where there is no compiler. gloo does as well, and the same on one host as on several.
        ops = importlib.import_module("deepspeed.ops")
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        dist_init_required=False,
    )
    return deepspeed
