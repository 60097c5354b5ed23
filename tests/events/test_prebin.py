"""tools/prebin_dvs.py, as a user runs it: what it writes, continues, refuses and leaves alone."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import cameras
import numpy as np
import pytest
import tiny

from tetdist.apps.events.binning import Binning, bin_events
from tetdist.apps.events.formats import read_recording
from tetdist.apps.events.recording import Sensor
from tetdist.config.loading import load
from tetdist.datasets.index import check_fresh, find_index, load_index
from tetdist.errors import UserError

TOOL = "prebin_dvs.py"
PATH = Path(__file__).parents[2] / "tools" / TOOL


def make_source(root, per_class=10, number=300):
    """Two classes of N-MNIST-like recordings, in class folders."""
    for k, name in enumerate(("left", "right")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            made = cameras.events(number, seed=100 * k + i)
            (root / name / f"{i}.bin").write_bytes(cameras.nmnist(made))
    return root


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "source")


@pytest.fixture
def prebin_dvs(output_of, tmp_path):
    """Runs the tool in this process: (source, *options, status=0) -> output; DEST is dest/."""

    def run(source, *options, timesteps=4, workers=1, status=0):
        rest = ["--timesteps", timesteps, "--workers", workers, *options]
        return output_of(TOOL, source, tmp_path / "dest", *rest, status=status)

    return run


def contents(folder):
    """All files below a folder, with what is in them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors(dest):
    return contents(dest / "recordings")


def lines(dest):
    return [json.loads(line) for line in (dest / "recordings.jsonl").read_text().splitlines()]


def test_tensors_splits_and_records_are_written(source, tmp_path, prebin_dvs):
    dest = tmp_path / "dest"
    output = prebin_dvs(source, "--split", "first-80-percent", "--size", "20x17")
    root = dest / "splits" / "first-80-percent"
    assert f"{root}: 16 to train, 4 to test; data.root={root}" in output

    file = source / "left" / "3.bin"
    events = read_recording(file, file.read_bytes(), None)
    expected = bin_events(events, Binning(4, Sensor(20, 17), "count", "count", "area", "uint8"))
    tensor = np.load(root / "train" / "left" / "3.npy")
    assert tensor.shape == (4, 2, 17, 20)
    assert np.array_equal(tensor, expected.tensor)
    assert (root / "train/left/3.npy").samefile(dest / "recordings/left/3.npy")
    for part, numbers in (("train", range(8)), ("val", (8, 9))):
        index = load_index(root / "index" / f"{part}.npz")
        check_fresh(index, root, root / "index" / f"{part}.npz")
        paths = [index.path(i) for i in range(len(index))]
        assert paths == [f"{part}/{name}/{i}.npy" for name in ("left", "right") for i in numbers]
        assert (index.timesteps, index.dtype) == (4, "uint8")

    described = json.loads((root / "dataset.json").read_text())
    assert described["split"] == "first-80-percent"
    assert described["recordings"] == {"train": 16, "val": 4}
    assert described["parameters"]["size"] == "20x17"
    manifest = json.loads((dest / "manifest.json").read_text())
    assert manifest["parameters"] == described["parameters"]
    assert manifest["tetdist"]
    (line,) = [line for line in lines(dest) if line["key"] == "left/3"]
    assert line["events"] == 300
    assert line["duration_us"] == int(events.t[-1] - events.t[0])
    assert len(line["source_sha256"]) == len(line["sha256"]) == 64

    found = json.loads((dest / "statistics.json").read_text())
    assert found["left"]["tensors"] == 10
    assert found["all"]["events_mean"] == 300
    assert found["all"]["on_share"] == pytest.approx(0.5, abs=0.05)
    assert found["all"]["empty_share"] == 0
    for words in ("events/s", "left", "right", "all"):
        assert words in output


