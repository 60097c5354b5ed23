"""The Weights & Biases (W&B) logger of a run, which sends metrics.jsonl to W&B.

Values have their names from `points_of`. Each kind of line has its own axis, ``train/step`` and
``val/step``, since W&B's own step counts calls. W&B cannot delete or change values: so a start
queries the run's summary for the last step of each kind and sends the later ones. Steps computed
again after a kill keep W&B's first values, which differ only in timings.

Offline (``WANDB_MODE=offline``) there is no summary. So each start writes the whole run anew into
RUN/wandb/latest-run and removes that of an earlier start: `wandb sync` finds each point once.

W&B's own variables and files set account and destination: WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY,
WANDB_PROJECT (by default ``tracking.experiment``), ...
"""

import logging
import os
import secrets
import sys
from typing import Any, ClassVar

from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import remove, write_text
from tetdist.tracking.metrics_file import points_of
from tetdist.tracking.trackers import TRACKERS, TrackedRun, require_package

logger = logging.getLogger(__name__)


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """One start of a run, in W&B."""

    from_first_line: ClassVar[bool] = True

    @staticmethod
    def check() -> None:
        """Check that W&B works without a prompt at the terminal."""
        require_package("wandb", "wandb")
        import wandb

        is_online = wandb.setup().settings.mode in ("online", "shared")
        if is_online and not wandb.login(prompt=False):
            raise UserError(
                "tracking.trackers: wandb is not logged in; run `wandb login` once, or keep the "
                "run here (export WANDB_MODE=offline) and send it with `wandb sync` later"
            )

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        id_file = run.folder / "wandb_run_id"
        if not id_file.is_file():
            write_text(id_file, secrets.token_hex(4) + "\n")
        run_id = id_file.read_text().strip()
        for earlier in (run.folder / "wandb").glob(f"offline-run-*-{run_id}"):
            remove(earlier)
        # W&B records the command line from here.
        sys.argv[1:] = map(without_passwords, sys.argv[1:])
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            name=run.name,
            project=os.environ.get("WANDB_PROJECT") or run.params.get("tracking.experiment"),
            dir=run.folder,
            config={**run.params, "tags": dict(run.tags)},
            # Its output would mix with the progress on the terminal, which the log already has.
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
        if status == "RUNNING":  # elsewhere, soon
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
        # Its service is a separate process, which ends when all is sent.
        self._wandb.teardown()
