"""tools/fashion_mnist.py: IDX files become a folder of images if their checksums are right."""

import gzip
import hashlib

import numpy as np
import pytest
from PIL import Image

from tetdist.apps.cli import fashion_mnist
from tetdist.datasets.index import load_index

# Labels are not in order, so files of one class have numbers of several places.
LABELS = {"train": [9, 3, 0, 8, 1, 7, 2, 6, 4, 5, 3, 9], "t10k": [*range(10)]}
TRAIN = "train-images-idx3-ubyte"


def idx(values):
    """Return an array as an IDX file: type and number of axes, sizes, values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def pixels(part):
    return np.random.default_rng(len(part)).integers(0, 256, (len(LABELS[part]), 28, 28), np.uint8)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with small files of the published names; two are compressed."""
    contents = {}
    for part, labels in LABELS.items():
        contents[f"{part}-images-idx3-ubyte"] = idx(pixels(part))
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.array(labels, np.uint8))
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, content in contents.items():
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "_SHA256", sums)
    return folder


def test_files_become_class_folders_with_published_labels(output_of, tmp_path, source):
    dest = tmp_path / "fashion"
    output = output_of("fashion_mnist.py", dest, "--source", source)
    assert "12 images to train and 10 to validate, in 10 classes" in output
    folders = sorted(folder.name for folder in (dest / "train").iterdir())
    assert (folders[0], folders[9]) == ("0-t-shirt-top", "9-ankle-boot")
    for split, part in (("train", "train"), ("val", "t10k")):
        index = load_index(dest / "index" / f"{split}.npz")
        assert list(index.classes) == folders
        found = sorted((dest / split).rglob("*.png"), key=lambda file: file.name)
        assert [int(file.parent.name[0]) for file in found] == LABELS[part]
        for file, expected in zip(found, pixels(part), strict=True):
            assert np.array_equal(np.asarray(Image.open(file)), expected)
    assert "not empty" in output_of("fashion_mnist.py", dest, "--source", source, status=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), (f"neither {TRAIN} nor", "dataset-fashion-mnist", "--source")),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), (f"{TRAIN}.gz cannot be read",)),
        (
            lambda file: file.write_bytes(gzip.compress(idx(pixels("t10k")))),
            (f"{TRAIN}.gz is incomplete or from another data set",),
        ),
    ],
)
def test_a_wrong_file_is_named(output_of, tmp_path, source, change, words):
    change(source / f"{TRAIN}.gz")
    output = output_of("fashion_mnist.py", tmp_path / "fashion", "--source", source, status=2)
    assert [word for word in words if word not in output] == [], output
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]
