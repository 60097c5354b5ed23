"""Packing into shards and unpacking: what comes out, how it resumes, what it refuses."""

import dataclasses
import io
import resource
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from samples import picture

from tetdist.apps.images import shards
from tetdist.apps.images.shards import shard_split
from tetdist.config.sections.data import DataSection
from tetdist.data.batches import eval_batches
from tetdist.data.dali import Workers
from tetdist.datasets import index as ix
from tetdist.errors import UserError
from tetdist.order import evaluation_batches
from tetdist.storage.files import only_writer

ONE_WORKER = ("--splits", "train", "--workers", "1")
SMALL = 16 * 1024  # bytes a shard: a few of the tests' images


def indexed(root, split="train"):
    ix.index_splits(root, [split])
    return ix.load_index(ix.index_file(root / "index", split))


def pack(root, dest, split="train", *, seed=0, max_bytes=SMALL):
    file = ix.index_file(root / "index", split)
    return shard_split(file, root, dest, seed=seed, max_bytes=max_bytes, workers=1)


def tars(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


def test_shards_hold_the_data_set_in_another_order(image_root, tmp_path):
    root = image_root(per_class=8)
    index = indexed(root)
    packed = pack(root, tmp_path / "p")
    assert packed.fingerprint == index.fingerprint
    assert (tmp_path / "p" / "classes.txt").read_text() == "ant\nbee\ncow\n"
    files = tars(tmp_path / "p" / "train")
    assert list(files) == [f"train-{k:06d}.tar" for k in range(len(files))]
    assert len(files) > 3
    pairs, mixed = {}, 0
    for data in files.values():
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            names = archive.getnames()
            # The last member is a label, of one block.
            assert archive.getmembers()[-1].offset_data + 512 <= SMALL
            assert all((m.mtime, m.uid, m.mode) == (0, 0, 0o644) for m in archive)
            for image, label in zip(names[::2], names[1::2], strict=True):
                assert Path(image).with_suffix(".cls") == Path(label)
                number = int(archive.extractfile(label).read())
                pairs[image] = number, archive.extractfile(image).read()
            mixed += len({pairs[image][0] for image in names[::2]}) > 1
    assert mixed >= len(files) - 1
    for i, (name, (label, data)) in enumerate(sorted(pairs.items())):
        assert name == f"{i:08d}-{Path(index.path(i)).stem}.jpg"
        assert (label, data) == (index.labels[i], (root / index.path(i)).read_bytes())
    # The index that is written is the one that tools/images.py would build.
    again, bad = ix.build_index(tmp_path / "p", "train", workers=1)
    loaded = ix.load_index(tmp_path / "p" / "index" / "train.npz")
    assert bad == []
    for field in dataclasses.fields(ix.Index):
        name = field.name
        assert np.array_equal(getattr(loaded, name), getattr(again, name)), name


def test_names_are_made_fit_for_keys(tmp_path):
    names = ["a.b.c.JPG", "ä ö.png", "x" * 120 + ".jpeg", "a.b.jpg"]
    for folder in ("one", "two"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            picture(20, 30 + i).save(tmp_path / "train" / folder / name)
    index = indexed(tmp_path)
    packed = pack(tmp_path, tmp_path / "p")
    assert packed.fingerprint == index.fingerprint
    assert [packed.path(i).split("/")[-1] for i in range(2)] == [
        "00000000-a_b_c.jpg",
        "00000001-a_b.jpg",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root, _: pack(root, root / "p", seed=1), "with seed 0 instead of 1"),
        (lambda root, _: pack(root, root / "p", "val"), "p/val is not empty"),
        (lambda root, tar: (tar.unlink(), add_image(root), pack(root, root / "p")), "fingerprint"),
        (lambda root, tar: (swap(tar), pack(root, root / "p")), "do not match the index"),
        (lambda root, tar: (tar.write_bytes(b""), pack(root, root / "p")), "not a complete"),
    ],
)
def test_other_shards_are_not_mixed_with(image_root, change, words):
    root = image_root(per_class=8)
    indexed(root)
    indexed(root, "val")
    pack(root, root / "p")
    (root / "p" / "val").mkdir()
    (root / "p" / "val" / "mine.tar").write_bytes(b"all of my thesis")
    with pytest.raises(UserError, match=words):
        change(root, root / "p" / "train" / "train-000001.tar")
    assert (root / "p" / "val" / "mine.tar").read_bytes() == b"all of my thesis"


