"""DALI's part of a pipeline: it decodes windows of images, and resizes them on a GPU.

No other file uses DALI.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tetdist.data.pixels import Edits, Output
from tetdist.errors import UserError, pip_install


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Resources of a loader.

    Attributes:
        device: Device of the batches; "gpu" also decodes (DALI's mixed decoder) and resizes there.
        threads: Number of threads each for reading, decoding and finishing images. A reading thread
            waits for its file, so slow storage needs more threads than cores.
        prefetch: Number of batches prepared ahead of the consumer.
        raw: True to leave to the device what it does faster; batches are then bytes.
        pinned: True for batches in pinned memory, from which a GPU copies asynchronously.
    """

    device: Literal["cpu", "gpu"]
    device_id: int | None
    threads: int
    prefetch: int
    raw: bool = False
    pinned: bool = False


# Returns the pipeline's inputs for the next batch, or raises StopIteration.
Source = Callable[[], tuple[Any, ...]]


def import_dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as error:
        raise UserError(
            f"DALI is not installed; {pip_install('cuda130')} (for CUDA 12, cuda120 instead)"
        ) from error


def image_inputs(workers: Workers, edits: Edits) -> list[npt.NDArray[Any]]:
    """Return the inputs of `image_graph` besides the files, each (B, ...)."""
    # DALI takes no views with strides.
    arrays = [np.ascontiguousarray(edits.window[:, :2]), np.ascontiguousarray(edits.window[:, 2:])]
    if workers.device == "gpu":
        arrays += [
            edits.size.astype(np.float32),
            -edits.corner.astype(np.int32),
            edits.mirror.astype(np.int32),
        ]
    return arrays


def image_graph(dali: Any, source: Source, workers: Workers, output: Output) -> Any:
    """Make the node of decoded windows: (H, W, 3) uint8, each of its own size.

    On a GPU the node also resizes and mirrors, as the finishing threads do on a CPU, so that all
    windows are (size, size, 3).

    Args:
        source: Returns the files and `image_inputs`.
    """
    fn, types = dali.fn, dali.types
    on_gpu = workers.device == "gpu"
    encoded, corner, extent, *edits = fn.external_source(
        source,
        num_outputs=6 if on_gpu else 3,
        dtype=[types.UINT8, types.INT32, types.INT32]
        + ([types.FLOAT, types.INT32, types.INT32] if on_gpu else []),
        ndim=[1, 1, 1] + ([1, 1, 0] if on_gpu else []),
        # The stream's arrays are not used elsewhere, so DALI need not copy them.
        no_copy=True,
    )
    windows = fn.decoders.image_slice(
        encoded,
        device="mixed" if on_gpu else "cpu",
        start=corner,
        shape=extent,
        axis_names="HW",
        # PIL ignores the EXIF orientation, too, and the index has the sizes as stored.
        adjust_orientation=False,
    )
    return _placed(dali, windows, edits, output) if on_gpu else windows


def _placed(dali: Any, windows: Any, edits: list[Any], output: Output) -> Any:
    """Resize windows, place them in black squares, and mirror some, by the rules of pixels.py."""
    fn, types = dali.fn, dali.types
    size, start, mirror = edits
    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    resized = fn.resize(
        windows, size=size, interp_type=filters[output.interpolation], antialias=True
    )
    squares = fn.slice(
        resized,
        start=start,
        shape=[output.size, output.size],
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    return fn.flip(squares, horizontal=mirror, vertical=0)


def event_graph(dali: Any, source: Source, workers: Workers, dtype: str) -> Any:
    """Make the node of event frames as they are stored, copied to the device."""
    fn, types = dali.fn, dali.types
    stored = {"uint8": types.UINT8, "float16": types.FLOAT16}[dtype]
    (frames,) = fn.external_source(source, num_outputs=1, dtype=[stored], ndim=[4])
    return frames.gpu() if workers.device == "gpu" else frames
