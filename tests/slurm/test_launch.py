"""The launcher without a cluster: facts, batch script, snapshot, command line."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import hub_stand_in
import pytest
import tiny
import yaml

from tetdist.apps.cli.slurm import main
from tetdist.apps.slurm import batch, cluster, snapshot, submit
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.config import identity, loading
from tetdist.errors import UserError
from tetdist.tracking import mlflow_logger


@pytest.fixture
def without_slurm(monkeypatch, tmp_path):
    """As on a machine that has none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to("/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


# --- facts ----------------------------------------------------------------------------------------


def test_facts_from_three_places(cluster_file, monkeypatch, tmp_path):
    cluster_file.write_text(
        "partition: gpu\naccount: lab\ngpus_per_node: 8\nsetup: [module load x]\n"
    )
    facts = cluster.gather({"account": "mine", "nodes": 3}, {"nodes": 2})
    assert (facts.partition, facts.account, facts.nodes) == ("gpu", "mine", 2)
    assert facts.setup == ("module load x",)
    assert (facts.processes_per_node, facts.processes) == (8, 16)
    (tmp_path / "other.yaml").write_text("qos: high\n")
    monkeypatch.setenv("TETDIST_CLUSTER", str(tmp_path / "other.yaml"))
    assert (cluster.gather({}, {}).qos, cluster.gather({}, {}).account) == ("high", None)
    monkeypatch.setenv("TETDIST_CLUSTER", str(tmp_path / "nothing.yaml"))
    with pytest.raises(UserError, match="TETDIST_CLUSTER"):
        cluster.gather({}, {})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("partiton: gpu", ["cluster.yaml", "partiton: unknown key", "'partition'"]),
        ("time: 30", ["time must be text, in quotes, not 30"]),
        ("setup: module load cuda", ["setup must be a list, in brackets, not 'module load cuda'"]),
        ("sbatch: --exclusive", ["sbatch must hold keys and values"]),
        ("sbatch: {--exclusive: true}", ["cluster.yaml: sbatch: write --exclusive without the"]),
        ("time: tomorrow", ["cluster.time: 'tomorrow' is not a time"]),
        ('time: "1"', ["cluster.time: 1 is not longer than cluster.warn_before_end (120 s)"]),
    ],
)
def test_wrong_facts(text, parts, cluster_file):
    cluster_file.write_text(text)
    with pytest.raises(UserError) as error:
        cluster.gather({}, {})
    for part in parts:
        assert part in str(error.value)


def test_times_in_slurms_notation():
    minutes = {"90": 90, "1:30": 2, "02:00:00": 120, "00:00:30": 1, "2-00": 2880, "1-12:30": 2190}
    for text, expected in (minutes | {"1-00:00:01": 1441}).items():
        assert cluster.minutes(text) == expected, text


# --- batch script, snapshot -----------------------------------------------------------------------


def test_batch_script_of_a_typical_submission(monkeypatch):
    """2 nodes x 8 GPUs; to accept a change, write the new text into the file."""
    monkeypatch.setattr(sys, "executable", "/opt/tetdist/bin/python")
    section = ClusterSection(
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=8,
        partition="gpu",
        account="lab",
        setup=("module load cuda",),
        interface="ib0",
    )
    folder = Path("/data/runs/sew34_t4/slurm/submission-1")
    text = batch.text(batch.parameters("sew34_t4", section, folder / "code"), folder)
    assert text == Path(__file__).with_name("sew34_2x8.sbatch").read_text()


def test_further_flags_of_sbatch():
    further = {"exclusive": True, "mail-user": "a@b.c", "dependency": "singleton"}
    section = ClusterSection(gpus_per_node=0, sbatch=further)
    text = batch.text(batch.parameters("x", section, Path("/code")), Path("/folder"))
    assert "#SBATCH --exclusive\n" in text
    assert "#SBATCH --mail-user=a@b.c\n" in text
    assert "#SBATCH --dependency=singleton\n" in text
    assert "kill-on-invalid-dep" not in text
    assert "gpus" not in text
    # After others.
    text = batch.text(batch.parameters("x", section, Path("/code"), ["3", "4"]), Path("/folder"))
    assert "#SBATCH --dependency=afterok:3:4,singleton\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text


