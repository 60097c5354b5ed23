"""tools/images.py and tools/digits.py, as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import pytest
import torch
from PIL import Image
from samples import picture, write_tar

import tetdist_command
from tetdist.config.loading import load
from tetdist.data.splits import open_split
from tetdist.datasets.index import build_index, check_fresh, load_index
from tetdist.datasets.probe import probe_range
from tetdist.distributed.world import World
from tetdist.errors import UserError


@pytest.fixture
def images(output_of):
    """Runs tools/images.py: (command, *arguments, status=0) -> output."""
    return lambda command, *arguments, status=0: output_of(
        "images.py", command, "--workers", 1, *arguments, status=status
    )


def test_bad_files_are_named_and_nothing_is_written(image_root, tmp_path, images):
    root = image_root()
    (root / "train" / "ant" / "bad.jpg").write_text("hello")
    (root / "val" / "cow" / "worse.jpg").touch()
    output = images("index", root, status=2)
    assert "bad: train/ant/bad.jpg: not an image" in output
    assert "bad: val/cow/worse.jpg: the file is empty" in output
    assert "2 of 26 files are bad" in output
    assert not list(root.glob("index/*.npz"))

    out = tmp_path / "elsewhere"
    options = ["--skip-bad", "--out", out]
    output = images("index", root, *options)
    assert "bad: train/ant/bad.jpg" in output
    assert load_index(out / "val.npz").command(root).endswith(" --splits val --skip-bad")
    assert not list(root.glob("index/*.npz"))


def test_an_empty_class_folder_is_no_bad_file(image_root, images):
    root = image_root()
    (root / "train" / "ant" / "bad.jpg").write_text("hello")
    (root / "train" / "dodo").mkdir()
    assert "2 of 26 paths are bad" in images("index", root, status=2)


def test_images_that_exif_turns_are_counted(image_root, images, caplog):
    root = image_root()
    exif = Image.Exif()
    for number, turned in enumerate((6, 3, 1)):
        exif[0x0112] = turned
        picture(60, 80).save(root / "train" / "bee" / f"turned{number}.jpg", exif=exif)
    picture(60, 80).save(root / "train" / "cow" / "damaged.jpg", exif=b"Exif\0\0MM\0*")
    images("index", root)
    text = (
        "train: 2 images are to be turned for display, by EXIF; training sees all images as stored"
    )
    assert [record.getMessage() for record in caplog.records] == [text]


def test_what_is_no_file_is_bad_and_never_waited_for(image_root, images):
    root = image_root(per_class=1)
    folder = root / "train" / "bee"
    os.mkfifo(folder / "pipe.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(root / "train" / "x.tar")
    reasons = {
        "pipe.jpg": "It is a pipe, a device or a folder, not a file",
        "itself.jpg": "Too many levels of symbolic links",
    }
    for command in ("index", "check"):
        output = images(command, root, status=2 if command == "index" else 1)
        for name, reason in reasons.items():
            (line,) = [line for line in output.splitlines() if f"train/bee/{name}: cannot" in line]
            assert line.startswith("bad: ")
            assert reason in line
    images("index", root, "--skip-bad")
    assert len(load_index(root / "index" / "train.npz")) == 3


def test_files_that_are_not_taken_are_counted_and_named(image_root, images):
    root = image_root(per_class=1)
    for name in ("ant/a.gif", "ant/b.gif", "bee/c.HEIC", "bee/Thumbs.db", "ant/.hidden", "note"):
        (root / "train" / name).touch()
    output = images("index", root)
    assert (
        "train: ignored 1 with .db (train/bee/Thumbs.db), 2 with .gif (train/ant/a.gif, ...),"
        " 1 with .heic (train/bee/c.HEIC), 1 with no suffix outside class folders (train/note)\n"
    ) in output


def test_a_test_folder_is_not_mistaken_for_what_training_takes(image_root, images):
    root = image_root(per_class=1)
    (root / "val").rename(root / "test")
    output = images("index", root, status=2)
    assert f"rename it to 'val', or link it, `ln -s test {quote(f'{root}/val')}`" in output
    output = images("index", root, "--splits", "train,test", status=2)
    assert "would not find 'test'" in output
    assert f"`ln -s test {quote(f'{root}/val')}`, and leave out --splits" in output
    assert not (root / "index").exists()
    (root / "val").symlink_to("test")
    for options in ([], ["--splits", "train,test"]):
        output = images("index", root, *options)
        assert "without a train split" not in output
    assert sorted(p.stem for p in (root / "index").iterdir()) == ["test", "train", "val"]


@pytest.mark.parametrize("name", ["val", "Test"])
def test_data_to_evaluate_alone_need_no_train(image_root, images, name):
    root = image_root(per_class=1)
    shutil.rmtree(root / "train")
    (root / "val").rename(root / name)
    shutil.rmtree(root / name / "ant")
    shutil.rmtree(root / name / "bee")
    output = images("index", root)
    assert "1 image in 1 class" in output
    assert f"eval.py RUN --data {quote(str(root))} --split {name}" in output
    output = images("index", root, "--out", root / "other")
    places = f"--data {quote(str(root))} --index {quote(f'{root}/other')}"
    assert f"eval.py RUN {places} --split {name}" in output
    index = load_index(root / "index" / f"{name}.npz")
    assert index.classes == ("cow",)
    check_fresh(index, root)
    output = images("check", root)
    assert "\nall good\n" in output
    shards = root.parent / "shards"
    output = images("shard", root, shards)
    assert len(load_index(shards / "index" / f"{name}.npz")) == 1


def test_training_data_alone_are_indexed(image_root, images):
    root = image_root(per_class=1)
    shutil.rmtree(root / "val")
    config = load("own_images.yaml", [f"data.root={root}"])
    world = World(0, 1, torch.device("cpu"), control=None)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"index {quote(str(root))}`"):
            open_split(config.data, split, world)
    way_out = "add val/ and index it, or hold out training samples: data.held_out=0.1"
    assert way_out in images("index", root)
    output = images("index", root / "train", status=2)
    assert f"this is a train/ folder itself: give {root}" in output
    output = images("index", root / "train" / "ant", status=2)
    assert f"this is a class folder itself: give {root}\n" in output
    with pytest.raises(UserError, match=way_out):
        open_split(config.data, "val", world)
    output = images("index", (root / "train").rename(root / "flowers") / "ant", status=2)
    assert f"to evaluate only, to {root}/flowers/ant/val/CLASS, where one class is" in output


BEE = "train/bee/bee0.jpg"


def classes_alone(root):
    shutil.rmtree(root / "val")
    (root / "train").rename(root.with_name("classes"))
    root.rmdir()
    root.with_name("classes").rename(root)


def link(to, root):
    shutil.rmtree(root / "train")
    (root / "train").symlink_to(to)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda root: shutil.rmtree(root / "val"), ["--splits", "train,val"], "'val' nor tar file"),
        (lambda root: (root / "val/bee").rename(root / "val/Bee"), [], "into train/Bee (for"),
        (lambda root: [os.renames(f, root / "x" / f.name) for f in root.iterdir()], [], "/x?"),
        (lambda root: (root / "train/dog").mkdir(), [], "bad: train/dog: the folder holds no im"),
        (
            lambda root: (root / "train/dog").mkdir(),
            ["--skip-bad"],
            "no usable file of 'dog'; add ",
        ),
        (
            lambda root: (root / BEE).write_text("x"),
            ["--skip-bad"],
            "no usable file of 'bee'; add ",
        ),
        (lambda root: (root / "train").rename(root / "Train"), [], "'Train': rename it to 'train'"),
        (classes_alone, [], "itself: move them into "),
        (partial(link, "train"), [], "train is a link that leads to no folder; correct or remove"),
        (partial(link, "/nowhere"), [], "train is a link that leads to no folder; correct or"),
        (None, ["--splits", "tran,val"], "did you mean train?"),
        (None, ["--split", "val"], "did you mean --splits?"),
        (None, ["--events"], "hold no events (.npy), but 3 with .jpg"),
    ],
)
def test_mistakes_end_in_a_sentence(image_root, images, spoil, options, words):
    root = image_root(per_class=1)
    if spoil is not None:
        spoil(root)
    output = images("index", root, *options, status=2)
    assert words in output
    assert not list(root.glob("index/*.npz"))


def test_a_check_names_problems_and_duplicates_and_says_which_by_its_status(
    image_root, tmp_path, images
):
    root = image_root()
    report = tmp_path / "report.json"
    report.symlink_to("target.json")
    options = ["--json", report]
    images("index", root)
    output = images("check", root, *options)
    assert "train: 12 images in 3 classes examined" in output
    assert "\nall good\n" in output
    assert json.loads(report.read_text()) == []
    shutil.copy(root / "train" / "ant" / "ant1.jpg", root / "train" / "ant" / "same.jpg")
    shutil.copy(root / "train" / "ant" / "ant2.jpg", root / "train" / "bee" / "other.jpg")
    for i in range(21):
        shutil.copy(root / "train" / "cow" / "cow1.jpg", root / "train" / "cow" / f"z{i}.jpg")
    (root / "index" / "train.npz").unlink()  # Of the files of before.
    output = images("check", root, *options)
    assert f"duplicate: 3 more; see {report}" in output
    same = "duplicate: train/bee/other.jpg: the same bytes as train/ant/ant2.jpg"
    assert f"{same}, where its class is ant instead of bee\n" in output
    assert "duplicate: train/ant/same.jpg: the same bytes as train/ant/ant1.jpg\n" in output
    assert "0 problems, 23 duplicates" in output
    shutil.copy(root / "train" / "ant" / "ant1.jpg", root / "val" / "ant" / "leak.jpg")
    (root / "val" / "bee" / "bee1.jpg").write_bytes(b"x")
    output = images("check", root, *options, status=1)
    assert "overlap: val/ant/leak.jpg: the same bytes as train/ant/ant1.jpg" in output
    assert " problems, 23 duplicates; replace or remove what is bad, or index with --sk" in output
    assert f"index: {root}/index/val.npz: val/ant/leak.jpg is in {root} but not in" in output
    assert {row["kind"] for row in json.loads(report.read_text())} == {
        *("duplicate", "overlap", "bad", "index")
    }
    assert report.is_symlink()
    assert [file.name for file in (root / "index").iterdir()] == ["val.npz"]


def test_imagenet_is_compared_unless_it_is_a_subset(tmp_path, images):
    for split in ("train", "val"):
        for i, name in enumerate(("n01440764", "n01443537")):
            (tmp_path / split / name).mkdir(parents=True)
            picture(20, 30, 2 * i + (split == "val")).save(tmp_path / split / name / "0.jpg")
    output = images("check", tmp_path, status=1)
    assert "or more than 1,300: n01440764 (1), n01443537 (1), n01484850 (0)" in output
    assert "0 duplicates; for a part of ImageNet-1k, add --subset\n" in output
    assert "--subset" not in images("check", tmp_path, "--subset")


def test_images_go_from_folders_to_shards(image_root, tmp_path, images):
    root = image_root()
    shards = tmp_path / "shards"
    # By the script, from elsewhere, with a relative root.
    command = [sys.executable, Path(__file__).parents[2] / "tools/images.py", "index", root.name]
    printed = subprocess.check_output(command, cwd=tmp_path, text=True, timeout=120)
    assert printed.count("12 images in 3 classes") == 2
    assert sorted(p.name for p in (root / "index").iterdir()) == ["train.npz", "val.npz"]
    output = images("shard", root, shards)
    assert "12 images in 1 tar file in 3 classes, packed and indexed" in output
    for split in ("train", "val"):
        indexes = [load_index(place / "index" / f"{split}.npz") for place in (root, shards)]
        assert len({index.fingerprint for index in indexes}) == 1
        for index, place in zip(indexes, (root, shards), strict=True):
            check_fresh(index, place, place / "index" / f"{split}.npz")
    assert f"{root}/train is not empty: choose another" in images("shard", root, root, status=2)
    (root / "val" / "bee" / "bee1.jpg").unlink()
    output = images("shard", root, tmp_path / "again", status=2)
    assert "val/bee/bee1.jpg is in the index but not in" in output
    assert not (tmp_path / "again").exists()


def test_samples_without_a_label_are_left_out_only_if_asked(image_root, tmp_path, images):
    folder = image_root() / "train" / "ant"
    one, two = ((folder / f"ant{number}.jpg").read_bytes() for number in (0, 1))
    members = {"a.jpg": one, "a.cls": b"0", "b.jpg": two, "b.cls": b"2", "c.jpg": one}
    write_tar(tmp_path / "s" / "train" / "0.tar", members)
    output = images("index", tmp_path / "s", status=2)
    assert "bad: train/0.tar/c.jpg: no label" in output
    assert "1 of 3 files is bad" in output
    output = images("index", tmp_path / "s", "--skip-bad")
    index = load_index(tmp_path / "s" / "index" / "train.npz")  # by the first one's journal
    assert (index.skipped, index.heights.tolist()) == (("train/0.tar/c.jpg",), [60, 63])
    assert "2 images in 1 tar file in 3 classes, 1 of them empty, 1 bad one" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shard", "R", "D", "--shard-mb", "0"], "--shard-mb: 0 must be 1 or more"),
        (["shard", "R", "D"], "there is no index R/index/train.npz: build it with"),
        (["index", "R"], "there is no data folder R; give one with train/ and val/"),
    ],
)
def test_mistakes_with_the_other_commands_do_too(images, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    output = images(*arguments, status=2)
    assert words in output
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_index_continues(image_root, capsys, caplog, monkeypatch, tmp_path):
    root = image_root(per_class=25)  # More than one task of work.
    samples = [
        sorted(str(file.relative_to(root)) for file in root.glob(f"{split}/*/*"))
        for split in ("train", "val")
    ]
    probed = []

    def probe(function, root, place, *arguments):
        probed.append(place.file)
        if len(probed) == 70:
            os.kill(os.getpid(), signal.SIGINT)
        return probe_range(function, root, place, *arguments)

    def index():
        probed.clear()
        return tetdist_command.run("images", ["index", str(root), "--workers", "1"])

    monkeypatch.setattr("tetdist.datasets.journal.probe_range", probe)
    monkeypatch.setattr("tetdist.distributed.launchers.end_with_launchers", lambda: None)
    monkeypatch.setenv("TETDIST_COMMAND", "images")
    # As a shell does to what a script starts in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = index()
    finally:
        signal.signal(signal.SIGINT, before)
    errors = capsys.readouterr().err.splitlines()
    expected = "stopped; no index was written; the same command continues"
    assert (status, errors[-1]) == (130, expected)
    journal = root / "index" / "train.journal"
    assert [file.name for file in journal.parent.iterdir()] == [journal.name]

    known = journal.read_bytes()
    journal.write_bytes(known + b"\0\n" + known[:99])  # A power cut, and a kill in mid-line.
    shutil.copy(root / samples[0][30], root / samples[0][2])
    times = (root / samples[0][4]).stat().st_mtime_ns
    shutil.copy(root / samples[0][30], root / samples[0][4])
    os.utime(root / samples[0][4], ns=(times, times))  # of another size alone
    os.utime(root / samples[0][6], ns=(1, 1))
    (root / samples[0][3]).unlink()
    monkeypatch.setattr(os, "kill", lambda *_: None)
    assert index() == 0
    assert probed == [*samples[0][2:8:2], *samples[0][64:], *samples[1]]
    assert sorted(file.name for file in journal.parent.iterdir()) == ["train.npz", "val.npz"]
    found = load_index(root / "index" / "train.npz")
    assert found.fingerprint == build_index(root, "train", 1)[0].fingerprint

    journal.write_bytes(known.replace(b"true", b"false"))  # Of --no-decode.
    assert index() == 0
    assert len(probed) == 149

    # What is no journal is put aside; a link's target is not written, and a pipe not waited for.
    short = json.loads(known.splitlines()[0])
    short[1] = {key: [stamp, facts[:2]] for key, (stamp, facts) in short[1].items()}
    (other := tmp_path / "other").write_text("3")
    for write in (
        lambda: journal.write_text("3\n"),
        lambda: journal.write_text('["a"]\n'),
        lambda: journal.write_text(json.dumps(short) + "\n"),
        lambda: journal.symlink_to(other),
        lambda: os.mkfifo(journal),
    ):
        write()
        caplog.clear()
        assert index() == 0
        assert len(probed) == 149
        assert caplog.messages == [
            f"{journal} is no journal of an index; it is now train.journal.bad"
        ]
    assert other.read_text() == "3"


def test_the_digits_are_made_once_and_completely(tmp_path, output_of):
    dest = tmp_path / "digits"
    assert "4,000 images to train" in output_of("digits.py", dest)
    assert list(tmp_path.iterdir()) == [dest]
    names = {}
    for split, count in (("train", 400), ("val", 100)):
        index = load_index(dest / "index" / f"{split}.npz")
        check_fresh(index, dest)
        assert index.classes == tuple("0123456789")
        assert np.bincount(index.labels).tolist() == [count] * 10
        assert set(zip(index.heights, index.widths, strict=True)) == {(28, 28)}
        names[split] = {Path(index.path(i)).name for i in range(len(index))}
    assert names["train"] | names["val"] == {f"{i:04d}.png" for i in range(5000)}
    # The split is of the digits' numbers and must not change.
    sevens = sorted(path.stem for path in (dest / "val" / "7").iterdir())
    assert sevens[:3] == ["3500", "3501", "3506"]
    image = Image.open(dest / index.path(0))
    assert (image.mode, image.getextrema()) == ("L", (0, 255))

    before = (dest / "index" / "val.npz").stat().st_mtime_ns
    assert output_of("digits.py", dest) == f"{dest} already holds the 5,000 digits\n"
    assert (dest / "index" / "val.npz").stat().st_mtime_ns == before
    (dest / "index" / "val.npz").unlink()  # as if they were somebody else's
    assert "does not hold this tool's digits" in output_of("digits.py", dest, status=2)
    assert (dest / "val" / "7" / "3500.png").exists()
