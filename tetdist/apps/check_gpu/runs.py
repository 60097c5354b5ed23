"""Checks of runs: stopped ones resume exactly, and GPUs decode images as CPUs do."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from tetdist.apps.benchmarks.data import make_images
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.config.loading import parse
from tetdist.data.build import eval_loader
from tetdist.datasets.index import build_index, index_splits
from tetdist.distributed.starters import as_starter
from tetdist.storage.checkpoint import load_model_file

STEPS = 6
TIMEOUT = 280.0  # seconds for all runs; less than `run.LIMIT`, since the other processes wait
RERUN = "train one of your runs with deterministic=true, alone on one GPU, for details"
SLOW = "repeat the command, which then finds the compiled kernels; if that is no faster, report it"
REPORT = "report this with the JSON file; it does not affect runs that are not stopped"
# Variables by which a run would take itself for one of several processes.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# Levels of 255 by which an image may differ on average. Both decoders are within the standard's
# tolerance, but their filters differ.
LARGEST_DIFFERENCE = 2.0


def check_resume(here: Machine) -> Finding:
    """Train with ``deterministic``, straight and stopped half-way, as one process each."""
    if here.world.rank:
        return Finding("left out", "only rank 0 runs this check")
    root, end = here.folder / "resume", time.monotonic() + TIMEOUT
    values = prepare(root) | {"engine": "torch", "deterministic": True}
    values["data"] |= {"image_size": 64 if here.on_gpu else 33, "mixup": 0.2}
    values |= {"tracking": {"mlflow": False}, "runs_dir": str(root / "runs")}
    index_splits(root)
    file = root / "check.yaml"
    file.write_text(yaml.safe_dump(values | {"device": here.world.device.type}))
    # The runs end with this process, even if that is killed.
    alone = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | as_starter()
    weights = {}
    for name, steps in (("straight", STEPS), ("stopped", STEPS // 2), ("stopped", STEPS)):
        here.progress(f"the run {name!r} to step {steps}")
        command = [sys.executable, "-m", "tetdist", "train", "--config", str(file)]
        command += [f"name={name}", f"max_steps={steps}"]
        left = end - time.monotonic()
        try:
            done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            text = f"the run {name!r} did not reach step {steps} in {TIMEOUT:.0f} s"
            return Finding("bad", text, SLOW)
        if done.returncode:
            *_, last = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()]
            text = f"the run {name!r} to step {steps} failed: {last}"
            return Finding("bad", text, RERUN, {"config": file.read_text()})
        (folder,) = (root / "runs" / name / "checkpoints").glob(f"step-*{steps}")
        weights[name], _ = load_model_file(folder)
    if all(torch.equal(x, weights["stopped"][name]) for name, x in weights["straight"].items()):
        return Finding("ok", f"stopped after {STEPS // 2} of {STEPS} steps: bitwise identical")
    return Finding("bad", "a resumed run ended with other weights than a straight one", REPORT)


def check_pixels(here: Machine) -> Finding:
    """Compare images decoded and resized on the GPU with the same ones on the CPU."""
    if not here.on_gpu:
        return Finding("left out", "comparing the decoders needs a GPU")
    values = prepare(here.folder / "pixels")
    index, _ = build_index(values["data"]["root"], "val", workers=1, decode=False)
    # Each process decodes all images.
    alone, two = dataclasses.replace(here.world, rank=0, world_size=1), []
    for device in ("cpu", "gpu"):
        config = parse(values | {"data": values["data"] | {"device": device}}, "the check")
        with eval_loader(config, index, alone) as batches:
            two.append(torch.cat([batch.images.cpu() for batch in batches]))
    difference = float((two[0] - two[1]).abs().mean() * 255 * 0.226)
    text = f"{len(two[0])} images decoded on GPU and CPU: {difference:.2f} levels of 255 apart"
    if not difference <= LARGEST_DIFFERENCE:
        return Finding("bad", text, "train with data.device=cpu, which is exact")
    return Finding("ok", text)


def prepare(root: Path) -> dict[str, Any]:
    """Make JPEG files of two classes; return a configuration that trains on them."""
    for label in "01":
        make_images(root / "train" / label, count=50)
    (root / "val").symlink_to("train")
    return {
        "name": "check",
        "model": {"name": "sew_resnet18"},
        "data": {"root": str(root)},
        "batch": {"global": 8, "micro": 4, "eval": 25},
        "phases": [{"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.1}}],
    }
