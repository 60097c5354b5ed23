"""Pack an indexed split into WebDataset shards: KEY.jpg and KEY.cls in plain tar files.

The same index, seed and size give the same bytes on any machine. Each shard holds a random choice
of the samples, for readers that shuffle only within a few shards; tetdist's training shuffles all
samples anyway.
"""

import functools
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tetdist.datasets import archives
from tetdist.datasets.index import Index, build_index, index_file, load_index, save_index
from tetdist.datasets.layouts import CLASSES_FILE
from tetdist.datasets.processes import ReportProgress, run_tasks
from tetdist.datasets.reader import SampleReader
from tetdist.errors import UserError
from tetdist.order import permutation
from tetdist.storage.files import check_space, explaining, only_writer, replacing, settle

_PLAN_FILE = "plan.json"
_VERSION = 1
_BLOCK = 512
# Letters of the sample's own name in its key; a tar's header has room for 100 bytes.
_NAME_LENGTH = 60


class Packed(NamedTuple):
    """A sample for a shard: its number in the split, path, label and bytes."""

    number: int
    path: str
    label: int
    data: bytes


def shard_split(
    file: Path,
    root: str | Path,
    dest: Path,
    *,
    seed: int,
    max_bytes: int,
    workers: int,
    progress: ReportProgress | None = None,
) -> Index:
    """Pack the good samples of an index into DEST/SPLIT/SPLIT-000000.tar and following.

    Existing shards are kept, so a stopped packing continues. DEST also gets classes.txt and the
    index of the shards, with the fingerprint of the given one.

    Args:
        max_bytes: Size of a shard; a larger sample gets a separate one.
    """
    index = load_index(file)
    if index.kind != "images":
        raise UserError(f"{file} is an index of {index.kind}, but only images can be packed")
    plan = plan_shards(index, seed, max_bytes)
    sizes = [int(_tar_sizes(index)[ids].sum()) for ids in plan]
    settings = {"fingerprint": index.fingerprint, "seed": seed, "max_bytes": max_bytes}
    read = functools.partial(_read, file, root)
    return pack(dest, index.split, index.classes, settings, plan, sizes, read, workers, progress)


def pack(
    dest: Path,
    split: str,
    classes: Sequence[str],
    settings: dict[str, Any],
    plan: Sequence[Any],
    sizes: Sequence[int],
    read: Callable[[Any], Iterable[Packed]],
    workers: int,
    progress: ReportProgress | None,
) -> Index:
    """Write the shards that do not exist yet, and their index; see `shard_split`.

    Args:
        settings: Values on which the shards depend; the index must have their fingerprint.
        plan: Description of each shard's samples, which `read` yields in a worker.
        sizes: Bytes that each shard needs.
    """
    folder = dest / split
    with only_writer(folder):
        _begin(dest, split, classes, settings | {"shards": len(plan)})
        files = [folder / f"{split}-{number:06d}.tar" for number in range(len(plan))]
        tasks = list(zip(files, plan, strict=True))
        check_space(folder, sum(n for f, n in zip(files, sizes, strict=True) if not f.is_file()))
        for _ in run_tasks(functools.partial(_pack, read), tasks, workers, progress):
            pass
        packed, _ = build_index(dest, split, workers, decode=False)
        if packed.fingerprint != settings.get("fingerprint", packed.fingerprint):
            raise UserError(
                f"the shards in {folder} do not match the index: remove the folder and pack again"
            )
        save_index(packed, index_file(dest / "index", split))
    return packed


def plan_shards(index: Index, seed: int, max_bytes: int) -> list[npt.NDArray[np.int64]]:
    """Return the sample numbers of each shard: every sample once, in the order of (seed, 0)."""
    order = permutation(len(index), seed, epoch=0)
    ends = np.cumsum(_tar_sizes(index)[order])
    plan, first, done = [], 0, 0
    while first < len(order):
        last = max(int(np.searchsorted(ends, done + max_bytes, "right")), first + 1)
        plan.append(order[first:last])
        first, done = last, int(ends[last - 1])
    return plan


def _tar_sizes(index: Index) -> npt.NDArray[np.int64]:
    """Return each sample's bytes (N,) in a tar: a header and whole blocks, for two members."""
    return 3 * _BLOCK + -(-index.file_sizes // _BLOCK) * _BLOCK


def _begin(dest: Path, split: str, names: Sequence[str], settings: dict[str, Any]) -> None:
    """Write the plan of the shards, or check that an existing one is the same."""
    plan = {"version": _VERSION, **settings}
    plan_file, classes_file = dest / split / _PLAN_FILE, dest / CLASSES_FILE
    classes = "".join(f"{name}\n" for name in names).encode()
    if classes_file.is_file() and classes_file.read_bytes() != classes:
        raise UserError(f"{classes_file} names other classes than the index: choose another folder")
    if plan_file.is_file():
        known: dict[str, Any] = json.loads(plan_file.read_bytes())
        for name, value in plan.items():
            if known.get(name) != value:
                raise UserError(
                    f"{plan_file.parent} holds shards with {name} {known.get(name)} instead of"
                    f" {value}: pack with the same settings and data, or into another folder"
                )
        return
    if any(plan_file.parent.iterdir()):
        raise UserError(f"{plan_file.parent} is not empty: choose another folder")
    for file, data in ((classes_file, classes), (plan_file, json.dumps(plan).encode())):
        with explaining(file), replacing(file) as stream:
            stream.write(data)


_load_once = functools.lru_cache(maxsize=1)(load_index)


def _read(index_file: Path, root: str | Path, ids: npt.NDArray[np.int64]) -> Iterator[Packed]:
    index = _load_once(index_file)
    with SampleReader(index, root) as reader:
        for i in ids.tolist():
            yield Packed(i, index.path(i), int(index.labels[i]), reader.read(i).tobytes())


def _pack(read: Callable[[Any], Iterable[Packed]], task: tuple[Path, Any]) -> None:
    """Write one shard, verify it, and only then give it its name."""
    file, samples = task
    if file.is_file():
        return
    checksums: dict[str, str] = {}
    with explaining(file), replacing(file) as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, path, label, data in read(samples):
                key, suffix = _key(number, path)
                checksums[key + suffix] = _checksum(data)
                _add(archive, key + suffix, data)
                _add(archive, f"{key}.cls", str(label).encode())
        settle(stream)
        _verify(Path(stream.name), file, checksums)


def _key(i: int, file: str) -> tuple[str, str]:
    """Return a sample's key and suffix in the shards: its number first, to keep the order."""
    path = PurePosixPath(file)
    suffix = path.suffix.lower()
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:_NAME_LENGTH]
    return f"{i:08d}-{name}", ".jpg" if suffix == ".jpeg" else suffix


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # Owner and time stay 0: the bytes must not depend on the user or the date.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _verify(aside: Path, file: Path, checksums: dict[str, str]) -> None:
    members = archives.shard_samples(aside).members
    if {m.name: _checksum(archives.read(aside, m)) for m in members} != checksums:
        raise UserError(f"{file} differs from what was written: its disk is faulty; use another")
