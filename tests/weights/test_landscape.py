"""tools/landscape.py: sharpness of trained networks, along directions relative to their filters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

from tetdist.apps.cli import train
from tetdist.apps.weights import landscape
from tetdist.apps.weights.landscape import Landscape
from tetdist.config.loading import parse
from tetdist.datasets.index import index_file, load_index
from tetdist.distributed.world import World
from tetdist.losses import sdt_loss
from tetdist.nn.batch_norm import BatchNorm
from tetdist.storage import checkpoint

CPU = ("--device", "cpu", "--execution", "reference", "--threads", 1, "--precision", "fp64")
FEW = (*CPU, "--samples", 7, "--directions", 2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TET and SDT with two seeds each."""
    folder = tmp_path_factory.mktemp("landscape")
    for kind in ("tet", "sdt"):
        for seed in (0, 1):
            changes = {"name": f"{kind}-seed{seed}", "seed": seed, "loss.kind": kind}
            changes |= {"engine": "torch", "phases.0.epochs": 1}
            file = tiny.write_config(folder / "t.yaml", tiny_root, changes)
            assert train.main(["--config", str(file)]) == 0
    return folder / "runs"


@pytest.fixture
def around(runs: Path, alone: World) -> Callable[..., Landscape]:
    """Makes the landscape of a model, by default of a trained one."""
    weights, description = checkpoint.load_model_file(runs / "tet-seed0")
    config = parse(tiny.changed(description.config, {"precision": "fp64"}), "test", warn=False)
    index = load_index(index_file(config.data.index_dir, "train"))

    def make(model: Any = None, samples: int = 46, seed: int = 0) -> Landscape:
        if model is None:
            model = config.model.build(num_classes=4, timesteps=2)
            model.set_execution("reference")
            model.load_state_dict(weights)
        return Landscape(model.double().eval(), config, index, samples, seed, alone)

    return make


class Smooth(nn.Module):
    """A network whose loss has a Hessian, and which ignores its images."""

    timesteps = 2

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator).double())
        self.bias = nn.Parameter(torch.ones(4).double())
        self.mixed = torch.randn(12, 4, generator=generator).double()

    def logits(self, weight: Tensor, number: int) -> Tensor:
        return ((weight.flatten() @ self.mixed).tanh() + self.bias).expand(2, number, 4)

    def forward(self, images: Tensor, *, per_timestep: bool) -> Tensor:
        assert per_timestep
        return self.logits(self.weight, len(images))


def test_curvature_is_that_of_the_hessian(around):
    model = Smooth()
    found = around(model)
    labels = torch.cat([labels for _, labels in found.batches])
    weight = model.weight.detach().clone()
    exact = hessian(lambda w: sdt_loss(model.logits(w, len(labels)), labels), weight).view(12, 12)
    scale = weight.norm(dim=1).repeat_interleave(4)
    eigenvalues = torch.linalg.eigvalsh(exact * scale * scale[:, None])
    assert eigenvalues[-1] > 1.5 * eigenvalues[:-1].abs().max()
    result = landscape.measure(found, 3, 1e-2, 0)
    sharp = result["sharpness"]["time_mean"]
    assert sharp["eigenvalue"] == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    assert max(result["surrogate_eigenvalues"]) == pytest.approx(sharp["eigenvalue"], rel=1e-3)
    random = [found.random(k)[0] for k in range(3)]
    for direction in random:
        torch.testing.assert_close(direction.norm(dim=1), weight.norm(dim=1))
    curvatures = [float(d.flatten() @ exact @ d.flatten()) for d in random]
    assert sharp["curvature"] == pytest.approx(np.mean(curvatures), rel=1e-3)
    assert sharp["rise"] == pytest.approx(np.mean(curvatures) / 2 * 1e-4, rel=1e-2)
    tops = [max(curve["time_mean"]) for curve in result["curves"].values()]
    assert sharp["worst_rise"] == max(tops) - result["center"]["time_mean"]
    directions = [found.normalised(found.gradient()), *map(found.random, range(9))]
    rises = [found.values((1e-3, direction))["time_mean"] for direction in directions]
    assert rises[0] == max(rises)
    other = around(Smooth(), seed=1).random(0)
    assert not torch.equal(other[0], random[0])


