"""Check of resuming: a stopped and resumed run ends with the weights of an uninterrupted one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.datasets.index import index_splits
from tetdist.distributed.starters import as_starter
from tetdist.storage.checkpoint import load_model_file

STEPS = 6
RERUN = "train one of your runs with deterministic=true, alone on one GPU, for details"
REPORT = "report this with the JSON file; it does not affect runs that are not stopped"
# Variables that launchers set, which must be hidden from a run of one process.
_OF_LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_(RANK|SIZE|WORLD_SIZE)|GROUP_.*|ROLE_.*|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*|CROSS_(RANK|SIZE)|SLURM_.*|TETDIST_TOKEN"
)


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
    """Make a few images, their index and the configuration; return the latter's file."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            file = root / split / "01"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    index_splits(root)
    file = root / "check.yaml"
    values = {
        "name": "straight",
        "model": {"name": "sew_resnet18"},
        "data": {"root": str(root), "image_size": 33 if small else 64, "mixup": 0.2},
        "batch": {"global": 8, "micro": 4, "eval": 8},
        "phases": [{"epochs": 2, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.1}}],
        "engine": "torch",
        "deterministic": True,
        "tracking": {"mlflow": False},
        "runs_dir": str(root / "runs"),
    }
    file.write_text(yaml.safe_dump(values))
    return file


def _train(here: Machine, config: Path, name: str, end: int) -> str | None:
    """Train to a step in a separate process; return its last line if it failed."""
    environment = {
        variable: value
        for variable, value in os.environ.items()
        if not _OF_LAUNCHERS.fullmatch(variable)
    }
    seconds = here.limit - 20  # before the check counts as hanging, to report which run is late
    command = [sys.executable, "-m", "tetdist", "train", "--config", str(config), f"name={name}"]
    command += [f"max_steps={end}", f"device={here.device.type}"]
    try:
        done = subprocess.run(
            command,
            # The run ends with this process, even if that is killed.
            env=environment | as_starter(),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _weights(root: Path, name: str) -> dict[str, Tensor]:
    (folder,) = (root / "runs" / name / "checkpoints").glob(f"step-*{STEPS}")
    weights, _ = load_model_file(folder)
    return weights