def add_image(root):
    picture(20, 20).save(root / "train" / "ant" / "z.jpg")
    indexed(root)


def swap(tar):
    shutil.copy(tar.with_name("train-000000.tar"), tar)


def test_two_do_not_write_to_one_folder(image_root, tmp_path):
    root = image_root()
    indexed(root)
    with only_writer(tmp_path / "p" / "train"), pytest.raises(UserError, match="another process"):
        pack(root, tmp_path / "p")


def test_packing_goes_on_where_it_was_stopped(image_root, tmp_path):
    root, dest = image_root(per_class=8), tmp_path / "p"
    indexed(root)
    pack(root, tmp_path / "straight")

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    file = ix.index_file(root / "index", "train")
    with pytest.raises(KeyboardInterrupt):
        shard_split(file, root, dest, seed=0, max_bytes=SMALL, workers=1, progress=stop)
    assert not (dest / "index").exists()
    done = {file: file.stat().st_mtime_ns for file in dest.glob("train/*.tar")}
    assert len(done) == 2
    pack(root, dest)
    assert tars(dest / "train") == tars(tmp_path / "straight" / "train")
    assert all(file.stat().st_mtime_ns == mtime for file, mtime in done.items())


def test_a_shard_that_was_not_finished_leaves_nothing(image_root, tmp_path, call, monkeypatch):
    root, dest = image_root(), tmp_path / "p"
    indexed(root)

    def stopped(*_):  # Ctrl-C when the first shard is written, but not yet verified.
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_verify", stopped)
        status, output = call("images.py", "shard", root, dest, *ONE_WORKER)
    assert (status, "stopped; the same command continues" in output) == (130, True)
    assert [file.name for file in (dest / "train").iterdir()] == ["plan.json"]
    (dest / "train" / ".train-000000.tar.123.tmp").write_bytes(b"what a kill leaves")
    pack(root, dest, max_bytes=256 * 2**20)
    files = sorted(file.name for file in (dest / "train").iterdir())
    assert files == ["plan.json", "train-000000.tar"]


def test_a_disk_that_is_full_is_a_sentence(image_root, tmp_path, call, monkeypatch):
    root = image_root(size=(300, 400))
    indexed(root)
    arguments = ("images.py", "shard", root, tmp_path / "dest", *ONE_WORKER)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        status, output = call(*arguments)
    assert (status, "free: free disk space, or choose another place" in output) == (2, True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow is refused as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, before[1]))
    try:
        status, output = call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "cannot be written (File too large), and nothing has changed: correct that" in output
    assert [f for f in (tmp_path / "dest").rglob("*") if f.name.endswith((".tmp", ".jpg"))] == []
    # With room the same command goes on from there.
    assert call(*arguments)[0] == 0


def test_an_image_in_a_shard_that_went_bad_is_named(image_root, tmp_path):
    root = image_root()
    indexed(root)
    index = pack(root, tmp_path / "p")
    damaged = index.byte_range(7)
    file = tmp_path / "p" / damaged.file
    data = bytearray(file.read_bytes())
    data[damaged.offset + 700 : damaged.offset + damaged.size] = bytes(damaged.size - 700)
    file.write_bytes(data)
    workers = Workers(device="cpu", device_id=None, threads=2, prefetch=2)
    data = DataSection(root=str(tmp_path / "p"), image_size=32, resize=36)
    ids = list(evaluation_batches(len(index), 4, rank=0, world_size=1))
    with pytest.raises(UserError, match=r"00000007-bee3.jpg \(cannot be decoded.*images.py index"):
        list(eval_batches(data, index, ids, workers))