def test_a_second_call_keeps_tensors_and_adds_a_split(source, tmp_path, prebin_dvs):
    dest = tmp_path / "dest"
    prebin_dvs(source)
    before = contents(dest)
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("*.np[yz]")}
    assert "splits/stratified-9-1-seed-0/dataset.json" in before
    for file in source.rglob("*.bin"):  # as a copy of the source has them
        os.utime(file, ns=(1, 1))
    prebin_dvs(source, "--split", "stratified-9-1,first-70-percent")
    after = contents(dest)
    assert {path: after[path] for path in before} == before
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    assert "splits/first-70-percent/index/val.npz" in after


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_call_is_continued(tmp_path, prebin_dvs, how):
    source, dest = make_source(tmp_path / "source", per_class=150), tmp_path / "dest"
    command = tiny.python(PATH, source, dest, "--timesteps", 4, "--workers", 2)
    journal = dest / "recordings.jsonl"
    with tiny.started(command, tmp_path) as process:
        tiny.wait_until(lambda: journal.is_file() and journal.stat().st_size > 2500, 60)
        memory = Path(f"/proc/{process.pid}/maps").read_text()
        semaphores = {Path(name) for name in re.findall(r"/dev/shm/sem\.\S+", memory)}
        if how == signal.SIGKILL:
            process.send_signal(how)
        else:
            os.killpg(process.pid, how)  # As a terminal does it: to parent and workers alike.
        # Comes to an end only when the workers have ended, too, who hold the same output.
        output, _ = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert semaphores
    tiny.wait_until(lambda: not any(file.exists() for file in semaphores), 20)
    assert "Traceback" not in output
    if how == signal.SIGINT:
        assert "stopped; the same command continues" in output
    done = len(journal.read_text().splitlines())
    assert 4 < done < 300
    assert not (dest / "splits").exists()
    kept = {f"{line['key']}.npy" for line in lines(dest)[:done]}
    times = {path: (dest / "recordings" / path).stat().st_mtime_ns for path in kept}

    # What a kill may leave.
    with journal.open("a") as stream:
        stream.write('{"key": "left/3')
    (dest / "recordings" / "left" / ".5.npy.1.tmp").write_bytes(b"half")
    prebin_dvs(source)
    assert {path: (dest / "recordings" / path).stat().st_mtime_ns for path in kept} == times
    assert len(lines(dest)) == 300
    assert len(tensors(dest)) == 300


def test_a_damaged_tensor_is_made_again(source, tmp_path, prebin_dvs):
    dest = tmp_path / "dest"
    prebin_dvs(source)
    good = tensors(dest)
    damaged, gone = dest / "recordings" / "left" / "3.npy", dest / "recordings" / "right" / "0.npy"
    status = damaged.stat()
    damaged.write_bytes(good["left/3.npy"][:-1] + b"\x07")
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))
    gone.unlink()
    prebin_dvs(source)
    assert tensors(dest) == good
    split = contents(dest / "splits" / "stratified-9-1-seed-0")
    assert {data for path, data in split.items() if path.endswith(".npy")} == set(good.values())


def test_a_changed_parameter_is_not_mixed_with_old_tensors(source, tmp_path, prebin_dvs):
    dest = tmp_path / "dest"
    prebin_dvs(source)
    before = contents(dest)
    output = prebin_dvs(source, "--bins", "time", status=2)
    assert "were made with bins=count, not time; name another DEST, or give --overw" in output
    assert "with bins=count, not 3ms" in prebin_dvs(source, "--bins", "3ms", status=2)
    prebin_dvs(source, timesteps=5, status=2)
    assert contents(dest) == before
    output = prebin_dvs(source, "--overwrite", timesteps=5)
    assert np.load(dest / "recordings" / "left" / "3.npy").shape == (5, 2, 34, 34)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.write_bytes(cameras.nmnist(cameras.events(seed=9))), "has changed"),
        (lambda file: file.unlink(), "no longer exists"),
    ],
)
def test_a_changed_source_is_not_mixed_with_old_tensors(
    source, tmp_path, prebin_dvs, change, words
):
    prebin_dvs(source)
    before = contents(tmp_path / "dest")
    change(source / "left" / "3.bin")
    output = prebin_dvs(source, status=2)
    assert "left/3.bin" in output
    assert words in output
    assert "--overwrite" in output
    assert contents(tmp_path / "dest") == before
    prebin_dvs(source, "--overwrite")


def spoil(source):
    """Bad recordings of several kinds; their reasons."""
    good = cameras.events()
    (source / "left" / "a.bin").write_bytes(cameras.nmnist(good)[:-2])
    (source / "left" / "b.bin").touch()
    (source / "right" / "e.bin").write_bytes(cameras.nmnist(cameras.events(3)))
    (source / "right" / "f.aedat").write_bytes(cameras.dvs128(good))
    (source / "right" / "g.bin").symlink_to("nowhere")
    return {
        "left/a.bin": "truncated",
        "left/b.bin": "the file is empty",
        "right/e.bin": "3 events are too few for 4 bins",
        "right/f.aedat": "its sensor is 128x128, but 20 others have 34x34; bin each sensor's",
        "right/g.bin": "No such file",
    }


