"""Binning of events to frames: T time bins, two polarities, counted, resized, stored compactly."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt
from pydantic import PlainValidator, TypeAdapter, ValidationError

from tetdist.apps.events.published import published_frames
from tetdist.apps.events.recording import BadRecording, Events, Sensor
from tetdist.config.fields import Timesteps
from tetdist.config.flags import MOST_TIMESTEPS
from tetdist.errors import UserError, typed
from tetdist.wording import are, counted

Values = Literal["count", "occupancy", "normalised", "published"]
Resize = Literal["area", "bilinear"]
DType = Literal["uint8", "float16"]


def _sensor(text: object) -> Sensor:
    width, height = str(text).split("x")
    return Sensor.stated(width, height)


# The header of a checkpoint has it as text.
_Size = Annotated[Sensor, PlainValidator(_sensor)]

# uint8 holds values between 0 and 1 as multiples of 1 / 255.
UINT8_STEPS = 255


@dataclass(frozen=True)
class Binning:
    """Settings for the conversion of events to frames.

    Attributes:
        timesteps: T, the number of bins.
        size: Width and height of the frames; None: the sensor's.
        bins: "count": N // T events each, as in the paper, without the last N % T; "time": equal
            durations between the first and the last event; a `Window` as text, such as "20ms" or
            "2000events": windows of this size from the first event on, as a live camera can deliver
            them. Events after the T-th window are left out; missing windows stay empty.
        values: Value of a pixel. "count": number of events; "occupancy": 1 if there are any;
            "normalised": number of events divided by the maximum of this frame and polarity;
            "published": as by `published_frames`, which needs bilinear.
        resize: "area": sum over each new pixel's area; "bilinear": weighted by a triangle as wide
            as two new pixels, as PIL does. Both preserve a frame's sum for "count", and its mean
            for the other values.
        dtype: "uint8": rounded, all values except "count" as multiples of 1 / 255; "float16".
    """

    timesteps: Timesteps
    size: _Size | None
    bins: str
    values: Values
    resize: Resize
    dtype: DType


class Window(NamedTuple):
    """Window of a fixed size."""

    size: int
    unit: Literal["us", "events"]

    @classmethod
    def of(cls, bins: str) -> "Window | None":
        """Parse a text such as 20ms, 500us or 2000events; None if it is not a window."""
        match = re.fullmatch(r"([1-9]\d{0,8})(ms|us|events)", bins)
        if match is None:
            return None
        size, unit = int(match[1]), match[2]
        if unit == "events":
            return cls(size, "events")
        return cls(1000 * size if unit == "ms" else size, "us")


@dataclass(frozen=True)
class _Header(Binning):
    """The binning in the header of a checkpoint."""

    sensor: _Size


def binning_of(found: dict[str, Any] | None, run: Path) -> tuple[Binning, Sensor]:
    """Return how the recordings that a run was trained on were binned, and their sensor."""
    if found is None:
        raise UserError(
            f"{run} was trained on images, or on recordings whose binning it does not know; "
            f"train on a folder that `{typed('prebin_dvs')} --bins 20ms` made"
        )
    if isinstance(bins := found.get("bins"), str) and Window.of(bins) is None:
        raise UserError(
            f"{run} was trained on --bins {bins}, T parts of a whole recording, which a "
            f"stream cannot know; bin by windows, `{typed('prebin_dvs')} --bins 20ms`, and train "
            "again"
        )
    try:
        header = TypeAdapter(_Header).validate_python(found)
    except ValidationError as error:
        raise UserError(
            f"{run}: the binning of its recordings is damaged: {error.errors()[0]['loc'][0]} "
            "cannot be read; use another checkpoint"
        ) from error
    return header, header.sensor


class Frames(NamedTuple):
    """Frames of a recording.

    Attributes:
        tensor: (T, 2, H, W), OFF before ON.
        saturated: Number of values that were clipped to the type's maximum.
        empty: Number of the T x 2 frames without events.
    """

    tensor: npt.NDArray[np.uint8] | npt.NDArray[np.float16]
    saturated: int
    empty: int


def bin_events(events: Events, binning: Binning) -> Frames:
    """Make the frames of a recording.

    Raises:
        BadRecording: The recording has fewer events than bins.
    """
    if len(events) < (1 if Window.of(binning.bins) else binning.timesteps):
        number = len(events)
        raise BadRecording(
            f"{counted(number, 'event')} {are(number)} too few for "
            f"{counted(binning.timesteps, 'bin')}; lower --timesteps"
        )
    counts = _count(events, _bin_numbers(events, binning), binning.timesteps)
    frames = _frames(counts, binning)
    tensor, saturated = _stored(frames, binning)
    return Frames(tensor, saturated, int((counts.max(axis=(2, 3)) == 0).sum()))


def window_frames(events: Events, binning: Binning) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield a recording's windows of a fixed size.

    Frames are those of `bin_events` at any T; the recording may end within the last window.

    Yields:
        A window's end in microseconds after the first event, and its frame, (2, H, W).
    """
    window = Window.of(binning.bins)
    assert window is not None, "the bins have no fixed size"
    elapsed = events.t - events.t[0]
    order = elapsed if window.unit == "us" else np.arange(len(events))
    gaps = np.diff(order)
    far = np.flatnonzero(gaps // window.size > MOST_TIMESTEPS)
    if far.size:
        raise UserError(
            f"event {far[0] + 1} comes {gaps[far[0]]} us after the one before, more than "
            f"{MOST_TIMESTEPS} windows of {binning.bins}; cut the recording there"
        )
    for end in range(window.size, int(order[-1]) + window.size + 1, window.size):
        first, last = np.searchsorted(order, [end - window.size, end])
        part = events.cut(slice(first, last))
        yield end if window.unit == "us" else int(elapsed[last - 1]), _frame(part, binning)


def _frame(events: Events, binning: Binning) -> npt.NDArray[Any]:
    counts = _count(events, np.zeros(len(events), np.int64), 1)
    return _stored(_frames(counts, binning), binning)[0][0]


def _bin_numbers(events: Events, binning: Binning) -> npt.NDArray[np.int64]:
    """Return the bin (N,) of each event; T for events without a bin."""
    number, timesteps = len(events), binning.timesteps
    elapsed = events.t - events.t[0]
    window = Window.of(binning.bins)
    if window is not None:
        passed = elapsed if window.unit == "us" else np.arange(number)
        return np.minimum(passed // window.size, timesteps)
    match binning.bins:
        case "count":
            return np.minimum(np.arange(number) // (number // timesteps), timesteps)
        case "time":
            return elapsed * timesteps // (elapsed[-1] + 1)
        case other:
            raise ValueError(f"there are no bins {other!r}")


def _count(events: Events, bins: npt.NDArray[np.int64], timesteps: int) -> npt.NDArray[np.float64]:
    """Count the events of each pixel: (T, 2, H, W)."""
    width, height = events.sensor
    pixel = ((bins * 2 + events.p) * height + events.y) * width + events.x
    # `frames[...] += 1` would count a repeated pixel once, and np.add.at is slow.
    total = np.bincount(pixel, minlength=(timesteps + 1) * 2 * height * width)
    return total.reshape(timesteps + 1, 2, height, width)[:timesteps].astype(np.float64)


def _frames(counts: npt.NDArray[np.float64], binning: Binning) -> npt.NDArray[np.float64]:
    match binning.values:
        case "count":
            return _resized(counts, binning)
        case "occupancy":
            return _resized((counts > 0).astype(np.float64), binning)
        case "normalised":
            most = counts.max(axis=(2, 3), keepdims=True)
            return _resized(counts / np.maximum(most, 1), binning)
        case "published":
            return published_frames(counts, binning.size)
        case _:
            assert_never(binning.values)


def _resized(frames: npt.NDArray[np.float64], binning: Binning) -> npt.NDArray[np.float64]:
    height, width = frames.shape[2:]
    size = binning.size or Sensor(width, height)
    if size == (width, height):
        return frames
    rows = resize_weights(height, size.height, binning.resize)
    columns = resize_weights(width, size.width, binning.resize)
    resized: npt.NDArray[np.float64] = rows @ frames @ columns.T
    if binning.values == "count":
        resized *= height * width / (size.height * size.width)
    return resized


def resize_weights(source: int, target: int, how: Resize) -> npt.NDArray[np.float64]:
    """Return the weights (target, source) that resize a line of pixels.

    Each row sums to 1.
    """
    scale = source / target
    pixel = np.arange(source)[None, :]
    match how:
        case "area":
            edges = np.arange(target + 1) * scale
            first, last = edges[:-1, None], edges[1:, None]
            weights = np.clip(np.minimum(last, pixel + 1) - np.maximum(first, pixel), 0, None)
        case "bilinear":
            centres = (np.arange(target) + 0.5)[:, None] * scale - 0.5
            weights = np.clip(1 - np.abs(pixel - centres) / max(scale, 1), 0, None)
        case _:
            assert_never(how)
    normalised: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _stored(
    frames: npt.NDArray[np.float64], binning: Binning
) -> tuple[npt.NDArray[np.uint8] | npt.NDArray[np.float16], int]:
    """Return the frames in their type, and the number of clipped values."""
    match binning.dtype:
        case "float16":
            largest = float(np.finfo(np.float16).max)
            return np.minimum(frames, largest).astype(np.float16), int((frames > largest).sum())
        case "uint8":
            steps = 1 if binning.values == "count" else UINT8_STEPS
            rounded = np.rint(frames * steps)
            return np.minimum(rounded, 255).astype(np.uint8), int((rounded > 255).sum())
        case _:
            assert_never(binning.dtype)
