"""The launcher without a cluster: facts, batch script, snapshot, sweeps, runs on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import hub_stand_in
import pytest
import tiny
import yaml
from cluster import wait_until

from tetdist.apps.cli.slurm import main
from tetdist.apps.slurm import batch, cluster, history, local, snapshot, status, submit
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import JobEvent
from tetdist.config import identity, loading
from tetdist.errors import UserError

LAUNCHER = tiny.PROJECT / "launch" / "slurm.py"


@pytest.fixture
def without_slurm(monkeypatch, tmp_path):
    """As on a machine that has none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to("/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


# --- facts ----------------------------------------------------------------------------------------


def test_facts_from_three_places(cluster_file):
    cluster_file.write_text(
        "partition: gpu\naccount: lab\ngpus_per_node: 8\nsetup: [module load x]\n"
    )
    facts = cluster.gather({"account": "mine", "nodes": 3}, {"nodes": 2})
    assert (facts.partition, facts.account, facts.nodes) == ("gpu", "mine", 2)
    assert facts.setup == ("module load x",)
    assert (facts.processes_per_node, facts.processes) == (8, 16)


def test_cluster_file_elsewhere(monkeypatch, tmp_path):
    (tmp_path / "other.yaml").write_text("qos: high\n")
    monkeypatch.setenv("TETDIST_CLUSTER", str(tmp_path / "other.yaml"))
    assert cluster.gather({}, {}).qos == "high"
    monkeypatch.setenv("TETDIST_CLUSTER", str(tmp_path / "nothing.yaml"))
    with pytest.raises(UserError, match="TETDIST_CLUSTER"):
        cluster.gather({}, {})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("partiton: gpu", ["cluster.yaml", "unknown key 'partiton'", "'partition'"]),
        ("zzz: 1", ["unknown key 'zzz'; known keys: partition, account"]),
        ("time: 24:00:00", ["cluster.yaml: 24:00:00 in line 1", "quote it"]),
        ("time: 30", ["'time'", "a valid string, in quotes, not 30"]),
        ("time: tomorrow", ["cluster.time: 'tomorrow' is not a time"]),
        ("nodes: 0", ["cluster.yaml", "'nodes'", "must be above 0, not 0"]),
        ("gpus_per_node: many", ["'gpus_per_node'", "not 'many'"]),
        ("- 1", ["cluster.yaml must hold keys and values"]),
        ("a: [", ["cluster.yaml is not valid YAML"]),
        ('time: "1"', ["cluster.time: 1 is not longer than cluster.warn_before_end (120 s)"]),
        ("setup: [2020-01-01]", ["a value is neither text"]),
        ('partition: "a\\nb"', ["'partition'"]),
    ],
)
def test_wrong_facts(text, parts, cluster_file):
    cluster_file.write_text(text)
    with pytest.raises(UserError) as error:
        cluster.gather({}, {})
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 2),
        ("02:00:00", 120),
        ("00:00:30", 1),
        ("2-00", 2880),
        ("1-12:30", 2190),
        ("1-00:00:01", 1441),
    ],
)
def test_times_in_slurms_notation(text, expected):
    assert cluster.minutes(text) == expected


# --- batch script, snapshot, sweeps ---------------------------------------------------------------


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
    text = batch.text(batch.parameters("x", section, Path("/code")), Path("/folder"), count=3)
    assert "#SBATCH --exclusive\n" in text
    assert "#SBATCH --mail-user=a@b.c\n" in text
    assert "#SBATCH --array=0-2%3\n" in text
    assert "#SBATCH --dependency=singleton\n" in text
    assert "kill-on-invalid-dep" not in text
    assert "gpus" not in text
    # After others.
    text = batch.text(batch.parameters("x", section, Path("/code"), ["3", "4_1"]), Path("/folder"))
    assert "#SBATCH --dependency=afterok:3:4_1,singleton\n" in text
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
    clean = snapshot.take(tmp_path / "clean", project)
    assert (clean["commit"], clean["changed"]) == (git("rev-parse", "HEAD").strip(), False)

    (project / "tetdist" / "a.py").write_text("A = 2\n")
    (project / "tetdist" / "b.py").write_text("B = 1\n")
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


