"""The index: what it holds, what it refuses, and when it is out of date."""

import dataclasses
import json
import os
import pickle
import signal
import threading
import zipfile
from multiprocessing import forkserver

import numpy as np
import pytest
from PIL import Image
from samples import picture

from tetdist.datasets import index as ix
from tetdist.errors import UserError


def build(root, split="train", **options):
    return ix.build_index(root, split, workers=1, **options)


def save_turned(image, file):
    """Save an image whose EXIF orientation says that it is to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def test_an_index_holds_what_is_on_disk(image_root):
    root = image_root()
    save_turned(picture(20, 30), root / "train" / "ant" / "ant0.jpg")
    index, bad = build(root)
    assert bad == []
    assert index.classes == ("ant", "bee", "cow")
    assert index.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index.path(5) == "train/bee/bee1.jpg"
    for i in range(len(index)):
        file = root / index.path(i)
        assert index.file_sizes[i] == file.stat().st_size
        assert (index.widths[i], index.heights[i]) == Image.open(file).size  # as stored


def test_an_index_survives_saving_and_another_process_maps_it_again(image_root, tmp_path):
    index, _ = build(image_root())
    file = ix.index_file(tmp_path / "deep" / "er", "train")
    ix.save_index(index, file)
    assert [p.name for p in file.parent.iterdir()] == ["train.npz"]
    loaded = ix.load_index(file)
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 500
    for got in (loaded, pickle.loads(pickle.dumps(pickle.loads(pickled))), index):
        for name in (one.name for one in dataclasses.fields(index)):
            was, now = getattr(index, name), getattr(got, name)
            assert np.array_equal(was, now), name
            assert type(was) is type(now), name
            assert not isinstance(was, np.ndarray) or was.dtype == now.dtype, name
    changed = dataclasses.replace(loaded, labels=loaded.labels[::-1], fingerprint="another")
    assert pickle.loads(pickle.dumps(changed)).labels[0] == 2
    ix.save_index(changed, file)
    assert loaded.labels[0] == 0  # The file that was mapped is still there.
    with pytest.raises(UserError, match=f"{file} was replaced while it was in use"):
        pickle.loads(pickled)


@pytest.mark.parametrize("size", [0, 1000])
def test_an_index_that_was_cut_off_in_place_is_named(size, image_root, tmp_path):
    """Reading its arrays would end the process, or read zeros."""
    index, _ = build(image_root())
    file = ix.index_file(tmp_path, "train")
    ix.save_index(index, file)
    loaded = ix.load_index(file)
    relabelled = dataclasses.replace(loaded, labels=np.zeros_like(index.labels))
    bytes_before = file.stat().st_size
    assert loaded.whole().byte_range(5) == index.whole().byte_range(5)
    os.truncate(file, size)
    for read in (loaded.whole, relabelled.whole, lambda: loaded.byte_range(5)):
        with pytest.raises(UserError, match=f"{file} has {size} bytes instead of {bytes_before}"):
            read()


def test_the_fingerprint_is_of_the_content_not_of_the_copy(image_root):
    root = image_root()
    first = build(root)[0].fingerprint
    os.utime(root / "train" / "ant", ns=(1, 1))
    os.utime(root / "train" / "ant" / "ant0.jpg", ns=(1, 1))
    assert build(root)[0].fingerprint == first
    picture(60, 81).save(root / "train" / "ant" / "ant0.jpg", quality=95)
    assert build(root)[0].fingerprint != first


def test_workers_do_not_change_the_index(image_root, monkeypatch):
    root = image_root(per_class=50)  # More than one task of work.
    progress, server, starters = [], [], []
    connect = forkserver.connect_to_new_process  # in a thread that Ctrl-C does not interrupt

    def start():
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        server.append(("TETDIST_COMMAND" in os.environ, signal.SIGINT in blocked))

    def start_worker(*given):
        starters.append(threading.current_thread())
        return connect(*given)

    monkeypatch.setattr(forkserver, "ensure_running", start)
    monkeypatch.setattr(forkserver, "connect_to_new_process", start_worker)
    one, _ = build(root)
    two, _ = ix.build_index(root, "train", 2, progress=lambda *numbers: progress.append(numbers))
    assert (two.fingerprint, server) == (one.fingerprint, [(True, True)])
    assert progress == [(64, 150), (128, 150), (150, 150)]
    assert {thread is threading.main_thread() for thread in starters} == {False}


def test_hidden_and_foreign_files_are_passed_over(image_root):
    root = image_root()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "._ant0.jpg").write_bytes(b"x")
    (root / "train" / "ant" / "readme.txt").write_text("x")
    (root / "train" / "note.jpg").write_text("x")
    picture(20, 30).save(root / "train" / "ant" / "upper.JPEG")
    index, bad = build(root)
    assert len(index) == 13
    assert index.path(4) == "train/ant/upper.JPEG"
    assert bad == []


def test_names_beyond_ascii_and_beyond_utf8_are_kept(image_root, tmp_path):
    root = image_root()
    strange = [os.fsdecode(b"\xc3\xa4.png"), os.fsdecode(b"\xff.png")]
    for name in strange:
        picture(20, 30).save(root / "train" / "ant" / "plain.png")
        (root / "train" / "ant" / "plain.png").rename(root / "train" / "ant" / name)
    index, bad = build(root)
    ix.save_index(index, tmp_path / "i.npz")
    loaded = ix.load_index(tmp_path / "i.npz")
    paths = {loaded.path(i) for i in range(len(loaded))}
    assert {f"train/ant/{name}" for name in strange} < paths
    assert all((root / path).exists() for path in paths)
    assert bad == []


def bad_files(folder):
    jpeg = (folder / "ant0.jpg").read_bytes()
    (folder / "b_truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "c_text.jpg").write_text("hello")
    (folder / "d_empty.jpg").touch()
    picture(20, 30).save(folder / "e_gif.jpg", "GIF")
    (folder / "f_gone.jpg").symlink_to("nowhere")
    save_turned(picture(20, 30), folder / "g_turned.tif")
    for name in ("h.png", "i.tif"):
        Image.fromarray(np.full((20, 30), 3000, np.uint16)).save(folder / name)
    bits = "more than 8 bits per channel (PIL's mode I;16): save it with 8"
    return {
        "train/ant/b_truncated.jpg": "truncated",
        "train/ant/c_text.jpg": "not an image",
        "train/ant/d_empty.jpg": "empty",
        "train/ant/e_gif.jpg": "GIF",
        "train/ant/f_gone.jpg": "No such file",
        "train/ant/g_turned.tif": "orientation",
        "train/ant/h.png": bits,
        "train/ant/i.tif": bits,
    }


def test_bad_files_are_named_with_reasons_and_left_out(image_root):
    root = image_root()
    expected = bad_files(root / "train" / "ant")
    index, bad = build(root)
    assert [path for path, _ in bad] == list(expected)
    for path, reason in bad:
        assert expected[path] in reason
    assert len(index) == 12
    assert index.skipped == tuple(expected)
    os.utime(root / "train" / "ant", ns=(1, 1))  # So that the names are compared.
    ix.check_fresh(index, root)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: root.rename(root.with_name("moved")), "there is no data folder"),
        (lambda root: (root / "train").rename(root / "training"), "neither a folder 'train' nor"),
        (lambda root: [p.rename(root / p.name) for p in (root / "train").iterdir()], "no class"),
        (
            lambda root: [(root / "train" / n).rename(root / n) for n in ("bee", "cow")],
            "only one class folder, 'ant'",
        ),
        (
            lambda root: [p.rename(p.with_suffix(".gif")) for p in root.glob("train/*/*")],
            r"hold no images .*, but 3 with .gif \(train/ant/ant0.gif, ...\); add some",
        ),
        (lambda root: (root / "train" / "ant" / "sub").mkdir(), "holds a folder, 'sub'"),
    ],
)
def test_folders_that_are_not_a_data_set_are_named(image_root, spoil, words):
    root = image_root(per_class=1)
    spoil(root)
    with pytest.raises(UserError, match=words):
        build(root)


def saved(image_root, tmp_path):
    file = tmp_path / "index" / "train.npz"
    ix.save_index(build(image_root())[0], file)
    return file


def flipped(data):
    """With another bit in a long array, of which the headers' readers see only the beginning."""
    start = data.index(b"heights.npy") + 8000
    return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [*(lambda data, n=n: data[: int(n * len(data))] for n in (0, 0.1, 0.5, 0.99)), flipped],
)
def test_a_damaged_index_is_noticed(image_root, tmp_path, spoil):
    file, index = tmp_path / "index" / "train.npz", build(image_root())[0]
    ix.save_index(dataclasses.replace(index, heights=np.tile(index.heights, 400)), file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"damaged.*tools/images.py index"):
        ix.load_index(file)


