"""Parquet files of the Hugging Face hub: packed as the data set that they hold, or refused."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import picture

from tetdist.apps.images import parquet
from tetdist.datasets import index as ix
from tetdist.datasets.reader import SampleReader

IDS = ("n00000001", "n00000002", "n00000003")
# In class folders 1002 comes before 10026; with the hub's ending it would come after it.
NUMBERS = (7, 1002, 10026)
COUNTS = {"train": 9, "val": 3}


@pytest.fixture
def folders(tmp_path):
    """Class folders with the names of ImageNet."""
    root = tmp_path / "folders"
    for k, name in enumerate(IDS):
        for split, numbers in (("train", NUMBERS), ("val", NUMBERS[:1])):
            (root / split / name).mkdir(parents=True)
            for i, number in enumerate(numbers):
                stem = f"{name}_{number}" if split == "train" else f"ILSVRC2012_val_{k:08d}"
                image = picture(30 + k, 40 + i, seed=10 * k + i)
                image.save(root / split / name / f"{stem}.JPEG", quality=90)
    ix.index_splits(root)
    return root


def write(file, rows, *, names=None, columns=("image", "label")):
    """Write images with labels in the hub's form, in several row groups."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = [
        pa.array([{"bytes": data, "path": path} for data, path, _ in rows], image),
        pa.array([label for *_, label in rows], pa.int64()),
    ]
    features = {"label": {"_type": "ClassLabel", "names": names}} if names else {}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(arrays, names=list(columns)).replace_schema_metadata(about)
    # Uncompressed, so that a test can damage an image where it is.
    pq.write_table(table, file, row_group_size=2, compression="none", write_statistics=False)


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The same images as on the hub: shuffled, the class at the end of each name."""
    monkeypatch.setattr(parquet, "imagenet_classes", lambda: IDS)
    monkeypatch.setattr(parquet, "IMAGENET_COUNTS", COUNTS)
    root = tmp_path / "hub"
    for split, name, parts in (("train", "train", 2), ("val", "validation", 1)):
        rows = [
            (file.read_bytes(), f"{file.stem}_{file.parent.name}.JPEG", IDS.index(file.parent.name))
            for file in sorted((folders / split).glob("*/*"), key=lambda file: file.name[::-1])
        ]
        for i in range(parts):
            file = root / "data" / f"{name}-{i:05d}-of-{parts:05d}.parquet"
            write(file, rows[i::parts], names=["a crane", "a crane", "a dog"])
    return root


def shard(call, hub, *arguments):
    return call("images.py", "shard", hub, hub / "p", "--from-parquet", "--workers", 1, *arguments)


def test_imagenet_of_the_hub_is_that_of_the_folders(folders, hub, call):
    status, output = shard(call, hub)
    assert status == 0, output
    assert "train: 9 images in 2 tar files in 3 classes, packed and indexed" in output
    assert (hub / "p" / "classes.txt").read_text().split() == list(IDS)
    for split, count in COUNTS.items():
        packed, known = (
            ix.load_index(at / "index" / f"{split}.npz") for at in (hub / "p", folders)
        )
        assert packed.fingerprint == known.fingerprint
        ix.check_fresh(packed, hub / "p", hub / "p" / "index" / f"{split}.npz")
        with SampleReader(packed, hub / "p") as a, SampleReader(known, folders) as b:
            assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(count))
    assert packed.path(0) == "val/val-000000.tar/00000000-ILSVRC2012_val_00000000.jpg"


def test_packing_continues_where_a_damaged_image_stopped_it(hub, call):
    file = hub / "data" / "train-00001-of-00002.parquet"
    good = shutil.copy(file, hub / "good")
    image, data = pq.read_table(file)["image"][1]["bytes"].as_py(), file.read_bytes()
    assert data.count(image) == 1
    file.write_bytes(data.replace(image, bytes(len(image))))
    status, output = shard(call, hub)
    assert status == 2
    assert f".JPEG in {file} cannot be used (" in output
    first = hub / "p" / "train" / "train-000000.tar"
    written = first.stat().st_mtime_ns
    assert [file.name for file in first.parent.glob("*.tar")] == [first.name]
    shutil.copy(good, file)
    status, output = shard(call, hub)
    assert status == 0, output
    assert first.stat().st_mtime_ns == written
    assert shard(call, hub)[0] == 0


def test_other_sets_have_the_names_of_the_hub_or_numbers(folders, tmp_path, call):
    images = [file.read_bytes() for file in sorted(folders.rglob("*.JPEG"))]
    for names, expected in ((["dog", "cat"], ["dog", "cat"]), (["dog", "dog"], ["0", "1"])):
        root = tmp_path / names[1]
        rows = [(data, None, k % 2) for k, data in enumerate(images)]
        write(root / "train.parquet", rows, names=names)
        write(root / "val.parquet", rows[:4], names=names)
        status, output = shard(call, root)
        assert status == 0, output
        assert (root / "p" / "classes.txt").read_text().split() == expected
        index = ix.load_index(root / "p" / "index" / "train.npz")
        assert index.path(0) == "train/train-000000.tar/00000000-image.jpg"
        with SampleReader(index, root / "p") as reader:
            # In the order of the files, where no names give another.
            assert [reader.read(i).tobytes() for i in range(12)] == images[::2] + images[1::2]


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def relabel(file):
    rows = pq.read_table(file).to_pylist()
    write(file, [(*r["image"].values(), (r["label"] + (i == 2)) % 3) for i, r in enumerate(rows)])


def drop_row(file):
    rows = pq.read_table(file).to_pylist()
    write(file, [(*r["image"].values(), r["label"]) for r in rows[1:]])


def bent(file):
    """A name with another number, which only the checksum of its page tells from the right one."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pq.read_table(file), file, write_page_checksum=True, **options)
    data = file.read_bytes()
    assert data.count(b"_1002_") == 1
    file.write_bytes(data.replace(b"_1002_", b"_1003_"))


