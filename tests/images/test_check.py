"""The check of images: what it finds."""

from samples import picture, write_tar

from tetdist.apps.images import check
from tetdist.datasets.archives import ByteRange
from tetdist.datasets.layouts import Listing, imagenet_classes, list_split


def examine(root, split="train"):
    listing = list_split(root, split, "images")
    return listing, check.examine_split(root, listing, 1)


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
    picture(20, 32).save(folder / "n00000002_3.JPEG")
    torn = (folder / "n00000001_1.JPEG").read_bytes()[:-100]
    (folder / "n00000001_4.JPEG").write_bytes(torn)
    found = by_kind(check.split_findings(*examine(tmp_path)))
    assert found.pop("bad")["train/n00000001/n00000001_4.JPEG"].startswith("cannot be decoded: ")
    label = "its name has class n00000002, but its label is n00000001"
    assert found == {"label": {"train/n00000001/n00000002_3.JPEG": label}}


def listing_of(split, counts):
    """As if a split had so many images of each class."""
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    return Listing(
        kind="images",
        split=split,
        classes=tuple(counts),
        labels=labels,
        names=["x"] * len(labels),
        byte_ranges=[ByteRange("x")] * len(labels),
    )


def test_missing_images_and_classes_of_imagenet_are_named():
    whole = dict.fromkeys(imagenet_classes(), 50)
    assert list(check.imagenet_findings(listing_of("val", whole))) == []
    fewer = whole | {"n01440764": 48, "n99999999": 50}
    del fewer["n01443537"]
    found = [text for _, _, text in check.imagenet_findings(listing_of("val", fewer))]
    assert found == [
        "classes that are not in ImageNet-1k: n99999999 (50)",
        "classes with fewer images than 50 or more than 50: n01440764 (48), n01443537 (0)",
        "49,998 images where ImageNet-1k has 50,000",
    ]
    counts = dict.fromkeys(imagenet_classes(), 1300) | {"n02747177": 731, "n15075141": 1301}
    found = [text for _, _, text in check.imagenet_findings(listing_of("train", counts))]
    assert found == [
        "classes with fewer images than 732 or more than 1,300: n02747177 (731), n15075141 (1,301)",
        "1,299,432 images where ImageNet-1k has 1,281,167",
    ]


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
