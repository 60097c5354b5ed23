"""Shards and the official tars: found, listed, refused, and read in place."""

import gzip
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from shlex import quote

import numpy as np
import psutil
import pytest
from samples import images_by_class, write_official, write_shards, write_tar

from tetdist.datasets import index as ix
from tetdist.datasets.layouts import check_same_classes, imagenet_classes, list_split
from tetdist.datasets.reader import SampleReader
from tetdist.errors import UserError


def build(root, split="train", classes=None):
    listing = list_split(root, split, "images", class_names=classes)
    return ix.index_listing(root, listing, workers=1)


def contents(index, root):
    with SampleReader(index, root) as reader:
        return [reader.read(i).tobytes() for i in range(len(index))]


@pytest.fixture
def shard_root(image_root, tmp_path):
    """Class folders, and a root of shards of them."""
    root, dest = image_root(), tmp_path / "shards"
    write_shards(root, dest, "train", "imagenet1k-train-{:04d}.tar")
    write_shards(root, dest, "val", "imagenet1k-validation-{:02d}.tar")
    return root, dest


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_are_the_data_set_that_they_were_made_of(shard_root, split):
    root, dest = shard_root
    (dest / "classes.txt").write_text("ant\nbee\ncow\n")
    folder, _ = ix.build_index(root, split, workers=1)
    ix.index_splits(dest, [split])
    index = ix.load_index(dest / "index" / f"{split}.npz")
    assert len(index.archives) == 3
    assert index.fingerprint == folder.fingerprint
    assert index.labels.tolist() == folder.labels.tolist()
    assert contents(index, dest) == contents(folder, root)
    assert index.path(0).startswith("imagenet1k-")
    assert index.path(0).endswith(".tar/00000000.jpg")
    ix.check_fresh(index, dest)