def test_sweeps():
    assert submit.sweep_of("run", ["seed=0,1", "loss.kind=sdt,tet"]) == {
        "run_seed-0_kind-sdt": ["seed=0", "loss.kind=sdt"],
        "run_seed-0_kind-tet": ["seed=0", "loss.kind=tet"],
        "run_seed-1_kind-sdt": ["seed=1", "loss.kind=sdt"],
        "run_seed-1_kind-tet": ["seed=1", "loss.kind=tet"],
    }
    # A comma in brackets belongs to the value; what does not vary is in no name, and no name has
    # brackets and commas.
    sweep = ["data.scale=[0.1,1],[0.5,1]", "seed=3"]
    assert submit.sweep_of("run", sweep)["run_scale-0.5-1"] == ["data.scale=[0.5,1]", "seed=3"]
    named = list(submit.sweep_of("run", [*sweep, "x.y=-1,1", "z=a b,a/b%"]))
    assert named[0] == "run_scale-0.1-1_y--1_z-a-b"
    assert all(re.fullmatch(r"[\w.-]+", name) for name in named)
    for wrong in (["seed"], ["=1"], ["seed=1,,2"], ["seed="]):
        with pytest.raises(UserError, match="--sweep"):
            submit.sweep_of("run", wrong)
    with pytest.raises(UserError, match="two runs would have the same name"):
        submit.sweep_of("run", ["seed=1,1"])
    many = [f"x.y{i}={','.join(map(str, range(200)))}" for i in range(3)]
    with pytest.raises(UserError, match=r"--sweep: 8,000,000 runs are too many; .* 1,000 by"):
        submit.sweep_of("run", many)


def test_tracker_that_is_down_stops_no_submission(tiny_config, caplog):
    file = tiny_config({"tracking": {"mlflow": True, "uri": "http://127.0.0.1:9"}})
    config = loading.load(str(file))
    config.run_dir.mkdir(parents=True)
    history.announce(config, "SCHEDULED", {"a": "b"})
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
    assert main([*arguments, "--partition", "gpu", "--images-per-s", "100"]) == 0
    text, rest = capfd.readouterr().out.split("# --- batch script\n")
    script, config = rest.split("# --- configuration\n")
    assert text.startswith("# --- plan\n")
    assert "#SBATCH --partition=gpu" in script
    assert yaml.safe_load(config)["cluster"]["gpus_per_node"] == 2
    assert Path(yaml.safe_load(config)["runs_dir"]).is_absolute()
    assert "5 an epoch, 10 in total (2 epochs)" in text
    # Nothing says how many GPUs a node has.
    assert main(["--config", str(file), "--dry-run", "batch.micro=1"]) == 0
    captured = capfd.readouterr()
    assert "without --gpus-per-node, the plan assumes 8" in captured.err
    assert "#SBATCH --gpus-per-node=8" in captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_without_the_data(tiny_config, capfd):
    file = str(tiny_config())

    def planned(*arguments):
        flags = ("--dry-run", "--gpus-per-node", "1", "--images-per-s", "9")
        assert main(["--config", file, *flags, *arguments]) == 0
        return capfd.readouterr().out

    text = planned("data.root=/nowhere", "--images", "80")
    assert "10 an epoch, 20 in total (2 epochs)" in text
    assert "2 evaluations of 0" in text
    text = planned("data.root=/nowhere", "--images", "80", "data.held_out=0.1")
    assert "(72 as given, without" in text
    assert "2 evaluations of 8" in text
    # The data that are there are counted, unless another number is given.
    assert " in the split)" in planned()
    assert "(48 as given" in planned("--images", "48")
    root = ["--config", file, "--dry-run", "data.root=/nowhere"]
    refused(capfd, root, "there is no folder /nowhere", "--images N")
    recordings = ["--config", "nmnist.yaml", "--dry-run", "--images", "9"]
    refused(capfd, recordings, "--images does not apply to recordings")


@pytest.mark.usefixtures("without_slurm")
def test_what_is_refused_before_anything_is_written(tiny_config, tmp_path, capfd):
    file = str(tiny_config())
    refused(capfd, ["--config", file], "the number of GPUs", "--gpus-per-node G")
    four = ["--config", file, "--gpus-per-node", "4"]
    refused(capfd, four, "there is no Slurm here", "--dry-run", "--local N")
    refused(capfd, [*four, "--nodes", "3"], "cannot be divided equally among 12 processes")
    refused(capfd, [*four, "data.root=/nowhere"], "data.root: there is no folder /nowhere")
    refused(capfd, [*four, "reference=sew43"], "reference: there is no published curve 'sew43'")
    refused(capfd, [*four, "bach.micro=1"], "unknown key 'bach'")
    refused(capfd, [*four, "cluster.quos=x"], "unknown key 'quos'", "'qos'")
    refused(capfd, [*four, "--time", "soon"], "--time: 'soon' is not a time")
    # Slurm would look for the log of job 12 in a folder 12.
    refused(capfd, [*four, "name=100%j"], "name: '100%j' must consist of letters")
    refused(capfd, [*four, f"runs_dir={tmp_path}/%j"], "contains a %", "another runs_dir=...")
    refused(capfd, [*four, "--after", "nothing"], "there is no run nothing")
    refused(capfd, [*four, "--after", "nothing", "--local", "1"], "cannot be combined with --local")
    refused(capfd, [*four, "--gpus-per-node", "-1"], "'gpus_per_node'")
    refused(capfd, ["status", "nothing"], "there is no run nothing")
    refused(capfd, ["cancel", str(tmp_path)], "was not submitted with `python launch/slurm.py`")
    assert not (tmp_path / "runs").exists()


