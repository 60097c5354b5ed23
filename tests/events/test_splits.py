"""Listing recordings and dividing them: order, layouts, names."""

import json

import pytest

from tetdist.apps.events.folders import list_sources, natural_key
from tetdist.apps.events.splits import NAMES, assign, default_split, split_name
from tetdist.datasets.recorded_split import recorded_split, recordings_of
from tetdist.errors import UserError

LABELS = "class,startTime_usec,endTime_usec\n"


def touch(root, *paths):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.fixture
def classes(tmp_path):
    """105 recordings of one class and 120 of another, numbered without zeros in front."""
    touch(tmp_path, *(f"cutter/cutter_{i}.aedat" for i in range(105)))
    touch(tmp_path, *(f"mug/mug_{i}.aedat" for i in range(120)))
    return list_sources(tmp_path, [".aedat"]).sources


@pytest.fixture
def gestures(tmp_path):
    """20 recordings of two gestures each, with lists of trials."""
    for i in range(20):
        touch(tmp_path, f"user{i}.aedat")
        (tmp_path / f"user{i}_labels.csv").write_text(f"{LABELS}1,10,20\n2,30,50\n")
    for name, users in (("train", range(15)), ("test", range(15, 20))):
        text = "".join(f"user{i}.aedat\n" for i in users)
        (tmp_path / f"trials_to_{name}.txt").write_text(text)
    return tmp_path


def trained(sources, name, seed=0):
    parts = assign(sources, name, seed)
    assert set(parts) == {source.path for source in sources}
    return {path for path, part in parts.items() if part == "train"}


def test_numbers_in_names_are_compared_by_value():
    names = ["cutter_10", "cutter_2", "a", "cutter_2b", "10", "9"]
    expected = ["a", "cutter_2", "cutter_2b", "cutter_10", "9", "10"]
    assert sorted(names, key=natural_key) == expected


@pytest.mark.parametrize(("percent", "cutters", "mugs"), [(90, 94, 108), (70, 73, 84)])
def test_the_first_of_each_class_are_to_train(classes, percent, cutters, mugs):
    expected = {f"cutter/cutter_{i}.aedat" for i in range(cutters)}
    expected |= {f"mug/mug_{i}.aedat" for i in range(mugs)}
    assert trained(classes, f"first-{percent}-percent") == expected


def test_the_first_by_letters_are_those_of_spikingjelly(tmp_path):
    """A thousand names of CIFAR10-DVS; of 105 others 94.5 are rounded up."""
    touch(tmp_path, *(f"bird/cifar10_bird_{i}.aedat" for i in range(1000)))
    touch(tmp_path, *(f"cat/cifar10_cat_{i}.aedat" for i in range(105)))
    sources = list_sources(tmp_path, [".aedat"]).sources
    train = trained(sources, "first-90-percent-by-letters")
    numbers = {int(path.rsplit("_")[-1][:-6]) for path in train if path.startswith("bird")}
    assert set(range(1000)) - numbers == {*range(91, 100), *range(909, 1000)}
    cats = sorted(f"cifar10_cat_{i}.aedat" for i in range(105))
    assert train == {path for path in train if "bird" in path} | {f"cat/{c}" for c in cats[:95]}


def test_the_first_hundred_of_each_class_are_to_test(classes):
    expected = {f"cutter/cutter_{i}.aedat" for i in range(100, 105)}
    expected |= {f"mug/mug_{i}.aedat" for i in range(100, 120)}
    assert trained(classes, "0-99-test") == expected


