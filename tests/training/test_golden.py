"""Runs of the version before the rooms, kept in golden/ with their numbers, are still right."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import expect

from tetdist.apps.cli import eval as evaluation
from tetdist.datasets import index
from tetdist.nn.batch_norm import BatchNorm

GOLDEN = tiny.PROJECT / "tests" / "golden"
# To the bit on the machine that wrote them; another processor adds up in another order.
EQUAL = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The tiny images as BMP files, whose bytes no release of a library changes."""
    root = tmp_path_factory.mktemp("golden") / "data"
    tiny.make_images(root)
    for file in root.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    index.index_splits(root)
    return root


@pytest.fixture
def train(main, root, tmp_path):
    """Trains golden.yaml in runs/NAME of the test's folder: (name, *overrides)."""

    def run(name, *overrides):
        places = (f"data.root={root}", f"runs_dir={tmp_path / 'runs'}", f"name={name}")
        return main(GOLDEN / "golden.yaml", *places, *overrides)

    return run


@pytest.fixture
def stem_counted_once(monkeypatch):
    """Move the running variance of an image's stem as that version did: as of one copy, not of T.

    This changes no training, but by a thousandth what is evaluated.
    """
    forward = BatchNorm.forward
    monkeypatch.setattr(
        BatchNorm, "forward", lambda self, current, _copies=1: forward(self, current)
    )


def lines(file):
    """Lines of a metrics.jsonl without what the clock says, by kind and step."""
    clock = ("time", "samples_per_s", "image_timesteps_per_s", "data_wait", "eta_s", "seconds")
    read = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in clock} for line in read]
    return {(line["kind"], line["step"]): line for line in kept}


def same(got, expected):
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float):
        return got == pytest.approx(expected, **EQUAL)
    return got == expected


@pytest.mark.usefixtures("stem_counted_once")
def test_its_run_is_made_again_continued_and_evaluated(train, tmp_path, root):
    run = Path(shutil.copytree(GOLDEN / "stopped", tmp_path / "runs" / "stopped"))
    expect(train("stopped"), "from step 7")
    train("straight")
    expected = lines(GOLDEN / "straight.jsonl")
    # It was evaluated after step 7, too, where it was to end.
    more = {"straight": set(), "stopped": {("val", 7), ("final", 7)}}
    for name, keys in more.items():
        found = lines(tmp_path / "runs" / name / "metrics.jsonl")
        assert found.keys() == expected.keys() | keys
        for key in expected:
            assert same(found[key], expected[key]), (name, key)
    last = [
        load_file(tmp_path / f"runs/{name}/checkpoints/step-00000010/model.safetensors")
        for name in ("stopped", "straight")
    ]
    assert last[0].keys() == last[1].keys()
    for name, tensor in last[1].items():
        torch.testing.assert_close(last[0][name], tensor, rtol=1e-9, atol=1e-12)

    result = tmp_path / "result.json"
    arguments = ["--checkpoint", run, "--json", result, "--precision", "fp64"]
    arguments += ["--execution", "reference", "--device", "cpu", "--data", root]
    assert evaluation.main([str(argument) for argument in arguments]) == 0
    wanted = json.loads((GOLDEN / "straight_evaluation.json").read_text())
    for gone in ("seed", "dropped_timesteps", "dropped_events"):
        del wanted[gone]
    found = json.loads(result.read_text()) | {"checkpoint": ""}
    found["energy"] = {key: found["energy"][key] for key in wanted["energy"]}
    assert same(found, wanted | {"checkpoint": ""})
