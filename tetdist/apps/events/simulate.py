"""Simulated event camera that views an image: event data without recordings.

As for N-MNIST, the image moves along three straight saccades, the sides of a triangle. Each pixel
compares the logarithm of its light with the value at its last event, and emits an event for each
threshold crossed. This is a model, not a measurement, and its splits are named "simulated".
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tetdist.apps.events.recording import BadRecording, Events, Sensor, checked_events

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DEFAULT_SENSOR = Sensor(34, 34)
# Minimum pixels a side, so that the movement leaves space for the image.
SMALLEST_SENSOR = 8

_STEP_US = 1_000
# Positions of the image, in units of the amplitude, before and after each saccade.
_CORNERS = np.array([(0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 0.0)])
# Light of a black pixel relative to a white one: screens are never black, and log(0) is infinite.
_BLACK = 0.05


@dataclass(frozen=True)
class Simulation:
    """Settings of the simulated camera.

    Attributes:
        width, height: Pixels of the sensor.
        seed: Seed of noise and thresholds, together with the image's path.
        saccade_ms: Duration of each of the three saccades.
        amplitude: Movement of the image, as a fraction of the sensor's shorter side.
        threshold: Change of the logarithm of light that triggers an event.
        threshold_spread: Standard deviation of the threshold over pixels.
        noise_hz: Noise events per pixel and second.
    """

    width: int
    height: int
    seed: int
    saccade_ms: int = 100
    amplitude: float = 0.12
    threshold: float = 0.3
    threshold_spread: float = 0.03
    noise_hz: float = 0.1


_Columns = tuple[npt.NDArray[np.int64], ...]  # x, y, t and p before sorting, each (N,)


def simulate(data: bytes, path: str, simulation: Simulation) -> Events:
    """Simulate the events of an image that moves in front of the sensor.

    Args:
        path: Path of the image in its folder; together with the seed, it determines the noise.

    Raises:
        BadRecording: The data is not an image, or makes no events.
    """
    rng = np.random.default_rng([simulation.seed, zlib.crc32(path.encode())])
    scene = _scene(data, simulation)
    columns = [*_seen(scene, simulation, rng), _noise(simulation, rng)]
    x, y, t, p = (np.concatenate(values) for values in zip(*columns, strict=True))
    order = np.argsort(t, kind="stable")
    sensor = Sensor(simulation.width, simulation.height)
    return checked_events(Events(x[order], y[order], t[order], p[order], sensor))


def _scene(data: bytes, simulation: Simulation) -> npt.NDArray[np.float64]:
    """Return the logarithm of light, larger than the sensor by the margin of the movement."""
    from PIL import Image

    margin = int(np.ceil(simulation.amplitude * min(simulation.width, simulation.height))) + 1
    # Shrink the image so that all of it stays visible.
    width, height = simulation.width - margin, simulation.height - margin
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.convert("L")
            grey.thumbnail((width, height), Image.Resampling.BILINEAR)
            light = np.asarray(grey, np.float64) / 255
    except Exception as error:  # PIL's decoders raise many kinds.
        raise BadRecording(f"it is not an image, or damaged ({error})") from error
    missing = (
        simulation.height + margin - light.shape[0],
        simulation.width + margin - light.shape[1],
    )
    padded = np.pad(light, [(n // 2, n - n // 2) for n in missing], mode="edge")
    return np.log(_BLACK + (1 - _BLACK) * padded)


def _seen(
    scene: npt.NDArray[np.float64], simulation: Simulation, rng: np.random.Generator
) -> Iterator[_Columns]:
    """Yield the events of the movement, for each step."""
    shape = simulation.height, simulation.width
    spread = rng.normal(simulation.threshold, simulation.threshold_spread, shape)
    threshold = np.maximum(spread, simulation.threshold / 10)
    amplitude = simulation.amplitude * min(shape)
    steps = simulation.saccade_ms * 1_000 // _STEP_US
    reference = _view(scene, shape, 0.0, 0.0)
    for step in range(1, 3 * steps + 1):
        saccade, within = divmod(step - 1, steps)
        start, end = _CORNERS[saccade], _CORNERS[saccade + 1]
        right, down = amplitude * (start + (end - start) * (within + 1) / steps)
        change = _view(scene, shape, right, down) - reference
        number = np.floor(np.abs(change) / threshold).astype(np.int64)
        reference = reference + np.sign(change) * number * threshold
        y, x = np.nonzero(number)
        repeats = number[y, x]
        t = (step - 1) * _STEP_US + rng.integers(0, _STEP_US, int(repeats.sum()))
        p = (change[y, x] > 0).astype(np.int64)
        yield np.repeat(x, repeats), np.repeat(y, repeats), t, np.repeat(p, repeats)


def _view(
    scene: npt.NDArray[np.float64], shape: tuple[int, int], right: float, down: float
) -> npt.NDArray[np.float64]:
    """Return the part of the scene that the sensor sees, shifted by fractions of a pixel."""
    column, row = int(right), int(down)
    across, along = right - column, down - row
    height, width = shape
    window = scene[row : row + height + 1, column : column + width + 1]
    lines = (1 - along) * window[:-1] + along * window[1:]
    return (1 - across) * lines[:, :-1] + across * lines[:, 1:]


def _noise(simulation: Simulation, rng: np.random.Generator) -> _Columns:
    duration_us = 3 * simulation.saccade_ms * 1_000
    pixels = simulation.width * simulation.height
    number = rng.poisson(simulation.noise_hz * pixels * duration_us / 1e6)
    return (
        rng.integers(0, simulation.width, number),
        rng.integers(0, simulation.height, number),
        rng.integers(0, duration_us, number),
        rng.integers(0, 2, number),
    )
