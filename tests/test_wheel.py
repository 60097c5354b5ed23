"""The wheel, unpacked in an empty folder: all is in it, and commands need no checkout."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import zipfile

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import refused

FILES = ("tetdist", "configs", "tetdist_command.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip would install it."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, since a build leaves folders in its source.
    source = folder / "source"
    for file in tracked("."):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((tiny.PROJECT / file).read_bytes())
    build = ("-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index")
    status, output = tiny.execute(tiny.python(*build, "-w", folder, source), folder, timeout=240)
    assert (status, "is absent from the `packages`" in output) == (0, False), output
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def tracked(*places):
    command = ["git", "-C", str(tiny.PROJECT), "ls-files", "-z", "--cached", "--others"]
    command += ["--exclude-standard", "--", *places]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [file for file in listed.split("\0") if file and (tiny.PROJECT / file).is_file()]


def test_constraints_are_within_the_ranges():
    """CI installs constraints.txt; `make constraints` renews it after a change of a range."""
    lines = (tiny.PROJECT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((tiny.PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # One of two builds of DALI, what comes with torch for CUDA, and what pip leaves out.
    names = extras.keys() - {"cuda120", "gpu-code"}
    wanted = [*project["dependencies"], *(one for name in names for one in extras[name])]
    ranges = {canonicalize_name(one.name): one.specifier for one in map(Requirement, wanted)}
    del ranges[canonicalize_name("setuptools")]
    assert len(ranges) > 30
    for name, allowed in ranges.items():
        assert versions.get(name) in allowed, f"{name}{allowed}: make constraints"


def test_make_installs_nothing_into_the_environment_of_another_checkout(tmp_path):
    other, venv = tmp_path / "other", tmp_path / "venv"
    url = venv / "lib/python3.11/site-packages/tetdist-0.1.0.dist-info/direct_url.json"
    for folder in (other, url.parent):
        folder.mkdir(parents=True)
    (other / "setup.py").touch()
    command = ["make", "-n", "-C", str(tiny.PROJECT), "venv", f"VENV={venv}"]
    for folder, installs in ((other, False), (tiny.PROJECT, True), (tmp_path / "gone", True)):
        url.write_text(json.dumps({"dir_info": {"editable": True}, "url": f"file://{folder}"}))
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert ("pip install" in shown) == installs
        assert (f"{venv} has the tetdist of {other}" in shown) != installs
    (venv / ".installed").write_text("cpu\n")
    refused = subprocess.run([*command, "DALI=cuda130"], capture_output=True, text=True)
    assert f"{venv} is for DALI=cpu" in refused.stderr


def test_everything_is_in_it(installed):
    wanted = {
        f"tetdist/{file}" if file.startswith("configs/") else file for file in tracked(*FILES)
    }
    found = {str(file.relative_to(installed)) for file in installed.rglob("*") if file.is_file()}
    assert {file for file in found if ".dist-info/" not in file} == wanted


# One interpreter, since a start takes seconds: what importing needs, then a run in a fork, which
# has its own modules, then all commands.
ALL = """
import contextlib, io, json, os, sys
others = ["pydantic", "deepspeed", "mlflow", "psutil", "nvidia.dali", "submitit", "matplotlib"]
sys.modules |= dict.fromkeys(others)
import timm, tetdist, tetdist_command
print(len(timm.create_model("sew_resnet18").blocks), len(timm.list_models("sew_resnet*")))
print(timm.create_model("spiking_convnet", pretrained=True).pretrained_cfg["file"])
print(tetdist.losses.tet_loss.__name__, flush=True)
tetdist_command.run("list", [])
for name in others:
    del sys.modules[name]
_, root, *train = sys.argv
pid = os.fork()
if pid == 0:
    sys.argv = ["tetdist", *train]
    status = tetdist_command.main()
    print(*sys.modules, flush=True)
    os._exit(status)
