"""DALI's part of a pipeline: it decodes windows of images, and resizes them on a GPU.

No other file knows DALI.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tetdist.data.pixels import Output
from tetdist.datasets.index import Index
from tetdist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Resources of a loader.

    Attributes:
        device: Where the batches come out; "gpu" also decodes (DALI's mixed decoder) and resizes
            there.
        device_id: The GPU's number; None for the CPU.
        threads: Threads that read, as many that decode, and as many that finish images. A thread
            that waits for a file does nothing else: slow storage needs more of them than there are
            cores.
        prefetch: Batches that are worked on ahead of the consumer.
        raw: Whether what a device does faster is left to it: batches come out as bytes.
        pinned: Whether bytes come out in memory from which a GPU copies by itself.
    """

    device: Literal["cpu", "gpu"]
    device_id: int | None
    threads: int
    prefetch: int
    raw: bool = False
    pinned: bool = False


# A source gives the pipeline's inputs for the next batch, or raises StopIteration.
Source = Callable[[], tuple[Any, ...]]
# A graph takes DALI's module and the source of its inputs, and gives the node of the images.
Graph = Callable[[Any, Source], Any]


def import_dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as error:
        raise UserError(
            "DALI is not installed: pip install 'tetdist[cuda130]' (CUDA 13, or no GPU) or"
            " 'tetdist[cuda120]' (CUDA 12)"
        ) from error


def image_graph(workers: Workers, output: Output) -> Graph:
    """Make a graph that decodes windows; each comes out as (H, W, 3) uint8, of its own size.

    On a GPU it also does what the finishing threads do on a CPU, so that all windows come out as
    (size, size, 3).
    """

    def graph(dali: Any, source: Source) -> Any:
        fn, types = dali.fn, dali.types
        on_gpu = workers.device == "gpu"
        encoded, corner, extent, *edits = fn.external_source(
            source,
            num_outputs=6 if on_gpu else 3,
            dtype=[types.UINT8, types.INT32, types.INT32]
            + ([types.FLOAT, types.INT32, types.INT32] if on_gpu else []),
            ndim=[1, 1, 1] + ([1, 1, 0] if on_gpu else []),
            # Nobody else has the stream's arrays, so DALI need not copy them.
            no_copy=True,
        )
        windows = fn.decoders.image_slice(
            encoded,
            device="mixed" if on_gpu else "cpu",
            start=corner,
            shape=extent,
            axis_names="HW",
            # PIL does not turn images by their EXIF orientation either, and the index has their
            # sizes as stored.
            adjust_orientation=False,
        )
        return _placed(dali, windows, edits, output) if on_gpu else windows

    return graph


def _placed(dali: Any, windows: Any, edits: list[Any], output: Output) -> Any:
    """Resize windows, lay them into black squares, and mirror some, by the rules of pixels.py."""
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


def event_graph(workers: Workers, index: Index) -> Graph:
    """Make a graph that copies frames to the device and makes them float32, unless raw."""

    def graph(dali: Any, source: Source) -> Any:
        fn, types = dali.fn, dali.types
        stored = {"uint8": types.UINT8, "float16": types.FLOAT16}[str(index.dtype)]
        (frames,) = fn.external_source(source, num_outputs=1, dtype=[stored], ndim=[4])
        if workers.device == "gpu":
            frames = frames.gpu()
        return frames if workers.raw else fn.cast(frames, dtype=types.FLOAT)

    return graph
