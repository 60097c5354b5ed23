"""The configured network: built for its data and checked, with weights, on the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tetdist import models
from tetdist.config.schema import RunConfig
from tetdist.config.sections.training import SegmentsSection
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.fast import dispatch, native_zeros
from tetdist.nn.precision import choose_algorithms, parameter_type, place
from tetdist.optimizers import layers_of
from tetdist.storage import checkpoint


def make_model(
    config: RunConfig, index: Index, load: Callable[[SpikingNetwork], Any] | None = None
) -> SpikingNetwork:
    """Return the configured model for the data of ``index``, initialised, at the first phase's
    largest T; ``load`` loads weights into it."""
    section = config.model
    model = section.build(
        num_classes=section.num_classes or len(index.classes),
        timesteps=config.phases[0].most_timesteps,
        input_kind=config.data.input_kind,
    )
    if model.input_kind != config.data.input_kind:
        raise UserError(
            f"data: the samples are {config.data.input_kind}, but model.name={section.name} takes "
            f"{model.input_kind}; choose another model or other data"
        )
    _refuse_foreign_norms(section.name, model)
    frames, size = index.frames(config.data), config.data.image_size
    # Refuse the T of a later step now; end with the first phase's largest T.
    for phase in reversed(config.phases):
        for timesteps in sorted(phase.choices):
            model.set_timesteps(timesteps)
    sides = (size, size)
    if frames is not None:
        frames, sides = (model.timesteps, *frames[1:]), frames[2:]
    input_size = getattr(model, "input_size", None)
    if input_size is not None and sides != (input_size, input_size):
        other = "bin with --size " if config.data.kind == "events" else "set data.image_size="
        square = f", or train with model.arguments.input_size={sides[0]}"
        raise UserError(
            f"{section.name} is built for {input_size}x{input_size} pixels and the data has "
            f"{sides[1]}x{sides[0]}; {other}{input_size}{square * (sides[0] == sides[1])}"
        )
    if load is not None:
        model.to(parameter_type(config.precision))
        load(model)
    models.freeze(model, section.freeze)
    if section.freeze and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.freeze: {', '.join(section.freeze)} leave nothing to train; remove one"
        )
    section.check_own(model, frames or (3, size, size))
    # Otherwise the optimiser of a later phase would refuse these when that phase begins.
    optimizers = map(config.optimizer_of, range(len(config.phases)))
    if any(optimizer.layer_decay is not None for optimizer in optimizers):
        layers_of(model)
    if hasattr(model, "set_execution"):
        model.set_execution(config.execution)
    if config.recompute != "none":
        _call(section.name, model, "set_grad_checkpointing", True)
    if isinstance(config.recompute, SegmentsSection):
        if model.looks_ahead:
            raise UserError(
                f"recompute: {section.name} looks ahead and cannot run in segments of timesteps; "
                "set recompute=blocks"
            )
        _call(section.name, model, "set_segment", config.recompute.timesteps)
    return model


def load_model(
    config: RunConfig,
    index: Index,
    weights: dict[str, Tensor],
    source: Path,
    world: World,
    looks_ahead: bool | None = None,
) -> SpikingNetwork:
    """Return the model of `make_model` with weights, on the device, the same on all processes.

    ``looks_ahead`` is the checkpoint's verdict on a user's network.
    """

    def load(model: SpikingNetwork) -> None:
        checkpoint.load_weights(model, weights, source)
        model.looks_ahead = looks_ahead

    with world.together():
        model = make_model(config, index, load)
    if config.model.is_own:
        agree_on_looks_ahead(model, world)
    choose_algorithms(config.precision)
    if config.execution == "fused":
        with world.together():
            choose_kernels(world)
    place(model, world.device, config.precision)
    return model


def agree_on_looks_ahead(model: SpikingNetwork, world: World) -> None:
    """Make all processes use the same verdict on a user's network: the worst of theirs."""
    verdicts = world.gather(model.looks_ahead)
    model.looks_ahead = next((worst for worst in (True, None) if worst in verdicts), False)


def choose_kernels(world: World) -> None:
    """Make all processes use the same kernels.

    They round differently from the definition, which replaces them where they cannot be compiled.
    If that happens on all processes, a warning is logged once and the run goes on, slower.
    """

    def gather(reasons: dispatch.Reasons) -> list[dispatch.Reasons]:
        gathered = world.gather(reasons)
        for family, name in dispatch.FAMILIES.items():
            missing = [rank for rank, of_rank in enumerate(gathered) if family in of_rank]
            if missing and len(missing) < len(gathered):
                raise UserError(
                    f"the kernels of {name} work on {len(gathered) - len(missing)} of "
                    f"{len(gathered)} processes, but not on rank {', '.join(map(str, missing))} "
                    f"({gathered[missing[0]][family]}); install the same software on all hosts, or "
                    "set execution=reference, which needs no kernels and is slower"
                )
        return gathered

    dispatch.decide(world.device, gather)
    if world.device.type == "cpu":
        native_zeros.agree(frozenset.intersection(*world.gather(native_zeros.types_here())))


def _call(name: str, model: SpikingNetwork, method: str, argument: int) -> None:
    """Make a network recompute activations, if it can."""
    if not hasattr(model, method):
        raise UserError(f"recompute: {name} has no {method}; set recompute=none")
    try:
        getattr(model, method)(argument)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"recompute: {error}") from error


def _refuse_foreign_norms(name: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise UserError(
                f"model.name: {path} of {name} is torch's {type(module).__name__}, whose running "
                "statistics would depend on the number of processes and be lost in "
                "recomputation; use tetdist.nn.batch_norm.BatchNorm instead"
            )
