"""Whether a stopped run ends on the device in the weights of one that was not stopped."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from tetdist.checkpoint import load_model_file
from tetdist.data.index import build_index, index_file, save_index
from tetdist.device_check.check import Finding, Machine

STEPS = 6
LIMIT = 240  # seconds a run


def check_resume(here: Machine) -> Finding:
    """Train with ``deterministic``, straight and stopped half-way, as one process each."""
    if here.world.rank:
        return Finding("left out", "rank 0 does it")
    config = _prepared(here.folder / "resume")
    for name, ends in (("straight", (STEPS,)), ("stopped", (STEPS // 2, STEPS))):
        for end in ends:
            problem = _train(here, config, name, end)
            if problem is not None:
                return Finding("bad", f"the run {name!r} to step {end} failed: {problem}")
    straight, stopped = (_weights(config.parent, name) for name in ("straight", "stopped"))
    if all(torch.equal(straight[name], stopped[name]) for name in straight):
        return Finding("ok", f"stopped after {STEPS // 2} of {STEPS} steps: the same bits")
    return Finding("bad", "a stopped run ended in other weights than a straight one")


def _prepared(root: Path) -> Path:
    """Make a few images, their index, and the configuration; its file."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            file = root / split / "01"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        index, _ = build_index(root, split, workers=1)
        save_index(index, index_file(root / "index", split))
    file = root / "check.yaml"
    values = {
        "name": "straight",
        "model": {"name": "sew_resnet18"},
        "data": {"root": str(root), "image_size": 64, "mixup": 0.2},
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
    """Train to a step in a process of its own; the last line it said if it failed."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    command = [sys.executable, "-m", "tetdist", "train", "--config", str(config), f"name={name}"]
    command += [f"max_steps={end}", f"device={here.device.type}"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {LIMIT} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _weights(root: Path, name: str) -> dict[str, Tensor]:
    (folder,) = (root / "runs" / name / "checkpoints").glob(f"step-*{STEPS}")
    weights, _ = load_model_file(folder)
    return weights