@pytest.mark.parametrize("label", [-1, 3, 30_000_000, 2**40])
def test_a_label_without_a_class_is_damage(image_root, tmp_path, label):
    file, index = tmp_path / "train.npz", build(image_root())[0]
    labels = np.append(index.labels[:-1].astype(np.int64), label)
    ix.save_index(dataclasses.replace(index, labels=labels), file)
    with pytest.raises(UserError, match=r"damaged \(a label is outside 0 to 2\)"):
        ix.load_index(file)


def test_an_index_of_another_format_is_not_guessed_at(image_root, tmp_path):
    file = saved(image_root, tmp_path)
    with np.load(file) as archive:
        arrays = dict(archive)
    meta = json.loads(arrays["meta"].tobytes()) | {"version": 99}
    np.savez(file, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    with pytest.raises(UserError, match="format 99"):
        ix.load_index(file)
    np.savez_compressed(file, **arrays)
    with pytest.raises(UserError, match="meta is not an uncompressed array"):
        ix.load_index(file)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("something.npy", b"else")
    with pytest.raises(UserError, match="damaged"):
        ix.load_index(file)


def test_a_save_that_fails_leaves_the_old_index(image_root, tmp_path, monkeypatch):
    file = saved(image_root, tmp_path)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space"):
        ix.save_index(ix.load_index(file), file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["train.npz"]


def test_a_copy_is_fresh(image_root):
    root = image_root()
    index, _ = build(root)
    ix.check_fresh(index, root)
    for folder in (root / "train").iterdir():
        os.utime(folder, ns=(1, 1))
    ix.check_fresh(index, root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t / "bee" / "bee2.jpg").unlink(), "train/bee/bee2.jpg is in the index but"),
        (lambda t: picture(9, 9).save(t / "cow" / "new.png"), "train/cow/new.png is in .* but not"),
        (lambda t: (t / "dog").mkdir(), "class folder train/dog"),
        (lambda t: (t / "bee").rename(t / "wasp"), "class folder train/bee"),
        (lambda t: (t / "ant" / "ant3.jpg").write_bytes(b"12345"), "ant3.jpg has 5 bytes"),
    ],
)
def test_a_change_makes_an_index_stale(image_root, change, words):
    root = image_root()
    index, _ = build(root)
    change(root / "train")
    with pytest.raises(UserError, match=words) as error:
        ix.check_fresh(index, root)
    assert f"python tools/images.py index {root} --splits train" in str(error.value)


