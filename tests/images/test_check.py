"""The check of images: what it finds, and that it goes on where it was stopped."""

import json
import os
import time

import pytest
from PIL import Image
from samples import picture, write_shards, write_tar

from tetdist.apps.images import check
from tetdist.datasets import index as ix
from tetdist.datasets.archives import ByteRange
from tetdist.datasets.layouts import Listing, imagenet_classes, list_split


def examine(root, split="train", progress=None):
    listing = list_split(root, split, "images")
    journal = root / "index" / f"check-{split}.jsonl"
    return listing, check.examine_split(root, listing, journal, 1, progress)


def by_kind(findings):
    found = {}
    for kind, path, text in findings:
        found.setdefault(kind, {})[path] = text
    return found


def test_damage_wrong_names_and_labels_are_found(tmp_path):
    for name in ("n00000001", "n00000002"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(20, 30, int(name[-1])).save(tmp_path / "train" / name / f"{name}_1.JPEG")
    folder = tmp_path / "train" / "n00000001"
    picture(20, 31).save(folder / "n00000001_2.JPEG", "PNG")
    picture(20, 32).save(folder / "n00000002_3.JPEG")
    (folder / "n00000001_4.JPEG").write_bytes(b"hello")
    (folder / "n00000001_5.JPEG").touch()
    data = (folder / "n00000001_1.JPEG").read_bytes()
    (folder / "n00000001_6.JPEG").write_bytes(data[: len(data) // 2])
    found = by_kind(check.split_findings(*examine(tmp_path)))
    truncated = found["bad"].pop("train/n00000001/n00000001_6.JPEG")
    assert truncated.startswith("cannot be decoded: ")
    assert found == {
        "misnamed": {"train/n00000001/n00000001_2.JPEG": "a PNG file; it is used as it is"},
        "label": {
            "train/n00000001/n00000002_3.JPEG": "its name has class n00000002, "
            "but its label is n00000001"
        },
        "bad": {
            "train/n00000001/n00000001_4.JPEG": "not an image",
            "train/n00000001/n00000001_5.JPEG": "the file is empty",
        },
    }


def test_a_check_that_was_stopped_goes_on(image_root):
    root = image_root(per_class=50)  # 150 samples: tasks of 64, 64 and 22

    def stop(done, _):
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(root, progress=stop)
    journal = root / "index" / "check-train.jsonl"
    with journal.open("a") as stream:
        stream.write("[128, [[12, 3")  # Torn by a kill.
    paths = [root / r.file for r in list_split(root, "train", "images").byte_ranges]
    # Spoilt without a trace, so what is known of it is not asked again; with one, it is.
    quiet, loud, later = paths[3], paths[5], paths[140]
    mtime = quiet.stat().st_mtime_ns
    for file in (quiet, loud, later):
        file.write_bytes(b"hello")
    os.utime(quiet, ns=(mtime, mtime))
    os.utime(loud, ns=(time.time_ns() + 10**9,) * 2)
    seen = []
    listing, examined = examine(root, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(150, 150)]  # 22 and the one that changed
    bad = [listing.path(i) for i, result in enumerate(examined) if isinstance(result, str)]
    assert bad == [str(file.relative_to(root)) for file in (loud, later)]
    # And once more from the end: nothing is left to do but what changed.
    assert examine(root)[1] == examined


def test_a_journal_of_other_files_is_not_used(image_root):
    root = image_root()
    examine(root)
    assert len((root / "index" / "check-train.jsonl").read_text().splitlines()) == 13
    picture(20, 30).save(root / "train" / "ant" / "a.jpg")
    seen = []
    examine(root, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(13, 13)]
    assert len((root / "index" / "check-train.jsonl").read_text().splitlines()) == 14


def test_a_journal_of_shards_is_of_the_archives_as_they_are(image_root, tmp_path):
    write_shards(image_root(), tmp_path / "s", "train", "train-{}.tar")
    _, first = examine(tmp_path / "s")
    file = tmp_path / "s" / "train-0.tar"
    data = file.read_bytes()
    file.write_bytes(data[:600] + bytes(300) + data[900:])
    os.utime(file, ns=(1, 1))
    listing, again = examine(tmp_path / "s")
    assert all(not isinstance(result, str) for result in first)
    changed = [listing.byte_ranges[i].file for i in range(12) if again[i] != first[i]]
    assert changed == ["train-0.tar"]


def listing_of(split, counts, names=None):
    """As if a split had so many images of each class."""
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    names = names or [f"{i}.JPEG" for i in range(len(labels))]
    return Listing(
        kind="images",
        split=split,
        classes=tuple(counts),
        labels=labels,
        names=names,
        byte_ranges=[ByteRange(name) for name in names],
    )


def test_missing_images_and_classes_of_imagenet_are_named():
    whole = dict.fromkeys(imagenet_classes(), 50)
    names = [f"val/x/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50_001)]
    assert list(check.imagenet_findings(listing_of("val", whole, names))) == []
    del names[3999], names[6]
    found = check.imagenet_findings(listing_of("val", whole | {"n01440764": 48}, names))
    assert {(finding.path, finding.text) for finding in found} == {
        ("val", "49,998 images where ImageNet-1k has 50,000"),
        ("val/n01440764", "48 images instead of 50"),
        ("val", "2 images: ILSVRC2012_val_00000007.JPEG, ILSVRC2012_val_00004000.JPEG"),
    }
    del whole["n01443537"]
    found = list(check.imagenet_findings(listing_of("val", whole | {"n99999999": 50})))
    assert [(kind, text) for kind, _, text in found] == [
        ("missing", "classes that are not in ImageNet-1k: n99999999"),
        ("missing", "1 of 1,000 classes: n01443537"),
    ]


def test_training_counts_of_imagenet_are_known():
    counts = dict.fromkeys(imagenet_classes(), 1300)
    counts |= {"n02747177": 731, "n15075141": 1301}
    texts = {path: text for _, path, text in check.imagenet_findings(listing_of("train", counts))}
    assert texts["train/n02747177"] == "731 images instead of 732 to 1,300"
    assert texts["train/n15075141"] == "1,301 images instead of 732 to 1,300"
    assert texts["train"].endswith("images where ImageNet-1k has 1,281,167")
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, None),
        (lambda root: (root / "train" / "bee" / "bee1.jpg").unlink(), "bee1.jpg is in the index"),
        (
            lambda root: turn(root / "train" / "bee" / "bee1.jpg"),
            "does not match the present files",
        ),
        (lambda root: (root / "index" / "train.npz").write_bytes(b"x"), "is damaged"),
        (lambda root: (root / "index" / "train.npz").unlink(), None),
    ],
)
def test_an_index_of_other_files_is_found(image_root, change, words):
    root = image_root()
    ix.index_splits(root, ["train"])
    if change:
        change(root)
    found = list(check.index_findings(root, root / "index", *examine(root)))
    if words is None:
        assert found == []
    else:
        ((kind, path, text),) = found
        assert (kind, path) == ("index", str(root / "index" / "train.npz"))
        assert words in text
        assert "tools/images.py index" in text


def turn(file):
    """Another image of as many bytes and the same age, which only decoding shows."""
    status = file.stat()
    with Image.open(file) as image:
        width, height = image.size
    picture(width, height).save(file, quality=60)
    file.write_bytes(file.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size


def test_shards_and_their_problems_are_checked_as_folders_are(image_root, tmp_path):
    root = image_root()
    image = (root / "train" / "ant" / "ant0.jpg").read_bytes()
    members = {"a.jpg": image, "a.cls": b"0", "b.jpg": image, "b.cls": b"1", "c.jpg": b"x"}
    write_tar(tmp_path / "s" / "train" / "0.tar", members | {"c.cls": b"1", "d.jpg": image})
    listing, examined = examine(tmp_path / "s")
    found = by_kind(check.split_findings(listing, examined))
    assert found["bad"] == {
        "train/0.tar/d.jpg": "no label: neither .cls nor .json of this key has one",
        "train/0.tar/c.jpg": "not an image",
    }
    ((kind, path, _),) = check.duplicate_findings({"train": (listing, examined)})
    assert (kind, path) == ("duplicate", "train/0.tar/b.jpg")
    journal = (tmp_path / "s" / "index" / "check-train.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in journal[1:]] == [0, 1, 2]
