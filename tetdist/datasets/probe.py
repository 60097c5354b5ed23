"""Open and decode samples in worker processes, to find their sizes and faults.

A fault is returned as a `str`, not raised, so that one bad file does not end the work.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from tetdist.datasets.archives import ByteRange
from tetdist.datasets.processes import ReportProgress, run_on_samples
from tetdist.storage.files import open_file

# Formats that both PIL and DALI decode; PIL opens many more, whatever the suffix.
_PIL_FORMATS = {"JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"}
_EXIF_ORIENTATION = 0x0112

_Result = TypeVar("_Result")


class Probe(NamedTuple):
    """Facts about one good sample.

    Attributes:
        height, width: Pixels as stored.
        format: PIL's name of an image's format.
        is_turned: True if EXIF says that the image is to be turned for display.
    """

    size: int
    height: int
    width: int
    timesteps: int | None = None
    dtype: str | None = None
    format: str | None = None
    is_turned: bool = False


def probe_batches(
    probe: Callable[..., _Result | str],
    arguments: tuple[Any, ...],
    root: str | Path,
    byte_ranges: Sequence[ByteRange],
    workers: int,
    progress: ReportProgress | None = None,
) -> Iterator[list[_Result | str]]:
    """Call `probe(stream, size, *arguments)` for every sample, and yield lists of results in order.

    If a file cannot be opened, the result is the reason.
    """
    work = functools.partial(_probe_ranges, probe, root, arguments)
    return run_on_samples(work, byte_ranges, workers, progress)


def _probe_ranges(
    probe: Callable[..., _Result | str],
    root: str | Path,
    arguments: tuple[Any, ...],
    byte_ranges: Sequence[ByteRange],
) -> list[_Result | str]:
    return [probe_range(probe, root, byte_range, *arguments) for byte_range in byte_ranges]


def probe_range(
    probe: Callable[..., _Result | str], root: str | Path, byte_range: ByteRange, *arguments: Any
) -> _Result | str:
    """Call `probe(stream, size, *arguments)`, or return the reason why the file cannot be opened.

    The stream begins at the sample's first byte and ends at its last.
    """
    try:
        with open_file(Path(root, byte_range.file)) as file:
            size = os.fstat(file.fileno()).st_size if byte_range.size is None else byte_range.size
            if size == 0:
                return "the file is empty"
            if byte_range.size is None:
                return probe(file, size, *arguments)
            file.seek(byte_range.offset)
            data = file.read(size)
            if len(data) != size:
                return f"{byte_range.file} ends before it does"
            return probe(io.BytesIO(data), size, *arguments)
    except OSError as error:
        return f"cannot be read: {error}"


def probe_image(stream: IO[bytes], size: int, decode: bool) -> Probe | str:
    """Return the size of an image as stored, or the reason why it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(stream) as image:
            if image.format not in _PIL_FORMATS:
                return f"a {image.format} file, which DALI does not decode"
            # Unlike JPEG's, this orientation cannot be ignored: PIL turns the image on loading.
            if image.format == "TIFF" and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                return "a TIFF file with an orientation: save it upright"
            # DALI scales 16 bits to 8; PIL clips at 255.
            if image.mode.startswith(("I", "F")):
                return f"more than 8 bits per channel (PIL's mode {image.mode}): save it with 8"
            width, height = image.size
            is_turned = _is_turned(image)
            if decode:
                image.load()
    except UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # PIL's decoders raise many kinds
        return f"cannot be decoded: {error}" if decode else f"cannot be read: {error}"
    return Probe(size, height, width, format=image.format, is_turned=is_turned)


def _is_turned(image: Any) -> bool:
    # PIL would decode a PNG for that.
    if image.format not in ("JPEG", "MPO"):
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION) in range(2, 9)
    except Exception:  # of damaged EXIF, which changes no pixel
        return False


def probe_tensor(stream: IO[bytes], size: int) -> Probe | str:
    """Return shape and type of a (T, 2, H, W) .npy file, or the reason why it cannot be used."""
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            return f"a .npy file of version {version[0]}.{version[1]} instead of 1.0"
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
    except (OSError, ValueError) as error:
        return f"not a .npy file: {error}"
    if len(shape) != 4 or shape[1] != 2 or 0 in shape:
        return f"shape {shape} instead of (T, 2, H, W)"
    if dtype not in (np.dtype("u1"), np.dtype("<f2")):
        return f"type {dtype} instead of uint8 or float16"
    if fortran_order:
        return "stored in Fortran order instead of C order"
    expected = start + dtype.itemsize * int(np.prod(shape))
    if size != expected:
        return f"{size} bytes instead of {expected} for its shape {shape} and type {dtype}"
    return Probe(size, shape[2], shape[3], shape[0], dtype.name)
