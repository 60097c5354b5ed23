"""DeepSpeed at ZeRO stages 0, 1 and 2. No other file uses DeepSpeed."""

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tetdist.buffers import copy_to_host
from tetdist.errors import UserError, pip_install
from tetdist.nn.precision import LOW_PRECISION, autocast, lay_out
from tetdist.training.engines.base import (
    EngineParts,
    LossScale,
    Update,
    WholeEngine,
    set_lr,
)

logger = logging.getLogger(__name__)

# DeepSpeed's version that the tests run with; another may have renamed what is used here.
TRIED = "0.19.8"


class DeepSpeedEngine(WholeEngine):
    """DeepSpeed at ZeRO stage 0, with autocast, loss scale and average by tetdist.

    DeepSpeed's scaler hides overflows and does not save its scale, and its average copies each
    gradient twice; `GradientMean` does it in a few kernels.
    """

    def __init__(self, parts: EngineParts) -> None:
        # initialize broadcasts parameters through a view that channels_last weights cannot have.
        lay_out(parts.model, torch.contiguous_format)
        # DeepSpeed's gradient_clipping is 1.0 by default; here update() clips.
        self.engine = _initialize(parts, {"gradient_clipping": 0.0})
        _require(self.engine, "no_sync")
        self.precision = parts.config.precision
        super().__init__(parts)

    def forward(self, images: Tensor) -> Tensor:
        # The engine's own forward would turn this autocast off.
        with autocast(images.device, self.precision):
            return self.engine.module(images, per_timestep=True)

    def _run_backward(self, loss: Tensor) -> None:
        with self.engine.no_sync():
            self.engine.backward(loss)
        _count(self.engine)

    def _step(self) -> None:
        assert self.engine.is_gradient_accumulation_boundary()
        self.engine.step()

    def close(self) -> None:
        super().close()
        self.engine.destroy()


class ZeroEngine:
    """DeepSpeed at ZeRO stage 1 (the optimiser's state is divided among the processes) or 2 (the
    gradients, too).

    Parameters become views of flat buffers, so weights cannot be channels_last here, and
    convolutions are slower than at stage 0.
    """

    loss_scale: LossScale | None = None  # config/checks.py refuses fp16 here

    def __init__(self, parts: EngineParts) -> None:
        lay_out(parts.model, torch.contiguous_format)
        self.world, self.optimizer = parts.world, parts.optimizer
        # Their order numbers them in a state_dict. Keep them now: initialize replaces them by flat
        # partitions.
        self.groups = [list(group["params"]) for group in self.optimizer.param_groups]
        settings: dict[str, Any] = {
            # DeepSpeed computes the norm, clips, and checks for non-finite values here, since no
            # process has the whole gradient.
            "gradient_clipping": parts.config.gradient_clipping or 0.0,
            "zero_allow_untested_optimizer": True,
        }
        if dtype := LOW_PRECISION[parts.config.precision]:
            # With the empty list gradients are averaged in float32, their own type. By default
            # those of convolutions would be sent in bfloat16, and the result would depend on the
            # number of processes.
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": str(dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],
            }
        self.engine = _initialize(parts, settings)
        _require(self.engine, "allreduce_gradients", "get_global_grad_norm", "was_step_applied")
        _require(self.groups[0][0], "_hp_mapping")
        # It averages the gradients at the end of the last backward pass.
        average = self.engine.allreduce_gradients
        self.engine.allreduce_gradients = self.world.waiting.measured()(average)

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images, per_timestep=True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        _count(self.engine)

    def update(self, lr: float) -> Update:
        assert self.engine.is_gradient_accumulation_boundary()
        set_lr(self.optimizer, lr)
        self.engine.step()
        # DeepSpeed's step has already read on the host whether the norm is finite.
        norm, device = self.engine.get_global_grad_norm(), self.world.device
        if not isinstance(norm, Tensor):
            norm = torch.full((), norm, device=device)
        # Filling is one kernel; copying a number from the host would wait for the device again.
        return Update(norm.float(), torch.full((), self.engine.was_step_applied(), device=device))

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
                    elif value.shape != parameter.shape or key == "step":
                        # One value for the whole partition, such as Adam's step: fused kernels
                        # need it on their device. Its shape is that of a scalar parameter, too.
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
        """Assemble a state of the partition from all processes: on rank 0, a tensor a parameter."""
        if not torch.is_tensor(value):
            return [value] * len(parameters)
        if value.shape != flat.shape:
            # One copy each: torch's Adam counts in place, once per parameter.
            return [copy_to_host(value) for _ in parameters]
        gathered = self.world.gather_on_rank_0(value)
        if gathered is None:
            return [None] * len(parameters)
        # The partitions follow each other as the parameters do, and the last one is padded.
        sizes = [parameter.numel() for parameter in parameters]
        parts = copy_to_host(gathered)[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for p, part in zip(parameters, parts, strict=True)]

    def close(self) -> None:
        self.engine.destroy()


