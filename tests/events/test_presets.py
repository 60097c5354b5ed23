"""tools/prebin_dvs.py --preset on miniature trees of the published data sets."""

import json

import cameras
import numpy as np
import pytest

from tetdist.apps.events.folders import list_sources
from tetdist.apps.events.formats import SUFFIXES
from tetdist.apps.events.presets import PRESETS, check_source
from tetdist.errors import UserError

LABELS = "class,startTime_usec,endTime_usec\n1,0,40000\n2,50000,90000\n"


def write(root, paths, make):
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(make(seed))
    return root


def cifar10_dvs(root):
    paths = [f"{name}/cifar10_{name}_{i}.aedat" for name in ("cat", "dog") for i in range(10)]
    return write(root, paths, lambda seed: cameras.dvs128(cameras.events(200, 128, 128, seed=seed)))


def dvs128_gesture(root):
    names = [f"user0{i}_led" for i in (1, 2)]
    made = cameras.events(900, 128, 128)
    write(root, [f"{name}.aedat" for name in names], lambda _: cameras.aedat31(made))
    for part, name in zip(("train", "test"), names, strict=True):
        (root / f"trials_to_{part}.txt").write_text(f"{name}.aedat\n")
        (root / f"{name}_labels.csv").write_text(LABELS)
    return root


def n_caltech101(root):
    names = ("Faces_easy", "yin_yang")
    paths = [f"{name}/image_{i:04}.bin" for name in names for i in range(2)]
    return write(root, paths, lambda seed: cameras.nmnist(cameras.events(200, 233, 173, seed=seed)))


def n_cars(root):
    paths = [
        f"n-cars_{part}/{name}/obj_{i}_td.dat"
        for part in ("train", "test")
        for name in ("cars", "background")
        for i in range(2)
    ]
    header = "% Version 2\n"
    return write(
        root, paths, lambda seed: cameras.dat(cameras.events(200, 90, 80, seed=seed), header)
    )


def nmnist(root):
    paths = [f"{part}/{k}/{i}.bin" for part in ("Train", "Test") for k in "37" for i in range(2)]
    return write(root, paths, lambda seed: cameras.nmnist(cameras.events(200, seed=seed)))


TREES = {
    "cifar10-dvs": cifar10_dvs,
    "dvs128-gesture": dvs128_gesture,
    "n-caltech101": n_caltech101,
    "n-cars": n_cars,
    "nmnist": nmnist,
}
# Shape of a tensor; the splits of a miniature, with the numbers to train and to test.
MADE = {
    "cifar10-dvs": (
        (10, 2, 48, 48),
        {
            "first-90-percent": (18, 2),
            "first-70-percent": (14, 6),
            "first-90-percent-by-letters": (18, 2),
            "stratified-9-1-seed-0": (18, 2),
        },
    ),
    "dvs128-gesture": ((16, 2, 128, 128), {"published": (2, 2)}),
    "n-caltech101": (
        (10, 2, 48, 48),
        {"first-90-percent": (2, 2), "stratified-9-1-seed-0": (2, 2)},
    ),
    "n-cars": ((10, 2, 48, 48), {"published": (4, 4)}),
    "nmnist": ((10, 2, 34, 34), {"published": (4, 4)}),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return {name: make(root / name) for name, make in TREES.items()}


@pytest.fixture
def prebin_dvs(output_of, tmp_path):
    return lambda source, *options, status=0: output_of(
        "prebin_dvs.py", source, tmp_path / "dest", "--workers", 1, *options, status=status
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_its_frames_and_splits(name, trees, tmp_path, prebin_dvs):
    output = prebin_dvs(trees[name], "--preset", name)
    shape, expected = MADE[name]
    made = {
        file.parent.name: json.loads(file.read_text())["recordings"]
        for file in tmp_path.glob("dest/splits/*/dataset.json")
    }
    assert made == {split: {"train": a, "val": b} for split, (a, b) in expected.items()}
    tensor = np.load(next(tmp_path.glob("dest/recordings/*/*.npy")))
    assert tensor.shape == shape
    # The published frames are multiples of 1 / 255; whole events are counted elsewhere.
    steps = 255 * tensor if name == "cifar10-dvs" else tensor
    assert steps.max() > 0
    assert np.allclose(steps, np.rint(steps), atol=0.1)
    preset = PRESETS[name]
    whole = f"but {preset.title} has {preset.classes} in {preset.recordings:,}, so results"
    assert whole in output
    for split, behind in preset.splits.items():
        is_made = any(full.startswith(split) for full in made)
        assert (f"data set, used by: {behind}\n" in output) == is_made
    if name == "cifar10-dvs":
        assert "split skipped: the split '0-99-test' leaves nothing to train of 'cat'" in output


def test_a_preset_takes_no_other_data_set_for_its_own(trees):
    for name in PRESETS:
        for other, root in trees.items():
            sources = list_sources(root, SUFFIXES).sources
            if other == name:
                assert "results are not those of the whole" in check_source(name, root, sources)
                continue
            with pytest.raises(UserError, match=f"--preset {name} expects .* give the data set's"):
                check_source(name, root, sources)


def test_options_beside_a_preset_count_and_are_reported(trees, tmp_path, prebin_dvs):
    options = ["--preset", "n-cars", "--timesteps", 4, "--size", "20x17", "--bins", "count"]
    output = prebin_dvs(trees["n-cars"], *options)
    assert "--preset n-cars: --values count --split published --sensor 120x100\n" in output
    assert "--bins" not in output
    tensor = np.load(next(tmp_path.rglob("*.npy")))
    assert tensor.shape == (4, 2, 17, 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --timesteps (the number of time bins) or --preset"),
        (["--preset", "nmnist", "--simulate"], "--preset needs recordings and --simulate images"),
        (["--preset", "cifar10-dvs"], "--preset cifar10-dvs expects 10 classes in 10,000 record"),
    ],
)
def test_mistakes_with_presets_end_in_a_sentence(trees, tmp_path, prebin_dvs, options, words):
    output = prebin_dvs(trees["nmnist"], *options, status=2)
    assert words in output
    assert not (tmp_path / "dest").exists()