def test_files_of_others_are_found_from_the_folder_of_the_code(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["init_checkpoint=given", "loss.distillation.teacher=its/folder"]
    config = loading.load(str(tiny_config()), overrides)
    facts = ClusterSection(gpus_per_node=0)
    with pytest.raises(UserError, match=r"init_checkpoint: there is no given; .*--after RUN"):
        submit.prepare(config, facts)
    (tmp_path / "given").touch()
    with pytest.raises(UserError, match=r"teacher: there is no its/folder"):
        submit.prepare(config, facts)
    # Those will be there.
    prepared = submit.prepare(config, facts, after=["its"]).config
    assert prepared.init_checkpoint == str(tmp_path / "given")
    assert prepared.loss.distillation.teacher == str(tmp_path / "its" / "folder")
    # However it is written, it is the same run.
    assert identity.differences(config.as_dict(), prepared.as_dict()) == []
    other = config.model_copy(update={"init_checkpoint": "other"})
    assert len(identity.differences(other.as_dict(), prepared.as_dict())) == 1
    # timm's models have names, not paths.
    timm = loading.load(str(tiny_config()), ["loss.distillation.teacher=timm:resnet18"])
    assert submit.prepare(timm, facts).config.loss.distillation.teacher == "timm:resnet18"
    with pytest.raises(UserError, match="no network tetdist:it comes with tetdist"):
        submit.prepare(loading.load(str(tiny_config()), ["init_checkpoint=tetdist:it"]), facts)
    ours = loading.load(str(tiny_config()), ["init_checkpoint=tetdist:quickstart"])
    assert submit.prepare(ours, facts).config.init_checkpoint == "tetdist:quickstart"


def test_networks_of_the_hub_are_fetched_before_the_job_is_queued(
    tiny_config, tmp_path, monkeypatch
):
    config = loading.load(str(tiny_config()), ["init_checkpoint=hf:us/small"])
    facts = ClusterSection(gpus_per_node=0)
    with hub_stand_in.serving(monkeypatch, tmp_path / "home") as hub:
        with pytest.raises(UserError, match="/us/small does not exist"):
            submit.prepare(config, facts)
        hub.repositories["us/small"] = hub_stand_in.Repository()
        hub.repositories["us/small"].commit({"model.safetensors": b"weights"})
        prepared = submit.prepare(config, facts).config
    assert prepared.init_checkpoint == "hf:us/small"
    assert len(list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))) == 1


