"""Faults made on purpose, each with the check that must see it.

Those of averages happen in two processes. A GPU is pretended.
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import tiny
import torch
from faults import faulty

from tetdist.apps.check_gpu import numerics, rates, remedies, runs, steps, versions
from tetdist.apps.check_gpu.check import Machine
from tetdist.apps.check_gpu.numerics import ATTENTION
from tetdist.distributed.world import World
from tetdist.errors import pip_install

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, DTYPES = torch.device("cpu"), [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def here(alone, tmp_path):
    return Machine(alone, tmp_path)


@pytest.mark.parametrize("kind", ["lif", "sliding_psn", ATTENTION])
def test_numerics_sees_any_result_that_is_wrong(here, monkeypatch, kind):
    """Outputs, membranes, gradients, running statistics: those of a single case, by 2 %."""
    case = next(x for x in numerics.cases(DTYPES[:2]) if x.kind == kind and x.mode == "carried")
    monkeypatch.setattr(numerics, "cases", lambda _: [case])
    monkeypatch.setattr(numerics, "SEEDS", 1)
    results, wrong, names = numerics.results, None, set()

    def spoilt(layer, inputs, seed):
        found = results(layer, inputs, seed)
        if layer.layer.execution == "fused":
            names.update(found)
            if wrong is not None:
                found[wrong] = 1.02 * found[wrong] + 0.02
        return found

    monkeypatch.setattr(numerics, "results", spoilt)
    assert numerics.check_numerics(here).status == "ok"
    names -= {name for name in names if "pending" in name}
    assert len(names) > 5
    for wrong in sorted(names):
        found = numerics.check_numerics(here)
        assert found.status == "bad", wrong
        named = "spikes|bytes" if wrong in ("spikes", "bytes") else re.escape(wrong)
        assert re.search(f": ({named}) differs by", found.text), wrong


def test_kernels_that_do_not_work_are_not_called_equal(here, monkeypatch):
    monkeypatch.setattr(numerics, "kernels_for", lambda *_, **__: None)
    assert "do not work here" in numerics.check_numerics(here).text


@pytest.mark.parametrize("leaks", [False, True])
def test_numerics_sees_tf32_in_float32(here, monkeypatch, leaks):
    """A GPU rounds a float32 convolution's inputs to ten bits, if it may."""
    convolve = torch.nn.functional.conv2d

    def rounded(x):
        kept = x.detach().float().contiguous().view(torch.int32) + (1 << 12) >> 13 << 13
        return x + (kept.view(torch.float32) - x).detach()

    def as_on_gpu(*inputs, **options):
        rounds = torch.backends.cudnn.allow_tf32 and inputs[0].dtype == torch.float32
        return convolve(*(map(rounded, inputs) if rounds else inputs), **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", as_on_gpu)
    case = numerics.Case("lif", 3, 3, torch.float32, "training", "current")
    monkeypatch.setattr(numerics, "cases", lambda _: [case])
    fault = ("tetdist.nn.precision:choose_algorithms", "tf32 = precision == ", "tf32 = True or ")
    with faulty(*fault) if leaks else contextlib.nullcontext():
        found = numerics.check_numerics(here)
    assert ("precision=fp32 differs" in found.text) == leaks, found


def test_rounding_alone_is_not_called_wrong():
    """Half of the limits, with other inputs than those of the check."""
    for case in numerics.cases(DTYPES[:2])[::6]:
        tries = (numerics.differences(case, CPU, 100 + i) for i in range(3))
        assert any(max(found.values()) <= 0.5 for found in tries), case


@pytest.mark.parametrize("name", ["spikes", "gradient of x", None])
def test_a_single_nan_is_called_wrong(here, monkeypatch, name):
    apart = {"gradient of w": 0.0, "spikes": 0.0, "gradient of x": 0.0} | {name: math.nan}
    monkeypatch.setattr(numerics, "differences", lambda *_: {k: x for k, x in apart.items() if k})
    assert numerics.check_numerics(here).status == ("ok" if name is None else "bad")


# --- steps ----------------------------------------------------------------------------------------

OTHERS = "rank 1 has other weights than rank 0"
AVERAGE = "by another average than one process computes alone"
MADE_UP, STEP = "tetdist.apps.benchmarks.made_up:", "tetdist.training.step:Step."
ENGINES = "tetdist.training.engines."
RANK = "__import__('torch').distributed.get_rank()"
# Name: the case; the function and its line, what it has instead (see faults.py), and what the check
# says.
# fmt: off
AVERAGES = {
    "a micro-batch is lost": ("torch",
        f"{ENGINES}torch_engine:TorchEngine._run_backward",
        "loss /", "loss * (self.mean._backward_passes % 2) /", AVERAGE),
    "another learning rate on rank 1": ("torch",
        f"{ENGINES}base:set_lr", "lr * group", f"(1 + {RANK}) * lr * group", OTHERS),
    "statistics of each process": ("batch_norm.sync",
        f"{MADE_UP}training_step", "if config.batch_norm.sync:", "if False:", AVERAGE),
    "running statistics of rank 0": ("torch",
        f"{STEP}_attempt", "self.world.mean_, update",
        f"lambda x: self.world.mean_(x * 2 * (0 == {RANK})), update", AVERAGE),
    "a loss that is not finite": ("torch",
        f"{MADE_UP}MadeUp.__call__", "/ sums[SAMPLES]", "/ (0 * sums[SAMPLES])", "are not finite"),
    "a loss scaled by another number than the gradient": ("fp16",
        f"{ENGINES}base:WholeEngine.update", "1 / self.loss", "2 / self.loss", AVERAGE),
    "the masks of another step": ("everything",
        f"{STEP}_attempt", "self._draw(step,", "self._draw(step + 1,", AVERAGE),
    "images that are not mixed": ("everything",
        "tetdist.data.mixing:mixed", "mixed_images(images, there)", "images", AVERAGE),
    "targets that are not mixed": ("everything, cuda_graphs",
        "tetdist.data.mixing:mixed_targets", "mix.others(targets)", "targets", AVERAGE),
    "the phase's largest T": ("everything",
        f"{STEP}_timesteps_of", "set_timesteps(timesteps)", "set_timesteps(4)", AVERAGE),
    "an average of the other weight": ("everything",
        "tetdist.training.ema:WeightAverage.update", "(1 - decay", "(decay", "moving average"),
    "an optimiser's step undone": ("timm:lamb",
        f"{ENGINES}base:prepare_step", "(~apply)", "apply", AVERAGE),
    "a graph that reads the images of its capture": ("cuda_graphs",
        "tetdist.training.graphs:Graphed.__call__", "static.copy_(tensor)", "pass", AVERAGE),
    "a graph that draws the masks of its capture": ("everything, cuda_graphs",
        "tetdist.training.graphs:Graphed.__call__",
        "static.copy_(tensor)", "tensor.ndim != 2 and static.copy_(tensor)", AVERAGE),
}
# fmt: on
# Prints what the check says of small networks' cases without a fault, and of each fault. On a CPU,
# float16 and DeepSpeed take long; others test that engine.
CODE = """
import contextlib, json, sys
from pathlib import Path
import torch
sys.path.append(sys.argv[2])
from faults import faulty
from graph_stand_ins import run_again
from tetdist.apps.check_gpu import steps
from tetdist.apps.check_gpu.check import Machine
from tetdist.distributed.world import join
from tetdist.training import graphs

def small(world, name, **of):
    if name == "sew_resnet18":
        of |= {"size": 28}
        if "arguments" in of:
            of["arguments"] = {"drop_rate": 0.2}
    return made(world, "spiking_convnet" if name == "sew_resnet18" else name, **of)

made, cases, steps.STEPS, steps.ON_GPU = steps.training_step, steps.CASES, 1, []
steps.training_step, graphs.capture = small, run_again
faults = json.loads(sys.argv[1])
with join("cpu") as world:
    torch.set_num_threads(1)
    for name in (None, *faults):
        case, *fault, _ = faults.get(name, [None, None])
        if name is None:
            chosen = [x for x in cases if "model" not in cases[x] and not x.startswith("deepspeed")]
            chosen.remove("fp16, cuda_graphs")
        else:
            chosen = dict.fromkeys((steps.EQUAL[case], case))
        steps.CASES = {one: cases[one] for one in chosen}
        with faulty(*fault) if fault else contextlib.nullcontext():
            found = steps.check_steps(Machine(world, Path(".")))
        print(json.dumps([name, found.status, found.text]), flush=True)
"""


def test_steps_sees_averages_that_are_wrong(farm, tmp_path):
    """Averages as on GPUs, bucket by bucket during the last backward pass."""
    command = tiny.python("-c", CODE, json.dumps(AVERAGES), Path(__file__).parents[1])
    for status, output in farm.side_by_side(2, command, tmp_path):
        assert status == 0, output[-1500:]
        found = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
        assert [name for name, _, _ in found] == [None, *AVERAGES]
        for name, status, text in found:
            said = AVERAGES[name][-1] if name else "1 steps in 11 ways, on the CPU"
            assert (said in text, status) == (True, "bad" if name else "ok"), (name, text)


def test_a_synchronisation_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _mode: None)
    for owner in (torch.cuda, torch.accelerator, torch.cuda.Event, torch.cuda.Stream):
        with steps.refusing_synchronisation(), pytest.raises(RuntimeError, match="synchronizing"):
            owner.synchronize()