def test_bad_recordings_are_named_and_left_out_only_by_a_flag(source, tmp_path, prebin_dvs):
    expected = spoil(source)
    output = prebin_dvs(source, "--split", "first-80-percent", status=2)
    for path, reason in expected.items():
        (line,) = [line for line in output.splitlines() if line.startswith(f"bad: {path}: ")]
        assert reason in line
    assert "5 of 25 recordings are bad" in output
    assert "no split was made: replace the bad recordings, or give --skip-bad" in output
    assert not (tmp_path / "dest" / "splits").exists()

    output = prebin_dvs(source, "--split", "first-80-percent", "--skip-bad")
    assert "bad: left/a.bin" in output
    root = tmp_path / "dest" / "splits" / "first-80-percent"
    described = json.loads((root / "dataset.json").read_text())
    assert described["left_out"] == 5
    # Of 12 of left and 13 of right, 9 and 10 are to train; the bad ones do not move the others.
    # Letters come before numbers.
    assert described["recordings"] == {"train": 7 + 7, "val": 3 + 3}
    for file in (source / "left").iterdir():
        file.write_bytes(b"")
    output = prebin_dvs(source, "--overwrite", "--skip-bad", status=2)
    assert "no usable recording of class 'left' in train; add some, remove the class" in output


def test_a_missing_sensor_size_is_asked_for_once_and_then_taken(tmp_path, prebin_dvs):
    source = tmp_path / "source"
    for name in ("left/1", "left/2", "right/1", "right/2"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(source / name, **cameras.events()._asdict())
    output = prebin_dvs(source, status=2)
    words = "it does not store the sensor's size; give --sensor"
    assert f"no split was made: each of 4 recordings is bad: {words}" in output
    assert "bad: left" not in output
    prebin_dvs(source, "--sensor", "34x34")
    assert "made with sensor=34x34, not" in prebin_dvs(source, "--sensor", "35x35", status=2)


def test_folders_beside_a_data_root_lead_to_it(source, tmp_path, prebin_dvs):
    prebin_dvs(source, "--split", "first-80-percent")
    dest = tmp_path / "dest"
    for root, words in (
        (dest, f"{dest} holds data roots: use {dest}/splits/first-80-percent"),
        (dest / "splits", f"{dest}/splits holds data roots: use {dest}/splits/first-80-percent"),
        (source, f"is not a tensor (.npy): bin recordings first, `python tools/{TOOL} {source}"),
        (dest / "recordings", "class folders (left, right) are in"),
    ):
        data = load("nmnist.yaml", [f"data.root={root}"]).data
        with pytest.raises(UserError, match=re.escape(words)):
            find_index(data, "train")


def test_new_recordings_are_for_evaluation_alone(source, tmp_path, prebin_dvs):
    shutil.rmtree(source / "right")
    output = prebin_dvs(source, "--split", "all-to-val")
    root = tmp_path / "dest" / "splits" / "all-to-val"
    assert f"{root}: 10 to test; " in output
    assert f"eval.py RUN --data {root}" in output
    assert sorted(path.name for path in root.iterdir()) == ["dataset.json", "index", "val"]
    assert load_index(root / "index" / "val.npz").classes == ("left",)
    described = json.loads((root / "dataset.json").read_text())
    assert (described["split"], described["recordings"]) == ("all-to-val", {"train": 0, "val": 10})
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    prebin_dvs(source, "--split", "all-to-val")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    output = prebin_dvs(source, status=2)
    assert "only one class, 'left'" in output


def test_a_full_disk_loses_nothing(source, tmp_path, prebin_dvs, monkeypatch):
    dest = tmp_path / "dest"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    output = prebin_dvs(source, status=2)
    assert "cannot be written" in output
    assert "No space left on device" in output
    assert "run the same command again" in output
    assert not list(dest.rglob("*.tmp"))
    kept = len(lines(dest))
    assert 0 < kept < 20
    monkeypatch.undo()
    paths = [dest / "recordings" / f"{line['key']}.npy" for line in lines(dest)]
    times = {path: path.stat().st_mtime_ns for path in paths}
    prebin_dvs(source)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(lines(dest)) == len(tensors(dest)) == 20


def test_labelled_gestures_are_cut_out(tmp_path, prebin_dvs):
    source, dest = tmp_path / "gestures", tmp_path / "dest"
    source.mkdir()
    made = cameras.events(4000, 128, 128, duration=1_000_000)
    for i in range(4):
        (source / f"user{i}.aedat").write_bytes(cameras.aedat31(made))
        rows = "1,0,400000\n2,500000,900000\n"
        if i == 3:
            rows += "2,2000000,3000000\n"
        labels = source / f"user{i}_labels.csv"
        labels.write_text(f"class,startTime_usec,endTime_usec\n{rows}")
    (source / "trials_to_train.txt").write_text("user0.aedat\nuser2.aedat\nuser3.aedat\n")
    (source / "trials_to_test.txt").write_text("user1.aedat\n")
    output = prebin_dvs(source, "--skip-bad")
    assert "bad: user3.aedat: 2000000 to 3000000 us: it has no events; the file's are" in output
    root = dest / "splits" / "published"
    assert {path for path in contents(root) if path.startswith("val")} == {
        "val/1/user1-0.npy",
        "val/2/user1-1.npy",
    }
    first = np.load(root / "train" / "1" / "user0-0.npy").astype(int)
    number = int((made.t < 400_000).sum())
    assert first.sum() == number // 4 * 4
    labels = source / "user0_labels.csv"
    labels.write_text(labels.read_text().replace("400000", "300000"))
    output = prebin_dvs(source, "--skip-bad", status=2)
    assert "the labels of user0.aedat have changed" in output


def test_images_become_simulated_recordings_named_so(tmp_path, prebin_dvs):
    images, dest = cameras.draw_bars(tmp_path / "images", train=4, val=2), tmp_path / "dest"
    output = prebin_dvs(images, "--simulate")
    root = dest / "splits" / "simulated-published"
    assert f"{root}: simulated from images, 8 to train, 4 to test" in output
    described = json.loads((root / "dataset.json").read_text())
    assert described["simulated"]
    assert json.loads((dest / "manifest.json").read_text())["parameters"]["simulated"]
    found = json.loads((dest / "statistics.json").read_text())
    assert found["all"]["events_least"] > 300
    # The image comes back to where it was: what became brighter became darker.
    assert found["all"]["on_share"] == pytest.approx(0.5, abs=0.03)
    assert found["all"]["duration_s_mean"] == pytest.approx(0.3, abs=0.02)

    first, journal = tensors(dest), lines(dest)
    shutil.rmtree(dest)
    prebin_dvs(images, "--simulate", workers=2)
    assert (tensors(dest), lines(dest)) == (first, journal)
    output = prebin_dvs(images, "--simulate", "--seed", 1, status=2)
    assert "simulation" in output
    output = prebin_dvs(images, "--simulate", "--seed", 1, "--overwrite")
    assert tensors(dest) != first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timesteps", "0"], "0 must be 1 or more"),
        (["--bins", "0ms"], "'0ms' must be count, time, a duration such as 20ms"),
        (["--values", "published", "--resize", "area"], "leave out --resize"),
        (["--split", "first-half"], "'first-half' is not one of published, first-90-percent"),
        (["--split", "published"], "the part of left/0.bin is unknown"),
        (["--split", "0-99-test"], "leaves nothing to train of 'left', which has 10"),
        (["--sensor", "10x10"], "of 300; correct the size in the file or, if it st"),
        (["--simulate", "--sensor", "7x9"], "--simulate needs at least 8x8 pixels, not 7x9"),
    ],
)
def test_mistakes_end_in_a_sentence(source, tmp_path, prebin_dvs, options, words):
    output = prebin_dvs(source, *options, status=2)
    assert words in output
    assert not (tmp_path / "dest" / "splits").exists()


def test_nothing_elses_folder_is_taken(source, tmp_path, prebin_dvs, output_of):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "thesis.txt").write_text("all of it")
    for options in ([], ["--overwrite"]):
        output = prebin_dvs(source, *options, status=2)
        assert "holds 'thesis.txt', which is not this tool's" in output
    assert contents(dest) == {"thesis.txt": b"all of it"}
    for inside in (source, source / "deep", tmp_path):
        output = output_of(TOOL, source, inside, "--timesteps", 4, status=2)
        assert "contain each other" in output


def test_where_there_are_no_hard_links_tensors_are_copied(
    source, tmp_path, prebin_dvs, monkeypatch
):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        prebin_dvs(source)
    root = tmp_path / "dest" / "splits" / "stratified-9-1-seed-0"
    copies = [data for path, data in contents(root).items() if path.endswith(".npy")]
    assert sorted(copies) == sorted(tensors(tmp_path / "dest").values())
    check_fresh(load_index(root / "index" / "val.npz"), root, root / "index" / "val.npz")
