"""A run beside a published training: equal epochs, equal images, and a sentence that says which."""

import json
import math
from functools import partial

import pytest
import tiny
import yaml

from tetdist.apps.reports import runs_table
from tetdist.apps.reports.reference import IMAGES, find_reference, references, tolerated
from tetdist.config.loading import load
from tetdist.config.schema import RunConfig

SEW = find_reference("sew34")


def a_run(folder, top1, recipe="sew34_t4", overrides=(), kind="val", images=IMAGES, loss=1.0):
    """A run of a recipe on so many images that was evaluated after so many epochs."""
    config = load(tiny.PROJECT / "configs" / f"{recipe}.yaml", overrides)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config.as_yaml())
    steps = images // config.batch.global_
    with (folder / "metrics.jsonl").open("a") as file:
        for epoch, value in top1.items():
            line = {"kind": kind, "step": round(epoch * steps), "epoch": epoch, "top1": value}
            print(json.dumps(line | {"time": 0.0, "loss": loss}), file=file)
    return folder


@pytest.fixture
def compare(tool):
    return partial(tool, "compare_runs")


def test_every_curve_is_whole():
    keys = set(RunConfig.model_fields)
    for name, curve in references().items():
        assert min(curve.top1) == 1, name
        assert max(curve.top1) <= curve.epochs, name
        assert all(0 < value < 100 for value in curve.top1.values()), name
        assert {key.partition(".")[0] for key in curve.recipe} <= keys, name


def test_between_published_epochs():
    assert SEW.at(4) == 36.33
    assert SEW.at(3) == pytest.approx(23.18 + (36.33 - 23.18) * math.log(1.5) / math.log(2))
    assert SEW.at(0.5) is None
    assert SEW.at(400) is None
    # An epoch without its last, incomplete batch.
    assert SEW.at(0.999) == 12.59
    last = max(SEW.top1)
    assert SEW.at(1.005 * last) == pytest.approx(SEW.top1[last])
    assert SEW.reached(36.33) == pytest.approx(4)
    assert SEW.reached(12.59) == 1
    assert SEW.reached(90) is None
    assert SEW.reached(0.1) is None


def test_curves_are_steep_for_ten_epochs():
    assert [tolerated(epochs, 50.0) for epochs in (10, 10.1)] == [5.0, 1.5]


def test_a_run_on_the_way(tmp_path, compare):
    run = a_run(tmp_path / "r", {1: 11.0, 3: 30.0})
    status, out, _ = compare(run, "--reference", "sew34", "--json", tmp_path / "v.json")
    assert status == 0
    assert "r is on track: 30.00 % after 3 epochs" in out
    assert "phases.0.epochs 120 (theirs 320)" in out
    (verdict,) = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert verdict["on_the_way"] is True
    assert verdict["points"][1]["at_epoch"] == pytest.approx(SEW.at(3))


def test_a_run_behind(tmp_path, compare):
    run = a_run(tmp_path / "r", {21: 50.38})
    figure = tmp_path / "both.png"
    status, out, _ = compare(run, "--reference", "sew34", "--plot", figure)
    assert status == 1
    assert "r is 5.6 points behind" in out
    assert "had about 56.02 %, and 50.38 % after 11.0 epochs" in out
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("reference", ["t_revsnn", "spiking34", "qkformer_10_384", "sew34"])
def test_a_run_that_guesses_is_behind(reference, tmp_path, compare):
    published = find_reference(reference)
    for epoch in (1.0, 2.0, 3.0):
        run = a_run(tmp_path / "r", {epoch: 0.10})
        status, out, _ = compare(run, "--reference", reference)
        assert status == 1, out
        assert "points behind" in out
        assert "and 0.10 % after" not in out
        top1 = published.at(epoch)
        assert top1 is not None
        assert published.warning(0.10, round(epoch * IMAGES)) is not None
        assert published.warning(0.6 * top1, round(epoch * IMAGES)) is None or top1 > 12


def test_too_early_where_the_reference_itself_guesses(tmp_path, compare):
    average = find_reference("t_revsnn_ema")
    run = a_run(tmp_path / "r", {3: 0.10}, kind="val_ema")
    status, out, _ = compare(run, "--reference", "t_revsnn_ema")
    assert status == 0
    assert "r has 0.10 % after 3 epochs, where t_revsnn_ema was still at chance (0.12 %)" in out
    assert average.warning(0.10, 3 * IMAGES) is None


