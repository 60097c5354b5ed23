"""The mean of several trained networks' weights: the work of the command average.

Running statistics of a mean are not the mean of running statistics, so they are computed anew: over
training samples, augmented and mixed as in training, in its micro-batches and in training mode.
Each is the average over all of these micro-batches.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetdist import order, plugins
from tetdist.config.identity import differences
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig, phase_image_sizes
from tetdist.data import mixing
from tetdist.data.build import train_loader
from tetdist.data.dropping import drop_factors
from tetdist.data.transfer import on_device
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn import batch_norm, dropout
from tetdist.nn.precision import autocast, parameter_type
from tetdist.storage import checkpoint
from tetdist.wording import counted


def mean_weights(
    sources: Sequence[Path], which: str = "last", *, ema: bool = False
) -> tuple[dict[str, Tensor], checkpoint.Description]:
    """The mean of the weights of networks that are alike, formed in float64.

    Args:
        sources: Run folders, folders of checkpoints or exports, or .safetensors files.
        which: Of run folders, ``last`` or ``best``.
        ema: Take the moving averages of the weights.

    Returns:
        The mean, in the weights' own types, and the first one's description, changed to what the
        mean is. Counts are those of the first.

    Raises:
        UserError: One cannot be read, or is another network than the first.
    """
    first = sources[0]
    weights, description = _read(first, which, ema)
    total = {key: value.double() for key, value in weights.items()}
    step = description.step
    for source in sources[1:]:
        others, theirs = _read(source, which, ema)
        _check_alike(source, (others, theirs), first, (weights, description))
        for key, value in others.items():
            total[key] += value
        step = max(step, theirs.step)
    mean = {
        key: (total[key] / len(sources)).to(value.dtype) if value.is_floating_point() else value
        for key, value in weights.items()
    }
    names = ", ".join(source.resolve().name for source in sources)
    what = (
        f"mean of {counted(len(sources), 'moving average')}" if ema else f"mean of {len(sources)}"
    )
    changes = {"step": step, "validation": None, "averaged": f"{what}: {names}"}
    return mean, description.model_copy(update=changes)


Read = tuple[dict[str, Tensor], checkpoint.Description]


def _read(path: Path, which: str, ema: bool) -> Read:
    weights, description = checkpoint.load_model_file(path, which, ema=ema)
    plugins.require(description.imports, path)
    return weights, description


def _check_alike(source: Path, of_source: Read, first: Path, of_first: Read) -> None:
    """Refuse what is not of the same network.

    Raises:
        UserError: It is another; the text says in what.
    """
    (weights, theirs), (first_weights, ours) = of_source, of_first
    found = differences(
        *(
            {"model": parse(one.config, str(path), warn=False).as_dict()["model"]}
            for one, path in ((ours, first), (theirs, source))
        )
    )
    if theirs.timesteps != ours.timesteps:
        found.append(f"T is {theirs.timesteps} and was {ours.timesteps}")
    if theirs.classes != ours.classes:
        found.append("its classes are others")
    shapes = {(key, *value.shape) for key, value in weights.items()}
    unlike = sorted(shapes ^ {(key, *value.shape) for key, value in first_weights.items()})
    if unlike and not found:
        found.append(f"{unlike[0][0]} is not of the same shape")
    if found:
        raise UserError(
            f"{source} is another network than {first}: {'; '.join(found)}. Only weights of one "
            "network have a mean: leave it out"
        )


@torch.no_grad()
def recompute_statistics(
    model: SpikingNetwork,
    config: RunConfig,
    index: Index,
    world: World,
    samples: int,
    progress: Callable[[int, int], Any] = lambda _done, _total: None,
) -> int:
    """Compute a model's running statistics anew: call it on every process together.

    The samples, their augmentation and what the network drops of them are those of the last epoch
    that a training of the configuration has, and of what would be the next.

    Args:
        model: On its device, at its T; left in evaluation mode.
        config: That of its training: its data, batch and precision are read.
        index: The training split.
        world: All processes; their number changes the result by rounding alone.
        samples: How many to take at least: it is rounded up to whole global batches.
        progress: Told the samples done and those in all.

    Returns:
        How many were taken.

    Raises:
        UserError: The batches do not suit the data or the number of processes.
    """
    batch, device = config.batch, world.device
    steps = -(-samples // batch.global_)
    numbers = order.rank_micro_batches(world.rank, world.world_size, batch.global_, batch.micro)
    epoch = sum(phase.epochs for phase in config.phases) - 1
    first = epoch * order.steps_per_epoch(len(index), batch.global_)
    dropping = dropout.dropping(model)
    size = phase_image_sizes(config, config.phases[-1])[1]
    batch_norm.defer_running_statistics(model)
    model.train()
    with train_loader(config, index, world, first, size) as loader:
        for step in range(steps):
            for number in numbers:
                given = next(loader)
                images = on_device(given.images, device, parameter_type(config.precision))
                if given.mix is not None:
                    images = mixing.mixed_images(images, mixing.on_device(given.mix, device))
                # As in training: a network from outside draws of torch's generator.
                torch.manual_seed(order.forward_seed(config.seed, first + step, number))
                for factors in drop_factors(config, dropping, first + step, number, device):
                    dropout.set_factors(dropping, factors)
                with autocast(device, config.precision):
                    model(images, per_timestep=True)
            # So each step has the same weight in the end.
            batch_norm.update_running_statistics(model, world.mean_, momentum=1 / (step + 1))
            progress((step + 1) * batch.global_, steps * batch.global_)
    model.eval()
    return steps * batch.global_
