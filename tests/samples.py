"""What several tests of the data room share."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image that no flip, turn or shift leaves as it is."""
    rows = np.linspace(0, 1, height)[:, None]
    columns = np.linspace(0, 1, width)[None, :]
    phase = np.random.default_rng(seed).uniform(0, 6, 6)
    channels = [
        np.sin(5 * rows + 3 * columns + phase[i]) + np.cos(2 * rows - 7 * columns + phase[i + 3])
        for i in range(3)
    ]
    return Image.fromarray((np.stack(channels, axis=2) * 60 + 127).astype(np.uint8))


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    """A tar of regular files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def images_by_class(root: Path, split: str) -> dict[str, dict[str, bytes]]:
    """The files of class folders: class -> name -> bytes."""
    return {
        folder.name: {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        for folder in sorted((root / split).iterdir())
    }


def write_shards(root: Path, dest: Path, split: str, pattern: str, per_shard: int = 5) -> None:
    """Shards of class folders as others write them: mixed classes, a key a number, .cls or .json.

    The order of the keys is that of the folders. `pattern` has a place for the shard's number.
    """
    samples = [
        (label, data)
        for label, files in enumerate(images_by_class(root, split).values())
        for data in files.values()
    ]
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    for number, start in enumerate(range(0, len(order), per_shard)):
        members = {}
        for i in order[start : start + per_shard]:
            label, data = samples[i]
            members[f"{i:08d}.jpg"] = data
            if i % 2:
                members[f"{i:08d}.cls"] = f"{label}\n".encode()
            else:
                members[f"{i:08d}.json"] = json.dumps({"label": label, "name": "x"}).encode()
        write_tar(dest / pattern.format(number), members)


# Not the order of the ids: the devkit has one of its own.
DEVKIT_NUMBERS = {"n00000003": 1, "n00000001": 2, "n00000002": 3}


def write_official(root: Path, dest: Path) -> dict[str, str]:
    """The official tars of class folders "train" and "val" of three classes, and the devkit.

    Returns:
        The WordNet id that stands for each class.
    """
    from scipy.io import savemat

    ids = dict(zip(sorted(images_by_class(root, "train")), sorted(DEVKIT_NUMBERS), strict=True))
    inner = {}
    for name, files in images_by_class(root, "train").items():
        file = write_tar(
            dest / "inner.tar",
            {f"{ids[name]}_{i}.JPEG": data for i, data in enumerate(files.values())},
        )
        inner[f"{ids[name]}.tar"] = file.read_bytes()
        file.unlink()
    write_tar(dest / "ILSVRC2012_img_train.tar", inner)
    val = [
        (ids[name], data)
        for name, files in images_by_class(root, "val").items()
        for data in files.values()
    ]
    val = [val[i] for i in np.random.default_rng(1).permutation(len(val))]
    write_tar(
        dest / "ILSVRC2012_img_val.tar",
        {f"ILSVRC2012_val_{i:08d}.JPEG": data for i, (_, data) in enumerate(val, 1)},
    )
    rows = [(number, wnid, 0) for wnid, number in DEVKIT_NUMBERS.items()]
    rows.append((4, "n00000009", 3))  # An inner node of WordNet.
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    stream = io.BytesIO()
    savemat(stream, {"synsets": np.array(rows, kind)})
    truth = "".join(f"{DEVKIT_NUMBERS[wnid]}\n" for wnid, _ in val)
    folder = "ILSVRC2012_devkit_t12/data"
    plain = write_tar(
        dest / "devkit.tar",
        {
            f"{folder}/meta.mat": stream.getvalue(),
            f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
        },
    )
    (dest / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return ids


def pixels(file: Path, colour: str) -> int:
    """How many pixels of a picture have a colour, #RRGGBB, exactly."""
    with Image.open(file) as image:
        counted = image.convert("RGB").getcolors(image.width * image.height)
    assert counted is not None
    return {value: count for count, value in counted}.get(tuple(bytes.fromhex(colour[1:])), 0)