def test_resume_sees_one_weight_that_differs(here, monkeypatch):
    """The runs are replaced: straight and resumed, without and with a GPU's decoder."""
    ends, other = [], torch.tensor([1, 1 + 2**-23])

    def run(command, timeout, **_):
        name, decoder, resume = (one.partition("=")[2] for one in command[-3:])
        if timeout < 0:
            raise subprocess.TimeoutExpired(command, timeout)
        ends.append(resumed[decoder] if resume == "must" else torch.ones(2))
        (here.folder / f"resume/runs/{name}/checkpoints/step-6").mkdir(parents=True)
        return types.SimpleNamespace(returncode=0)

    def load(_folder):
        return {"a": torch.ones(2), "b": ends[-1]}, None

    monkeypatch.setattr(Machine, "on_gpu", True)
    monkeypatch.setattr(runs, "prepare", lambda root: root.mkdir() or {"data": {}})
    monkeypatch.setattr(runs, "index_splits", lambda _: None)
    monkeypatch.setattr(runs.subprocess, "run", run)
    monkeypatch.setattr(runs, "load_model_file", load)
    for changed, limit, status, said in (
        ({}, 280.0, "ok", "bitwise identical"),
        ({"cpu": other}, 280.0, "bad", "step 3 with data.device=cpu ended with other weights"),
        ({"gpu": other}, 280.0, "bad", "step 3 with data.device=gpu ended with other weights"),
        ({}, -1.0, "bad", "the run from step 0 with data.device=cpu did not end within -1 s"),
    ):
        resumed = dict.fromkeys(runs.DEVICES, torch.ones(2)) | changed
        monkeypatch.setattr(runs, "TIMEOUT", limit)
        found = runs.check_resume(here)
        assert (found.status, said in found.text) == (status, True), found
        shutil.rmtree(here.folder / "resume")


