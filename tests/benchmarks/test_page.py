"""The scripts that make the performance page and README's figure."""

import argparse
import importlib
import json
from statistics import mean
from unittest import mock

import pytest
import timm
import tiny
import torch
from torch import nn

from tetdist import models
from tetdist.apps.benchmarks import bench
from tetdist.apps.reports import style


@pytest.fixture
def made(monkeypatch):
    """Imports a script of docs/make."""
    monkeypatch.syspath_prepend(tiny.PROJECT / "docs/make")
    return importlib.import_module


def test_the_page_is_that_of_the_record(made, monkeypatch, tmp_path):
    """And what the record lacks, or what is asked for, is measured."""
    performance = made("performance")
    page, record = performance.PAGE, json.loads(performance.RECORD.read_text())
    assert performance.page(record) == page.read_text()
    measured = []

    def measure(entry, precision):
        measured.append((entry.model, precision))
        return record["vggsnn-fp32"]

    for name in ("PAGE", "RECORD"):
        monkeypatch.setattr(performance, name, tmp_path / name)
    monkeypatch.setattr(performance, "measured", measure)
    lacking = {key: value for key, value in record.items() if key != "ms_resnet34-bf16"}
    performance.RECORD.write_text(json.dumps(lacking))
    performance.main(["--again", "vggsnn"])
    assert measured == [("ms_resnet34", "bf16"), ("vggsnn", "fp32"), ("vggsnn", "bf16")]
    assert json.loads(performance.RECORD.read_text()).keys() == record.keys()


@pytest.mark.parametrize(
    ("name", "spinning", "better"),
    [("relu", 1.0, "spinning"), ("relu", 3.0, "asleep"), ("tetdist, none", 1.0, "asleep")],
)
def test_the_better_way_of_waiting_competes(name, spinning, better, made, monkeypatch):
    """A step takes 2 s asleep. tetdist's network waits as its commands do."""
    performance, alive = made("performance"), []

    def start(*_, OMP_WAIT_POLICY):
        one = mock.Mock(policy=OMP_WAIT_POLICY)
        one.end.side_effect = lambda: alive.remove(one)
        alive.append(one)
        return one

    seconds = {"PASSIVE": 2.0, None: spinning}
    monkeypatch.setattr(performance, "Worker", start)
    monkeypatch.setattr(performance, "together", lambda workers, _: seconds[workers[0].policy])
    with performance.fastest(argparse.Namespace(), name) as (worker, way):
        assert (way, worker.policy) == (better, performance.WAITING[better])
        assert alive == [worker]
    assert not alive


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_contestants_and_the_memory_that_the_documentation_promises(precision, made, monkeypatch):
    performance = made("performance")
    monkeypatch.setattr(performance, "FIXED", {"size": 64, "device": "cpu"})
    modes = ("none", "blocks", "timesteps")
    entry = performance.Entry("sew_resnet34", 4, 2, modes, repeats=1, has_peer=True)
    found = {row["name"]: row for row in performance.measured(entry, precision)["rows"]}
    assert list(found) == ["relu", *(f"tetdist, {mode}" for mode in modes), performance.PEER]
    assert all(row["waiting"] in performance.WAITING for row in found.values())
    kept = {name: row["kept_mib"] for name, row in found.items()}
    # The convolutions' outputs, and spikes in bytes; ReLU keeps its own output as well.
    assert kept["tetdist, none"] < 0.65 * kept["relu"]
    assert kept["tetdist, blocks"] < 0.25 * kept["tetdist, none"]


def test_bytes_are_kept_once_and_parameters_not_at_all(made):
    model, x = torch.nn.Linear(3, 5), torch.ones(7, 3, requires_grad=True)
    saved = made("performance").SavedBytes(model)
    with saved.counting():
        y = (model(x) + model(x)).square()  # of `x` both layers keep the same
    assert saved.now == saved.most == 4 * 7 * (3 + 5)
    y.sum().backward()
    assert (saved.now, saved.most) == (0, 4 * 7 * (3 + 5))


def convolutions(model):
    return sorted(
        (tuple(module.weight.shape), module.stride, module.padding, module.bias is not None)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def test_relu_networks_have_the_same_convolutions(made):
    relu_network, have = made("relu_networks").relu_network, set()
    names = [name for name in models.names() if "101" not in name and "152" not in name]
    for name in names:
        with torch.device("meta"):
            if (baseline := relu_network(name)) is None:
                continue
            model = timm.create_model(name)
            assert convolutions(baseline) == convolutions(model), name
            *_, channels, height, width = model.default_cfg["input_size"]
            logits = baseline(torch.empty(2, channels, height, width))
        assert logits.shape == (2, model.num_classes), name
        have.add(name)
    assert have == {name for name in names if "resnet" in name or name == "vggsnn"}
    in_bench = {name for name in names if bench.relu_baseline(name) is not None}
    assert in_bench >= {"sew_resnet34", "spiking_resnet50"}
    assert in_bench < have


def test_readmes_figure_shows_the_numbers_that_are_in_the_project(made, monkeypatch):
    drawn = []
    monkeypatch.setattr("sys.argv", ["readme_figure.py"])
    monkeypatch.setattr(style, "save", lambda figure, _: drawn.append(figure))
    assert made("readme_figure").main() == 0
    study, performance = (
        json.loads((tiny.PROJECT / "docs" / file).read_text())
        for file in ("results/losses.json", "performance/results.json")
    )
    study = study["studies"]["losses_fashion"]
    exits, costs = drawn[0].axes
    shown = {text.get_text() for text in exits.texts}
    for entry, label in (("sdt", "usual loss"), ("tet", "TET")):
        exit_of = [run["chosen_exit"] for run in study["runs"] if run["entry"] == entry]
        x, y = (mean(one[key] for one in exit_of) for key in ("mean_timesteps", "top1"))
        assert f"{label}: {y:.1f} % after {x:.2f} timesteps" in shown
        point = pytest.approx([x, y])
        assert any([*line.get_xdata(), *line.get_ydata()] == point for line in exits.lines)
    names = ("spikingjelly, eager", "relu", "tetdist, none", "tetdist, blocks")
    rows = performance["sew_resnet34-bf16"]["rows"]
    times, memory = ({row["name"]: row[key] for row in rows} for key in ("ratio", "kept_mib"))
    assert [bar.get_width() for bar in costs.patches] == pytest.approx(
        [values[name] / values["relu"] for values in (times, memory) for name in names]
    )
