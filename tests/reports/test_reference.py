"""A run beside a published training: equal epochs, equal images, and a sentence that says which."""

import importlib
import json
import math
from pathlib import Path

import pytest
import tiny
import yaml
from tiny import Farm

from tetdist.config.loading import load
from tetdist.config.schema import RunConfig
from tetdist.reports.reference import IMAGES, find_reference, references

SEW = find_reference("sew34")


def a_run(folder: Path, top1: dict[float, float]) -> Path:
    """A run of sew34_t4.yaml that was evaluated after so many epochs."""
    config = load(tiny.PROJECT / "configs" / "sew34_t4.yaml")
    folder.mkdir()
    (folder / "config.yaml").write_text(config.as_yaml())
    steps = IMAGES // config.batch.global_
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch, value in top1.items():
            line = {"kind": "val", "step": round(epoch * steps), "epoch": epoch, "top1": value}
            print(json.dumps(line | {"time": 0.0, "loss": 1.0}), file=file)
    return folder


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = importlib.import_module("tetdist.cli.compare_runs").main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_every_curve_is_whole() -> None:
    keys = set(RunConfig.model_fields)
    for name, curve in references().items():
        assert min(curve.top1) == 1, name
        assert max(curve.top1) <= curve.epochs, name
        assert all(0 < value < 100 for value in curve.top1.values()), name
        assert {key.partition(".")[0] for key in curve.recipe} <= keys, name


def test_between_published_epochs() -> None:
    assert SEW.at(4) == 36.33
    assert SEW.at(3) == pytest.approx(23.18 + (36.33 - 23.18) * math.log(1.5) / math.log(2))
    assert SEW.at(0.5) is None
    assert SEW.at(400) is None
    # An epoch without its last, incomplete batch.
    assert SEW.at(0.999) == 12.59
    assert SEW.reached(36.33) == pytest.approx(4)
    assert SEW.reached(90) is None


def test_a_run_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "r", {1: 11.0, 3: 30.0})
    status, out, _ = compare(capsys, run, "--reference", "sew34", "--json", tmp_path / "v.json")
    assert status == 0
    assert "r is on the way: 30.00 % after 3 epochs" in out
    assert "phases.0.epochs 120 (theirs 320)" in out
    (verdict,) = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert verdict["on_the_way"] is True
    assert verdict["points"][1]["at_epoch"] == pytest.approx(SEW.at(3))


def test_a_run_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "r", {21: 50.38})
    figure = tmp_path / "both.png"
    status, out, _ = compare(capsys, run, "--reference", "sew34", "--plot", figure)
    assert status == 1
    assert "r is 5.6 points behind" in out
    assert "had about 56.02 %, and 50.38 % after 11.0 epochs" in out
    assert figure.stat().st_size > 10_000


def test_images_count_where_the_data_are_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "r", {2: 12.0})
    lines = (run / "metrics.jsonl").read_text()
    # A run on half of the images: two of its epochs are one of theirs.
    half = lines.replace(f'"step": {2 * (IMAGES // 256)}', f'"step": {IMAGES // 256}')
    assert half != lines
    (run / "metrics.jsonl").write_text(half)
    status, out, _ = compare(capsys, run, "--reference", "sew34")
    assert status == 0
    assert out.splitlines()[4].split() == ["2", "12.00", "23.18", "12.59"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "r", {})
    status, _, told = compare(capsys, run, "--reference", "sew43")
    assert status == 2
    assert "no published curve 'sew43'; there are sew18, sew34" in told
    status, out, _ = compare(capsys, run, "--reference", "sew34")
    assert status == 0
    assert "cannot be compared with sew34 yet" in out
    alone = run / "metrics.jsonl"
    status, _, told = compare(capsys, alone, "--reference", "sew34")
    assert status == 2
    assert "needs the run's folder" in told


def test_a_run_says_so_itself(farm: Farm, tiny_root: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    config = tiny.write_config(tmp_path / "c.yaml", tiny_root)
    unknown = farm(config, "reference=sew43")
    assert unknown.status == 2
    assert "reference: there is no published curve 'sew43'; there are sew18" in unknown.text
    assert not runs.exists()
    # With a data set of 8 images the run is beyond all published epochs but the first ones.
    small = tmp_path / "small.py"
    small.write_text("from tetdist.reports import reference\n\nreference.IMAGES = 8\n")
    trained = farm(config, f"imports=[{small}]", "reference=psn_sew34", "name=r")
    assert trained.status == 0, trained.text
    first = tiny.metrics(runs / "r", "val")[0]
    batch = yaml.safe_load(config.read_text())["batch"]["global"]
    there = find_reference("psn_sew34").at(first["step"] * batch / 8)
    assert first["reference_top1"] == pytest.approx(there)
    behind = there - first["top1"] > 5
    assert ("points behind psn_sew34" in trained.text) == behind
