"""Checks of runs: they resume exactly, and GPUs decode and augment images as CPUs do."""

import dataclasses
import itertools
import os
import shutil
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
from tetdist.data.build import eval_loader, train_loader
from tetdist.datasets.index import build_index, index_splits
from tetdist.distributed.launchers import as_launcher
from tetdist.storage.checkpoint import load_model_file

STEPS = 6
TIMEOUT = 280.0  # seconds for all runs; less than `run.LIMIT`, since the other processes wait
RERUN = "train one of your runs with deterministic=true, alone on one GPU, for details"
SLOW = "repeat the command, which then finds the compiled kernels; if that is no faster, report it"
REPORT = "report this with the JSON file; runs that resume, and saved weights, may be wrong"
# Variables by which a run would take itself for one of several processes.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
DEVICES = ("cpu", "gpu")  # that decode; no test trains with the second, which needs a GPU
# Levels of 255 by which images may differ on average. Both decoders are within the standard's
# tolerance, but their filters differ.
LARGEST_DIFFERENCES = {"whole images": 2.0, "augmented images": 3.0}


def check_resume(here: Machine) -> Finding:
    """Train with ``deterministic``, straight, and on from the checkpoint that was copied
    half-way while training went on; on a GPU, also on images that it decodes."""
    if here.world.rank:
        return Finding("left out", "only rank 0 runs this check")
    root, end = here.folder / "resume", time.monotonic() + TIMEOUT
    values = prepare(root) | {"engine": "torch", "deterministic": True}
    values["data"] |= {"image_size": 64 if here.on_gpu else 33, "mixup": 0.2}
    values |= {"tracking": {"mlflow": False}, "runs_dir": str(root / "runs")}
    values |= {"max_steps": STEPS, "save": {"every_steps": STEPS // 2}}
    index_splits(root)
    file = root / "check.yaml"
    file.write_text(yaml.safe_dump(values | {"device": here.world.device.type}))
    # The runs end with this process, even if that is killed.
    alone = {k: v for k, v in os.environ.items() if k not in LAUNCHED} | as_launcher()
    command = [sys.executable, "-m", "tetdist", "train", "--config", str(file)]
    for device in DEVICES if here.on_gpu else DEVICES[:1]:
        ends = []
        for start, resume in ((0, "never"), (STEPS // 2, "must")):
            run = f"the run from step {start} with data.device={device}"
            here.progress(run)
            own = [*command, f"name={device}", f"data.device={device}", f"resume={resume}"]
            left = end - time.monotonic()
            try:
                done = subprocess.run(own, env=alone, capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                return Finding("bad", f"{run} did not end within {TIMEOUT:.0f} s", SLOW)
            if done.returncode:
                *_, last = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()]
                return Finding("bad", f"{run} failed: {last}", RERUN, {"config": file.read_text()})
            (folder,) = (root / "runs" / device / "checkpoints").glob(f"step-*{STEPS}")
            ends.append(load_model_file(folder)[0])
            shutil.rmtree(folder)
        if not all(torch.equal(x, ends[1][name]) for name, x in ends[0].items()):
            return Finding("bad", f"{run} ended with other weights than a straight one", REPORT)
    return Finding("ok", f"resumed after {STEPS // 2} of {STEPS} steps: bitwise identical")


def check_pixels(here: Machine) -> Finding:
    """Compare images decoded, resized and augmented on the GPU with the same ones on the CPU."""
    if not here.on_gpu:
        return Finding("left out", "comparing the decoders needs a GPU")
    values = prepare(here.folder / "pixels")
    index, _ = build_index(values["data"]["root"], "val", workers=1, decode=False)
    # Each process decodes all images.
    alone, of_device = dataclasses.replace(here.world, rank=0, world_size=1), []
    for device in DEVICES:
        config = parse(values | {"data": values["data"] | {"device": device}}, "the check")
        train = train_loader(config, index, alone, step=0)
        with eval_loader(config, index, alone) as whole, train as edited:
            both = (whole, itertools.islice(edited, 25))
            of_device.append([torch.cat([one.images.cpu() for one in some]) for some in both])
    texts, is_bad = [], False
    for (name, limit), *images in zip(LARGEST_DIFFERENCES.items(), *of_device, strict=True):
        difference = float((images[0] - images[1]).abs().mean() * 255 * 0.226)
        texts.append(f"{len(images[0])} {name}: {difference:.2f} levels of 255 apart")
        is_bad |= not difference <= limit
    text = f"decoded on GPU and CPU, {', '.join(texts)}"
    return Finding("bad", text, "train with data.device=cpu") if is_bad else Finding("ok", text)


def prepare(root: Path) -> dict[str, Any]:
    """Make JPEG files of two classes; return a configuration that trains on them."""
    for label in "01":
        make_images(root / "train" / label, count=50)
    (root / "val").symlink_to("train")
    return {
        "name": "check",
        "model": {"name": "sew_resnet18"},
        "data": {"root": str(root), "auto_augment": "rand-m9-mstd0.5-inc1"},
        "batch": {"global": 8, "micro": 4, "eval": 25},
        "phases": [{"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.1}}],
    }
