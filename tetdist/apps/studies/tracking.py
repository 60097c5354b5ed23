"""Study in MLflow: a parent run with the study's name, and its runs below it."""

from pathlib import Path

from tetdist.apps.slurm import history
from tetdist.apps.studies.plan import StudyRun


class Parent:
    """Parent run in MLflow of a study's runs.

    It does nothing without MLflow or, after one warning, if MLflow does not answer.
    """

    def __init__(self, study: str, runs: list[StudyRun], output: Path) -> None:
        self.study = study
        self.run_id: str | None = None
        tracked = next((run.config for run in runs if run.config.tracking_uri is not None), None)
        if tracked is not None:
            output.mkdir(parents=True, exist_ok=True)
            # A parent run counts as finished.
            tags = {"study": study}
            self.run_id = history.announce(tracked, "FINISHED", tags, heading=(output, study))

    def announce(self, run: StudyRun, status: str | None) -> None:
        """Show a run that no process trains now below this one; see `history.announce`."""
        if self.run_id is None or run.config.tracking_uri is None:
            return
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # The run's training reports the same problem.
        tags = {"mlflow.parentRunId": self.run_id, "study": self.study}
        tags |= {"entry": run.entry, "seed": str(run.seed)}
        if run.section.control is not None:
            tags["control"] = run.section.control
        history.announce(run.config, status, tags)
