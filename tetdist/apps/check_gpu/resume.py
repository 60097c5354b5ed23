"""Check of resuming: a stopped and resumed run ends with the weights of an uninterrupted one."""

import subprocess
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.images import make_splits
from tetdist.apps.check_gpu.run_train import run_train
from tetdist.datasets.index import index_splits
from tetdist.storage.checkpoint import load_model_file

STEPS = 6
RERUN = "train one of your runs with deterministic=true, alone on one GPU, for details"
REPORT = "report this with the JSON file; it does not affect runs that are not stopped"


def check_resume(here: Machine) -> Finding:
    """Train with ``deterministic``, straight and stopped half-way, as one process each."""
    if here.world.rank:
        return Finding("left out", "only rank 0 runs this check")
    config = _prepared(here.folder / "resume", here.small)
    for name, ends in (("straight", (STEPS,)), ("stopped", (STEPS // 2, STEPS))):
        for end in ends:
            problem = _train(here, config, name, end)
            if problem is not None:
                text = f"the run {name!r} to step {end} failed: {problem}"
                return Finding("bad", text, RERUN, {"config": config.read_text()})
    straight, stopped = (_weights(config.parent, name) for name in ("straight", "stopped"))
    if all(torch.equal(straight[name], stopped[name]) for name in straight):
        return Finding("ok", f"stopped after {STEPS // 2} of {STEPS} steps: bitwise identical")
    return Finding("bad", "a resumed run ended with other weights than a straight one", REPORT)


def _prepared(root: Path, small: bool) -> Path:
    """Make images, their index and the configuration; return the latter's file."""
    make_splits(root)
    index_splits(root)
    file = root / "check.yaml"
    values = {
        "name": "straight",
        "model": {"name": "sew_resnet18"},
        "data": {"root": str(root), "image_size": 33 if small else 64, "mixup": 0.2},
        "batch": {"global": 8, "micro": 4, "eval": 50},
        "phases": [{"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.1}}],
        "engine": "torch",
        "deterministic": True,
        "tracking": {"mlflow": False},
        "runs_dir": str(root / "runs"),
    }
    file.write_text(yaml.safe_dump(values))
    return file


def _train(here: Machine, config: Path, name: str, end: int) -> str | None:
    """Train to a step; return the run's last line if it failed."""
    seconds = here.limit - 20  # before the check counts as hanging, to report which run is late
    arguments = ("--config", str(config), f"name={name}", f"max_steps={end}")
    device = f"device={here.device.type}"
    try:
        done = run_train(here, *arguments, device, alone=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _weights(root: Path, name: str) -> dict[str, Tensor]:
    (folder,) = (root / "runs" / name / "checkpoints").glob(f"step-*{STEPS}")
    weights, _ = load_model_file(folder)
    return weights
