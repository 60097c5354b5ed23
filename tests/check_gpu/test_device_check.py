"""The check of a machine with GPUs, in the form that it has on a CPU."""

import dataclasses
import itertools
import json
import math
import sys
import types

import pytest
import tiny
import torch
from graph_stand_ins import run_again

from tetdist.apps.check_gpu import (
    graphs,
    images,
    layers,
    numerics,
    remedies,
    resume,
    steps,
    versions,
)
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.checks import CHECKS
from tetdist.apps.check_gpu.run import run_checks
from tetdist.apps.cli import check_gpu
from tetdist.apps.slurm import speed
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config import loading
from tetdist.distributed.world import World
from tetdist.errors import UserError, pip_install
from tetdist.training import graphs as training_graphs


@pytest.fixture
def here(alone, tmp_path):
    return Machine(alone, small=True, folder=tmp_path)


def test_the_command_knows_all_checks():
    assert tuple(CHECKS) == check_gpu.NAMES


def test_the_quick_checks_pass_here(tmp_path, call):
    file = tmp_path / "found.json"
    names = "versions,numerics,graphs,pixels"
    status, output = call("check_gpu", "--device", "cpu", "--only", names, "--json", file)
    assert status == 0, output
    last = output.splitlines()[-1]
    assert last.startswith("no GPU: ")
    assert last.endswith("; left out: graphs, pixels")
    assert "CUDA graphs need a GPU" in output
    found = json.loads(file.read_text())
    assert set(found["checks"]) == set(names.split(","))
    # In float64 the kernels and the definition are equal but for rounding.
    assert 0 < found["checks"]["numerics"]["sew_resnet18 fp64"] < 1e-9
    assert found["machine"]["torch"]


@pytest.mark.long
@pytest.mark.timeout(1000)  # The machine may be busy: alone it takes less than a minute.
def test_all_checks_pass_here_on_two_processes(tmp_path):
    file = tmp_path / "found.json"
    command = tiny.launched(2, tiny.PROJECT / "tools" / "check_gpu.py", "--device", "cpu")
    status, output = tiny.execute([*command, "--json", str(file)], tmp_path, timeout=900)
    assert status == 0, output
    # What DeepSpeed and torch tell their developers does not come between the lines.
    table = output[output.index("no GPU: the checks run small") :]
    lines = [line for line in table.splitlines() if line and not line.startswith("ok ")]
    assert [line.split()[0] for line in lines] == ["no", "left", "left", "no"], output
    found = json.loads(file.read_text())
    assert found["processes"] == 2
    statuses = {name: one["status"] for name, one in found["checks"].items()}
    assert statuses == dict.fromkeys(CHECKS, "ok") | dict.fromkeys(("graphs", "pixels"), "left out")
    by_rank = found["checks"]["rates"]["by_rank"]
    assert found["images_per_s"] == 2 * min(one["images_per_s"] for one in by_rank)


def test_the_plan_reads_what_is_written(here, tmp_path):
    rates = {"images_per_s": 2000.0, "ratio": 0.5, "peak_mib": 2048.0}
    relu = {"images_per_s": 1000.0, "ratio": 1.0, "peak_mib": None}
    numbers = {
        "by_batch": {"32": {"relu": relu, "tetdist": rates}},
        "images_per_s": 2000.0,
        "timesteps": 4,
    }
    report = run_checks({"rates": lambda _: Finding("ok", "fast", None, numbers)}, here)
    file = tmp_path / "found.json"
    file.write_text(json.dumps(report.as_dict()))
    values = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"})
    config = loading.parse(values, "x")
    facts = ClusterSection(gpus_per_node=0)
    found = speed.speed_of(config, facts, None, benchmark=str(file))
    assert isinstance(found, speed.Speed)
    assert (found.images_per_s, found.timesteps) == (2000.0, 4)
    with pytest.raises(UserError, match="measured a CPU"):
        speed.speed_of(config, ClusterSection(gpus_per_node=1), None, benchmark=str(file))


def test_a_fault_is_reported_with_its_remedy(here):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    lines = []
    report = run_checks(
        {
            "fine": lambda _: Finding("ok", "7 of 7"),
            "first": lambda _: Finding("bad", "two builds", "pip uninstall one"),
            "second": broken,
        },
        here,
        lambda report: lines.append(report.results[-1].line()),
    )
    assert [line.split()[0] for line in lines] == ["ok", "bad", "bad"]
    assert "RuntimeError: CUDA error: an illegal memory access" in lines[2]
    assert report.conclusion() == "to fix: first: pip uninstall one (then 1 more)"
    assert "Traceback" in report.as_dict()["checks"]["second"]["traceback"]


def test_kernels_that_do_not_work_are_not_called_equal(here, monkeypatch):
    """Without them both would be the definition."""
    monkeypatch.setattr(numerics, "kernels_for", lambda *_, **__: None)
    found = numerics.check_numerics(here)
    assert found.status == "bad"
    assert "do not work here" in found.text


