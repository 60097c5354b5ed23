"""The wheel, unpacked in an empty folder: all is in it, and commands need no checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def tetdist(installed, cwd, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "tetdist_command", *map(str, arguments)],
        cwd=cwd,
        env=tiny.clean_environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stderr
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


def test_commands_answer_without_a_checkout(installed, tmp_path):
    from tetdist_command import COMMANDS

    assert set(COMMANDS) <= set(tetdist(installed, tmp_path, "--help").split())
    for command in COMMANDS:
        output = tetdist(installed, tmp_path, command, "--help")
        assert output.startswith(f"usage: tetdist {command}"), output
    assert re.fullmatch(r"tetdist \d+\.\d+\.\d+\n", tetdist(installed, tmp_path, "--version"))
    listed = tetdist(installed, tmp_path, "list")
    assert "  sew34_t4.yaml " in listed
    assert "sew_resnet34," in listed
    assert "tetdist:quickstart" in listed
    assert "there is no command 'evla'" in tetdist(installed, tmp_path, "evla", status=2)


def test_a_run_without_a_checkout(installed, tmp_path, tiny_root):
    shown = tetdist(
        installed, tmp_path, "train", "--config", "sew34_t4", "--print-config", "data.root=x"
    )
    assert "name: sew_resnet34" in shown
    file = tiny.write_config(tmp_path / "tiny.yaml", tiny_root, {"engine": "torch", "max_steps": 2})
    output = tetdist(installed, tmp_path, "train", "--config", file)
    assert f"tetdist eval {tmp_path / 'runs' / 'tiny'}" in output


@pytest.mark.long
def test_a_job_without_a_checkout(installed, tmp_path, tiny_root):
    """Planned, trained and evaluated, from the wheel's code and configs."""
    file = tiny.write_config(tmp_path / "tiny.yaml", tiny_root, {"engine": "torch", "max_steps": 2})
    planned = ("slurm", "--config", file, "--gpus-per-node", "0", "--dry-run")
    assert "#SBATCH" in tetdist(installed, tmp_path, *planned)
    tetdist(installed, tmp_path, "train", "--config", file)
    run = tmp_path / "runs" / "tiny"
    assert "top-1" in tetdist(installed, tmp_path, "eval", "--checkpoint", run, "--device", "cpu")
    missing = tetdist(installed, tmp_path, "train", "--config", file, "data.root=gone", status=2)
    assert "tetdist eval: --data" in missing


def test_importing_it_does_not_need_the_command(installed, tmp_path):
    # Only torch and timm are needed, also for a trained network.
    code = (
        "import sys; sys.modules |= dict.fromkeys(['pydantic', 'deepspeed', 'mlflow', 'psutil'])\n"
        "import timm, tetdist; print(len(timm.create_model('sew_resnet18').blocks))\n"
        "print(timm.create_model('spiking_convnet', pretrained=True).pretrained_cfg['file'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    weights = installed / "tetdist" / "pretrained" / "quickstart" / "model.safetensors"
    assert done.stdout == f"8\n{weights}\n", done.stderr
