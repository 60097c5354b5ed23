"""A run beside a published training: its accuracy after as many images."""

import math

import pytest
import tiny
import yaml

from tetdist.apps.reports.reference import IMAGES, find_reference, references
from tetdist.config.loading import load

SEW = find_reference("sew34")


def test_every_curve_is_whole():
    for name, curve in references().items():
        top1, loss, train = curve.curves.values()
        assert min(top1) == 1, name
        assert len(top1) > 5, name
        assert all(0 < value < 100 for value in [*top1.values(), *train.values()]), name
        assert [*loss.values()] == sorted(loss.values(), reverse=True), name
        assert [*train.values()] == sorted(train.values()), name
        assert loss.keys() == train.keys(), name


def test_between_published_epochs():
    assert SEW.at(4) == 36.33
    assert SEW.at(3) == pytest.approx(23.18 + (36.33 - 23.18) * math.log(1.5) / math.log(2))
    assert SEW.at(0.5) is None
    assert SEW.at(400) is None
    # An epoch without its last, incomplete batch.
    assert SEW.at(0.999) == 12.59
    assert SEW.at(1.005 * 320) == pytest.approx(66.66)
    training = {"reference_train_loss": 3.36, "reference_train_top1": 30.69}
    assert SEW.beside(4 * IMAGES) == {"reference_top1": 36.33, **training}
    assert find_reference("psn_sew34").beside(4 * IMAGES) == {"reference_top1": 55.53}
    assert SEW.beside(IMAGES // 2) == {}


def test_recipes_of_imagenet_name_a_curve():
    named = {file.stem: load(file).reference for file in (tiny.PROJECT / "configs").glob("*.yaml")}
    named = {recipe: name for recipe, name in named.items() if name is not None}
    # The name begins as the recipe's does, of the same network.
    alike = {"psn_sew34_t4": "psn_sew34", "spiking34_t4_t6": "spiking34"}
    alike |= dict.fromkeys(("sew34_t4", "sew34_t4_64gpus", "sew34_t4_best"), "sew34")
    sizes = ("maxformer_10_384", "qkformer_10_384", "qkformer_10_512", "qkformer_10_768")
    assert named == alike | {name: name for name in sizes}
    assert references().keys() >= {*named.values()}


def test_a_run_says_so_itself(farm, tiny_root, tmp_path):
    runs = tmp_path / "runs"
    config = tiny.write_config(tmp_path / "c.yaml", tiny_root)
    unknown = farm(config, "reference=sew43")
    assert unknown.status == 2
    assert "reference: there is no published curve 'sew43'; choose from sew18" in unknown.text
    assert not runs.exists()
    other = farm(config, "reference=psn_sew34", "name=other")
    assert other.status == 0, other.text
    message = "psn_sew34 has ImageNet's 1,000 classes and these data have 4, so the run is not"
    assert f"reference: {message}" in other.text
    assert "reference_top1" not in tiny.metrics(runs / "other", "val")[0]
    # An ImageNet of as many classes, whose epochs are as long.
    batch = yaml.safe_load(config.read_text())["batch"]["global"]
    images = tiny.STEPS_PER_EPOCH * batch
    small = tmp_path / "small.py"
    small.write_text(
        "from tetdist.apps.reports import reference\n\n"
        f"reference.IMAGES = {images}\n"
        f"reference.IMAGENET_CLASSES = {len(tiny.CLASSES)}\n"
    )
    trained = farm(config, f"imports=[{small}]", "reference=psn_sew34", "name=r")
    assert trained.status == 0, trained.text
    first = tiny.metrics(runs / "r", "val")[0]
    there = find_reference("psn_sew34").at(first["step"] * batch / images)
    assert first["reference_top1"] == pytest.approx(there)
    compared, alone = ([x["loss"] for x in tiny.metrics(runs / n, "train")] for n in ("r", "other"))
    assert compared == alone
