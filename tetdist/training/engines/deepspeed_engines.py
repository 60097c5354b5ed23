"""Backward pass, gradient averaging and update: DeepSpeed, or the same in a few lines of torch.

The one file that knows DeepSpeed. All engines do the same: a step is ``accumulation``
micro-batches, each ``forward`` then ``backward``; then ``update`` averages the gradients over
micro-batches and processes, clips them and applies them, unless a gradient is not finite, in which
case no process changes a parameter. Whether it was is a tensor on the device: the host does not
wait for it.

The optimiser's state leaves and enters an engine in one form, that of torch: whole tensors, one a
parameter. So a checkpoint of any engine and ZeRO stage continues on any other, and on any number
of processes.
"""

import importlib
import importlib.util
import logging
import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tetdist.config.schema import OptimizerSection, RunConfig
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.precision import LOW_PRECISION, autocast


class Update(NamedTuple):
    """What an update did, as tensors on the device.

    Attributes:
        grad_norm: Norm of the averaged gradient before clipping, ().
        applied: Whether the gradient was finite and the parameters changed, () bool.
    """

    grad_norm: Tensor
    applied: Tensor


class Engine(Protocol):
    loss_scale: "LossScale | None"

    def forward(self, images: Tensor) -> Tensor:
        """Logits per timestep, (T, B, K), in the configured precision."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    def update(self, lr: float) -> Update:
        """Apply the average gradient of the step's micro-batches, with learning rate ``lr``."""

    def optimizer_state(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; to be called on every process together."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what `optimizer_state` of any engine returned."""

    def close(self) -> None:
        """Let go of the model, which another engine may take over."""


class LossScale:
    """Dynamic loss scaling for float16, whose smallest gradients would else be zeros.

    A number of the host, not of the device: a step whose gradient overflowed is taken again with
    half the scale, so the host has to know.

    Attributes:
        value: What the loss is multiplied by before its backward pass.
        good_steps: Steps without an overflow since the value last changed.
        overflows: How often a step was taken again, in all.
    """

    START, GROWTH_INTERVAL = 2.0**16, 2000

    def __init__(self) -> None:
        self.value, self.good_steps, self.overflows = self.START, 0, 0

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> bool:
        """Halve the scale; False where it is 1 already, so that the scale is not to blame."""
        if self.value <= 1:
            return False
        self.overflows += 1
        self.value, self.good_steps = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])
        self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])


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
        config: Its ``engine``, ``zero_stage``, ``precision``, ``batch`` and ``gradient_clipping``
            are read.
        model: On its device, the same on every process.
        optimizer: From `make_optimizer`.
        accumulation: Micro-batches that this process contributes to each step.
        world: All processes.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    cls: type[TorchEngine] | type[DeepSpeedEngine] | type[ZeroEngine] = TorchEngine
    if config.engine == "deepspeed":
        cls = ZeroEngine if config.zero_stage else DeepSpeedEngine
    return cls(config, model, optimizer, accumulation, world)


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
        self.model, self.optimizer, self.world = model, optimizer, world
        self.accumulation, self.max_norm = accumulation, config.gradient_clipping
        self.precision = config.precision
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        _lay_out(model, torch.channels_last)
        _start_momentum(optimizer)
        self.optimizer.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.model(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        (_scaled(loss, self.loss_scale) / self.accumulation).backward()

    def update(self, lr: float) -> Update:
        grads = _gradients(self.optimizer)
        self.world.mean_all_(grads)
        update = _unscale_and_clip(grads, self.loss_scale, self.max_norm)
        _set(self.optimizer, lr, update.applied)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return update

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        _load_whole_state(self.optimizer, state)

    def close(self) -> None:
        pass


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0 with torch_autocast.

    On CPUs of one host the gradients are averaged through shared memory and not by DeepSpeed, whose
    average would go through the loopback device.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        world: World,
    ) -> None:
        # initialize broadcasts parameters through a view that channels_last weights do not have.
        _lay_out(model, torch.contiguous_format)
        # Its gradient_clipping is 1.0 by default. Clipping is ours, in update().
        settings = _settings(config, accumulation) | {"gradient_clipping": 0.0}
        self.engine = _initialize(model, optimizer, settings, world)
        # It skips overflows, and neither says so nor saves its scale: the scaling is ours, too.
        self.engine.torch_autocast_z0_gradscaler = None
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        _lay_out(model, torch.channels_last)
        _start_momentum(optimizer)
        self.optimizer, self.max_norm = optimizer, config.gradient_clipping
        self.world = world
        # Alone there is nothing to average, for which DeepSpeed would copy all gradients twice.
        self.engine.enable_backward_allreduce = world.world_size > 1 and world.shared is None

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        _accumulate(self.engine, _scaled(loss, self.loss_scale))

    def update(self, lr: float) -> Update:
        assert self.engine.is_gradient_accumulation_boundary()
        grads = _gradients(self.optimizer)
        if self.world.shared:
            self.world.mean_all_(grads)
        update = _unscale_and_clip(grads, self.loss_scale, self.max_norm)
        _set(self.optimizer, lr, update.applied)
        self.engine.step()
        return update

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        _load_whole_state(self.optimizer, state)

    def close(self) -> None:
        self.engine.destroy()