def test_event_tensors_that_differ_or_are_damaged_are_named(event_root):
    root = event_root()
    folder = root / "train" / "right"
    good = np.load(folder / "0.npy")
    data = (folder / "0.npy").read_bytes()
    np.save(folder / "a.npy", good.astype(np.float16))
    np.save(folder / "b.npy", good[:2])
    np.save(folder / "c.npy", good.astype(np.float32))
    np.save(folder / "d.npy", good[0])
    np.save(folder / "e.npy", np.asfortranarray(good))
    (folder / "f.npy").write_bytes(data[:-1])
    (folder / "g.npy").write_bytes(data + b"0")
    (folder / "h.npy").write_bytes(b"PK" + data)
    np.save(folder / "i.npy", good[:, :1])
    index, bad = build(root, kind="events")
    assert (len(index), index.classes) == (10, ("left", "right"))
    assert (index.kind, index.timesteps, index.dtype) == ("events", 3, "uint8")
    assert set(zip(index.heights, index.widths, strict=True)) == {(8, 6)}
    words = ["float16, but train/left/0.npy has", "(2, 2, 8, 6)", "type float32", "shape (2, 8, 6)"]
    words += ["Fortran", "bytes instead", "bytes instead", "not a .npy file", "shape (3, 1, 8, 6)"]
    assert [path for path, _ in bad] == [f"train/right/{name}.npy" for name in "abcdefghi"]
    for (path, reason), word in zip(bad, words, strict=True):
        assert word in reason, path


def test_files_newer_than_the_index_are_refused(image_root, tmp_path):
    file = saved(image_root, tmp_path)
    root, index = tmp_path / "images", ix.load_index(file)
    ix.check_fresh(index, root, file)
    stamp = file.stat().st_mtime_ns + 1
    os.utime(root / index.path(1), ns=(stamp, stamp))
    with pytest.raises(UserError, match=f"{index.path(1)} is newer than the index .*`touch "):
        ix.check_fresh(index, root, file)
    os.utime(file)
    ix.check_fresh(index, root, file)