def test_an_average_is_compared_with_an_average(tmp_path, compare):
    run = a_run(tmp_path / "r", {21: 52.0}, kind="val_ema")
    a_run(run, {21: 40.0})
    assert compare(run, "--reference", "t_revsnn_ema")[0] == 0
    status, out, _ = compare(run, "--reference", "t_revsnn")
    assert status == 1
    assert "r is 9.1 points behind: 40.00 %" in out


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_a_run_that_has_diverged(loss, tmp_path, compare):
    run = a_run(tmp_path / "r", {2: 25.0})
    a_run(run, {3: 0.1}, loss=loss)
    status, out, _ = compare(run, "--reference", "sew34")
    assert status == 1
    assert f"r has diverged: its loss after 3 epochs is {float(loss)}." in out
    # In training, before it is evaluated again.
    run = a_run(tmp_path / "t", {2: 25.0})
    a_run(run, {2.1: 0.1}, loss=loss, kind="train")
    status, out, _ = compare(run, "--reference", "sew34")
    assert status == 1
    assert f"t has diverged: its loss after 2.1 epochs is {float(loss)}." in out


def test_other_data_have_no_verdict(tmp_path, compare):
    # A run on half of the images: two of its epochs are one of theirs.
    run = a_run(tmp_path / "r", {2: 12.0}, images=IMAGES // 2)
    status, out, _ = compare(run, "--reference", "sew34", "--json", tmp_path / "v.json")
    assert status == 0
    assert out.splitlines()[4].split() == ["2", "12.00", "23.18", "12.59"]
    assert "r cannot be compared with sew34: its epochs have 640,512 images, those of" in out
    assert "1.0 epochs of ImageNet, it has 12.00 %, where sew34 had about 12.59 %." in out
    (verdict,) = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert verdict["on_the_way"] is None
    # Some held out are no other data.
    run = a_run(tmp_path / "h", {1: 11.0}, images=round(0.96 * IMAGES))
    assert "h is on track" in compare(run, "--reference", "sew34")[1]
    # Ten epochs of few images are less than one of ImageNet's.
    run = a_run(tmp_path / "f", {10: 90.0}, images=IMAGES // 20)
    status, out, _ = compare(run, "--reference", "sew34")
    assert status == 0
    assert "f cannot be compared with sew34: its epochs have 64," in out


@pytest.mark.parametrize(
    ("recipe", "overrides", "reference", "differences"),
    [
        ("psn_sew34_t4", [], "psn_sew34", {}),
        ("qkformer_10_512", [], "qkformer_10_512", {}),
        ("maxformer_10_384", [], "maxformer_10_384", {}),
        (
            "psn_sew34_t4",
            ["init_checkpoint=null"],
            "psn_sew34",
            {"init_checkpoint": [None, "a ReLU network's weights"]},
        ),
        (
            "psn_sew34_t4",
            [],
            "sew34",
            {
                "model.name": ["psn_sew_resnet34", "sew_resnet34"],
                "model.neuron.kind": ["psn", "lif"],
                "loss.kind": ["tet", "sdt"],
                "init_checkpoint": ["data/psn_sew34.safetensors", None],
            },
        ),
        (
            "psn_sew34_t4",
            ["model.name=psn_sew_resnet18", "batch.global=512", "batch.micro=64"],
            "psn_sew18",
            {},
        ),
        (
            "psn_sew34_t4",
            ["data.image_size=128", "data.mixup=0.2", "gradient_clipping=1.0", "ema.decay=0.999"],
            "psn_sew34",
            {
                "data.image_size": [128, 224],
                "data.mixup": [0.2, 0.0],
                "gradient_clipping": [1.0, None],
                "ema.decay": [0.999, None],
            },
        ),
        (
            "sew34_t4_64gpus",
            [],
            "sew34",
            {
                "model.neuron.decay": [0.5, 1.0],
                "model.neuron.surrogate": ["triangle", "atan"],
                "loss.kind": ["tet", "sdt"],
                "loss.label_smoothing": [0.1, 0.0],
                "phases.0.epochs": [120, 320],
                "phases.0.optimizer.lr": [0.8, 0.1],
                "phases.0.optimizer.weight_decay": [4e-5, 0.0],
                "phases.0.warmup_epochs": [5.0, 0.0],
                "batch.global": [2048, 256],
            },
        ),
    ],
)
def test_what_differs(recipe, overrides, reference, differences, tmp_path, compare):
    run = a_run(tmp_path / "r", {3: 50.0}, recipe, overrides)
    out = compare(run, "--reference", reference, "--json", tmp_path / "v.json")[1]
    (verdict,) = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert verdict["differences"] == differences
    assert ("Its configuration differs" in out) == bool(differences)


def test_the_phase_that_the_run_is_in_is_compared(tmp_path, compare):
    run = a_run(tmp_path / "r", {95: 57.0}, "spiking34_t4_t6")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.replace('"kind": "val"', '"kind": "val", "phase": 1'))
    out = compare(run, "--reference", "spiking34")[1]
    assert "model.arguments.norm tdbn (theirs unset)" in out
    assert "phases.1.timesteps 6 (theirs 4), phases.1.optimizer.kind adam (theirs sgd)" in out
    assert "phases.0" not in out


def test_the_figure_of_an_average_has_the_average(tmp_path, monkeypatch, compare):
    drawn = []
    monkeypatch.setattr(runs_table, "plot", lambda records, *_: drawn.extend(records))
    run = a_run(a_run(tmp_path / "r", {1: 40.0}), {1: 60.0}, kind="val_ema")
    for name in ("t_revsnn", "t_revsnn_ema"):
        compare(run, "--reference", name, "--plot", tmp_path / "figure.png")
    assert [record.name for record in drawn] == ["r", "r (EMA)"]
    assert [[line["top1"] for line in one.of_kind("val")] for one in drawn] == [[40.0], [60.0]]


def test_recipes_of_imagenet_name_a_curve():
    named = {
        file.stem: config.reference
        for file in sorted((tiny.PROJECT / "configs").glob("*.yaml"))
        if (config := load(file)).reference is not None
    }
    assert named == {
        "maxformer_10_384": "maxformer_10_384",
        "psn_sew34_t4": "psn_sew34",
        "qkformer_10_384": "qkformer_10_384",
        "qkformer_10_512": "qkformer_10_512",
        "qkformer_10_768": "qkformer_10_768",
        "sew34_t4": "sew34",
        "sew34_t4_64gpus": "sew34",
        "sew34_t4_best": "sew34",
        "spiking34_t4_t6": "spiking34",
    }
    for name in named.values():
        find_reference(name)


def test_mistakes(tmp_path, compare):
    run = a_run(tmp_path / "r", {})
    status, _, told = compare(run, "--reference", "sew43")
    assert status == 2
    assert "no published curve 'sew43'; choose from sew18, sew34" in told
    status, out, _ = compare(run, "--reference", "sew34")
    assert status == 0
    assert "r cannot be compared with sew34 yet: it has no evaluation after 1 to 320" in out
    status, out, _ = compare(run, "--reference", "t_revsnn_ema")
    assert status == 0
    assert "it has no evaluation of an average (ema.decay) after 1 to 250" in out
    alone = run / "metrics.jsonl"
    status, _, told = compare(alone, "--reference", "sew34")
    assert status == 2
    assert "needs the run's folder" in told


def test_a_run_says_so_itself(farm, tiny_root, tmp_path, compare):
    runs = tmp_path / "runs"
    config = tiny.write_config(tmp_path / "c.yaml", tiny_root)
    unknown = farm(config, "reference=sew43")
    assert unknown.status == 2
    assert "reference: there is no published curve 'sew43'; choose from sew18" in unknown.text
    assert not runs.exists()
    other = farm(config, "reference=psn_sew34", "name=other")
    assert other.status == 0, other.text
    message = (
        "reference: psn_sew34 has ImageNet's 1,000 classes and these data have 4, so the run is"
    )
    assert message in other.text
    assert "reference_top1" not in tiny.metrics(runs / "other", "val")[0]
    # An ImageNet of as many classes, whose epochs are as long.
    batch = yaml.safe_load(config.read_text())["batch"]["global"]
    images = tiny.STEPS_PER_EPOCH * batch
    small = tmp_path / "small.py"
    small.write_text(
        "from tetdist.apps.reports import reference\n\n"
        f"reference.IMAGES = {images}\n"
        "reference.HELD_OUT = 0.5\n"
        f"reference.IMAGENET_CLASSES = {len(tiny.CLASSES)}\n"
    )
    trained = farm(config, f"imports=[{small}]", "reference=psn_sew34", "name=r")
    assert trained.status == 0, trained.text
    first = tiny.metrics(runs / "r", "val")[0]
    there = find_reference("psn_sew34").at(first["step"] * batch / images)
    assert first["reference_top1"] == pytest.approx(there)
    behind = there - first["top1"] > 5
    assert ("points behind psn_sew34" in trained.text) == behind
    average = farm(config, f"imports=[{small}]", "reference=t_revsnn_ema", "name=average")
    assert average.status == 0, average.text
    assert "t_revsnn_ema is of a moving average and this run keeps none" in average.text
    status, out, _ = compare(runs / "other", runs / "average")
    assert status == 0, out
    assert "Metrics: the same in 13 lines that both have." in out