ROW = [(b"", "", 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "there is no train-00001-of-00002.parquet in "),
        (lambda file: file.write_text("version https://git-lfs"), "00001-of-00002.parquet is dama"),
        (cut, "train-00001-of-00002.parquet is damaged, or not Parquet ("),
        (lambda file: write(file, [(b"", "", -1)]), "00001-of-00002.parquet has rows without a cl"),
        (lambda file: write(file, ROW, columns=("img", "label")), "has the columns img.bytes, img"),
        (lambda file: write(file, [(b"", "", 30_000_000)]), "has the label 30000000, but labels"),
        (bent, "00001-of-00002.parquet is damaged, or not Parquet ("),
        (relabel, "1 of 12 images in "),
        (drop_row, "has 8 images of train, but ImageNet-1k has 9: fetch the missing files, or "),
    ],
)
def test_what_is_missing_or_broken_is_named_before_anything_is_packed(hub, call, change, words):
    change(hub / "data" / "train-00001-of-00002.parquet")
    status, output = shard(call, hub)
    assert status == 2
    assert words in output
    assert not (hub / "p").exists()
    assert "there is no test-00000-of-N.parquet" in shard(call, hub, "--splits", "test")[1]


@pytest.mark.parametrize(
    ("change", "count", "classes"), [(drop_row, 8, list(IDS)), (relabel, 9, ["0", "1", "2"])]
)
def test_part_of_imagenet_is_packed_on_request(hub, call, change, count, classes):
    change(hub / "data" / "train-00001-of-00002.parquet")
    assert "--subset to " in shard(call, hub)[1]
    status, output = shard(call, hub, "--subset")
    assert status == 0, output
    assert len(ix.load_index(hub / "p" / "index" / "train.npz")) == count
    assert (hub / "p" / "classes.txt").read_text().split() == classes
