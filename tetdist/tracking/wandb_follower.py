"""The view of Weights & Biases (W&B) of a run, which follows metrics.jsonl.

Values are called as `points_of` calls them. Each kind of line has its own axis, ``train/step`` and
``val/step``, since W&B's own counts what it was given. W&B takes nothing back and never changes
what it has: so a start asks the run's summary for the last step of each kind and sends what comes
after it. Steps that are computed again after a kill keep the values that W&B had first, which
differ by the clock alone.

Offline (``WANDB_MODE=offline``) there is nobody to ask. So each start writes the whole run anew,
into RUN/wandb/latest-run, and removes what an earlier start has left: `wandb sync` finds each point
once.

Who writes to W&B, as whom and where to is for W&B's own variables and files to say: WANDB_MODE,
WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT (else the project is ``tracking.experiment``), ...
"""

import logging
import os
import secrets
import shutil
import sys
from typing import Any, ClassVar

from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import write_text
from tetdist.tracking.metrics_file import points_of
from tetdist.tracking.trackers import TRACKERS, TrackedRun, require_package

logger = logging.getLogger(__name__)


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """One start of a run, as W&B has it."""

    from_first_line: ClassVar[bool] = True

    @staticmethod
    def check() -> None:
        """See that W&B can be used without a question at the terminal.

        Raises:
            UserError: It is not installed, or knows no account.
        """
        require_package("wandb", "wandb")
        import wandb

        is_online = wandb.setup().settings.mode in ("online", "shared")
        if is_online and not wandb.login(prompt=False):
            raise UserError(
                "tracking.trackers: wandb knows no account here: run `wandb login` once, or keep "
                "the run here (export WANDB_MODE=offline) and send it with `wandb sync` later"
            )

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        id_file = run.folder / "wandb_run_id"
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4) + "\n")
        run_id = id_file.read_text().strip()
        for earlier in (run.folder / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(earlier, ignore_errors=True)  # left there, it is only in the way
        # W&B keeps the command line, and takes no other than this one.
        sys.argv[1:] = map(without_passwords, sys.argv[1:])
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=run.name,
            project=os.environ.get("WANDB_PROJECT") or run.params.get("tracking.experiment"),
            dir=run.folder,
            config={**run.params, "tags": dict(run.tags)},
            # Its output on the terminal would tear our own apart, and ours is in the log already.
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._last_step: dict[str, int] = {}  # of each kind, that W&B has
        if not self._run.offline:
            logger.info("Weights & Biases: %s", self._run.url)

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            kind, step = line["kind"], line["step"]
            axis = f"{kind}/step"
            if kind not in self._last_step:
                self._run.define_metric(axis, hidden=True)
                self._run.define_metric(f"{kind}/*", step_metric=axis)
                self._last_step[kind] = self._run.summary.get(axis, -1)
            if step > self._last_step[kind]:
                self._run.log(dict(points_of(line)) | {axis: step})
                self._last_step[kind] = step

    def close(self, status: str) -> None:
        import wandb

        if status == "RUNNING":  # elsewhere, soon
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        # Its service is a process of its own, which ends when all is sent.
        wandb.teardown()