class ZeroEngine:
    """DeepSpeed at ZeRO stage 1 (the optimiser's state is divided among the processes) or 2 (the
    gradients, too).

    Parameters become views of flat buffers, so weights cannot be channels_last here, and
    convolutions are slower than at stage 0.
    """

    loss_scale: LossScale | None = None  # config.py refuses fp16 here

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int,
        world: World,
    ) -> None:
        _lay_out(model, torch.contiguous_format)
        self.world = world
        # In the order that numbers them in a state_dict; initialize puts flat partitions in their
        # place.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        settings = _settings(config, accumulation) | {
            # Norm, clipping and the look for what is not finite are DeepSpeed's here, since no
            # process has the whole gradient.
            "gradient_clipping": config.gradient_clipping or 0.0,
            "zero_allow_untested_optimizer": True,
        }
        self.engine = _initialize(model, optimizer, settings, world)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        _accumulate(self.engine, loss)

    def update(self, lr: float) -> Update:
        assert self.engine.is_gradient_accumulation_boundary()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        zero = self.engine.optimizer
        norm = torch.as_tensor(
            zero._global_grad_norm, dtype=torch.float32, device=self.world.device
        )
        return Update(norm, torch.tensor(not zero.overflow, device=self.world.device))

    def optimizer_state(self) -> dict[str, Any]:
        states: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            numbers = range(first, first + len(parameters))
            first += len(parameters)
            (flat,) = group["params"]
            for key, value in self.optimizer.state.get(flat, {}).items():
                whole = self._whole(parameters, value, flat)
                for number, own in zip(numbers, whole, strict=True):
                    states.setdefault(number, {})[key] = own
            groups.append(
                {key: value for key, value in group.items() if key != "params"}
                | {"params": list(numbers)}
            )
        return {"state": states, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        first = 0
        for group, parameters, given in zip(
            self.optimizer.param_groups, self.groups, state["param_groups"], strict=True
        ):
            (flat,) = group["params"]
            group.update({key: value for key, value in given.items() if key != "params"})
            own: dict[str, Any] = {}
            for number, parameter in enumerate(parameters, start=first):
                for key, value in state["state"].get(number, {}).items():
                    if not torch.is_tensor(value):
                        own[key] = value
                    elif value.shape != parameter.shape:
                        # One for the whole partition, such as Adam's step, which fused kernels
                        # want on their device.
                        own[key] = value.to(flat.device, torch.float32, copy=True)
                    elif fragment := _fragment(parameter):
                        partition = own.setdefault(key, torch.zeros_like(flat.detach()))
                        source, target, length = fragment
                        part = value.reshape(-1).narrow(0, source, length)
                        partition.narrow(0, target, length).copy_(part)
                    else:
                        own.setdefault(key, torch.zeros_like(flat.detach()))
            first += len(parameters)
            if own:
                self.optimizer.state[flat] = own

    def _whole(self, parameters: list[nn.Parameter], value: Any, flat: Tensor) -> list[Any]:
        """A state of the partition as one of each parameter, put together from all processes."""
        if not torch.is_tensor(value):
            return [value] * len(parameters)
        if value.shape != flat.shape:
            # A copy each: torch's Adam counts in place, once a parameter.
            return [value.clone() for _ in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        gathered = torch.zeros(sum(sizes), dtype=value.dtype, device=value.device)
        parts = gathered.split(sizes)
        for parameter, part in zip(parameters, parts, strict=True):
            if fragment := _fragment(parameter):
                target, source, length = fragment
                part.narrow(0, target, length).copy_(value.narrow(0, source, length))
        # Each element is on one process, and 0 on all others.
        self.world.sum_(gathered)
        return [
            part.view(parameter.shape).clone()
            for parameter, part in zip(parameters, parts, strict=True)
        ]

    def close(self) -> None:
        self.engine.destroy()


def _fragment(parameter: nn.Parameter) -> tuple[int, int, int] | None:
    """Which part of a parameter lies in this process's partition at ZeRO stages 1 and 2.

    Returns:
        Its start in the parameter, its start in the partition, and its length; None: no part.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    if mapping is None:
        return None
    inside, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return inside.start, there.start, inside.numel


def _load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # In the parameter's memory layout, which another engine's state may not have:
                # fused kernels go through both in the order of memory, and would pair the wrong
                # elements.
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _settings(config: RunConfig, accumulation: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 2**31,
    }
    if config.precision in LOW_PRECISION:
        # The empty list: gradients are averaged as the float32 numbers they are. By default
        # those of convolutions would travel in bfloat16, and the result depend on the number
        # of processes.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": str(LOW_PRECISION[config.precision]).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        }
    return settings


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World
) -> Any:
    deepspeed = _import_deepspeed(world.device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _accumulate(engine: Any, loss: Tensor) -> None:
    engine.backward(loss)
    # Inside a step this only counts; at its last micro-batch it would update, which is left to
    # update(), when the averaged gradient has been looked at.
    if not engine.is_gradient_accumulation_boundary():
        engine.step()


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


def _scaled(loss: Tensor, scale: LossScale | None) -> Tensor:
    return loss if scale is None else loss * scale.value


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


def _unscale_and_clip(
    grads: list[Tensor], scale: LossScale | None, max_norm: float | None
) -> Update:
    """Undo the loss's scale and limit the norm, in place, without asking the device."""
    if scale is not None:
        torch._foreach_mul_(grads, 1 / scale.value)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm is not None:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return Update(norm, torch.isfinite(norm))


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Begin SGD's momentum at 0, from which its first step is the same.

    Left to itself torch allocates it at the first step, and if that step is given up, leaves it
    with whatever was in memory.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


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
