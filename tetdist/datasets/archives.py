"""Contents of tar files, found without unpacking them.

A tar alternates headers and contents, so a file in it, or in a tar within it, is an offset and a
size. Names that would leave the folder, links and devices are refused here, so that unpacking need
not check them again.
"""

import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tetdist.errors import UserError
from tetdist.storage.files import parse_json
from tetdist.wording import counted

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MOST_CLASSES = 1_000_000  # A label above fills the memory with names of classes.
WORDNET_ID = re.compile(r"n\d{8}")

_DEVKIT = "ILSVRC2012_devkit_t12"
_BLOCK = 512


class BadFile(NamedTuple):
    """A file that cannot be used: its path relative to the data root, and why."""

    path: str
    reason: str


class ByteRange(NamedTuple):
    """Bytes of a file: all of them, or `size` bytes from `offset` on.

    Attributes:
        file: Path; for samples, relative to the data root.
        offset: Bytes before the range in the file.
        size: Number of bytes; None for all, if their number is not known yet.
    """

    file: str
    offset: int = 0
    size: int | None = None


class Member(NamedTuple):
    """A regular file in a tar; `offset` counts from the beginning of the outermost file."""

    name: str
    offset: int
    size: int


class Samples(NamedTuple):
    """Samples of one tar, in its order; `bad` lists those without an image or a usable label."""

    members: list[Member]
    labels: list[int]
    bad: list[BadFile]


def members(tar: ByteRange) -> Iterator[Member]:
    """Yield every regular file of a tar in its order, except those whose name begins with a dot."""
    with Path(tar.file).open("rb") as file:
        end = file.seek(0, io.SEEK_END) if tar.size is None else tar.offset + tar.size
        file.seek(tar.offset)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("it is cut off within a file")
                    _refuse(member, tar.file)
                    if member.isreg() and PurePosixPath(member.name).name[0] != ".":
                        yield Member(member.name, member.offset_data, member.size)
                # tarfile takes a damaged header, or a cut between two members, for the end.
                file.seek(archive.offset)
                if archive.offset + _BLOCK > end or any(file.read(_BLOCK)):
                    raise tarfile.ReadError("its end is missing")
        except tarfile.TarError as error:
            raise UserError(
                f"{tar.file} is not a complete, uncompressed tar file ({error}): fetch it again, or"
                " uncompress it"
            ) from error


def _refuse(member: tarfile.TarInfo, file: str) -> None:
    path = PurePosixPath(member.name)
    reason = None
    if path.is_absolute() or ".." in path.parts:
        reason = "whose name leads out of the folder"
    elif member.issym() or member.islnk():
        reason = f"which is a link to {member.linkname!r}"
    elif member.issparse():
        reason = "which is a sparse file"
    elif not (member.isreg() or member.isdir()):
        reason = "which is a device or a pipe"
    if reason is not None:
        raise UserError(
            f"{file} holds {member.name!r}, {reason}, which is unsafe, so this tar is not used: get"
            " it from its original source"
        )


def read(file: Path, place: Member | ByteRange) -> bytes:
    """Read the contents of a place in a file."""
    with file.open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.size)


def shard_samples(file: Path) -> Samples:
    """Find the samples of a WebDataset shard: KEY.jpg (or .png, ...) with KEY.cls or KEY.json.

    A key is a member's path up to the first dot of its name. KEY.cls holds the label as a decimal
    number, KEY.json an object with the number as "label" or "cls".
    """
    groups: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in members(ByteRange(str(file))):
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        parts = groups[str(path.with_name(stem))]
        if parts.setdefault(f"{dot}{suffix.lower()}", member) is not member:
            raise UserError(f"{file} holds {member.name!r} twice: make the shard again")
    samples = Samples([], [], [])
    for key, parts in groups.items():
        images = [parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts]
        label = _label(file, parts)
        if len(images) != 1:
            samples.bad.append(
                BadFile(key, f"{counted(len(images), 'image')} of this key instead of 1")
            )
        elif isinstance(label, str):
            samples.bad.append(BadFile(images[0].name, label))
        else:
            samples.members.append(images[0])
            samples.labels.append(label)
    return samples


def _label(file: Path, parts: Mapping[str, Member]) -> int | str:
    """Return the label of a sample, or the reason why it has none."""
    texts: list[object] = []
    if ".cls" in parts:
        texts.append(read(file, parts[".cls"]).decode("ascii", "replace").strip())
    if ".json" in parts:
        try:
            description = parse_json(read(file, parts[".json"]))
        except ValueError as error:
            return f"its .json is damaged: {error}"
        if not isinstance(description, dict):
            return "its .json is not an object"
        # Beside a .cls, the .json need not have a label.
        texts += [description[key] for key in ("label", "cls") if key in description]
    if not texts:
        return "no label: neither .cls nor .json of this key has one"
    text = texts[0]
    if len({str(other) for other in texts}) > 1:
        return f"its labels differ: {', '.join(map(repr, texts))}"
    if isinstance(text, bool) or not re.fullmatch(r"0*\d{1,6}", str(text), re.ASCII):
        return f"the label {text!r} is not an integer from 0 to {MOST_CLASSES - 1:,}"
    return int(str(text))


def class_tars(file: Path) -> dict[str, ByteRange]:
    """Find the tars in the official training tar, by class."""
    tars = {}
    for member in members(ByteRange(str(file))):
        path = PurePosixPath(member.name)
        if path.suffix != ".tar":
            raise UserError(
                f"{file} holds {member.name!r}, but the official training tar holds only one tar"
                " per class: fetch the original file"
            )
        tars[path.stem] = ByteRange(str(file), member.offset, member.size)
    return tars


def images(tar: ByteRange) -> tuple[list[Member], list[str]]:
    """Return the members of a tar that have an image's suffix, and the names of all others."""
    kept: list[Member] = []
    others: list[str] = []
    for member in members(tar):
        if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
            kept.append(member)
        else:
            others.append(member.name)
    return kept, others


def validation_labels(devkit: Path, number: int) -> tuple[tuple[str, ...], list[str]]:
    """Return all classes, sorted, and the WordNet id of each image of the official validation tar.

    The devkit numbers classes from 1 in a different order; meta.mat has their ids.

    Args:
        number: Number of images; the ids are in the order of their names.
    """
    from scipy.io import loadmat

    try:
        with tarfile.open(devkit) as archive:
            parts = [
                archive.extractfile(f"{_DEVKIT}/data/{name}")
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            ]
            meta, truth = (part.read() for part in parts if part is not None)
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Inner nodes of WordNet are listed, too; the classes are those without children.
        leaves = synsets[synsets["num_children"] == 0]
        ids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        labels = [ids[int(one)] for one in truth.split()]
        if len(labels) != number:
            raise ValueError(f"it has {len(labels)} labels for {number} images")
        return tuple(sorted(ids.values())), labels
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{devkit} is damaged, or is not the devkit ({error}): fetch it again"
        ) from error
