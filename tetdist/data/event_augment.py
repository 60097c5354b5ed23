"""Augmentation of event frames (T, 2, H, W), all timesteps of a sample alike.

Operations are those of published recipes, with torchvision's pixels (nearest neighbour, and zeros
from outside). Each sample's operation is drawn from separate random streams.
"""

import math
from typing import Any, Literal, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import functional as vision

from tetdist.config.sections.data import DataSection
from tetdist.data.pixels import cut_out
from tetdist.data.transforms import cutout_boxes, event_draws, shifts
from tetdist.order import named_stream, uniforms

Policy = Literal["nda", "snn_augment_wide"]
_Floats = npt.NDArray[np.float64]
_Frames = npt.NDArray[Any]

OPERATION_DRAWS = 4
OPERATION_STREAM = named_stream("event operations")


class EventChanges:
    """Changes of a micro-batch's frames, before the user's transforms and mixing.

    The order is: mirroring, roll, one operation, Cutout.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        positions: npt.NDArray[np.int64],
        size: tuple[int, int],
        data: DataSection,
    ) -> None:
        """
        Args:
            positions: (B,) of the samples in the epoch's order.
        """
        draws = event_draws(seed, epoch, positions)
        self._mirror = draws.flip[:, 0] < data.flip
        self._shift = shifts(draws.roll, data.roll)
        self._operations: list[Operation] | None = None
        if data.event_augment != "none":
            numbers = uniforms(seed, epoch, positions, OPERATION_DRAWS, OPERATION_STREAM)
            self._operations = operations(numbers, data.event_augment, size)
        self._boxes = cutout_boxes(draws.cutout, *size, data.cutout)

    def of(self, k: int, frames: _Frames) -> _Frames:
        """Return the changed frames of the k-th sample; the given frames stay unchanged."""
        frames = frames[..., ::-1] if self._mirror[k] else frames
        frames = np.roll(frames, self._shift[k].tolist(), axis=(-2, -1))
        if self._operations is not None:
            frames = operated(frames, self._operations[k])
        cut_out(frames, self._boxes[k])
        return frames


class Operation(NamedTuple):
    """A change of a sample's frames.

    Attributes:
        name: identity, roll, translate, rotate, shear_x or cutout.
        values: roll, translate: pixels down and to the right; rotate, shear_x: degrees; cutout: a
            box of top, left, bottom, right.
    """

    name: str
    values: tuple[float, ...] = ()


def operations(draws: _Floats, policy: Policy, size: tuple[int, int]) -> list[Operation]:
    """Draw the operation of each sample.

    "nda" (Neuromorphic Data Augmentation, Li et al., ECCV 2022, as in the authors' code for
    CIFAR10-DVS at 48x48): a roll of up to 5 pixels each way, a rotation or a horizontal shear of up
    to 30 degrees. "snn_augment_wide" (SNNAugmentWide of QKFormer's code):
    identity, a horizontal shear of up to 0.3, a shift of up to 5 pixels either way, a rotation of
    up to 30 degrees, each by one of 31 magnitudes, or a square of 0.1 to 11 % of the area, emptied.

    Args:
        draws: (B, OPERATION_DRAWS) uniform in [0, 1).
    """
    match policy:
        case "nda":
            return [_nda(row) for row in draws.tolist()]
        case "snn_augment_wide":
            return [_snn_augment_wide(row, size) for row in draws.tolist()]
        case _:
            assert_never(policy)


def _nda(draws: list[float]) -> Operation:
    which, first, second, _ = draws
    match ("roll", "rotate", "shear_x")[int(3 * which)]:
        case "roll":
            down, right = shifts(np.array([first, second]), 5).tolist()
            return Operation("roll", (down, right))
        case name:
            return Operation(name, (60 * first - 30,))


def _snn_augment_wide(draws: list[float], size: tuple[int, int]) -> Operation:
    which, first, second, third = draws
    names = ("identity", "shear_x", "translate_x", "translate_y", "rotate", "cutout")
    match names[int(len(names) * which)]:
        case "shear_x":
            return Operation("shear_x", (math.degrees(_magnitude(0.3, first, second)),))
        case "translate_x":
            return Operation("translate", (0, int(_magnitude(5.0, first, second))))
        case "translate_y":
            return Operation("translate", (int(_magnitude(5.0, first, second)), 0))
        case "rotate":
            return Operation("rotate", (_magnitude(30.0, first, second),))
        case "cutout":
            return Operation("cutout", _square(first, second, third, *size))
        case name:
            return Operation(name)


def _magnitude(most: float, first: float, second: float) -> float:
    """Draw one of 31 magnitudes from -most to most, and flip its sign half of the time."""
    # Torch computes them in float32, as the original does: a shift of 4.99 pixels is one of 4.
    magnitude = float(torch.linspace(-most, most, 31)[int(31 * first)].item())
    return -magnitude if second < 0.5 else magnitude


def _square(area: float, row: float, column: float, height: int, width: int) -> tuple[int, ...]:
    """Draw the square of torchvision's RandomErasing(p=1, scale=(0.001, 0.11), ratio=(1, 1))."""
    side = round(math.sqrt(height * width * (0.001 + (0.11 - 0.001) * area)))
    if side >= min(height, width):
        return 0, 0, 0, 0
    top, left = int(row * (height - side + 1)), int(column * (width - side + 1))
    return top, left, top + side, left + side


def operated(frames: _Frames, operation: Operation) -> _Frames:
    """Change frames (T, 2, H, W) of any type; cutout does so in place."""
    values = operation.values
    match operation.name:
        case "identity":
            return frames
        case "roll":
            return np.roll(frames, tuple(map(int, values)), axis=(-2, -1))
        case "translate":
            down, right = map(int, values)
            return _moved(frames, translate=[right, down])
        case "shear_x":
            return _moved(frames, shear=[values[0], 0.0])
        case "rotate":
            # torchvision's rotate is anticlockwise, and its affine clockwise.
            return _moved(frames, angle=-values[0])
        case "cutout":
            cut_out(frames, np.array(values, np.int32))
            return frames
        case _:
            raise AssertionError(operation.name)


def _moved(frames: _Frames, **how: Any) -> _Frames:
    """Take each pixel from the place that torchvision's affine takes it from, or set it to 0."""
    height, width = frames.shape[-2:]
    # Torchvision moves one image of pixel numbers instead of all T x 2 frames.
    # float32 holds these numbers exactly.
    assert height * width < 2**24
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    still: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    source = vision.affine(numbers, **(still | how)).flatten().numpy().astype(np.int64)
    moved = frames.reshape(-1, height * width).take(source - 1, axis=1, mode="clip")
    moved[:, source == 0] = 0
    return moved.reshape(frames.shape)
