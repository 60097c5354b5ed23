"""What is held out of training: which samples, and that a run sees them in evaluation alone."""

import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch

from tetdist.config.loading import parse
from tetdist.data.splits import evaluated_split, open_data
from tetdist.datasets import held_out
from tetdist.datasets.index import index_file, index_splits, load_index
from tetdist.distributed.world import World
from tetdist.errors import UserError


def files(index):
    return [index.path(i) for i in range(len(index))]


@pytest.fixture(scope="module")
def whole(tiny_root):
    return load_index(index_file(tiny_root / "index", "train"))


def test_each_class_is_divided(whole):
    train, held = held_out.divide(whole, 0.3, seed=1)
    assert sorted(files(train) + files(held)) == sorted(files(whole))
    # 11, 12, 12 and 12 samples; the nearest integers to their 30 %.
    assert np.bincount(held.labels).tolist() == [3, 4, 4, 4]
    # Each side has one of each class at least.
    for share, least in ((0.01, 1), (0.99, 0)):
        part = held_out.divide(whole, share, seed=1)[least]
        assert np.bincount(part.labels).tolist() == [1, 1, 1, 1]
    place = {path: i for i, path in enumerate(files(whole))}
    within = np.array([place[path] for path in files(held)])
    within -= np.searchsorted(whole.labels, held.labels)
    assert len({tuple(within[held.labels == label]) for label in (1, 2, 3)}) > 1
    for part in (train, held):
        rows = [place[path] for path in files(part)]
        assert rows == sorted(rows)
        for name in ("labels", "heights", "widths", "file_sizes", "offsets", "archive_ids"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[rows]), name
        sent = pickle.dumps(part)  # as to a loader: how it is made, not the samples
        assert len(sent) < 600
        assert files(pickle.loads(sent)) == files(part)
    again = held_out.divide(whole, 0.3, seed=1)
    assert [files(part) for part in again] == [files(train), files(held)]
    other = held_out.divide(whole, 0.3, seed=2)
    assert files(other[1]) != files(held)
    prints = {part.fingerprint for part in (whole, train, held, *other)}
    assert len(prints) == 5
    assert again[0].fingerprint == train.fingerprint


@pytest.mark.parametrize("several_classes", [False, True])
def test_a_recording_is_on_one_side(whole, several_classes):
    # Three samples in succession are pieces of one recording.
    within = 0 if several_classes else whole.labels * 100
    recordings = [str(number) for number in within + np.arange(len(whole)) // 3]
    train, held = held_out.divide(whole, 0.25, seed=0, recordings=recordings)
    of = dict(zip(files(whole), recordings, strict=True))
    sides = [{of[path] for path in files(part)} for part in (train, held)]
    assert sides[0] & sides[1] == set()
    assert len(sides[1]) == 4  # of 16, in one piece or 4 in each of 4 classes
    assert len(train) + len(held) == len(whole)


@pytest.mark.parametrize(
    ("recordings", "words"),
    [
        (["one"] * 47, "all training samples are of one recording"),
        (["a"] * 11 + [*"bcdefghijkl"] * 3 + ["m"] * 3, "'down' has only one recording or sample"),
    ],
)
def test_too_little_to_divide(whole, recordings, words):
    if words.startswith("'down'"):
        recordings = [f"{one}{label}" for one, label in zip(recordings, whole.labels, strict=True)]
    with pytest.raises(UserError, match=words):
        held_out.divide(whole, 0.1, seed=0, recordings=recordings)


def test_a_run_leaves_the_validation_split_alone(tiny_copy, tmp_path, main, tool):
    shutil.rmtree(tiny_copy / "val")
    index_file(tiny_copy / "index", "val").unlink()
    changes = {"name": "held", "data.held_out": 0.3, "imports": [str(tiny.RECORD)]}
    outcome = main(tiny.write_config(tmp_path / "c.yaml", tiny_copy, changes))
    assert outcome.status == 0, outcome.text
    assert outcome.text.count("(15 held-out samples)\n") == 3  # two evaluations, and the end
    run = tmp_path / "runs/held"
    assert " held-out " in tool("compare_runs", run, run)[1]
    lines = tiny.metrics(run, "val")
    found = {(line["samples"], line["data_split"]) for line in lines}
    assert found == {(15, "train-held-out-0.3-seed-0")}
    # An epoch of 32 samples has 4 steps of 8, and sees each once.
    seen = tiny.samples(run)
    epochs = [
        [i for step in steps for i, _ in seen[step]] for steps in ((1, 2, 3, 4), (5, 6, 7, 8))
    ]
    assert [Counter(ids) for ids in epochs] == [Counter(range(32))] * 2
    assert lines[-1]["step"] == 8
    there = (run, "--import", tiny.RECORD)
    of_eval = ("--execution", "reference", "--device", "cpu", "--json", tmp_path / "e.json")
    status, out, err = tool("eval", *there, *of_eval)
    assert status == 0, err
    assert "15 samples of train-held-out-0.3-seed-0" in out
    assert json.loads((tmp_path / "e.json").read_text())["top1"] == lines[-1]["top1"]
    assert out.endswith(f"\n\nwrote {tmp_path / 'e.json'}\n")
    drawn = ("--output", tmp_path / "drawn")
    assert tool("show", *there, "--sample", 14, *drawn)[0] == 0
    for command, given, flags in (
        *(("eval", (), "--data"), ("show", drawn, "--data")),
        ("eval", ("--split", "held-out"), "--split and --data"),
    ):
        status, _, err = tool(command, *there, *given, "--data", tiny_copy)
        assert (status, f"; without {flags}, the run's held-out samples" in err) == (2, True), err
    again = main(tmp_path / "c.yaml", "data.held_out=0.2")
    assert again.status == 2
    assert "data.held_out is 0.2 and was 0.3" in again.text


def test_pieces_of_event_data_stay_together(event_root):
    """As tools/prebin_dvs.py leaves them: DEST/recordings.jsonl and DEST/splits/NAME/train."""
    made = event_root()
    root = made.parent / "dest" / "splits" / "published"
    root.parent.mkdir(parents=True)
    shutil.move(made, root)
    index_splits(root, ["train"], kind="events")
    (root / "dataset.json").write_text('{"split": "published"}')
    # Pieces 0 and 1 of both classes are of one recording, the others of one each.
    records = [
        {"key": f"{name}/{i}", "source": "both" if i < 2 else f"{name}{i}"}
        for name in ("left", "right")
        for i in range(5)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (root.parent.parent / "recordings.jsonl").write_text(lines)
    model = {"name": "spiking_convnet_dvs"}
    data = {"kind": "events", "root": str(root), "held_out": 0.5}
    sides = []
    for seed in range(3):
        changes = {"name": "x", "model": model, "data": data, "seed": seed}
        config = parse(tiny.changed(tiny.CONFIG, changes), "x")
        assert evaluated_split(config.data, config.seed) == f"published-held-out-0.5-seed-{seed}"
        alone = World(0, 1, torch.device("cpu"), control=None)
        train, held = (files(part) for part in open_data(config, alone))
        both = {f"train/{name}/{i}.npy" for name in ("left", "right") for i in range(2)}
        assert both <= set(train) or both <= set(held)
        # Of 7 recordings 4 are held out.
        assert len(held) == (7 if both <= set(held) else 4)
        sides.append(both <= set(held))
    assert set(sides) == {True, False}