print("process", pid, flush=True)
_, status = os.waitpid(pid, 0)
print("ended with", os.waitstatus_to_exitcode(status), flush=True)
answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["tetdist", *arguments]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        answers.append((tetdist_command.main(), output))
print(json.dumps([(status, output.getvalue()) for status, output in answers]), flush=True)
from tetdist.config.sections.data import DataSection
from tetdist.data.batches import Share, Workers, train_batches
from tetdist.datasets.index import load_index
index = load_index(f"{root}/index/train.npz")
share = dict(seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, epoch=0, step_in_epoch=0)
workers = Workers(device="cpu", device_id=None, threads=1, prefetch=2)
loader = train_batches(DataSection(root=root), index, Share(**share), 32, workers)
next(loader)  # it stays open, and must not hold the process
"""


# Imported late, or by other settings alone.
UNUSED = {"deepspeed", "mlflow", "tensorboard", "scipy", "matplotlib"}


def test_all_works_without_a_checkout(installed, tmp_path, tiny_config, tiny_root, main):
    """Importing needs torch and timm alone; a run is interrupted by its pid, and has its folder
    alone until then."""
    from tetdist_command import COMMANDS

    changes = {"phases.0.epochs": 4000, "evaluate_every": 4000}
    file = tiny_config(changes | {"engine": "torch"})
    train, run = ["train", "--config", str(file)], tmp_path / "runs" / "tiny"
    command = tiny.python("-c", ALL, tiny_root, *train)
    env = tiny.clean_environment(PYTHONPATH=str(installed))
    with tiny.started(command, tmp_path, env, stdin=subprocess.PIPE) as process:
        weights = installed / "tetdist" / "pretrained" / "quickstart" / "model.safetensors"
        install = (
            "pip install 'FOLDER_OR_WHEEL[train,cuda130]', with the folder or wheel of tetdist"
        )
        absent = f"error: the package pydantic is not installed; {install}"
        for line in ("8 5", str(weights), "tet_loss", absent):
            assert process.stdout.readline() == f"{line}\n", process.stdout.read()
        pid = int(process.stdout.readline().removeprefix("process "))
        assert any("step 12/" in line for line in process.stdout)
        refused(main(file, "max_steps=1"), "another process is running in", "runs/tiny")
        os.kill(pid, signal.SIGINT)
        lines = list(itertools.takewhile(lambda one: one != "ended with 130\n", process.stdout))
        assert any("all saved; the same command continues" in line for line in lines), lines
        modules = set(lines[-1].split())
        assert modules & UNUSED == set() < modules & {"tetdist.training.trainer"}
        step = json.loads((tiny.newest(run) / "state.json").read_text())["step"]
        assert tiny.metrics(run)[-1]["step"] == step >= 12
        planned = ["slurm", *train[1:], "--gpus-per-node", "0", "--dry-run"]
        printed = ["train", "--config", "sew34_t4", "--print-config", "data.root=x"]
        expected = [
            ([*train, f"max_steps={step + 1}"], 0, f"tetdist eval {run}"),
            (["--version"], 0, r"\Atetdist \d+\.\d+\.\d+\n\Z"),
            (["list"], 0, r"  sew34_t4\.yaml [^$]*sew_resnet34,[^$]*tetdist:quickstart"),
            (["evla"], 2, "there is no command 'evla'"),
            (printed, 0, "name: sew_resnet34"),
            (planned, 0, "#SBATCH"),
            (["eval", "--checkpoint", str(run), "--device", "cpu"], 0, "top-1"),
            ([*train, "data.root=gone"], 2, "there is no folder gone; set data.root=FOLDER"),
            *((["--help"], 0, f"\n  {command} ") for command in COMMANDS),
            *(([command, "--help"], 0, rf"\Ausage: tetdist {command}") for command in COMMANDS),
        ]
        asked = json.dumps([arguments for arguments, _, _ in expected])
        text, _ = process.communicate(asked, timeout=120)
    assert process.returncode == 0, text
    assert str(tiny.PROJECT) not in text.replace(sys.executable, "python")
    answers = json.loads(text.splitlines()[-1])
    for (arguments, status, pattern), (found, output) in zip(expected, answers, strict=True):
        assert found == status, (arguments, output)
        assert re.search(pattern, output), (arguments, output)
        assert "Traceback" not in output
