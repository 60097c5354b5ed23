"""DALI's part of a pipeline: it decodes windows of images, and resizes them on a GPU.

No other file knows DALI.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tetdist.data.index import Index
from tetdist.data.pixels import Interpolation
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
    """

    device: Literal["cpu", "gpu"]
    device_id: int | None
    threads: int
    prefetch: int


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


def image_graph(workers: Workers, interpolation: Interpolation) -> Graph:
    """Make a graph that decodes windows, and resizes them on a GPU.

    Each comes out as (H, W, 3) uint8, of its own size.
    """

    def graph(dali: Any, source: Source) -> Any:
        fn, types = dali.fn, dali.types
        on_gpu = workers.device == "gpu"
        encoded, corner, extent, *size = fn.external_source(
            source,
            num_outputs=4 if on_gpu else 3,
            dtype=[types.UINT8, types.INT32, types.INT32] + ([types.FLOAT] if on_gpu else []),
            ndim=[1, 1, 1] + ([1] if on_gpu else []),
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
        if not on_gpu:
            return windows
        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        return fn.resize(windows, size=size[0], interp_type=filters[interpolation], antialias=True)

    return graph


def event_graph(workers: Workers, index: Index) -> Graph:
    """Make a graph that copies frames to the device and makes them float32."""

    def graph(dali: Any, source: Source) -> Any:
        fn, types = dali.fn, dali.types
        stored = {"uint8": types.UINT8, "float16": types.FLOAT16}[str(index.dtype)]
        (frames,) = fn.external_source(source, num_outputs=1, dtype=[stored], ndim=[4])
        if workers.device == "gpu":
            frames = frames.gpu()
        return fn.cast(frames, dtype=types.FLOAT)

    return graph
