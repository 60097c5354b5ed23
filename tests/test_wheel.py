"""The wheel, unpacked in an empty folder: all is in it, and commands need no checkout."""

import json
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
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run(tiny.python(*build, "-w", folder, source), check=True, timeout=240)
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


def python(installed, cwd, *arguments):
    done = subprocess.run(
        tiny.python(*arguments),
        cwd=cwd,
        env=tiny.clean_environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    output = (done.stdout + done.stderr).replace(sys.executable, "python")
    assert str(tiny.PROJECT) not in output
    return output


def test_everything_is_in_it(installed):
    wanted = {
        f"tetdist/{file}" if file.startswith("configs/") else file for file in tracked(*FILES)
    }
    found = {str(file.relative_to(installed)) for file in installed.rglob("*") if file.is_file()}
    assert {file for file in found if ".dist-info/" not in file} == wanted


# One process, since a start of each takes seconds.
ALL = """
import contextlib, io, json, sys, tetdist_command
answers, root = [], sys.argv[2]
for arguments in json.loads(sys.argv[1]):
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


def test_a_run_and_all_commands_without_a_checkout(
    installed, tmp_path, tiny_config, tiny_root, main
):
    """The run is interrupted, by its pid; meanwhile it has its folder alone."""
    from tetdist_command import COMMANDS

    changes = {"phases.0.epochs": 4000, "evaluate_every": 4000}
    file = tiny_config(changes | {"engine": "torch"})
    train, run = ["train", "--config", str(file)], str(tmp_path / "runs" / "tiny")
    code = "import sys, tetdist_command as c; s = c.main(); print(*sys.modules); sys.exit(s)"
    command = tiny.python("-c", code, *train)
    env = tiny.clean_environment(PYTHONPATH=str(installed))
    with tiny.started(command, tmp_path, env) as process:
        assert any("step 12/" in line for line in process.stdout)
        refused(main(file, "max_steps=1"), "another process is running in", "runs/tiny")
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "all saved; the same command continues" in text
    assert "Traceback" not in text
    modules = set(text.splitlines()[-1].split())
    assert modules & UNUSED == set() < modules & {"tetdist.training.trainer"}
    step = json.loads((tiny.newest(tmp_path / "runs/tiny") / "state.json").read_text())["step"]
    assert tiny.metrics(tmp_path / "runs/tiny")[-1]["step"] == step >= 12
    planned = ["slurm", *train[1:], "--gpus-per-node", "0", "--dry-run"]
    expected = [
        ([*train, f"max_steps={step + 1}"], 0, f"tetdist eval {run}"),
        (["--version"], 0, r"\Atetdist \d+\.\d+\.\d+\n\Z"),
        (["list"], 0, r"  sew34_t4\.yaml [^$]*sew_resnet34,[^$]*tetdist:quickstart"),
        (["evla"], 2, "there is no command 'evla'"),
        (
            ["train", "--config", "sew34_t4", "--print-config", "data.root=x"],
            0,
            "name: sew_resnet34",
        ),
        (planned, 0, "#SBATCH"),
        (["eval", "--checkpoint", run, "--device", "cpu"], 0, "top-1"),
        ([*train, "data.root=gone"], 2, "tetdist eval: --data"),
        *((["--help"], 0, f"\n  {command} ") for command in COMMANDS),
        *(([command, "--help"], 0, rf"\Ausage: tetdist {command}") for command in COMMANDS),
    ]
    asked = json.dumps([arguments for arguments, _, _ in expected])
    answers = json.loads(python(installed, tmp_path, "-c", ALL, asked, tiny_root))
    for (arguments, status, pattern), (found, text) in zip(expected, answers, strict=True):
        assert found == status, (arguments, text)
        assert re.search(pattern, text), (arguments, text)
        assert "Traceback" not in text


def test_importing_it_needs_torch_and_timm_alone(installed, tmp_path):
    """Also for a trained network."""
    others = ["pydantic", "deepspeed", "mlflow", "psutil", "nvidia.dali", "submitit", "matplotlib"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({others})\n"
        "import timm, tetdist; print(len(timm.create_model('sew_resnet18').blocks))\n"
        "print(timm.create_model('spiking_convnet', pretrained=True).pretrained_cfg['file'])\n"
        "print(tetdist.losses.tet_loss.__name__, len(timm.list_models('sew_resnet*')))"
    )
    weights = installed / "tetdist" / "pretrained" / "quickstart" / "model.safetensors"
    found = python(installed, tmp_path, "-c", code)
    assert found == f"8\n{weights}\ntet_loss 5\n"
