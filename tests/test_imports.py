"""What starts quickly imports nothing large: help, lists, and mistakes that need no network."""

import json
import subprocess

import numpy as np
import pytest
import timm
import tiny
from safetensors.numpy import save_file

from tetdist import models
from tetdist.config import names
from tetdist.config.loading import parse
from tetdist.losses import LOSSES
from tetdist.optimizers import OPTIMIZERS

LARGE = ("torch", "timm", "torchvision", "deepspeed", "mlflow", "wandb", "scipy", "matplotlib")
WITHOUT_NUMPY = (*LARGE, "numpy", "PIL")
QUICKSTART = "train --config quickstart.yaml"
# Modules that a command must not import, in the order in which one process runs the commands.
UNUSED = {
    "status begun": (*WITHOUT_NUMPY, "pydantic"),
    "list": WITHOUT_NUMPY,
    **{
        f"{command} --help": WITHOUT_NUMPY
        for command in ("train", "eval", "export", "convert", "images", "digits", "compare_runs")
    },
    **{f"{command} --help": LARGE for command in ("prebin_dvs", "slurm", "study", "bench")},
    "status nosuch": LARGE,
    "train --explain": LARGE,
    "train": LARGE,
    "train --config nosuch.yaml": LARGE,
    f"{QUICKSTART} batch.globl=3": LARGE,
    f"{QUICKSTART} batch.global=x": LARGE,
    f"{QUICKSTART} clip_mode=value": LARGE,
    f"{QUICKSTART} model.name=sew_resnet43": LARGE,
    f"{QUICKSTART} model.neuron.treshold=1": LARGE,
    f"{QUICKSTART} model.neuron.kind=lid": LARGE,
    f"{QUICKSTART} model.neuron.kind=plif model.neuron.most_spikes=2": LARGE,
    f"{QUICKSTART} loss.kind=stt": LARGE,
    f"{QUICKSTART} zero_stage=2 engine=torch": LARGE,
    f"{QUICKSTART} phases.0.optimizer.kind=adma": LARGE,
    f"{QUICKSTART} tracking.trackers=wandbb": LARGE,
    f"{QUICKSTART} tracking.uri=localhost:5000": LARGE,
    f"{QUICKSTART} --import my_los.py": LARGE,
    f"{QUICKSTART} data.root=nosuch": LARGE,
    f"{QUICKSTART} data.root=empty": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 batch.globl=3": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 data.root=nosuch": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 --time 2d": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 cluster.quos=x": LARGE,
    "slurm --config sew34_t4.yaml --dry-run": LARGE,
    "slurm --config sew34_t4.yaml --dry-run --images 80 --gpus-per-node 3": LARGE,
    "slurm --config nmnist.yaml --dry-run --images 80": LARGE,
    "slurm status nosuch": LARGE,
    "slurm resume nosuch --time 2d": LARGE,
    "slurm --config sew34_t4.yaml --dry-run --images 80 reference=nosuch": LARGE,
    "study study.yaml": LARGE,
    "study tet_vs_sdt_digits --slurm --dry-run --gpus-per-node 0": LARGE,
    "bench step --model sew_resnet35": LARGE,
    "bench step --json nosuch/a.json": LARGE,
    "convert nosuch.pth --model sew_resnet34 --output a.safetensors": LARGE,
    "convert study.yaml --model sew_resnet35 --output a.safetensors": LARGE,
    f"{QUICKSTART} data.root=root init_checkpoint=nosuch": LARGE,
    "convert --list": LARGE,
    "eval nosuch": LARGE,
    "eval run --exit-within 1": LARGE,
    "eval tetdist:quikstart": LARGE,
    "eval tetdist:quickstart": LARGE,
    "eval run --energy nosuch.yaml": LARGE,
    "eval run --json nosuch/a.json": LARGE,
    "export run --format timm --output empty": LARGE,
    "replay tetdist:simulated_digits nosuch.npz": LARGE,
    "export nosuch --format timm --output out": LARGE,
    "show nosuch": LARGE,
    "show tetdist:quickstart": LARGE,
    "replay nosuch.npz --checkpoint nosuch": LARGE,
    "compare_runs nosuch other": LARGE,
    "compare_runs one two": LARGE,
    "images index empty": LARGE,
    "prebin_dvs nosuch out": LARGE,
}
RUN = """
import contextlib, io, json, sys, tetdist_command
found = {}
for line, unused in json.loads(sys.argv[1]).items():
    name, *rest = line.split()
    sys.argv = ["tetdist", name]
    with contextlib.redirect_stdout(io.StringIO()):
        status = tetdist_command.run(name, rest)
    found[line] = [status, [one for one in unused if one in sys.modules]]
print(json.dumps(found))
"""


def test_commands_import_nothing_that_they_do_not_use(tmp_path):
    (tmp_path / "empty").mkdir()
    study = "title: t\nconfig: quickstart.yaml\nseeds: [0]\nentries: {a: {overrides: {losss: 1}}}\n"
    (tmp_path / "study.yaml").write_text(study)
    (tmp_path / "root/index").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"root/index/{split}.npz").touch()
    for name in ("run", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun/config.yaml").write_text("phases: [{epochs: 1}]\n")
    (tmp_path / "run/config.yaml").write_text("data: {root: x, held_out: 0.0}\n")
    for name in ("one", "two"):
        config = parse(tiny.changed(tiny.CONFIG, {"name": name, "data.root": "x"}), "x")
        checkpoint = tmp_path / name / "checkpoints/step-00000001"
        checkpoint.mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(config.as_yaml())
        line = {"kind": "val", "step": 1, "time": 0, "epoch": 1, "top1": 50, "loss": 1}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        save_file({"weight": np.ones(2)}, checkpoint / "model.safetensors")
    done = subprocess.run(
        tiny.python("-c", RUN, json.dumps(UNUSED)),
        cwd=tmp_path,
        env=tiny.clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    statuses = {line: status for line, (status, _) in found.items()}
    right = ("list", "status begun", "train --explain", "convert --list", "compare_runs one two")
    assert statuses == {
        line: 0 if line in right or line.endswith("--help") else 2 for line in UNUSED
    }, done.stderr
    assert {line: imported for line, (_, imported) in found.items() if imported} == {}


@pytest.mark.parametrize(("option", "registers"), [("-mtetdist", False), ("-mmine", True)])
def test_a_module_that_is_run_registers_networks_unless_it_is_tetdist(option, registers, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "mine" / f"{name}.py").write_text("import tetdist\n")
    (tmp_path / "tetdist_command.py").write_text("main = lambda: 0\n")
    code = "import atexit, sys; atexit.register(lambda: print('tetdist.models' in sys.modules))"
    (tmp_path / "sitecustomize.py").write_text(code)
    env = tiny.clean_environment(PYTHONPATH=f"{tmp_path}:{tiny.PROJECT}")
    command = tiny.python(option, "tetdist")  # an argument alike
    options = {"cwd": tmp_path, "env": env, "timeout": 60}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert (done.stdout, done.stderr) == (f"{registers}\n", "")


def test_names_are_those_that_are_registered():
    # Other tests register the user's own.
    own = [
        one
        for one in models.names()
        if timm.model_entrypoint(one).__module__.startswith("tetdist.")
    ]
    assert list(names.NETWORKS) == own
    assert tuple(LOSSES) == names.LOSSES
    assert tuple(OPTIMIZERS) == names.OPTIMIZERS