def test_scale_of_normalised_filters_does_not_matter(around):
    """Which needs directions relative to the filters and running statistics of each point."""
    curves = []
    for factor in (1.0, 7.0):
        found = around(samples=8)
        for module in found.model.modules():
            if isinstance(module, BatchNorm):
                module.eps = 0.0
        for i, weight in enumerate(found.origin):
            if weight.ndim == 4:
                weight *= factor
                found.norms[i] *= factor
        curves.append(landscape.measure(found, 2, 0.5, 0)["curves"]["0"]["objective"])
    np.testing.assert_allclose(*curves, rtol=1e-6)
    assert len(set(curves[0])) == landscape.POINTS


def test_groups_are_compared_by_seed(runs, call, tmp_path):
    output, file = tmp_path / "l.png", tmp_path / "l.json"
    options = ("--grid", 3, "--json", file, "--output", output)
    status, printed = call("landscape", runs / "tet-seed0", runs, *FEW, *options)
    assert status == 0, printed
    assert output.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert {name: len(ones) for name, ones in found["groups"].items()} == {"sdt": 2, "tet": 2}
    assert found["control"] == "tet"
    of = {Path(one["checkpoint"]).name: one for one in found["networks"]}
    assert of["sdt-seed0"]["samples"] == 8
    assert of["sdt-seed0"]["center"]["objective"] == of["sdt-seed0"]["center"]["time_mean"]
    assert of["tet-seed0"]["center"]["objective"] != of["tet-seed0"]["center"]["per_timestep"]
    rises = {name: one["sharpness"]["time_mean"]["rise"] for name, one in of.items()}
    pairs = [rises[f"sdt-seed{seed}"] - rises[f"tet-seed{seed}"] for seed in (0, 1)]
    difference = found["differences"]["sdt"]["time_mean"]["rise"]
    assert (difference["n"], difference["mean"]) == (2, pytest.approx(np.mean(pairs)))
    surfaces = {name: one["surface"] for name, one in of.items() if one["surface"]}
    assert set(surfaces) == {"sdt-seed0", "tet-seed0"}  # one of each group, which is drawn
    for name, surface in surfaces.items():
        assert surface["top1"][1][1] == of[name]["center"]["top1"]


def test_any_number_of_processes_measures_the_same(runs, farm, tmp_path, call):
    command = (runs / "tet-seed0", *FEW, "--split", "val", "--grid", 3, "--json")
    status, printed = call("landscape", *command, tmp_path / "1.json")
    assert status == 0, printed
    program = tiny.PROJECT / "tools" / "landscape.py"
    ended = farm.side_by_side(3, tiny.python(program, *command, tmp_path / "3.json"), tmp_path)
    assert [status for status, _ in ended] == [0] * 3, ended
    one, three = (json.loads((tmp_path / f"{n}.json").read_text())["networks"][0] for n in (1, 3))
    for found in (one, three):
        found |= found.pop("curves") | found.pop("sharpness")
    for part in ("center", "surface", "0", "1", "ascent", "sharpest", "time_mean"):
        for name, values in one[part].items():
            np.testing.assert_allclose(three[part][name], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("missing",), "there is no checkpoint missing; give a run folder or"),
        (("tet-seed0", "tetdist:quickstart"), "tetdist:quickstart is another network than"),
        (
            ("tet-seed0", "--data", "nowhere"),
            "--data: nowhere does not exist; give the data folder",
        ),
        (("tet-seed0", "--directions", 1), "--directions: 1 has no standard deviation; give at"),
        (("tet-seed0", "--grid", 4), "--grid: 4 must be odd and at least 3"),
        (("tet-seed0", "--output", "a.pdf"), "--output: a.pdf must end in .png"),
        (("tet-seed0", "--json", "no/a.json"), "--json: cannot write no/a.json: name a file in a"),
    ],
)
def test_errors_are_one_sentence(arguments, text, runs, call, monkeypatch):
    monkeypatch.chdir(runs)
    status, printed = call("landscape", *FEW, *arguments)
    assert (status, text in printed, "Traceback" in printed) == (2, True, False), printed


def test_ctrl_c_writes_nothing(runs, call, monkeypatch, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Landscape, "sharpest", interrupt)
    status, printed = call("landscape", runs / "tet-seed0", *FEW, "--json", tmp_path / "l.json")
    assert (status, "interrupted; nothing was written" in printed) == (130, True), printed
    assert not list(tmp_path.iterdir())