def test_shards_of_any_name_may_be_linked_into_the_folder_of_a_split(shard_root):
    root, dest = shard_root
    write_shards(root, dest, "train", "packed/x-{:02d}.part.tar")
    (dest / "train").symlink_to("packed")
    index, _ = build(dest)
    assert len(index) == 12
    assert {file.rpartition("/")[0] for file in index.archives} == {"train"}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("few.txt", "labels up to 2, but there are 2 class names in few.txt"),
        ("twice.txt", "names a class twice"),
    ],
)
def test_what_the_user_says_must_be_so(shard_root, monkeypatch, classes, words):
    monkeypatch.chdir(shard_root[1])
    (shard_root[1] / "few.txt").write_text("ant\nbee\n")
    (shard_root[1] / "twice.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(UserError, match=words):
        build(shard_root[1], classes=classes)
    (shard_root[1] / "imagenet1k-train-0001.tar").unlink()
    with pytest.raises(UserError, match=r"the shard imagenet1k-train-0001.tar is missing"):
        build(shard_root[1], classes=classes)


def test_classes_of_shards(shard_root, tmp_path):
    _, dest = shard_root
    assert build(dest)[0].classes == ("0", "1", "2")
    index, _ = build(dest, classes="imagenet-1k")
    assert index.command("/data").endswith("/data --splits train --classes imagenet-1k")
    assert (len(index.classes), index.classes[0]) == (1000, "n01440764")
    assert index.classes == tuple(sorted(index.classes)) == imagenet_classes()
    # Numbers sort as they count.
    image = next(iter(images_by_class(shard_root[0], "train")["ant"].values()))
    for split, labels in (("train", range(11)), ("val", range(10))):
        members = {f"{i}.{what}": image for i in labels for what in ("jpg", "cls")}
        members |= {f"{i}.cls": str(i).encode() for i in labels}
        write_tar(tmp_path / "more" / split / "0.tar", members)
    index, _ = build(tmp_path / "more")
    assert index.classes == tuple(sorted(index.classes))
    assert (index.classes[2], index.labels.tolist()) == ("02", list(range(11)))
    with pytest.raises(UserError, match=r"the class '.*' is in .*--classes.*data.held_out"):
        check_same_classes({s: build(tmp_path / "more", s)[0].classes for s in ("train", "val")})


def test_samples_without_image_or_label_are_named(image_root, tmp_path):
    image = next(iter(images_by_class(image_root(), "train")["ant"].values()))
    good = {"a/1.jpg": image, "a/1.cls": b"0", "b/1.jpeg": image, "b/1.json": b'{"cls": 1}'}
    good["a/1.json"] = b'{"width": 5}'
    bad = {
        "x1.jpg": ({".jpg": image}, "no label"),
        "x2.jpg": ({".jpg": image, ".cls": b"dog"}, "'dog' is not an integer"),
        "x3.jpg": ({".jpg": image, ".cls": b"-1"}, "'-1' is not an integer"),
        "x4.jpg": ({".jpg": image, ".json": b"{"}, ".json is damaged"),
        "x5.jpg": ({".jpg": image, ".json": b'{"label": true}'}, "True is not an integer"),
        "x6.jpg": ({".jpg": image, ".json": b"[1]"}, "not an object"),
        "x7": ({".cls": b"0"}, "0 images"),
        "x8": ({".jpg": image, ".png": image, ".cls": b"1"}, "2 images"),
        "x9.jpg": ({".jpg": b"hello", ".cls": b"1"}, "not an image"),
        "x10.jpg": (
            {".jpg": image, ".cls": b"0", ".json": b'{"label": 1}'},
            "labels differ: '0', 1",
        ),
    }
    members = {"._x10.jpg": b"what a Mac leaves"} | good
    for name, (parts, _) in bad.items():
        members |= {name.split(".")[0] + suffix: data for suffix, data in parts.items()}
    write_tar(tmp_path / "t" / "train" / "0.tar", members)
    index, found = build(tmp_path / "t")
    assert index.labels.tolist() == [0, 1]
    assert [index.path(i) for i in (0, 1)] == ["train/0.tar/a/1.jpg", "train/0.tar/b/1.jpeg"]
    reasons = dict(found)
    assert set(reasons) == {f"train/0.tar/{name}" for name in bad}
    for name, (_, words) in bad.items():
        assert words in reasons[f"train/0.tar/{name}"]


def hostile(name="good.jpg", kind=tarfile.REGTYPE, link="", data=b"12"):
    def add(archive):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = len(data) if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(data))

    return add


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (hostile("/etc/x.jpg"), "'/etc/x.jpg', whose name leads out"),
        (hostile("a/../../x.jpg"), "'a/../../x.jpg', whose name leads out"),
        (hostile("x.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'x.jpg', which is a link"),
        (hostile("x.jpg", tarfile.LNKTYPE, "good.jpg"), "'x.jpg', which is a link"),
        (hostile("x.jpg", tarfile.FIFOTYPE), "'x.jpg', which is a device or a pipe"),
        (hostile("x.jpg", tarfile.CHRTYPE), "'x.jpg', which is a device or a pipe"),
        (hostile("0.jpg"), "'0.jpg' twice"),
    ],
)
def test_what_does_not_belong_in_a_tar_is_refused(tmp_path, member, words):
    file = tmp_path / "train" / "0.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as archive:
        hostile("0.jpg")(archive)
        hostile("0.cls", data=b"1")(archive)
        member(archive)
    with pytest.raises(UserError, match=words) as error:
        build(tmp_path)
    assert "train/0.tar" in str(error.value)


def cut(at):
    return lambda data: data[:at]


def flip(at):
    return lambda data: data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


# In the first member, between two members, before the end mark; the headers.
SPOILT = [*map(cut, (0, 100, 700, 1024, 2048)), flip(5), flip(1030), gzip.compress]


@pytest.mark.parametrize("spoil", [*SPOILT, lambda _: b"hello" * 1000])
def test_a_damaged_tar_is_not_taken_for_a_shorter_one(tmp_path, spoil):
    file = write_tar(tmp_path / "train" / "0.tar", {"0.jpg": b"x" * 300, "0.cls": b"1"})
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"train/0.tar is not a complete, uncompressed tar"):
        build(tmp_path)