def test_rounding_alone_is_not_called_wrong(here, monkeypatch):
    """Half of the limits, with other inputs than those of the check."""
    halves = {dtype: limit / 2 for dtype, limit in numerics.LAYER_LIMITS.items()}
    monkeypatch.setattr(numerics, "LAYER_LIMITS", halves)
    difference = numerics.difference
    monkeypatch.setattr(
        numerics, "difference", lambda case, device, seed: difference(case, device, seed + 100)
    )
    for case in numerics.cases([torch.float32, torch.bfloat16])[::3]:
        found = numerics.compared(case, here.device)
        assert found[1] is None, (case, found)


def test_all_pairs_are_tried():
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    found = numerics.cases(dtypes)
    assert len(found) < 70
    kinds = {"lif", "plif", "ilif", "nilif", "psn", "masked_psn", "sliding_psn"}
    assert kinds < layers.kinds().keys()
    factors = {"kind": layers.kinds(), "dtype": dtypes, **layers.FACTORS}
    for a, b in itertools.combinations(factors, 2):
        if (a, b) not in (("kind", "channels"), ("kind", "given")):
            tried = {(getattr(case, a), getattr(case, b)) for case in found}
            assert tried == set(itertools.product(factors[a], factors[b]))


@pytest.mark.parametrize("place", ["spikes", "network", "gradient of x", None])
def test_a_single_nan_is_called_wrong(here, monkeypatch, place):
    def nan_at(name):
        return math.nan if place == name else 0.0

    apart = {"gradient of x": nan_at("gradient of x"), "gradient of w": 0.0}
    monkeypatch.setattr(numerics, "difference", lambda *_: (nan_at("spikes"), apart))
    monkeypatch.setattr(
        numerics, "_of_network", lambda *_: [torch.tensor([1.0, nan_at("network")])]
    )
    assert numerics.check_numerics(here).status == ("ok" if place is None else "bad")


