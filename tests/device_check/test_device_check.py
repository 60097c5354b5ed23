"""The check of a machine with GPUs, in the form that it has on a CPU."""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from graph_stand_ins import run_again
from torch import Tensor

from tetdist.cli import check_gpu
from tetdist.config import loading
from tetdist.device_check import check as checking
from tetdist.device_check import graphs, numerics, versions
from tetdist.device_check.check import Finding, Machine, run_checks
from tetdist.device_check.checks import CHECKS
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.slurm import speed
from tetdist.slurm.cluster import ClusterSection
from tetdist.training import graphs as training_graphs
from tetdist.training.graphs import Captured


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    with join("cpu") as world:
        yield Machine(world, small=True, folder=tmp_path)


def test_the_command_knows_all_checks() -> None:
    assert tuple(CHECKS) == check_gpu.NAMES


def test_the_quick_checks_pass_here(tmp_path: Path, call: Callable[..., tuple[int, str]]) -> None:
    file = tmp_path / "found.json"
    names = "versions,numerics,graphs,links,pixels"
    status, output = call("check_gpu", "--device", "cpu", "--only", names, "--json", file)
    assert status == 0, output
    assert "all is well; left out: graphs, links, pixels" in output
    assert "there is no GPU, and CUDA graphs are a GPU's" in output
    found = json.loads(file.read_text())
    assert set(found["checks"]) == set(names.split(","))
    # In float64 the passes and the definition are equal but for rounding.
    assert 0 < found["checks"]["numerics"]["sew_resnet18 fp64"] < 1e-9
    assert found["machine"]["torch"]


@pytest.mark.long
def test_all_checks_pass_here_on_two_processes(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = tiny.launched(2, tiny.PROJECT / "tools" / "check_gpu.py", "--device", "cpu")
    status, output = tiny.execute([*command, "--json", str(file)], tmp_path, timeout=280)
    assert status == 0, output
    found = json.loads(file.read_text())
    assert found["processes"] == 2
    statuses = {name: one["status"] for name, one in found["checks"].items()}
    assert statuses == dict.fromkeys(CHECKS, "ok") | dict.fromkeys(("graphs", "pixels"), "left out")
    assert found["checks"]["links"]["gb_per_s"] > 0


def test_the_plan_and_the_document_read_what_is_written(here: Machine, tmp_path: Path) -> None:
    rates = {"images_per_s": 2000.0, "ratio": 0.5, "peak_mib": 2048.0}
    relu = {"images_per_s": 1000.0, "ratio": 1.0, "peak_mib": None}
    numbers = {
        "by_batch": {"32": {"relu": relu, "tetdist, none": rates}},
        "images_per_s": 2000.0,
        "timesteps": 4,
    }
    report = run_checks({"rates": lambda _: Finding("ok", "fast", None, numbers)}, here)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(report.as_dict()))
    values = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"})
    config = loading.parse(values, "x")
    network = speed.Network(config.model.build(num_classes=10, timesteps=4), None)
    facts = ClusterSection(gpus_per_node=0)
    found = speed.speed_of(config, facts, network, file=str(file))
    assert isinstance(found, speed.Speed)
    assert (found.images_per_s, found.timesteps) == (2000.0, 4)
    with pytest.raises(UserError, match="was measured on a CPU"):
        speed.speed_of(config, ClusterSection(gpus_per_node=1), network, file=str(file))
    script = tiny.PROJECT / "docs" / "make" / "performance.py"
    text = runpy.run_path(str(script))["gpu_text"](report.as_dict())
    assert "| 32 | tetdist, none | 2000 | 2.00 | 2.0 |" in text
    assert "| rates | ok | fast |" in text


def test_what_is_bad_is_told_with_its_remedy(here: Machine) -> None:
    def broken(_: Machine) -> Finding:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    lines: list[str] = []
    report = run_checks(
        {
            "fine": lambda _: Finding("ok", "7 of 7"),
            "first": lambda _: Finding("bad", "two builds", "pip uninstall one"),
            "second": broken,
        },
        here,
        lines.append,
    )
    assert [line.split()[0] for line in lines] == ["ok", "bad", "bad"]
    assert "RuntimeError: CUDA error: an illegal memory access" in lines[2]
    assert report.conclusion() == "to mend: first: pip uninstall one (1 more after that)"
    assert "Traceback" in report.as_dict()["checks"]["second"]["traceback"]


def test_passes_that_do_not_work_are_not_called_equal(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them both would be the definition."""
    monkeypatch.setattr(numerics, "passes_for", lambda *_, **__: None)
    found = numerics.check_numerics(here)
    assert found.status == "bad"
    assert "do not work here" in found.text


def test_losses_with_graphs_are_compared(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what stands in for a graph on a CPU, and with one that does not read the images anew."""
    monkeypatch.setattr(training_graphs, "capture", run_again)
    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _mode: None)
    monkeypatch.setattr(graphs, "BATCHES", ())
    monkeypatch.setattr(graphs, "STEPS", 2)
    monkeypatch.setattr(graphs, "PRECISIONS", ("bf16",))
    found = graphs.check_graphs(here)
    assert (found.status, found.text) == ("ok", "2 steps in bf16 have the same losses with graphs")

    def forgetful(function: Callable[[], Tensor]) -> Captured:
        result, replay = run_again(function)
        replays = iter([replay])
        return result, lambda: next(replays, lambda: None)()

    monkeypatch.setattr(training_graphs, "capture", forgetful)
    found = graphs.check_graphs(here)
    assert found.status == "bad"
    assert found.text.startswith("bf16: the loss of step 2 is ")
    assert str(found.remedy).startswith("train with cuda_graphs=false")


def test_ranks_that_fail_are_named() -> None:
    fine, bad = Finding("ok", "x"), Finding("bad", "no link")
    result = checking.Result("links", [fine, bad, fine, bad], 0.1)
    assert result.line().endswith("rank 1, 3: no link")


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"nvidia-dali-cuda130", "deepspeed"}, None),
        ({"deepspeed"}, "DALI is not installed"),
        ({"nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed"}, "two builds of DALI"),
        ({"nvidia-dali-cuda120"}, "DeepSpeed is not installed"),
    ],
)
def test_packages_that_do_not_suit_each_other(
    here: Machine, monkeypatch: pytest.MonkeyPatch, installed: set[str], problem: str | None
) -> None:
    monkeypatch.setattr(versions, "_distributions", lambda name: [name] * (name in installed))
    found = versions.check_versions(here)
    assert (found.status, problem is None) in (("ok", True), ("bad", False))
    if problem:
        assert problem in found.text
        assert "pip " in str(found.remedy)


def test_dali_of_another_cuda_is_told(monkeypatch: pytest.MonkeyPatch, here: Machine) -> None:
    import dataclasses

    on_gpu = dataclasses.replace(
        here, world=World(0, 1, torch.device("cuda", 0), here.world.control)
    )
    only: dict[str, Any] = {"nvidia-dali-cuda130": ["2.0"]}
    monkeypatch.setattr(versions, "_distributions", lambda name: only.get(name, []))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    problem = versions._dali_of_another_cuda(on_gpu)
    assert problem is not None
    assert "CUDA 12.8" in problem[0]
    assert "tetdist[cuda120]" in problem[1]