# --- what only a GPU has, pretended ---------------------------------------------------------------


@pytest.fixture
def on_gpu(here, monkeypatch):
    """The last of eight GPUs."""
    monkeypatch.setattr(Machine, "on_gpu", True)
    return Machine(World(7, 8, CPU, here.world.control), here.folder)


def test_every_gpu_decodes_every_image(on_gpu, monkeypatch):
    """Of a hundred images in batches of 25 ranks 4 to 7 would get none, and nothing is not bad."""
    worlds = []

    def loader(name, images):
        def load(_config, _index, world, **_):
            worlds.append((world.rank, world.world_size))
            return contextlib.nullcontext([types.SimpleNamespace(images=images * len(worlds))])

        monkeypatch.setattr(runs, name, load)

    monkeypatch.setattr(runs, "prepare", lambda _: {"data": {"root": "none"}})
    monkeypatch.setattr(runs, "build_index", lambda *_, **__: (None, None))
    monkeypatch.setattr(runs, "parse", lambda *_: None)
    same = torch.zeros(100, 3, 2, 2)
    for whole, edited, status in (
        (same, same, "ok"),
        (same[:0], same, "bad"),
        (same + 0.1, same, "bad"),
        (same, same + 0.1, "bad"),
    ):
        loader("eval_loader", whole)
        loader("train_loader", edited)
        assert runs.check_pixels(on_gpu).status == status
    assert set(worlds) == {(0, 1)}


