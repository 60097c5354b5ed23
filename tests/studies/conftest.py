"""Tiny studies, whose runs are carried out in this process or written by hand."""

import contextlib
import gc
import importlib
import json
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml

from tetdist.apps.studies import local, plan
from tetdist.apps.studies.numbers import gather


class Here:
    """Carries out what a study would start as processes, which saves the seconds of their imports.

    Attributes:
        started: The arguments of each command that a process was to be started with.
        gpus: The GPUs that each was to see.
    """

    def __init__(self):
        self.started, self.gpus = [], []

    def start(self, words, *, stdout, env, **_):
        self.gpus.append(env.get("CUDA_VISIBLE_DEVICES"))
        self.started.append(words[2:])
        command = importlib.import_module(f"tetdist.apps.cli.{Path(words[1]).stem}")
        gc.collect()  # A lock is held until the last traceback that knows of it is gone.
        log = logging.getLogger()
        with (
            open(stdout.fileno(), "w", closefd=False) as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            handler = logging.StreamHandler(stream)
            log.addHandler(handler)
            try:
                status = command.main(words[2:])
            finally:
                log.removeHandler(handler)
        nothing = dict.fromkeys(("terminate", "wait"), lambda: None)
        return SimpleNamespace(returncode=status, poll=lambda: status, **nothing)


@pytest.fixture
def here(main, monkeypatch):
    """Has the runs of studies carried out in this process, by the rules of `main`."""
    del main
    found = Here()
    constants = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=found.start, **constants))
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    return found


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes study.yaml, of tiny runs of one epoch at T=2: ({key: value}) -> file."""
    values = {
        "title": "A tiny study",
        "config": str(tiny_config({"phases.0.epochs": 1, "engine": "torch"})),
        "seeds": [0, 1],
        "test_timesteps": [1, 2],
        "entries": {
            "sdt": {"overrides": {"loss.kind": "sdt"}},
            "tet": {"control": "sdt", "overrides": {"loss.kind": "tet"}},
        },
    }

    def study(changes=None):
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tiny.changed(values, changes or {})))
        return file

    return study


@pytest.fixture
def by_hand(write, tmp_path):
    """Writes a study and what its runs, by default of two epochs at T=4, leave.

    (changes, run -> accuracies up to each timestep) -> its numbers
    """

    def made(changes, top1=lambda _: [50.0, 60.0, 70.0, 80.0]):
        phases = [{"epochs": 2, "timesteps": 4, "optimizer": {"kind": "sgd", "lr": 0.05}}]
        overrides = {"phases": phases} | changes.get("overrides", {})
        study = plan.read(write({"test_timesteps": [1, 4]} | changes | {"overrides": overrides}))
        runs = plan.runs_of(study, tmp_path / "out", [])
        for run in runs:
            finish(run, top1(run))
        return gather(study, runs, "the command")

    return made


def finish(run, top1):
    checkpoint = run.folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 10, "evaluated_step": 10}))
    (run.folder / "config.yaml").write_text(run.config.as_yaml())
    lines = [
        # 5 steps of 8 samples at 10 a second, and as many at 20; one seed was held up.
        {"kind": "train", "step": 5, "epoch": 1, "samples_per_s": 10.0},
        {"kind": "val", "step": 5, "epoch": 1, "top1": 99.0, "loss": 0.5 + run.seed},
        {"kind": "train", "step": 10, "epoch": 2, "samples_per_s": 2.0 if run.seed == 5 else 20.0},
        {"kind": "val", "step": 10, "epoch": 2, "top1": top1[3], "loss": 0.25 + run.seed},
    ]
    for line in lines:
        line |= {"time": 1.7e9, "samples": 23, "per_timestep_top1": top1}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