def test_every_way_to_wait_for_the_device_is_refused(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    ways = {
        "device": lambda: torch.cuda.synchronize(),
        "accelerator": lambda: torch.accelerator.synchronize(),
        "event": lambda: torch.cuda.Event.synchronize(None),
        "stream": lambda: torch.cuda.Stream.synchronize(None),
    }
    before = torch.cuda.synchronize
    with steps.refusing_synchronisation(True):
        for way in ways.values():
            with pytest.raises(RuntimeError, match="synchronizing"):
                way()
    assert torch.cuda.synchronize is before
    assert modes == ["error", "default"]


class _Decoded:
    """What stands in for a loader: the images of one batch."""

    def __init__(self, images):
        self.images = images

    def __enter__(self):
        return [self]

    def __exit__(self, *_): ...


def test_every_gpu_decodes_every_image(here, monkeypatch):
    """Of a hundred images in batches of 25 ranks 4 to 7 would get none, and nothing is not bad."""
    worlds = []

    def loader(_config, _index, world):
        worlds.append(world)
        return _Decoded(torch.zeros(100, 3, 2, 2))

    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr(images, "make_splits", lambda *_, **__: None)
    monkeypatch.setattr(images, "build_index", lambda *_, **__: (None, None))
    monkeypatch.setattr(images, "eval_loader", loader)
    last = dataclasses.replace(here, world=dataclasses.replace(here.world, rank=7, world_size=8))
    found = images.check_pixels(last)
    assert (found.status, found.numbers["images"]) == ("ok", 100)
    assert [(world.rank, world.world_size) for world in worlds] == [(0, 1), (0, 1)]
    monkeypatch.setattr(images, "eval_loader", lambda *_: _Decoded(torch.zeros(0, 3, 2, 2)))
    assert images.check_pixels(last).status == "bad"


def test_runs_that_take_long_are_ended(here, monkeypatch):
    """Each has less time than a check may stand still."""
    monkeypatch.setattr(Machine, "limit", 20.1)
    file = here.folder / "check.yaml"
    file.touch()
    monkeypatch.setattr(resume, "_prepared", lambda _root, _small: file)
    found = resume.check_resume(here)
    assert found.status == "bad"
    assert "the run 'straight' to step 6 failed: not finished within 0 s" in found.text


@pytest.fixture
def on_gpu(here, tmp_path, monkeypatch):
    """One of two H100 whose driver, libraries and compiler suit each other, as torch would say."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, uuid="GPU-1"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(versions.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(versions.importlib.util, "find_spec", lambda _: True)
    kernels = types.SimpleNamespace(OLDEST=(3, 3))
    monkeypatch.setattr(versions.importlib, "import_module", lambda _: kernels)
    monkeypatch.setattr(remedies, "smi", lambda _: "580.95.05\n580.95.05\n")
    monkeypatch.setattr(remedies, "driver_and_gpu", lambda: (580, (9, 0)))
    monkeypatch.setattr(versions, "_distributions", lambda name: INSTALLED.get(name, []))
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda _: ["triton==3.7.0"])
    for name in ("gcc", "clang"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(versions.sysconfig, "get_path", lambda _: str(tmp_path))
    world = World(0, 2, torch.device("cuda", 0), here.world.control)
    return Machine(world, small=False, folder=tmp_path)


INSTALLED = {
    "nvidia-dali-cuda130": ["2.4.0"],
    "nvidia-nccl-cu13": ["2.28.9"],
    "deepspeed": ["0.19.8"],
    "triton": ["3.7.0"],
}


def test_versions_that_suit_each_other(on_gpu):
    found = versions.check_versions(on_gpu)
    assert found.status == "ok", found
    assert found.text.startswith("NVIDIA H100, driver 580.95.05, torch ")
    assert found.same["driver"] == "580.95.05"
    # These differ from process to process.
    assert not {"host", "gpu_uuid"} & set(found.same)


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"triton": ["3.2.0"]}, "Triton 3.2.0 is older than 3.3", "pip install torch torchvision "),
        ({"triton": ["3.6.0"]}, "needs ==3.7.0", "pip install 'triton==3.7.0'"),
        ({"nvidia-nccl-cu13": ["2.27.5"]}, "NCCL 2.28.9 is loaded", "unset LD_LIBRARY_PATH"),
        ({"nvidia-dali-cuda130": []}, "DALI is not installed", pip_install("cuda130")),
        ({"nvidia-dali-cuda120": ["2.0"]}, "two builds of DALI", "pip uninstall -y nvidia-dali-"),
        (
            {"nvidia-dali-cuda130": [], "nvidia-dali-cuda120": ["2.0"]},
            "torch is built for CUDA 13.0, but DALI for cuda120",
            f"uninstall -y nvidia-dali-cuda120; {pip_install('cuda130')}",
        ),
        ({"deepspeed": []}, "DeepSpeed is not installed", "or train with engine=torch"),
    ],
)
def test_a_version_that_does_not_fit_comes_with_a_command(
    on_gpu, monkeypatch, changes, text, remedy
):
    for package, installed in changes.items():
        monkeypatch.setitem(INSTALLED, package, installed)
    found = versions.check_versions(on_gpu)
    assert found.status == "bad"
    assert text in found.text
    assert remedy in str(found.remedy)


def test_what_triton_builds_with_is_looked_for(on_gpu):
    (on_gpu.folder / "Python.h").unlink()
    assert versions.check_versions(on_gpu).remedy == "apt-get install python3-dev"
    for name in ("gcc", "clang"):
        (on_gpu.folder / name).unlink()
    assert versions.check_versions(on_gpu).remedy == "apt-get install gcc"


def test_a_gpu_that_torch_is_not_built_for(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75"])
    found = versions.check_versions(on_gpu)
    assert "built for sm_70, sm_75, but this GPU is sm_90" in found.text
    assert "whl/cu130" in str(found.remedy)


def test_a_machine_whose_gpu_torch_does_not_see_learns_what_to_install(tmp_path, monkeypatch, call):
    """A driver that is too old ends in a table and a file like any other finding."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "print('GPU 0: H100 (UUID: GPU-1)' if '-L' in sys.argv else '550.54.15, 9.0')\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "found.json"
    status, output = call("check_gpu", "--json", file)
    assert status == 1
    assert output.startswith("bad       device                 there is GPU 0: H100 (nvidia-smi)")
    last = output.splitlines()[-1]
    assert "pip install 'torch<2.15' torchvision --index-url " in last
    found = json.loads(file.read_text())
    assert found["checks"]["device"]["status"] == "bad"
    assert found["conclusion"] == last


@pytest.mark.long
def test_results_with_graphs_are_compared(here, monkeypatch):
    """With what stands in for a graph on a CPU, and with two that go wrong."""
    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _mode: None)
    monkeypatch.setattr(graphs, "STEPS", 2)
    monkeypatch.setattr(graphs, "PRECISIONS", ("bf16",))

    def without_new_images(function):
        result, replay = run_again(function)
        replays = iter([replay])
        return result, lambda: next(replays, lambda: None)()

    def counting_twice(function):
        result, _ = run_again(function)

        def replay():
            result.copy_(function())

        return result, replay

    for capture, status, text in (
        (run_again, "ok", "2 steps in bf16 have the same results with graphs"),
        # The second micro-batch of the first step is another one already.
        (without_new_images, "bad", "bf16: the loss of step 1 is "),
        (counting_twice, "bad", "bf16: the hash of weights and running statistics is "),
    ):
        monkeypatch.setattr(training_graphs, "capture", capture)
        found = graphs.check_graphs(here)
        assert (found.status, found.text.startswith(text)) == (status, True), found
        assert (status == "bad") == str(found.remedy).startswith("train with cuda_graphs=false")
