"""Runs of studies and searches, carried out in this process or written by hand."""

import contextlib
import gc
import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tetdist.apps.studies.plan import StudyRun

ENTRIES: dict[str, Any] = {
    "sdt": {"overrides": {"loss.kind": "sdt"}},
    "tet": {"control": "sdt", "overrides": {"loss.kind": "tet"}},
}


class Here:
    """Carries out what a study would start as processes, which saves the seconds of their imports.

    Attributes:
        started: The arguments of each command that a process was to be started with.
        interrupt_at: Position in these of the one instead of which Ctrl-C comes.
    """

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.interrupt_at = -1

    def start(self, words: list[str], *, stdout: IO[bytes], **_: object) -> Any:
        if len(self.started) == self.interrupt_at:
            raise KeyboardInterrupt
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
        return SimpleNamespace(returncode=status, poll=lambda: status, terminate=lambda: None)


def finish(run: StudyRun, top1: list[float]) -> None:
    checkpoint = run.folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 10, "evaluated_step": 10}))
    (checkpoint.parent / "last").write_text(checkpoint.name)
    (run.folder / "config.yaml").write_text(run.config.as_yaml())
    lines: list[dict[str, Any]] = [
        # 5 steps of 8 samples at 10 a second, and as many at 20; one seed was held up.
        {"kind": "train", "step": 5, "epoch": 1, "samples_per_s": 10.0},
        {"kind": "val", "step": 5, "epoch": 1, "top1": 99.0, "loss": 0.5 + run.seed},
        {"kind": "train", "step": 10, "epoch": 2, "samples_per_s": 2.0 if run.seed == 5 else 20.0},
        {"kind": "val", "step": 10, "epoch": 2, "top1": top1[3], "loss": 0.25 + run.seed},
    ]
    for line in lines:
        line |= {"time": 1.7e9, "samples": 23, "per_timestep_top1": top1}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
