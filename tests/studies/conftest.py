"""What the tests of studies and of searches share."""

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from tiny import Outcome
from tiny_study import ENTRIES, Here, finish

from tetdist.apps.studies import local, plan
from tetdist.apps.studies.numbers import Numbers, gather
from tetdist.apps.studies.plan import StudyRun


@pytest.fixture
def here(main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Has the runs of studies carried out in this process, by the rules of `main`."""
    del main
    found = Here()
    constants = {"DEVNULL": subprocess.DEVNULL, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=found.start, **constants))
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    return found


@pytest.fixture
def write(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes study.yaml, of tiny runs of one epoch at T=2: ({key: value}) -> file."""
    base = tiny_config({"phases.0.epochs": 1, "engine": "torch"})

    def study(changes: dict[str, Any] | None = None) -> Path:
        values: dict[str, Any] = {
            "title": "A tiny study",
            "config": str(base),
            "seeds": [0, 1],
            "test_timesteps": [1, 2],
            "entries": ENTRIES,
        }
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tiny.changed(values, changes or {})))
        return file

    return study


@pytest.fixture
def by_hand(write: Callable[..., Path], tmp_path: Path) -> Callable[..., Numbers]:
    """Writes a study and what its runs, of two epochs at T=4, leave: (changes, accuracies).

    The accuracies are up to each timestep, by run; without them those of all runs are alike.
    """

    def made(
        changes: dict[str, Any], top1: Callable[[StudyRun], list[float]] | None = None
    ) -> Numbers:
        phases = [{"epochs": 2, "timesteps": 4, "optimizer": {"kind": "sgd", "lr": 0.05}}]
        overrides = {"phases": phases} | changes.get("overrides", {})
        study = plan.read(write({"test_timesteps": [1, 4]} | changes | {"overrides": overrides}))
        runs = plan.runs_of(study, tmp_path / "out", [])
        for run in runs:
            finish(run, top1(run) if top1 else [50.0, 60.0, 70.0, 80.0])
        return gather(study, runs)

    return made
