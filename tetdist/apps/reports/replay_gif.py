"""A GIF of a replay: the events of each frame, and the classes' probabilities over time.

sample_plot.py draws frames and probabilities with the same functions.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.apps.reports.style import QUIET, SERIES, finish, new_figure
from tetdist.storage.files import explaining, replacing

_OFF, _ON = (213, 94, 0), (0, 114, 178)  # colours of events, on white
_SIDE = 200  # most pixels of a frame's side that are drawn
_FRAMES = 1000  # that are kept, so memory is bounded
_SHOWN = 40  # frames on the time axis
_PERCENT = 5.0  # from which a class is drawn


class _Drawn(NamedTuple):
    """A frame: end in seconds, image, probabilities (K,), True for a network's first one."""

    end: float
    events: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]
    is_first: bool


class ReplayGif:
    """The first frames of a replay, drawn at its end."""

    def __init__(self, path: Path, classes: list[str]) -> None:
        self._path, self._classes = path, classes
        self._frames: list[_Drawn] = []

    def add(
        self, end: float, frame: npt.NDArray[Any], probabilities: npt.NDArray[Any], is_first: bool
    ) -> None:
        """Keep a frame, (2, H, W), OFF before ON; see `_Drawn`."""
        if len(self._frames) < _FRAMES:
            self._frames.append(_Drawn(end, coloured(frame), probabilities, is_first))

    def save(self) -> None:
        """Draw the frames, a tenth of a second each, and write the file."""
        if not self._frames:
            return  # Ctrl-C came before the first.
        figure = new_figure(4, 2, dpi=100)
        figure.set_layout_engine("none")  # Each frame has the same layout.
        left = figure.add_axes((0.01, 0.1, 0.4, 0.78))
        right = figure.add_axes((0.59, 0.19, 0.35, 0.68))

        def draw(number: int) -> None:
            self._draw_events(left, self._frames[number])
            self._draw_probabilities(right, number + 1)

        write_gif(self._path, figure, draw, [100] * len(self._frames))
        print(f"wrote {self._path}, {len(self._frames)} frames")

    def _draw_events(self, axis: Any, frame: _Drawn) -> None:
        axis.clear()
        draw_frame(axis, frame.events, f"{frame.end:.3f} s")
        for x, name, colour in (0.0, "ON", _ON), (0.2, "OFF", _OFF):
            place = {"transform": axis.transAxes, "va": "top", "fontsize": 9}
            axis.text(x, -0.02, name, color=np.divide(colour, 255), **place)

    def _draw_probabilities(self, axis: Any, number: int) -> None:
        """Draw the last of the first frames: the classes' lines, which restart with the network."""
        axis.clear()
        begin = max(0, number - _SHOWN)
        shown = self._frames[begin : begin + _SHOWN]
        axis.set_xlim(self._frames[begin - 1].end if begin else 0, shown[-1].end)
        axis.set_ylim(0, 112)
        starts = [i for i, frame in enumerate(shown[: number - begin]) if i == 0 or frame.is_first]
        for start, end in pairwise([*starts, number - begin]):
            ends = [frame.end for frame in shown[start:end]]
            values = 100 * np.stack([frame.probabilities for frame in shown[start:end]])
            title = draw_classes(axis, ends, values, self._classes)
        finish(axis, title, "probability (%)", legend=False)
        axis.set_xlabel("s", fontsize=9, labelpad=1)


def write_gif(
    path: Path, figure: Any, draw: Callable[[int], None], durations: Sequence[int]
) -> None:
    """Write the frames that ``draw`` makes in a figure, each shown for some milliseconds."""
    from PIL import Image

    images = []
    for number in range(len(durations)):
        draw(number)
        figure.canvas.draw()
        drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        images.append(drawn.quantize(128, dither=Image.Dither.NONE))
    first, *others = images
    with explaining(path), replacing(path, sync=False) as file:
        first.save(
            file, "GIF", save_all=True, append_images=others, duration=list(durations), loop=0
        )


def draw_frame(axis: Any, image: npt.NDArray[Any], title: str = "") -> None:
    """Draw an input of a network, or another image (H, W, 3)."""
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("#BBBBBB")
    axis.set_title(title, fontsize=9, color=QUIET, loc="left")


def draw_classes(
    axis: Any, ends: Sequence[float], values: npt.NDArray[Any], classes: Sequence[str]
) -> str:
    """Draw the classes' probabilities (T, K) in percent, the last best one's in colour.

    Returns:
        The name of that class, and its last probability.
    """
    best = int(values[-1].argmax())
    name, colour = classes[best], SERIES[best % len(SERIES)]
    for k in np.flatnonzero(values.max(0) >= _PERCENT):
        axis.plot(ends, values[:, k], color="#BBBBBB", linewidth=0.8)
    axis.plot(ends, values[:, best], "o-", color=colour, linewidth=1.8, markersize=2)
    label = axis.text(ends[0], values[:, best].max() + 3, name, fontsize=8, color=colour)
    if label.get_window_extent().x1 > axis.bbox.x1:
        label.set_ha("right")
    return f"{name}  {values[-1, best]:.0f} %"


def coloured(frame: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the image (h, w, 3) of a frame, OFF before ON; more events are darker."""
    height, width = frame.shape[1:]
    step = -(-max(height, width) // _SIDE)
    rows, columns = np.arange(0, height, step), np.arange(0, width, step)
    counts = np.add.reduceat(np.add.reduceat(frame.astype(np.float64), rows, 1), columns, 2)
    total = counts.sum(0)
    usual = np.percentile(total[total > 0], 90) if total.any() else 1.0
    strength = np.where(total > 0, 0.3 + 0.7 * np.minimum(total / usual, 1), 0)[..., None]
    colour = np.where((counts[1] >= counts[0])[..., None], _ON, _OFF)
    image: npt.NDArray[np.uint8] = (255 - strength * (255 - colour)).astype(np.uint8)
    return image