def test_wrong_command_line(capfd):
    for arguments, part in (
        ([], "--config is missing"),
        (["--config", "x", "--nodes", "none"], "'none' is not a whole number"),
        (["status"], "RUN"),
        (["--config", "x", "--dry-run", "--follow"], "not allowed"),
        (["--config", "x", "--images", "8"], "--images applies to --dry-run only"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert part in capfd.readouterr().err


# --- without Slurm --------------------------------------------------------------------------------


@pytest.mark.long
def test_local_run_starts_again_after_a_warning(tiny_config, tmp_path):
    """The job's own function in two processes: warned, saved, started again, to the bit."""
    changes = {"engine": "torch", "phases.0.epochs": 30, "evaluate_every": 30}
    straight = tiny_config(changes | {"name": "straight"})
    assert (
        tiny.execute(tiny.python(LAUNCHER, "--config", straight, "--local", "2"), tmp_path)[0] == 0
    )
    file = tiny_config(changes | {"name": "warned"})
    command = tiny.python(LAUNCHER, "--config", file, "--local", "2")
    run = tmp_path / "runs" / "warned"
    with tiny.started(command, tmp_path, os.environ | tiny.clean_environment()) as process:
        wait_until(lambda: history.saved_step(run) >= 5, "a checkpoint", 90)
        process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "SIGUSR2: saved, the job restarts" in output
    kinds = [event.kind for event in history.history(run)]
    assert kinds == ["submitted", "started", "stopped", "started", "finished"]
    tiny.assert_same_run(run, tmp_path / "runs" / "straight")


def test_goodput_is_the_time_in_steps_since_the_submission(tmp_path):
    """Of a run that trained 100 steps, waited a day, and was submitted again at time 1000."""
    run = tmp_path / "run"
    submission = history.Submission("local", str(run), "c", "c", str(run), {}, 400, 100, 8, 1000.0)
    history.write_submission(history.next_submission(run), submission)
    history.note(run, JobEvent("submitted", "local", time=1000.0))
    assert "  goodput" not in status.describe(run)
    one = {"kind": "train", "epoch": 1.0, "loss": 1.0}
    lines = [
        one | {"step": step, "time": now, "samples_per_s": rate}
        for step, now, rate in ((100, 900.0, 1.0), (150, 1050.0, 40.0), (250, 1100.0, 16.0))
    ]
    lines.insert(2, {"kind": "val", "step": 150, "time": 1060.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history.note(run, JobEvent("finished", "local", time=1120.0))
    # 50 steps of 0.2 s and 100 of 0.5 s.
    shown = "  goodput   50 % (1 min in steps, of 2 min since the submission)"
    assert shown in status.describe(run).splitlines()


@pytest.mark.parametrize(("fails", "status"), [("exit 3", 3), ("kill -9 $$", 128 + signal.SIGKILL)])
def test_one_failed_process_ends_the_others(fails, status, tmp_path, monkeypatch):
    """Whichever it is; here the last."""
    monkeypatch.setattr(local, "PATIENCE", 0.1)
    job = types.SimpleNamespace(code=str(tmp_path))
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n[ $RANK = 0 ] && exec sleep 20\n{fails}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    begin = time.monotonic()
    assert local._start(tmp_path / "job.json", job, 2, 0) == status
    assert time.monotonic() - begin < 15


def test_cluster_file_of_the_documentation(cluster_file):
    """An example, and all other keys with their defaults."""
    text = (tiny.PROJECT / "docs" / "slurm.md").read_text()
    example, others = (part.split("```")[0] for part in text.split("```yaml\n")[1:3])
    cluster_file.write_text(example)
    assert cluster.gather({}, {}).gpus_per_node == 8
    defaults = yaml.safe_load(others)
    assert {*yaml.safe_load(example), *defaults} == set(ClusterSection.model_fields)
    assert {key: getattr(ClusterSection(), key) for key in defaults} == defaults
