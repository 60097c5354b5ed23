"""Plots that a run makes while it trains, on rank 0."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from tetdist.apps.reports import curves
from tetdist.apps.reports.curves import DEAD, SATURATED
from tetdist.apps.reports.replay_gif import coloured
from tetdist.config.sections.data import DataSection
from tetdist.data import mixing
from tetdist.data.loader import Batch
from tetdist.errors import UserError
from tetdist.training.evaluating import WEIGHTS
from tetdist.training.observers import Observer, Watched

logger = logging.getLogger(__name__)

SHOWN_IMAGES, SHOWN_EVENTS, SHOWN_TIMESTEPS = 32, 6, 10  # of the first batch

# Drawing takes half a second, so plots are drawn at most every DRAW_EVERY seconds. With a long file
# of metrics it takes longer, so the pause is at least PAUSE times that: 5 % of the time.
DRAW_EVERY, PAUSE = 20.0, 20

ALIVE = "layers that fire again"


class RunPlots(Observer):
    """Plots in ``runs/NAME/plots``, and warnings about layers that died or saturated.

    With ``plots`` false, nothing is drawn. Each plot is an artifact of the tracker.
    """

    def __init__(self, watched: Watched) -> None:
        run = watched.run
        self.config, self.classes, self.model = run.config, run.train.classes, run.model
        self.last_step, self.tracker = run.last_step, watched.tracker
        self.folder = self.config.run_dir / "plots"
        self._firing, self._metrics = FiringWatch(), curves.Metrics(self.tracker.path)
        self._next = -math.inf  # when to draw again
        self._has_inputs = (self.folder / "inputs.png").exists()

    @override
    def on_batch(self, step: int, batch: Batch) -> None:
        """Draw the run's first training batch, as the network sees it, once."""
        if self._has_inputs or not self.config.plots:
            return
        self._has_inputs = True
        images = batch.inputs(torch.device("cpu"), torch.float32)
        if batch.mix is not None:
            images = mixing.mixed_images(images, mixing.on_device(batch.mix, images.device))
        match self.config.data.input_kind:
            case "events":
                images = images[:SHOWN_EVENTS, : self.model.timesteps]
                shown = images[:, :SHOWN_TIMESTEPS]
                rgb = np.array([rgb_events(events, self.config.data) for events in shown])
                unit = f"events (blue: on, orange: off), {images.shape[1]} time bins"
            case "images":
                rgb = rgb_images(images[:SHOWN_IMAGES], self.config.data)
                unit = f"{images.shape[-1]}x{images.shape[-2]} pixels"
            case other:
                assert_never(other)
        labels = [self.classes[label] for label in batch.labels[: len(rgb)].tolist()]
        title = f"{self.config.name}: augmented training input, {unit}"
        self._draw("inputs.png", lambda out: curves.inputs(rgb, labels, title, out))

    @override
    def on_line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Warn about layers that died or saturated; draw periodically and at the end."""
        if kind != WEIGHTS:
            return
        for sentence in self._firing.changes(values["firing_rate"]):
            logger.warning("epoch %g: %s", values["epoch"], sentence)
        is_due = step == self.last_step or time.monotonic() >= self._next
        if self.config.plots and is_due:
            self._draw_all()

    def _draw_all(self) -> None:
        metrics, began = self._metrics, time.monotonic()
        self._draw("learning_curves.png", lambda out: curves.learning_curves(metrics, out))
        self._draw("firing_rates.png", lambda out: curves.firing_rates(metrics, out))
        ended = time.monotonic()
        self._next = ended + max(DRAW_EVERY, PAUSE * (ended - began))

    def _draw(self, name: str, draw: Callable[[Path], None]) -> None:
        plot = self.folder / name
        try:
            draw(plot)
        except (UserError, OSError) as error:
            # The other plots may still succeed.
            logger.warning("cannot draw the plot %s: %s", name, error)
            return
        self.tracker.artifact(plot)


def rgb_images(images: Tensor, data: DataSection) -> npt.NDArray[np.float64]:
    """Convert normalised images (N, 3, H, W) to RGB values in [0, 1], (N, H, W, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).double().numpy()


def rgb_events(events: Tensor, data: DataSection) -> list[npt.NDArray[Any]]:
    """Convert the event frames of a sample, (T, 2, H, W), to T images (h, w, 3) in [0, 1]."""
    # Images as events have ON before OFF.
    ordered = events.flip(1) if data.images_as_events else events
    return [coloured(frame) / 255 for frame in ordered.numpy()]


class FiringWatch:
    """Reports layers that became dead or saturated, or recovered, once per change."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def changes(self, firing_rate: Mapping[str, float]) -> list[str]:
        """Return sentences on the layers whose state has changed since the last call.

        Args:
            firing_rate: Spikes per neuron per timestep, by layer.
        """
        states = {layer: _firing_state(rate) for layer, rate in firing_rate.items()}
        changed: dict[str, list[str]] = {}
        for layer, state in states.items():
            if state != self._states.get(layer, ALIVE):
                changed.setdefault(state, []).append(f"{layer} ({100 * firing_rate[layer]:.3g} %)")
        self._states = states
        return [f"{state}: {', '.join(layers)}" for state, layers in changed.items()]


def _firing_state(rate: float) -> str:
    if rate < DEAD:
        return f"dead layers, firing below {100 * DEAD:g} %"
    return f"saturated layers, firing above {100 * SATURATED:g} %" if rate > SATURATED else ALIVE
