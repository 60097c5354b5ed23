"""Variants of ImageNet's validation set, in miniature, against plain sums over the logits."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tetdist.apps.weights import variants
from tetdist.apps.weights.trained import load
from tetdist.config.loading import parse
from tetdist.datasets import index
from tetdist.storage import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# In the order of their names; 10 and 11 are not where text would have them.
CLASSES = [f"n{1000 + 7 * k}" for k in range(12)]
EACH = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An untrained network that knows twelve classes."""
    changes = {"name": "twelve", "model.num_classes": len(CLASSES), "data.root": "data"}
    # A crop of what was enlarged would not be the image that is stored.
    changes |= {"data.resize": 20}
    config = parse(tiny.changed(tiny.CONFIG, changes), "test", warn=False)
    torch.manual_seed(3)
    model = config.model.build(num_classes=len(CLASSES), timesteps=2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(20)
    description = checkpoint.Description(
        config=config.as_dict(), classes=CLASSES, timesteps=2, step=0
    )
    path = tmp_path_factory.mktemp("network") / "twelve.safetensors"
    checkpoint.write_model_file(path, model.state_dict(), description)
    return path


def make(folder, names, seed=0, side=20):
    """Class folders of noise of several colours, by default with a border that is cropped."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((len(names), EACH, side, side, 3), np.uint8)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            colour = rng.integers(0, 256, 3)
            pixels[k, i] = (0.5 * colour + 0.5 * rng.integers(0, 256, (side, side, 3))).astype(
                np.uint8
            )
            Image.fromarray(pixels[k, i]).save(folder / name / f"{i}.png")
    return torch.from_numpy(pixels)


def decided(file, pixels, outputs=None):
    """Outputs, (K, N), that the network decides on for images in the middle of ``pixels``."""
    trained = load(file)
    border = (pixels.shape[2] - 16) // 2
    middle = slice(border, border + 16)
    images = pixels[:, :, middle, middle].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (trained.config.data.mean, trained.config.data.std)
    )
    with torch.no_grad():
        logits = trained.model((images - mean) / std)
    kept = logits if outputs is None else logits[:, list(outputs)]
    assert len(kept.argmax(1).unique()) > 1
    return kept.argmax(1).view(pixels.shape[:2])


def top1(right):
    return pytest.approx(100 * right.double().mean().item())


@pytest.fixture
def evaluate(file, tmp_path, tool):
    """Runs tools/eval.py on a variant: status, output, JSON."""

    def call(variant, *arguments):
        out = tmp_path / "found.json"
        out.unlink(missing_ok=True)
        command = ("--checkpoint", file, "--variant", variant, "--json", out, *arguments)
        status, output, err = tool("eval", *command, "--execution", "reference")
        return status, output + err, json.loads(out.read_text()) if out.is_file() else {}

    return call


def test_numbered_folders_of_v2(file, evaluate, tmp_path):
    numbers = [0, 2, 10, 11]
    pixels = make(tmp_path / "data" / "v2", [str(k) for k in numbers])
    status, output, found = evaluate("imagenet-v2", "--data", tmp_path / "data" / "v2")
    assert status == 0, output
    assert found["top1"] == top1(decided(file, pixels) == torch.tensor(numbers)[:, None])
    assert [sum(row) for row in found["confusion"]] == [EACH * (k in numbers) for k in range(12)]
    assert "12 samples of v2 (imagenet-v2: 4 classes by number)" in output
    assert (tmp_path / "data" / "index" / "v2.npz").is_file()
    (tmp_path / "data" / "v2" / "12").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "v2" / "12" / "0.png")
    (tmp_path / "data" / "index" / "v2.npz").unlink()
    status, output, _ = evaluate("imagenet-v2", "--data", tmp_path / "data" / "v2")
    assert status == 2
    assert "by the network's class numbers, 0 to 11, not 12" in output


def test_some_classes_compared_with_each_other(file, evaluate, tmp_path):
    numbers = [1, 4, 5, 9]
    names = [CLASSES[k] for k in numbers]
    pixels = make(tmp_path / "imagenet-a", names)
    page = tmp_path / "page.html"
    options = ("--data", tmp_path / "imagenet-a", "--index", tmp_path / "kept")
    status, output, found = evaluate("imagenet-a", *options, "--report", page)
    assert status == 0, output
    right = decided(file, pixels, numbers) == torch.arange(4)[:, None]
    assert found["top1"] == top1(right)
    # Among all twelve it would be another number.
    assert found["top1"] != top1(decided(file, pixels) == torch.tensor(numbers)[:, None])
    assert found["classes"] == names
    assert "imagenet-a (imagenet-a: the logits of its 4 classes alone)" in page.read_text()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["imagenet-a.npz"]
    make(tmp_path / "imagenet-r", ["n9"])
    status, output, _ = evaluate("imagenet-r", "--data", tmp_path / "imagenet-r")
    assert status == 2
    assert "the folder has the class n9, which the network was not trained on" in output


def test_corruptions_by_severity(file, evaluate, tmp_path):
    places = {("fog", "1"): "fog/1", ("glass_blur", "2"): "blur/glass_blur/2"}
    places |= {("fog", "5"): "fog/5", ("saturate", "1"): "extra/saturate/1"}
    expected = {}
    for seed, (key, place) in enumerate(places.items()):
        # They are of the network's size already.
        pixels = make(tmp_path / place, CLASSES, seed, side=16)
        expected[key] = top1(decided(file, pixels) == torch.arange(12)[:, None])
    status, output, found = evaluate("imagenet-c", "--data", tmp_path)
    assert status == 0, output
    for (name, severity), value in expected.items():
        assert found["corruptions"][name][severity] == value
    accuracy = found["corruptions"]
    fog = (accuracy["fog"]["1"] + accuracy["fog"]["5"]) / 2
    assert found["mean_error"] == pytest.approx(100 - (fog + accuracy["glass_blur"]["2"]) / 2)
    assert found["mce"] is None
    assert "no mean corruption error (mCE): it needs all 15" in output
    assert f"{accuracy['glass_blur']['2']:.2f}" in output


def test_mean_corruption_error_is_100_times_that_of_alexnet():
    def mce(factor, **changed):
        accuracies = {
            name: dict.fromkeys(range(1, 6), 100 - 100 * factor * error)
            for name, error in variants.ALEXNET.items()
        }
        return variants.corruption_errors(accuracies | changed)["mce"]

    assert mce(1) == pytest.approx(100)
    assert mce(0.5) == pytest.approx(50)
    half = dict(zip(range(1, 6), (100.0, 90.0, 80.0, 70.0, 60.0), strict=True))
    error = 20 / (100 * variants.ALEXNET["snow"])
    assert mce(1, snow=half) == pytest.approx(100 * (14 + error) / 15)
    assert mce(1, saturate=half) == pytest.approx(100)  # It does not count.
    assert mce(1, snow={1: 50.0}) is None


def test_several_labels_of_an_image(file, evaluate, tmp_path):
    pixels = make(tmp_path / "val", CLASSES)
    # Numbers in no order of the folders.
    numbers = np.random.default_rng(1).permutation(12 * EACH).reshape(12, EACH)
    for k, name in enumerate(CLASSES):
        for i in range(EACH):
            image = tmp_path / "val" / name / f"{i}.png"
            image.rename(image.with_name(f"ILSVRC2012_val_{numbers[k, i] + 1:08}.JPEG"))
    outputs = decided(file, pixels)
    index.index_splits(tmp_path, ["val"])
    rng = np.random.default_rng(2)
    answers = [
        sorted(rng.choice(12, size, replace=False).tolist()) for size in rng.integers(0, 5, 36)
    ]
    status, output, _ = evaluate("real", "--data", tmp_path)
    assert status == 2
    assert (
        "real.json from github.com/google-research/reassessed-imagenet and put it there" in output
    )
    (tmp_path / "real.json").write_text(json.dumps(answers))
    status, output, found = evaluate("real", "--data", tmp_path)
    assert status == 0, output
    labelled = [
        int(outputs[k, i]) in answers[numbers[k, i]]
        for k in range(12)
        for i in range(EACH)
        if answers[numbers[k, i]]
    ]
    assert 0 < sum(labelled) < len(labelled) < 36
    assert found["real"]["samples"] == len(labelled)
    assert found["real"]["top1"] == pytest.approx(100 * sum(labelled) / len(labelled))
    assert found["top1"] == top1(outputs == torch.arange(12)[:, None])
    assert (
        f"real labels: top-1 {found['real']['top1']:.2f} % of the {len(labelled)} images" in output
    )
    (tmp_path / "real.json").write_text(json.dumps(answers[:5]))
    status, output, _ = evaluate("real", "--data", tmp_path)
    assert status == 2
    assert "with a number up to the 5 of" in output
    (tmp_path / "real.json").write_text(json.dumps(answers))
    (first,) = (tmp_path / "val").rglob("*_00000001.JPEG")
    first.rename(first.with_name("ILSVRC2012_val_00000000.JPEG"))
    index.index_splits(tmp_path, ["val"])
    status, output, _ = evaluate("real", "--data", tmp_path)
    assert status == 2
    assert "val_00000000.JPEG is no image of ImageNet's validation set" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["imagenet-a"], "--variant imagenet-a needs its folder; give --data FOLDER"),
        (["imagenet-r", "--data", "x", "--split", "y"], "leave out --split"),
        (["imagenet-c", "--data", "x", "--report", "a.html"], "does not support --report"),
        (["imagenet-c", "--data", "x", "--timesteps", "1,2"], "is evaluated at one T"),
        (["imagenet-c", "--data", "/"], "/ has no folder of a corruption"),
        (["imagenet-c", "--data", "nowhere"], "--data: nowhere does not exist"),
        # Not "there is no index /index/nowhere.npz", which would have the whole disk indexed.
        (["imagenet-v2", "--data", "/nowhere"], "--data: /nowhere does not exist"),
        (["imagenet-a", "--data", "/nowhere"], "--data: /nowhere does not exist"),
        (["imagenet-r", "--data", __file__], "test_variants.py is a file; give the data folder"),
        (["real", "--data", __file__], "test_variants.py is a file; give the data folder"),
    ],
)
def test_options_are_checked(evaluate, arguments, complaint):
    status, output, _ = evaluate(*arguments)
    assert status == 2
    assert complaint in output
    assert "index" not in output.partition("error:")[2]
