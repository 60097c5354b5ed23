"""tools/study.py on a real cluster: a study submitted at once, of runs that need each other."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from cluster import wait_until
from runs import Run, assert_mlflow_has, mlflow_status

from tetdist.apps.cli import slurm
from tetdist.apps.cli import study as command

ON_CPU = ("--gpus-per-node", "0", "--time", "10")
HELD = ("cluster.sbatch.hold=true",)


class Study:
    """A study in a folder of its own, in which this process now is."""

    def __init__(self, cluster, capfd, folder):
        self.cluster, self._capfd = cluster, capfd
        self.output = folder / "out"

    def __call__(self, *arguments, status=0):
        """Runs the tool, which ends with a status: output, or errors of another status than 0."""
        self._capfd.readouterr()
        found = command.main(["study.yaml", "--output", "out", *map(str, arguments)])
        output, errors = self._capfd.readouterr()
        assert found == status, errors
        return errors if status else output

    def run(self, name):
        return Run(self.cluster, self.output / f"{name}-seed0")


@pytest.fixture
def study(cluster, tiny_config, tmp_path, capfd, monkeypatch):
    """Writes a study of tiny runs with one seed: (entries, changes of the configuration)."""
    monkeypatch.chdir(tmp_path)

    def write(entries, changes=None):
        base = tiny_config({"engine": "torch", "phases.0.epochs": 1} | (changes or {}))
        values = {
            "title": "A tiny study",
            "config": str(base),
            "seeds": [0],
            "test_timesteps": [1, 2],
            "entries": entries,
        }
        Path("study.yaml").write_text(yaml.safe_dump(values))
        return Study(cluster, capfd, tmp_path)

    return write


def test_typed_again_it_submits_what_is_neither_finished_nor_queued(study, cluster, capfd):
    tiny_study = study({"second": {"init": "first"}, "first": {}, "other": {}})
    held = ("--slurm", *ON_CPU, *HELD)
    tiny_study("--only", "other", *held)
    output = tiny_study("--only", "second", *held)
    first, second, other = map(tiny_study.run, ("first", "second", "other"))
    before = (first.job, second.job)
    assert f"second-seed0: submitted as job {second.job}, starts after first-seed0" in output
    assert f"afterok:{first.job}(" in cluster.job(second.job)["Dependency"]
    output = tiny_study(*held)
    for name, run in (("first", first), ("second", second), ("other", other)):
        assert f"{name}-seed0: PENDING as job {run.job} (waiting: " in output
    assert (len(cluster.squeue()), (first.job, second.job)) == (3, before)
    # Nor does it train here what is queued there.
    assert f"first-seed0 is PENDING as job {first.job}" in tiny_study(status=2)

    # Slurm does not remove what is held; so the second waits for a job that is gone.
    cluster.run("scancel", first.job)
    assert second.is_queued
    # What will never be finished is nothing to wait for.
    alone = ["--config", "tiny.yaml", "name=third", *ON_CPU]
    assert slurm.main([*alone, "--after", "out/first-seed0"]) == 2
    assert "--after: out/first-seed0 is neither finished nor queued" in capfd.readouterr().err
    output = tiny_study(*held)
    assert f"second-seed0: submitted as job {second.job}, starts after first-seed0" in output
    assert not {first.job, second.job} & {*before}
    queued = {f"{run.job} PENDING" for run in (first, second, other)}
    assert set(cluster.squeue()) == queued
    # The study's folder stands for all its runs, whenever they were submitted, that are there.
    assert slurm.main(["cancel", "out"]) == 0
    assert not cluster.squeue()
    shutil.rmtree(other.path)
    capfd.readouterr()
    assert slurm.main(["status", "out"]) == 0
    assert re.findall(r"(?m)^  out/(\w+)-seed0 ", capfd.readouterr().out) == ["first", "second"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--partition", "nowhere"), ("first-seed0: Slurm refused the job", "nowhere", "`sinfo`")),
        (("cluster.sbatch.exclusve=1",), ("unrecognized option '--exclusve", "`sbatch --help`")),
        (("--nodes", "9", "cluster.tasks_per_node=1", "cluster.mem_gb=1e6"), ("`sinfo",)),
    ],
)
def test_mistakes_are_named_and_nothing_is_queued(study, cluster, flags, words):
    changes = {"batch.global": 9, "batch.micro": 1} if "--nodes" in flags else {}
    errors = study({"first": {}}, changes)("--slurm", *ON_CPU, *flags, status=2)
    assert errors.count("\n") == 1
    assert [word for word in words if word not in errors] == [], errors
    assert not cluster.squeue()
    assert not Path("out").exists()


@pytest.mark.long
def test_a_run_begins_when_the_one_it_needs_is_finished(study, cluster):
    """It is requeued in between, which the other one must not take for its end."""
    long = {"phases.0.epochs": 150, "evaluate_every": 150}
    needs = {"init": "first", "teacher": "first"}
    tiny_study = study({"second": needs, "first": {"overrides": long}})
    tiny_study("--slurm", *ON_CPU)
    first, second = tiny_study.run("first"), tiny_study.run("second")
    wait_until(lambda: first.logged_step >= 20, "step 20", 90)
    cluster.run("scancel", "--signal=USR2", first.job)
    first.wait_for_start(2)
    output = tiny_study("--slurm", *ON_CPU)
    for name, run in (("first", first), ("second", second)):
        assert re.search(rf"{name}-seed0: \w+ as job {run.job} ", output), output

    second.wait_for("finished")
    kinds = ["submitted", "started", "stopped", "started", "finished"]
    assert [event.kind for event in first.history] == kinds
    assert [event.kind for event in second.history] == ["submitted", "started", "finished"]
    assert first.history[-1].time < second.history[1].time
    assert f"beginning with the weights of {first.path} (step 750, T=2)" in second.log
    assert tiny_study("--slurm", *ON_CPU).count("-seed0: finished\n") == 2
    tiny_study()
    assert "Incomplete" not in (tiny_study.output / "report.md").read_text()


@pytest.mark.long
def test_what_begins_after_a_run_that_fails_leaves_the_queue_and_is_submitted_with_it(
    study, cluster, tiny_root, tmp_path
):
    root = Path(shutil.copytree(tiny_root, tmp_path / "spoilt"))
    bad = {"overrides": {"data.root": str(root)}}
    entries = {"bad": bad, "child": {"init": "bad"}, "grandchild": {"init": "child"}, "other": {}}
    tiny_study = study(entries, {"tracking.mlflow": True})
    tiny_study("--slurm", *ON_CPU, *HELD)
    bad, child = tiny_study.run("bad"), tiny_study.run("child")
    shutil.move(root / "index", tmp_path / "away")
    for name in ("grandchild", "child", "other", "bad"):
        cluster.run("scontrol", "release", tiny_study.run(name).job)
    wait_until(lambda: not cluster.squeue(), "an empty queue", 120)
    assert bad.log.count("error: there is no index") == 1
    assert cluster.job(bad.job)["Restarts"] == "0"
    assert [event.kind for event in child.history] == ["submitted"]
    assert mlflow_status(bad) == "FAILED"
    # Nor can it be continued alone, with weights that are not there.
    assert slurm.main(["resume", str(child.path)]) == 2

    shutil.move(tmp_path / "away", root / "index")
    output = tiny_study("--slurm", *ON_CPU)
    assert "other-seed0: finished\n" in output
    assert output.count(": submitted as job ") == 3
    child.wait_for("finished")
    assert f"beginning with the weights of {bad.path} (step 5, T=2)" in child.log
    assert_mlflow_has(child)
