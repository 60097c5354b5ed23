"""Mean of several trained networks' weights, for the command average.

The running statistics of a mean are not the mean of the running statistics, so they are recomputed:
over training samples, augmented and mixed as in training, in its micro-batches and in training
mode. Each is the average over all of these micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tetdist import order, plugins
from tetdist.apps.weights.variants import with_classes_of_model
from tetdist.config.identity import differences
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.data import mixing
from tetdist.data.build import train_loader
from tetdist.data.dropping import drop_factors
from tetdist.data.loader import Batches
from tetdist.data.transfer import on_device
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn import batch_norm, dropout
from tetdist.nn.precision import autocast, parameter_type
from tetdist.storage import checkpoint
from tetdist.training.setup import open_data, open_split
from tetdist.wording import counted


def mean_weights(
    sources: Sequence[Path], which: str = "last", *, ema: bool = False
) -> tuple[dict[str, Tensor], checkpoint.Description]:
    """Return the mean weights of several copies of one network, computed in float64.

    Returns:
        The mean, in the weights' own types, and the first network's description, adapted to the
        mean. Integer entries (counters) are those of the first.
    """
    first = sources[0]
    weights, description = _read(first, which, ema)
    total = {key: value.double() for key, value in weights.items()}
    step = description.step
    for source in sources[1:]:
        others, theirs = _read(source, which, ema)
        because = "only weights of the same network can be averaged"
        check_alike(source, (others, theirs), first, (weights, description), because)
        for key, value in others.items():
            total[key] += value
        step = max(step, theirs.step)
    mean = {
        key: (total[key] / len(sources)).to(value.dtype) if value.is_floating_point() else value
        for key, value in weights.items()
    }
    averaged = description.averaged
    if len(sources) > 1:
        number = counted(len(sources), "moving average") if ema else len(sources)
        names = ", ".join(source.resolve().name for source in sources)
        averaged = f"mean of {number}: {names}"
    changes = {"step": step, "validation": None, "averaged": averaged}
    return mean, description.model_copy(update=changes)


Read = tuple[dict[str, Tensor], checkpoint.Description]


def _read(path: Path, which: str, ema: bool) -> Read:
    weights, description = checkpoint.load_model_file(path, which, ema=ema)
    plugins.require(description.imports, path)
    return weights, description


def check_alike(source: Path, of_source: Read, first: Path, of_first: Read, because: str) -> None:
    """Refuse weights of another network; ``because`` is the reason."""
    (weights, theirs), (first_weights, ours) = of_source, of_first
    found = differences(
        *(
            {"model": parse(one.config, str(path), warn=False, is_trained=True).as_dict()["model"]}
            for one, path in ((ours, first), (theirs, source))
        )
    )
    if theirs.timesteps != ours.timesteps:
        found.append(f"T is {theirs.timesteps} instead of {ours.timesteps}")
    if theirs.classes != ours.classes:
        found.append("its classes differ")
    shapes = {(key, *value.shape) for key, value in weights.items()}
    unlike = sorted(shapes ^ {(key, *value.shape) for key, value in first_weights.items()})
    if unlike and not found:
        found.append(f"{unlike[0][0]} has another shape")
    if found:
        raise UserError(
            f"{source} is another network than {first}: {'; '.join(found)}. Leave it out, because "
            f"{because}"
        )


def open_training_split(
    config: RunConfig, classes: list[str] | None, source: Path, world: World
) -> Index:
    """Return the training samples, without those that the run held out.

    ``classes`` are the network's, if known; messages name its ``source``.
    """
    if config.data.held_out:
        index = open_data(config, world)[0]
    else:
        index = open_split(config, "train", world)
    return with_classes_of_model(index, classes, config.model.num_classes, str(source))


def recompute_statistics(
    model: SpikingNetwork,
    config: RunConfig,
    index: Index,
    world: World,
    samples: int | None = None,
    show: Callable[[int, int], None] = lambda _done, _total: None,
    alive: Callable[[str], None] = lambda _: None,
) -> str:
    """Recompute a model's running statistics at its T; every process must call it.

    Samples, augmentation and dropout are those of the training's last epoch and, if more samples
    are needed, of the epochs that would follow.

    Args:
        model: The model on its device, at the T of the statistics, in evaluation mode.
        samples: Minimum number of samples, rounded up to whole global batches; None: one epoch.
        show: Called on rank 0 with the samples done and their total.

    Returns:
        A description for reports.
    """
    if not batch_norm.has_running_statistics(model):
        return "the network has no running statistics"
    batch, device = config.batch, world.device
    per_epoch = order.steps_per_epoch(len(index), batch.global_)
    steps = per_epoch if samples is None else -(-samples // batch.global_)
    numbers = order.rank_micro_batches(world.rank, world.world_size, batch.global_, batch.micro)
    first = (sum(phase.epochs for phase in config.phases) - 1) * per_epoch
    dropping = dropout.dropping(model)

    def batches(loader: Batches) -> Iterator[Tensor]:
        for step in range(first, first + steps):
            for number in numbers:
                given = next(loader)
                images = on_device(given.images, device, parameter_type(config.precision))
                if given.mix is not None:
                    images = mixing.mixed_images(images, mixing.on_device(given.mix, device))
                # As in training: an adopted network draws from torch's generator.
                torch.manual_seed(order.forward_seed(config.seed, step, number))
                for factors in drop_factors(config, dropping, step, number, device):
                    dropout.set_factors(dropping, factors)
                yield images
            alive("the running statistics")
            if world.rank == 0:
                show((step + 1 - first) * batch.global_, steps * batch.global_)

    with (
        train_loader(config, index, world, first) as loader,
        autocast(device, config.precision),
    ):
        batch_norm.recompute_running_statistics(model, batches(loader), world.mean_)
    taken = counted(steps * batch.global_, "training sample")
    return f"running statistics at T={model.timesteps} from {taken}"