def _fragment(parameter: nn.Parameter) -> tuple[int, int, int] | None:
    """Return the part of a parameter in this process's partition at ZeRO stages 1 and 2.

    Returns:
        Its start in the parameter, its start in the partition, and its length; None: no part.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    if mapping is None:
        return None
    inside, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return inside.start, there.start, inside.numel


def _initialize(parts: EngineParts, settings: dict[str, Any]) -> Any:
    config = parts.config
    settings = settings | {
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": parts.accumulation,
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 2**31,
        # The timer would wait for the device twice per micro-batch; window.py measures instead.
        "timers": {"throughput": {"enabled": False}},
    }
    with _as_local_rank(parts.world.device):
        deepspeed = _import_deepspeed(parts.world.device)
        with _broadcasting_scalars(deepspeed.DeepSpeedEngine, parts.model):
            engine, *_ = deepspeed.initialize(
                model=parts.model,
                optimizer=parts.optimizer,
                config=settings,
                dist_init_required=False,
            )
    return engine


@contextlib.contextmanager
def _as_local_rank(device: torch.device) -> Iterator[None]:
    """Set LOCAL_RANK to the number of this process's GPU within this context.

    DeepSpeed requires the variable and uses the GPU of that number. If each process sees only its
    own GPU, local rank 3 has GPU 0, and there is no GPU 3.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0) if device.type == "cuda" else before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def _broadcasting_scalars(cls: Any, model: nn.Module) -> Iterator[None]:
    """Give scalar parameters a dimension while they are broadcast within this context.

    DeepSpeed broadcasts byte views, which scalars do not have. Afterwards they must have their own
    shape again, which is that of their gradients.
    """
    _require(cls, "_broadcast_model")
    original = cls._broadcast_model
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]

    def broadcast(engine: Any) -> None:
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        original(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    cls._broadcast_model = broadcast
    try:
        yield
    finally:
        cls._broadcast_model = original


def _count(engine: Any) -> None:
    """Count a micro-batch.

    At the last one this would update, which is left to update(), after the averaged gradient has
    been checked.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()


def _require(owner: Any, *names: str) -> None:
    """Refuse a DeepSpeed that has renamed what is used here: setting it would do nothing."""
    for name in names:
        if not (name in owner if isinstance(owner, dict) else hasattr(owner, name)):
            version = importlib.import_module("deepspeed").__version__
            raise UserError(
                f"DeepSpeed {version} lacks {name}, which tetdist uses; pip install "
                f"deepspeed=={TRIED}, or train with engine=torch zero_stage=0"
            )


def _import_deepspeed(device: torch.device) -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"DeepSpeed is not installed: {pip_install('train,cuda130')}; or train with "
            "engine=torch"
        )
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    level = logging.getLogger().level
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger().setLevel(level)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if deepspeed.__version__.split(".")[:2] != TRIED.split(".")[:2]:
        logger.warning("DeepSpeed is %s; tetdist is tried with %s", deepspeed.__version__, TRIED)
    if device.type == "cpu":
        # init_distributed would compile a shared-memory reduction for half a minute, or fail
        # without a compiler. gloo is as good, and behaves the same on one host and on several.
        ops = importlib.import_module("deepspeed.ops")
        _require(ops, "__compatible_ops__")
        _require(ops.__compatible_ops__, "deepspeed_shm_comm")
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        dist_init_required=False,
    )
    # DeepSpeed keeps a group of all processes for good, but the group ends with its run.
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    _require(groups, "_WORLD_GROUP")
    if groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
        groups._WORLD_GROUP = None
    return deepspeed