def test_snapshot_holds_what_is_not_committed(tmp_path):
    project, target = tmp_path / "project", tmp_path / "copy"

    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(project), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (project / "tetdist").mkdir(parents=True)
    (project / "tetdist" / "a.py").write_text("A = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    (project / "tetdist" / "b.py").write_text("B = 1\n")
    clean = snapshot.take(tmp_path / "clean", project)
    assert (clean["commit"], clean["changed"]) == (git("rev-parse", "HEAD").strip(), False)

    (project / "tetdist" / "a.py").write_text("A = 2\n")
    taken = snapshot.take(target, project)
    assert (target / "tetdist" / "a.py").read_text() == "A = 2\n"
    assert (target / "tetdist" / "b.py").exists()
    assert taken["changed"]
    assert taken["untracked"] == ["tetdist/b.py"]
    assert "+A = 2" in (target / "snapshot.diff").read_text()
    assert json.loads((target / "snapshot.json").read_text())["commit"] == clean["commit"]
    assert "with uncommitted changes" in snapshot.describe(taken)


def test_snapshot_of_an_installed_package(tmp_path):
    """A wheel's folder: configs/ is in the package, and tools/ beside it is somebody else's."""
    site = tmp_path / "site-packages"
    for file in ("tetdist/a.py", "tetdist/configs/a.yaml", "tetdist_command.py", "tools/b.py"):
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()
    taken = snapshot.take(tmp_path / "code", site)
    assert snapshot.describe(taken) == "not from a git checkout"
    copied = {"tetdist", "tetdist_command.py", "snapshot.diff", "snapshot.json"}
    assert {path.name for path in (tmp_path / "code").iterdir()} == copied
    assert (tmp_path / "code/tetdist/configs/a.yaml").exists()


def test_tracker_that_is_down_stops_no_submission(tiny_config, caplog):
    file = tiny_config({"tracking": {"mlflow": True, "uri": "http://127.0.0.1:9"}})
    config = loading.load(str(file))
    config.run_dir.mkdir(parents=True)
    mlflow_logger.announce(config, "SCHEDULED", {"a": "b"})
    assert "MLflow at http://127.0.0.1:9 failed: " in caplog.text
    assert not (config.run_dir / "mlflow_run_id").exists()


# --- the program ----------------------------------------------------------------------------------


def refused(capfd, arguments, *parts):
    capfd.readouterr()
    assert main(arguments) == 2
    errors = capfd.readouterr().err
    for part in ("error: ", *parts):
        assert part in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("without_slurm")
def test_dry_run_writes_nothing(tiny_config, tmp_path, capfd):
    file = tiny_config()
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", str(file), "--dry-run", "--nodes", "2", "--gpus-per-node", "2"]
    arguments += ["--partition", "gpu", "--cpus-per-task", "3"]
    assert main([*arguments, "--images-per-s", "100", "--print-config"]) == 0
    text, rest = capfd.readouterr().out.split("# --- batch script\n")
    script, config = rest.split("# --- configuration\n")
    assert text.startswith("# --- plan\n")
    assert "#SBATCH --partition=gpu" in script
    assert "#SBATCH --cpus-per-task=3" in script
    assert yaml.safe_load(config)["cluster"]["gpus_per_node"] == 2
    assert Path(yaml.safe_load(config)["runs_dir"]).is_absolute()
    assert "5 an epoch, 10 in total (2 epochs)" in text
    # Nothing says how many GPUs a node has; 8 samples a step.
    for micro, nodes, gpus in ((1, 1, 8), (4, 1, 2), (1, 4, 2), (8, 1, 1)):
        plan = ["--config", str(file), "--dry-run", "--nodes", str(nodes), f"batch.micro={micro}"]
        assert main(plan) == 0
        captured = capfd.readouterr()
        assert "# --- configuration" not in captured.out
        assert f"without --gpus-per-node, the plan assumes {gpus}\n" in captured.err
        assert f"#SBATCH --gpus-per-node={gpus}\n" in captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_without_the_data(tiny_config, capfd):
    file = str(tiny_config())

    def planned(*arguments):
        flags = ("--dry-run", "--gpus-per-node", "1", "--images-per-s", "9")
        assert main(["--config", file, *flags, *arguments]) == 0
        return capfd.readouterr().out

    text = planned("data.root=/nowhere", "--images", "80")
    assert "10 an epoch, 20 in total (2 epochs)" in text
    assert "without reading the data; evaluations assume ImageNet's proportion)" in text
    assert "2 evaluations of 3;" in text
    text = planned("data.root=/nowhere", "--images", "80", "data.held_out=0.1")
    assert "(72 as given, without" in text
    assert "2 evaluations of 8" in text
    # The data that are there are counted, unless another number is given.
    assert " in the split)" in planned()
    assert "(48 as given" in planned("--images", "48")
    assert "--dependency=afterok:JOB_OF_nothing" in planned("--after", "nothing")
    root = ["--config", file, "--dry-run", "data.root=/nowhere"]
    refused(capfd, root, "there is no folder /nowhere", "--images N")
    recordings = ["--config", "nmnist.yaml", "--dry-run", "--images", "9"]
    refused(capfd, recordings, "--images does not apply to recordings")


@pytest.mark.usefixtures("without_slurm")
def test_what_is_refused_before_anything_is_written(tiny_config, tmp_path, capfd, monkeypatch):
    file, trained = str(tiny_config()), tmp_path / "trained"
    trained.mkdir()
    (trained / "config.yaml").write_text("phases: [{epochs: 1}]\n")
    refused(capfd, ["--config", file], "the number of GPUs", "--gpus-per-node G")
    arguments = ["--config", file, "--gpus-per-node", "4"]
    refused(capfd, arguments, "there is no Slurm here", "--dry-run")
    monkeypatch.setattr("tetdist.apps.slurm.jobs.is_here", lambda: True)
    for more, *parts in (
        (["--nodes", "3"], "cannot be divided equally among 12 processes"),
        (["reference=sew43"], "reference: there is no published curve 'sew43'"),
        (["cluster.quos=x"], "quos: unknown key", "'qos'"),
        (["--time", "soon"], "--time: 'soon' is not a time"),
        # Slurm would look for the log of job 12 in a folder 12.
        (["name=100%j"], "name: '100%j' must consist of letters"),
        (["--after", "nothing"], "there is no run nothing"),
        (["--after", str(trained)], "was not submitted with `python launch/slurm.py`"),
    ):
        refused(capfd, [*arguments, *more], *parts)
    # A finished run needs no job.
    (trained / "metrics.jsonl").write_text('{"kind": "final", "step": 9, "time": 1.0}\n')
    monkeypatch.setattr(submit, "submit", Mock(side_effect=UserError("no such partition")))
    refused(capfd, [*arguments, "--after", str(trained)], "no such partition")
    assert submit.submit.call_args.kwargs == {"after": []}
    for command in ("status", "cancel", "resume"):
        refused(capfd, [command, "nothing"], "there is no run nothing")
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert "there are no runs yet in runs/" in capfd.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["resume=must"], "--config is missing"),
        (["sttus"], "there is no command sttus; did you mean status?"),
        (["--config", "x", "--gpus", "8"], "did you mean --gpus-per-node?"),
        (["--config", "x", "--gres", "gpu:8"], "; write cluster.sbatch.gres=VALUE"),
        (["--config", "x", "--benchmark", "x"], "--benchmark; give --images-per-s X instead"),
        (["--config", "x", "--exclusive"], "; write cluster.sbatch.exclusive=VALUE"),
        (["--config", "x", "--tasks-per-node", "2"], "; write cluster.tasks_per_node=VALUE"),
        (["--config", "x", "--images-per-s", "0"], "--images-per-s must be above 0, not 0"),
        (["--config", "x", "--images-per-s", "inf"], "--images-per-s must be above 0, not inf"),
        (["--config", "x", "--images", "8"], "--images needs --dry-run"),
        (["--config", "x", "--print-config"], "--print-config needs --dry-run, with which nothing"),
    ],
)
def test_wrong_command_line(arguments, part, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert part in capfd.readouterr().err


def test_cluster_file_of_the_documentation(cluster_file):
    """An example, and all other keys with their defaults."""
    text = (tiny.PROJECT / "docs" / "slurm.md").read_text()
    example, others = (part.split("```")[0] for part in text.split("```yaml\n")[1:3])
    cluster_file.write_text(example)
    assert cluster.gather({}, {}).gpus_per_node == 8
    defaults = yaml.safe_load(others)
    assert {*yaml.safe_load(example), *defaults} == set(ClusterSection.model_fields)
    assert {key: getattr(ClusterSection(), key) for key in defaults} == defaults