def test_the_stratified_split_is_of_its_seed(classes):
    first, again, other = (trained(classes, "stratified-9-1", seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    for part in (first, other):
        assert [sum(path.startswith(name) for path in part) for name in ("c", "m")] == [94, 108]


def test_a_published_split_comes_from_the_folders(tmp_path):
    touch(
        tmp_path, *(f"{part}/{k}/{i}.bin" for part in ("Train", "Test") for k in "01" for i in "12")
    )
    touch(tmp_path, "index/train.npz", "stray.bin")
    listing = list_sources(tmp_path, [".bin"])
    assert listing.passed_over.suffixes == {".bin outside class folders": (1, "stray.bin")}
    assert default_split(listing.sources) == "published"
    assert trained(listing.sources, "published") == {
        f"Train/{k}/{i}.bin" for k in "01" for i in "12"
    }
    # Of the same name in both parts.
    assert len({piece.key for source in listing.sources for piece in source.pieces}) == 8


@pytest.mark.parametrize("name", ["Test", "val"])
def test_a_test_part_alone_is_to_be_evaluated(tmp_path, name):
    touch(tmp_path, *(f"{name}/{k}/{i}.bin" for k in "01" for i in "12"), f"{name}/0/notes.txt")
    listing = list_sources(tmp_path, [".bin"])
    assert default_split(listing.sources) == "all-to-val"
    assert set(assign(listing.sources, "all-to-val", 0).values()) == {"val"}
    assert {piece.class_name for source in listing.sources for piece in source.pieces} == {"0", "1"}
    assert listing.passed_over.suffixes == {".txt": (1, f"{name}/0/notes.txt")}
    with pytest.raises(UserError, match="'published' has no recording to train"):
        assign(listing.sources, "published", 0)


def test_labelled_recordings_are_cut_and_never_divided(gestures):
    sources = list_sources(gestures, [".aedat"]).sources
    assert [source.path for source in sources] == [f"user{i}.aedat" for i in range(20)]
    first, second = sources[3].pieces
    assert (first.key, first.window) == ("1/user3-0", (10, 20))
    assert (second.key, second.window) == ("2/user3-1", (30, 50))
    assert trained(sources, "published") == {f"user{i}.aedat" for i in range(15)}
    assert trained(sources, "first-80-percent") == {f"user{i}.aedat" for i in range(16)}
    assert len(trained(sources, "stratified-9-1")) == 18


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "its labels are missing: there is no user3_labels.csv"),
        (f"{LABELS}1,ten,20\n", "startTime_usec 'ten' is not an integer"),
        (f"{LABELS}box,10,20\n", "user3_labels.csv: class 'box' is not an integer"),
        (f"{LABELS[1:]}1,10,20\n", "user3_labels.csv: there is no column class"),
        (f"{LABELS}1,20,10\n", "gesture 0 ends at 10 us, before its start 20"),
    ],
)
def test_a_recording_without_good_labels_has_a_problem(gestures, text, words):
    labels = gestures / "user3_labels.csv"
    labels.unlink()
    if text is not None:
        labels.write_text(text)
    sources = list_sources(gestures, [".aedat"]).sources
    problems = {source.path: source.problem for source in sources if source.problem}
    assert list(problems) == ["user3.aedat"]
    assert words in problems["user3.aedat"]
    good = [source for source in sources if not source.problem]
    assert len(trained(good, "published")) == 14
    with pytest.raises(UserError, match=r"'all classes', which has 1 .* together; record more"):
        assign(good[:1], "stratified-9-1", 0)
    for file in gestures.glob("*_labels.csv"):
        file.write_text(text or "")
    with pytest.raises(UserError, match=r"user0_.*; user1.aedat: .* and 17 more; FILE_labels"):
        list_sources(gestures, [".aedat"])


def test_a_recording_that_is_not_there_has_a_problem(gestures):
    (gestures / "user3.aedat").unlink()
    (gestures / "user30_labels.csv").write_text(f"{LABELS}1,10,20\n")
    (gestures / "user31_labels.csv").write_text(f"{LABELS}1,10,20\n")
    with (gestures / "trials_to_test.txt").open("a") as file:
        file.write("\nuser31.aedat\n")
    sources = list_sources(gestures, [".aedat"]).sources
    assert {source.path: source.problem for source in sources if source.problem} == {
        "user3.aedat": "it is listed in trials_to_train.txt, but there is no such file",
        "user30": "there is user30_labels.csv, but no recording of this name",
        "user31.aedat": "it is listed in trials_to_test.txt, but there is no such file",
    }


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a/1.txt", "b/2.txt"], r"recordings \(.*, but 2 with .txt \(.*; save events as .npz"),
        (["1.bin", "2.bin"], "2 recordings, not in class folders; .* --split all-to-val"),
        (["1.bin", "../b/1.bin"], "a is a class folder itself: give "),
        (["1.bin", "../b/1.bin", "../c/1.txt"], "1 recording, not in class folders"),
        (["a/b/c/1.aedat", "b/1.aedat"], "a holds a folder, 'b'"),
        (["a/1.aedat", "a/1.bin", "b/1.bin"], "2 recordings 'a/1' that differ only in"),
    ],
)
def test_folders_that_are_no_recordings_are_named(tmp_path, paths, words):
    touch(tmp_path / "a", *paths)
    with pytest.raises(UserError, match=words):
        list_sources(tmp_path / "a", [".aedat", ".bin"])


def test_a_splits_name_says_what_it_depends_on():
    assert split_name("first-90-percent", 3, simulated=False) == "first-90-percent"
    assert split_name("stratified-9-1", 3, simulated=False) == "stratified-9-1-seed-3"
    assert split_name("published", 3, simulated=True) == "simulated-published"
    assert len(set(NAMES)) == len(NAMES)


def test_a_data_root_says_its_split(tmp_path):
    assert recorded_split(tmp_path) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"split": "published"}))
    assert recorded_split(tmp_path) == "published"
    for text in ("", "[]", "{}", '{"split": 3}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=r"dataset\.json"):
            recorded_split(tmp_path)


def test_a_data_root_says_what_pieces_are_of_one_recording(tmp_path):
    root = tmp_path / "splits" / "published"
    root.mkdir(parents=True)
    assert recordings_of(root) is None
    (root / "dataset.json").write_text(json.dumps({"split": "published"}))
    with pytest.raises(UserError, match=r"recordings\.jsonl, which lists the pieces"):
        recordings_of(root)
    lines = [{"key": f"1/user1-{n}", "source": "user1.aedat", "events": 3} for n in range(2)]
    (tmp_path / "recordings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recordings_of(root) == {"1/user1-0": "user1.aedat", "1/user1-1": "user1.aedat"}