@pytest.mark.parametrize(
    ("own", "relu", "others", "status", "text", "remedy"),
    [
        (2200, 2100, [2200], "ok", "b=32: 2200 images/s, 1.05 of ReLU's, 1.0 GiB", None),
        (1200, 2100, [1200], "ok", "0.57 of ReLU's", rates.KERNELS),
        (105, 2100, [105], "bad", "0.05 of ReLU's", rates.KERNELS),
        (9000, 2100, [9000], "bad", "4.29 of ReLU's", rates.IMPOSSIBLE),
        (math.nan, 2100, [2000], "bad", "nan images/s", None),
        (1700, 2000, [2000, 1990, 2010, 2005], "bad", "15% slower than most: b=32", "throttles"),
        (800, 900, [1000], "bad", "19% slower than most", "throttles"),
        (None, None, [2000], "bad", "b=32: out of memory; b=64: out of memory", remedies.BUSY),
    ],
)
def test_rates_sees_a_gpu_that_is_slow(
    on_gpu, monkeypatch, own, relu, others, status, text, remedy
):
    def measure(options):
        if own is None or options.batch == 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found = {"images_per_s": own + options.batch - 32, "peak_mib": 1024.0}
        return {"rows": [{}, found | {"ratio": relu / own}]}

    # Those of the other processes, at the largest batch.
    gathered = [{32: one, 64: one + 32} for one in others]
    monkeypatch.setattr(World, "gather", lambda _, value: [value, *gathered])
    monkeypatch.setattr(rates, "measure", measure)
    found = rates.check_rates(on_gpu)
    assert (found.status, text in found.text) == (status, True), found
    assert (found.remedy is None) == (remedy is None) or math.isnan(own)
    assert str(remedy or "") in str(found.remedy)
    if own is not None and not math.isnan(own):
        assert found.text.endswith("; b=128: out of memory")
        # A plan is made by the recipes' micro-batch, and all are as fast as the slowest.
        speed = found.numbers["speed"]
        assert speed["images_per_s"] == 8 * min([own, *others])
        assert speed["by_batch"] == {32: own, 64: own + 32}


INSTALLED = {
    "nvidia-dali-cuda130": "2.4.0",
    "nvidia-nccl-cu13": "2.28.9",
    "deepspeed": "0.19.8",
    "triton": "3.7.0",
}
DALI, DALI_12 = "nvidia-dali-cuda130", "nvidia-dali-cuda120"


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({}, "NVIDIA H100, driver 580.95.05, torch ", None),
        ({"triton": "3.2.0"}, "needs triton==3.7.0, but 3.2.0", "pip install 'triton==3.7.0'"),
        ({"nvidia-nccl-cu13": "2.27.5"}, "NCCL 2.28.9 is loaded", "unset LD_LIBRARY_PATH"),
        ({DALI: None}, "DALI is not installed", pip_install("cuda130")),
        ({DALI_12: "2.0"}, "DALI for cuda130 and cuda120", "pip uninstall -y nvidia-dali-"),
        ({"deepspeed": None}, "DeepSpeed is not installed", "or train with engine=torch"),
        ({"Python.h": None}, "Python.h is missing", "apt-get install python3-dev"),
        ({"gcc": None, "clang": None}, "no C compiler", "apt-get install gcc"),
        ({"arch": ["sm_70", "sm_75"]}, "built for sm_70, sm_75, but this GPU is sm_90", "cu130"),
        ({"others": {"driver": "570.2"}}, "driver is 580.95.05, but 570.2", remedies.UNLIKE),
    ],
)
def test_a_version_that_does_not_fit_comes_with_a_command(
    on_gpu, tmp_path, monkeypatch, changes, text, remedy
):
    """Of H100 whose driver, libraries and compiler suit each other, as torch would say."""
    gpu = types.SimpleNamespace(name="NVIDIA H100")
    installed = INSTALLED | changes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    arch = changes.get("arch", ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arch)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(remedies, "smi", lambda _: "580.95.05\n580.95.05\n")
    monkeypatch.setattr(remedies, "driver_and_gpu", lambda: (580, (9, 0)))
    found = [types.SimpleNamespace(name=k, version=x) for k, x in installed.items() if x]
    monkeypatch.setattr(versions.importlib.metadata, "distributions", lambda: found)
    needs = ["filelock", "triton==3.7.0; platform_system == 'Linux'"]
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda _: needs)
    monkeypatch.setattr(versions, "versions", lambda: {"torch": "2"})
    monkeypatch.setattr(versions, "environment", dict)
    for name in {"gcc", "clang", "Python.h"} - {name for name in changes if not changes[name]}:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(versions.sysconfig, "get_path", lambda _: str(tmp_path))
    others = changes.get("others", {})
    monkeypatch.setattr(World, "gather", lambda _, x: [x, x | others, x | others])
    found = versions.check_versions(on_gpu)
    assert (found.status, text in found.text) == ("bad" if remedy else "ok", True), found
    assert str(remedy or "") in str(found.remedy)
    # These differ from process to process.
    assert not {"hostname", "uuid"} & found.numbers.keys()
