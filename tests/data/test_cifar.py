"""tools/cifar.py: the binary archives become a folder of images, and nothing else is believed."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tetdist.datasets import processes
from tetdist.datasets.index import check_fresh, index_file, load_index

TEN = [f"class{i}" for i in range(10)]
HUNDRED = [f"fine_{i}" for i in range(100)]


def records(labels, seed):
    """Images with their label bytes, as in the archives; and their pixels (N, 32, 32, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    rows = np.concatenate([np.array(labels, np.uint8), pixels.reshape(len(labels), -1)], axis=1)
    return rows.tobytes(), pixels.transpose(0, 2, 3, 1)


def archive(file, contents):
    with tarfile.open(file, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def cifar10(changes=None):
    """Two images of each class to train, one to validate."""
    folder = "cifar-10-batches-bin"
    contents = {
        f"{folder}/data_batch_{i}.bin": records([[2 * i - 2], [2 * i - 1]] * 2, i)[0]
        for i in range(1, 6)
    }
    contents[f"{folder}/test_batch.bin"] = records([[label] for label in range(10)], 0)[0]
    contents[f"{folder}/batches.meta.txt"] = "\n".join([*TEN, "", ""]).encode()
    contents[f"{folder}/readme.html"] = b"<html>"
    contents |= {f"{folder}/{name}": content for name, content in (changes or {}).items()}
    return {name: content for name, content in contents.items() if content is not None}


def test_cifar10(output_of, tmp_path):
    (tmp_path / ".ten.4194305.tmp" / "train").mkdir(parents=True)  # what a kill leaves
    (tmp_path / ".ten.1.tmp").mkdir()  # of another process, at work
    output = output_of("cifar.py", archive(tmp_path / "ten.tar.gz", cifar10()), tmp_path / "ten")
    assert "20 images to train and 10 to validate, in 10 classes" in output
    files = sorted((tmp_path / "ten" / "train" / "class3").iterdir())
    assert [file.name for file in files] == ["00005.png", "00007.png"]
    # They are the second and the fourth image of the second file.
    pixels = records([[2], [3]] * 2, 2)[1]
    for file, expected in zip(files, pixels[1::2], strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), expected)
    for split, count in (("train", 20), ("val", 10)):
        index = load_index(index_file(tmp_path / "ten" / "index", split))
        assert (len(index), list(index.classes)) == (count, TEN)
        check_fresh(index, tmp_path / "ten")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".ten.1.tmp", "ten", "ten.tar.gz"]


def test_cifar100_takes_the_fine_label(output_of, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_SAMPLES_PER_TASK", 100)  # so that no process is started
    labels = [[label % 20, label] for label in range(100)]
    train, pixels = records(labels, 1)
    contents = {
        "cifar-100-binary/train.bin": train,
        "cifar-100-binary/test.bin": records(labels, 2)[0],
        "cifar-100-binary/fine_label_names.txt": "\n".join(HUNDRED).encode(),
        "cifar-100-binary/coarse_label_names.txt": b"animals\n",
    }
    output_of("cifar.py", archive(tmp_path / "hundred.tar.gz", contents), tmp_path / "hundred")
    (file,) = (tmp_path / "hundred" / "train" / "fine_42").iterdir()
    assert np.array_equal(np.asarray(Image.open(file)), pixels[42])


def test_the_first_of_each_class(output_of, tmp_path):
    three_each = records([[k] for k in range(10)] * 3, 0)[0]
    contents = cifar10({"test_batch.bin": three_each})
    file = archive(tmp_path / "ten.tar.gz", contents)
    output = output_of("cifar.py", file, tmp_path / "ten", "--per-class", "1,2")
    assert "10 images to train and 20 to validate" in output
    (first,) = (tmp_path / "ten" / "train" / "class3").iterdir()
    assert first.name == "00005.png"


def test_pickles_are_refused_and_not_opened(output_of, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "trapped",)

    file = archive(
        tmp_path / "cifar-10-python.tar.gz",
        {
            "cifar-10-batches-py/data_batch_1": pickle.dumps(Trap()),
            "cifar-10-batches-py/batches.meta": pickle.dumps(Trap()),
        },
    )
    output = output_of("cifar.py", file, tmp_path / "ten", status=2)
    assert "pickles" in output
    assert "cifar-10-binary.tar.gz" in output
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, ("damaged, or no tar; get it again",)),
        ({"data_batch_3.bin": None}, ("lacks data_batch_3.bin",)),
        ({"data_batch_3.bin": b"torn"}, ("train", "ends within an image")),
        ({"test_batch.bin": records([[label] for label in range(1, 11)], 0)[0]}, ("label 10",)),
        ({"batches.meta.txt": b"one\ntwo\n"}, ("batches.meta.txt", "10 class names")),
        (
            {"batches.meta.txt": "\n".join(["../../away", *TEN[1:]]).encode()},
            ("batches.meta.txt", "10 class names"),
        ),
    ],
)
def test_a_wrong_archive_is_named(output_of, tmp_path, changes, words):
    file = archive(tmp_path / "ten.tar.gz", cifar10(changes))
    if changes is None:  # the checksum, which is behind all that tar reads
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    output = output_of("cifar.py", file, tmp_path / "ten", status=2)
    assert [word for word in ("ten.tar.gz", *words) if word not in output] == [], output
    assert not (tmp_path / "ten").exists()
