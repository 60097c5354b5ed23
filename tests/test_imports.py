"""What starts quickly imports nothing large: help, lists, and mistakes that need no network."""

import json
import subprocess

import timm
import tiny

from tetdist import models
from tetdist.config import names
from tetdist.losses import LOSSES
from tetdist.optimizers import OPTIMIZERS

LARGE = ("torch", "timm", "torchvision", "deepspeed", "mlflow", "wandb", "scipy", "matplotlib")
WITHOUT_NUMPY = (*LARGE, "numpy", "PIL")
QUICKSTART = "train --config quickstart.yaml"
# Modules that a command must not import, in the order in which one process runs the commands.
UNUSED = {
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
    f"{QUICKSTART} data.root=nosuch": LARGE,
    f"{QUICKSTART} data.root=empty": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 batch.globl=3": LARGE,
    "slurm --config quickstart.yaml --gpus-per-node 1 data.root=nosuch": LARGE,
    "convert --list": LARGE,
    "eval nosuch": LARGE,
    "export nosuch --format timm --output out": LARGE,
    "show nosuch": LARGE,
    "replay nosuch.npz --checkpoint nosuch": LARGE,
    "compare_runs nosuch other": LARGE,
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
    right = ("list", "train --explain", "convert --list")
    assert statuses == {
        line: 0 if line in right or line.endswith("--help") else 2 for line in UNUSED
    }, done.stderr
    assert {line: imported for line, (_, imported) in found.items() if imported} == {}


TRAINING = """
import sys, tetdist.apps.reports.observers, tetdist.training.run
print(*sys.modules)
from tetdist.config.sections.data import DataSection
from tetdist.data.batches import Share, Workers, train_batches
from tetdist.datasets.index import load_index
root = sys.argv[1]
share = Share(
    seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, epoch=0, step_in_epoch=0
)
workers = Workers(device="cpu", device_id=None, threads=1, prefetch=2)
index = load_index(f"{root}/index/train.npz")
loader = train_batches(DataSection(root=root), index, share, 32, workers)
next(loader)
raise KeyboardInterrupt
"""


def test_training_imports_what_it_needs_and_an_open_loader_does_not_hold_it(tiny_root, tmp_path):
    """A process that hangs at its end holds its node of the cluster."""
    done = subprocess.run(
        tiny.python("-c", TRAINING, tiny_root),
        cwd=tmp_path,
        env=tiny.clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    # wandb is not among them, because timm itself imports it where it is installed.
    large = {"deepspeed", "mlflow", "tensorboard", "scipy", "matplotlib", "nvidia.dali"}
    assert "tetdist.training.trainer" in done.stdout.split()
    assert large & set(done.stdout.split()) == set()


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
