"""A sample in a network: input, spikes, the answer and its confidence so far, class activation."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist import plugins
from tetdist.apps.reports.replay_gif import draw_classes, draw_frame, write_gif
from tetdist.apps.reports.run_plots import rgb_events, rgb_images
from tetdist.apps.reports.style import QUIET, RATE, VALIDATION, finish, new_figure, save
from tetdist.apps.weights import evaluated
from tetdist.data.batches import eval_batches
from tetdist.data.dali import Workers
from tetdist.distributed.world import join
from tetdist.errors import UserError
from tetdist.losses import running_means
from tetdist.models import SpikingNetwork
from tetdist.network import load_model
from tetdist.nn.norm_neuron import firing_layers
from tetdist.storage import checkpoint
from tetdist.wording import counted

Images = list[npt.NDArray[Any]]
LAYERS = 3  # number of layers whose spikes are shown, spread from the first to the last
EVENTS = "input: ON events blue, OFF events orange"
COLUMNS = 6  # maximum number of timesteps in the PNG
WIDTH, DPI = 6.5, 128  # 832 pixels; the text is still legible at half that size


class Seen(NamedTuple):
    """A sample and what a network does with it, at T timesteps and for K classes.

    Attributes:
        title: Names of the sample and its class.
        rows: T images (h, w, 3) from 0 to 1, by title: the input, spikes of layers, and the class
            activation.
        probabilities: Softmax of the mean output of the first t timesteps, (T, K).
    """

    title: str
    classes: list[str]
    rows: dict[str, Images]
    probabilities: npt.NDArray[Any]


def see(
    source: Path,
    which: str,
    number: int,
    split: str | None,
    data: str | None,
    imports: Sequence[str],
) -> Seen:
    """Run a checkpoint on a sample of its data.

    Args:
        which: ``last`` or ``best``.
        number: Number of the sample in the split, whose samples are sorted by class and name.
        split: See `evaluated.open_evaluated`.
        data: Folder of other data; None: the training's.
    """
    plugins.import_files(imports)
    weights, description = checkpoint.load_model_file(source, which)
    plugins.require(description.imports, source)
    config = evaluated.evaluation_config(
        description.config,
        str(source),
        {"root": data, "index": None} if data else {},
        imports=imports or None,
        execution="reference",
        precision="fp32",
    )
    with join("cpu") as world:
        index = evaluated.open_evaluated(config, split, world, own_data=data is None)
        if not 0 <= number < len(index):
            last = f"{counted(len(index), 'sample')}, 0 to {len(index) - 1}"
            raise UserError(
                f"--sample: there is no sample {number} in {index.split}, which has {last}"
            )
        known = config.model.num_classes
        index = evaluated.with_classes_of_model(index, description.classes, known, str(source))
        model = load_model(config, index, weights, source, world, description.looks_ahead)
    model.set_timesteps(description.timesteps)
    model.eval()
    with eval_batches(
        config.data,
        index,
        [np.array([number])],
        Workers(device="cpu", device_id=None, threads=1, prefetch=1),
    ) as batches:
        x = next(batches).inputs(torch.device("cpu"), torch.float32)
    if x.ndim == 5:
        title, frames = EVENTS, rgb_events(x[0, : model.timesteps], config.data)
    else:
        title, frames = "input", [rgb_images(x, config.data)[0]] * model.timesteps
    classes = [*index.classes]
    classes += [f"class {k}" for k in range(len(classes), model.num_classes)]
    spikes, logits = _spikes(model, x)
    probabilities = running_means(logits)[:, 0].softmax(-1).numpy()
    rows = {title: frames}
    for layer, values in spikes.items():
        title = f"{layer}: {values.mean():.2f} spikes per neuron and timestep"
        rows[title] = _tinted(np.ones((*values.shape, 3)), values, RATE)
    if (activation := _activation(model, x)) is not None:
        size = frames[0].shape[:2]
        smooth = F.interpolate(torch.from_numpy(activation)[None], size=size, mode="bilinear")[0]
        grey = np.stack(frames).mean(-1, keepdims=True).repeat(3, -1)
        answer = classes[probabilities[-1].argmax()]
        title = f"class activation: where the input speaks for {answer} (orange)"
        rows[title] = _tinted(0.5 + 0.5 * grey, smooth.numpy(), VALIDATION)
    title = f"{index.path(number)}, class {classes[index.labels[number]]}"
    return Seen(title, classes, rows, probabilities)


def _tinted(below: npt.NDArray[Any], values: npt.NDArray[Any], colour: str) -> Images:
    """Return images (T, h, w, 3) with a colour where values (T, h, w) are large."""
    from matplotlib.colors import to_rgb

    strength = values[..., None] / (values.max() or 1)
    return [*(below + strength * (np.array(to_rgb(colour)) - below))]


@torch.no_grad()
def _spikes(model: SpikingNetwork, x: Tensor) -> tuple[dict[str, npt.NDArray[Any]], Tensor]:
    """Return means over channels, (T, h, w), of some layers' spikes, and the logits (T, 1, K)."""
    rates: dict[str, npt.NDArray[Any]] = {}

    def keep(name: str, _module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
        if spikes.ndim == 5 and spikes.shape[-1] > 1:
            rates[name] = spikes[:, 0].float().mean(1).numpy()

    with ExitStack() as hooks:
        for name, layer in firing_layers(model).items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
        logits = model(x, per_timestep=True)
    names = list(rates)
    shown = np.linspace(0, len(names) - 1, min(LAYERS, len(names))).round().astype(int)
    return {names[i]: rates[names[i]] for i in shown}, logits


def _activation(model: SpikingNetwork, x: Tensor) -> npt.NDArray[Any] | None:
    """Return the contributions (T, h, w) to the answer: gradient times output of the last block.

    Negative ones are 0. For a classifier behind a mean over positions these are the usual class
    activation map. Behind a neuron they follow its surrogate gradient.
    """
    if not hasattr(model, "blocks"):  # a network of another library
        return None
    with torch.no_grad():
        features = model.forward_features(x).float()
    features.requires_grad_()
    logits = model.forward_head(features)[0]
    (gradient,) = torch.autograd.grad(logits.max(), features)
    return (gradient * features.detach())[:, 0].sum(1).clamp(min=0).numpy()


def draw(seen: Seen, png: Path, gif: Path) -> None:
    """Draw a PNG with all timesteps, or `COLUMNS` of them, and a GIF with one after another."""
    timesteps, count = len(seen.probabilities), len(seen.rows)
    shown = np.linspace(0, timesteps - 1, min(COLUMNS, timesteps)).round().astype(int)
    height = WIDTH / max(len(shown), 4) + 0.5
    figure = new_figure(WIDTH, 2.4 + count * height, dpi=DPI)
    figure.suptitle(seen.title, fontsize=9, color=QUIET)
    top, *parts = figure.subfigures(1 + count, 1, height_ratios=[2.2] + [height] * count)
    _draw_answer(top.subplots(), seen, timesteps)
    for part, (title, images) in zip(parts, seen.rows.items(), strict=True):
        part.suptitle(title, fontsize=9, color=QUIET, x=0.015, ha="left")
        for axis, t in zip(part.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw_frame(axis, images[t])
            axis.set_xlabel(f"t={t + 1}", fontsize=9, labelpad=1)
            axis.set_visible(t == 0 or images[t] is not images[0])
    save(figure, png)

    side = WIDTH / count
    height = 2.4 + side
    figure = new_figure(WIDTH, height, dpi=DPI)
    figure.set_layout_engine("none")  # Each frame has the same layout.

    def draw_timestep(t: int) -> None:
        figure.clear()
        for i, (title, images) in enumerate(seen.rows.items()):
            place = (i / count + 0.01, 2.2 / height, 1 / count - 0.02, side / height)
            draw_frame(figure.add_axes(place), images[t], title.partition(":")[0][-17:])
        answer = figure.add_axes((0.1, 0.45 / height, 0.88, 1.4 / height))
        _draw_answer(answer, seen, t + 1)

    write_gif(gif, figure, draw_timestep, [700] * (timesteps - 1) + [2000])


def _draw_answer(axis: Any, seen: Seen, timesteps: int) -> None:
    """Draw the classes' probabilities after the first timesteps."""
    axis.set_xlim(0.8, len(seen.probabilities) + 0.2)
    axis.set_ylim(0, 112)
    values = 100 * seen.probabilities[:timesteps]
    title = draw_classes(axis, range(1, timesteps + 1), values, seen.classes)
    finish(axis, title, "probability (%)", legend=False)
    axis.set_xlabel("timesteps averaged", fontsize=9, labelpad=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