@pytest.fixture
def official_root(image_root, tmp_path):
    root, dest = image_root(), tmp_path / "official"
    return root, dest, write_official(root, dest)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_official_tars_are_read_in_place(official_root, split):
    root, dest, ids = official_root
    index, bad = ix.build_index(dest, split, workers=1)
    assert bad == []
    assert index.classes == tuple(sorted(ids.values()))
    expected = {ids[name]: sorted(fs.values()) for name, fs in images_by_class(root, split).items()}
    found = {name: [] for name in index.classes}
    for label, data in zip(index.labels, contents(index, dest), strict=True):
        found[index.classes[label]].append(data)
    assert {name: sorted(images) for name, images in found.items()} == expected
    ix.check_fresh(index, dest)
    if split == "train":
        member = "n00000002.tar/n00000002_0.JPEG"
        assert index.path(4) == f"ILSVRC2012_img_train.tar/{member}"


def test_labels_that_do_not_belong_to_the_images_are_refused(official_root):
    _, dest, _ = official_root
    file = dest / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(dest / "ILSVRC2012_img_val.tar", "a") as archive:
        hostile("ILSVRC2012_val_99999999.JPEG")(archive)
    with pytest.raises(UserError, match=r"devkit_t12.tar.gz .*it has (\d+) labels for \d+ images"):
        build(dest, "val")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged, or is not the devkit"):
        build(dest, "val")
    file.unlink()
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12.tar.gz beside it"):
        build(dest, "val")


def test_a_class_tar_that_is_cut_off_inside_the_whole_one_is_noticed(official_root):
    _, dest, _ = official_root
    inner = write_tar(dest / "i.tar", {"n1_0.JPEG": b"x" * 9000}).read_bytes()
    members = {"n1.tar": inner[:5120], "n2.tar": inner}
    write_tar(dest / "ILSVRC2012_img_train.tar", members)
    with pytest.raises(UserError, match="cut off within a file"):
        build(dest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "0001.tar in .* cannot be read"),
        (lambda file: file.write_bytes(b"12345"), "0001.tar has 5 bytes instead"),
        (lambda file: os.utime(file, ns=(2**62, 2**62)), "0001.tar is newer than the index"),
    ],
)
def test_shards_that_changed_make_an_index_stale(shard_root, tmp_path, change, words):
    _, dest = shard_root
    index, _ = build(dest)
    file = tmp_path / "i.npz"
    ix.save_index(index, file)
    ix.check_fresh(index, dest, file)
    change(dest / "imagenet1k-train-0001.tar")
    with pytest.raises(UserError, match=words) as error:
        ix.check_fresh(index, dest, file)
    assert f"tools/images.py index {quote(str(dest))} --splits train" in str(error.value)


def test_a_reader_names_what_it_cannot_read(shard_root):
    _, dest = shard_root
    index, _ = build(dest)
    file = dest / index.archives[0]
    last = max(range(len(index)), key=lambda i: (index.archive_ids[i] == 0, index.offsets[i]))
    os.truncate(file, int(index.offsets[last]) + 10)
    with SampleReader(index, dest) as reader:
        with pytest.raises(UserError, match=r"000000\d\d.jpg in .* is cut off.*images.py index"):
            reader.read(last)
        reader.close()
        file.unlink()
        with pytest.raises(UserError, match=r"cannot be read \(No such file"):
            reader.read(last)


def test_a_reader_of_many_archives_keeps_some_open_and_closes_them(image_root, tmp_path):
    image = next(iter(images_by_class(image_root(), "train")["ant"].values()))
    for k in range(300):
        members = {f"{k}.jpg": image + bytes([k % 256]), f"{k}.cls": str(k % 2).encode()}
        write_tar(tmp_path / "many" / "train" / f"{k:03d}.tar", members)
    index, _ = build(tmp_path / "many")
    this = psutil.Process()
    before = this.num_fds()
    with SampleReader(index, tmp_path / "many") as reader:
        order = np.random.default_rng(0).integers(0, 300, 3000).tolist()
        with ThreadPoolExecutor(8) as pool:
            for i, data in zip(order, pool.map(reader.read, order), strict=True):
                number = int(index.path(i).split("/")[-1].removesuffix(".jpg"))
                assert data.tobytes() == image + bytes([number % 256])
        assert 0 < this.num_fds() - before <= 256
    assert this.num_fds() <= before  # an earlier test may have left some to the collector
