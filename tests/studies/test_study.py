"""tools/study.py: runs trained, continued, skipped and failed; the report's numbers."""

import contextlib
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import stats
from tiny_study import ENTRIES, finish

from tetdist.apps.studies import figures, local, plan, search, slurm, summary, tracking
from tetdist.apps.studies.numbers import EQUAL, Numbers, gather, paired_difference, spread
from tetdist.apps.studies.plan import StudyRun
from tetdist.apps.studies.report import comparisons, differs_unnamed, early_exit
from tetdist.errors import UserError

STUDY = tiny.PROJECT / "tools" / "study.py"
Call = Callable[..., tuple[int, str]]
Write = Callable[..., Path]
ByHand = Callable[..., Numbers]


def runs_of(file: Path, output: Path) -> list[StudyRun]:
    return plan.runs_of(plan.read(file), output, [])


def steps_begun_at(log: Path) -> list[str]:
    """Lines of a run's starts about where they begin."""
    return re.findall(r"continuing \S+ from step (\d+)", log.read_text())


@pytest.mark.usefixtures("here")
def test_a_study_is_trained_continued_and_reported(call, write, main, tmp_path):
    file, output = write(), tmp_path / "out"
    # Of the control, one run has been trained by hand, one stopped at step 3; another has no place.
    for seed, more in ((0, ()), (1, ("max_steps=3",))):
        begun = [f"runs_dir={output}", f"name=sdt-seed{seed}", f"seed={seed}", "loss.kind=sdt"]
        assert main(tmp_path / "tiny.yaml", *begun, *more).status == 0
    (output / "tet-seed1").touch()
    status, printed = call("study", file, "--output", output, "--jobs", 2)
    assert status == 1, printed
    failure = r"failed: tet-seed1: exit status 2: error: cannot write to .*tet-seed1\.log\)\n"
    assert re.search(failure, printed), printed
    assert "1 of 4 runs are already done" in printed
    assert re.search(r"\[\d/4\] sdt-seed1: top-1 \d+\.\d\d %", printed), printed
    assert steps_begun_at(output / "logs" / "sdt-seed1.log") == ["3"]
    # Nothing is silent for long after the last run.
    assert "writing the report and its figure\n" in printed
    # What is finished is reported, and what is not is named.
    assert f"the report is {output / 'report.md'}" in printed
    report = (output / "report.md").read_text()
    assert "**Incomplete**: 1 of 4 runs is missing (tet-seed1)" in report
    before = {path: path.read_bytes() for path in output.glob("*/metrics.jsonl")}
    assert len(before) == 3

    # With room, the same command trains what is missing, and that alone.
    (output / "tet-seed1").unlink()
    status, printed = call("study", file, "--output", output, "--jobs", 2)
    assert status == 0, printed
    assert "3 of 4 runs are already done" in printed
    assert {path: path.read_bytes() for path in before} == before
    values = json.loads((output / "report.json").read_text())
    assert values["missing"] == []
    for run in values["runs"]:
        val = tiny.metrics(output / run["name"], "val")[-1]
        assert run["by_timestep"] == val["per_timestep_top1"]
        # 5 whole steps of 8 of the 47 samples, at T=2.
        assert run["image_timesteps"] == 80

    # A run that is finished evaluates nothing again.
    metrics = output / "tet-seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    status, printed = call("study", file, "--output", output)
    lacks = f"failed: tet-seed1: {metrics} lacks evaluations; remove {metrics.parent} to retrain"
    assert (status, lacks in printed) == (1, True), printed


@pytest.mark.usefixtures("here")
def test_thresholds_of_early_exit_are_compared(call, write, tmp_path):
    output, pages = tmp_path / "out", tmp_path / "results"
    averaged = {"control": "tet", "average": True, "overrides": {"ema.decay": 0.5}}
    fewer = {"overrides": {"phases.0.timesteps": 1}}
    entries = {**ENTRIES, "averaged": averaged, "fewer": fewer}
    overrides = {"data.held_out": 0.25, "phases.0.optimizer.lr": 0.5}
    changes = {"exit_within": 20.0, "seeds": [0], "entries": entries, "overrides": overrides}
    file = write(changes)
    status, printed = call("study", file, "--output", output, "--pages", pages)
    assert status == 0, printed
    values = json.loads((pages / "study.json").read_text())
    spent: dict[str, list[float]] = {name: [] for name in entries}
    for run in values["runs"]:
        found = json.loads((output / run["name"] / "test_timesteps.json").read_text())
        # The validation split is what is reported, not what the run held out.
        assert run["samples"] == sum(tiny.VAL_SIZES)
        # It is the accuracy at the T of training; early exit is with up to the last of the study's.
        trained = 1 if run["entry"] == "fewer" else 2
        assert run["top1"] == found["per_timestep_top1"][trained - 1]
        assert run["loss"] == found["per_timestep_loss"][trained - 1]
        assert run["chosen_exit"] == found["chosen_exit"]
        points = [[p["threshold"], p["top1"], p["mean_timesteps"]] for p in found["early_exit"]]
        assert run["early_exit"] == points
        assert run["best_top1"] == "NaN"
        assert "--exit-within 20" in run["commands"][1]
        is_averaged = run["entry"] == "averaged"
        assert ("averaged" in found) == is_averaged
        assert ("--ema" in run["commands"][1]) == is_averaged
        spent[run["entry"]].append(found["chosen_exit"]["mean_timesteps"])
    axis = figures.draw(gather(plan.read(file), runs_of(file, output))).axes[1]
    curves = [line for line in axis.get_lines() if len(line.get_xdata()) > 1]
    chosen = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
    assert {(line.get_xdata()[0], line.get_xdata()[-1]) for line in curves} == {(1, 2)}
    drawn = [float(line.get_xdata()[0]) for line in chosen]
    assert drawn == pytest.approx([np.mean(values) for values in spent.values()])
    # It is the same training, of which other weights are evaluated.
    losses = {run["name"]: run["loss"] for run in values["runs"]}
    assert losses["averaged-seed0"] != losses["tet-seed0"]
    for name, kind in (("tet-seed0", "val"), ("averaged-seed0", "val_ema")):
        (run,) = (run for run in values["runs"] if run["name"] == name)
        points = [[p["epoch"], p["loss"], p["top1"]] for p in tiny.metrics(output / name, kind)]
        assert run["curve"] == points
    difference = values["differences"]["tet"]["exit_timesteps"]
    assert difference["mean"] == pytest.approx(np.mean(np.subtract(spent["tet"], spent["sdt"])))
    report = (pages / "study.md").read_text()
    assert "loses at most 20 points on the 12 training samples that a run holds out" in report
    assert "The full T is 2, more than the training of `fewer` had." in report
    # Both runs have the lower accuracy of the two less 20 points at the first timestep.
    assert "| `tet` - `sdt` | +0.00 | +0.00 |" in report
    assert "best epoch" not in report


def test_the_result_is_on_the_validation_split_where_samples_are_held_out(
    call, write, here, tmp_path
):
    """And a file of one's own goes to training and evaluation, and into the report's command."""
    own, output = tmp_path / "my_loss.py", tmp_path / "out"
    own.write_text(
        "from tetdist.losses import register_loss, tet_loss\n"
        "@register_loss('own')\n"
        "def own(logits, target):\n"
        "    return tet_loss(logits, target, lambda_=0.0) + 100\n"
    )
    overrides = {"data.held_out": 0.25, "loss.kind": "own"}
    file = write({"seeds": [0], "entries": {"own": {}}, "overrides": overrides})
    status, printed = call("study", file, "--output", output)
    assert (status, "there is no loss 'own'" in printed) == (2, True), printed
    status, printed = call("study", file, "--output", output, "--import", own)
    assert status == 0, printed
    assert [words[-2:] for words in here.started] == [["--import", str(own)]] * 2
    values = json.loads((output / "report.json").read_text())
    assert [run["samples"] for run in values["runs"]] == [sum(tiny.VAL_SIZES)]
    report = (output / "report.md").read_text()
    assert f"on {sum(tiny.VAL_SIZES)} validation samples" in report
    assert "best epoch" not in report
    assert f"--import {own}" in report
    axis = figures.draw(gather(plan.read(file), runs_of(file, output))).axes[1]
    assert axis.get_title(loc="left") == "Loss on held-out samples"


@pytest.mark.usefixtures("here")
def test_one_begins_with_another(call, write, tmp_path):
    longer = {"phases.0.timesteps": 3, "phases.0.optimizer.lr": 0.01}
    phases = [{"epochs": 1, "timesteps": t, "optimizer": {"lr": 0.01}} for t in (2, 3)]
    entries = {
        "short": {},
        "longer": {"init": "short", "overrides": longer},
        "taught": {"init": "short", "teacher": "longer"},
        "second": {"init": "short", "overrides": {"phases": phases, "start_phase": 1}},
        "unasked": {},
    }
    file = write({"entries": entries, "seeds": [0], "test_timesteps": [1, 3]})
    output = tmp_path / "out"
    # Asked for some, it trains the others first; those are evaluated beyond their T, too.
    status, printed = call(
        "study", file, "--output", output, "--only", "taught", "--only", "second"
    )
    assert status == 0, printed
    log = (output / "logs" / "longer-seed0.log").read_text()
    assert f"beginning with the weights of {output / 'short-seed0'} (step 5, T=2)" in log
    values = json.loads((output / "report.json").read_text())
    cost = {name: entry["image_timesteps"] for name, entry in values["entries"].items()}
    # What two of a run's needs begin with is paid for once.
    assert cost == {"short": 80, "longer": 80 + 120, "taught": 80 + 120 + 80, "second": 80 + 120}
    report = (output / "report.md").read_text()
    assert report.count("| `short` | `longer` |") == 1  # begins with, learns from
    # Of the phase that the others lack those keys that are set, and only keys that are read.
    assert re.findall(r"`(phases\.1\.[\w.]+)`", report) == [
        f"phases.1.{key}" for key in ("epochs", "timesteps", "optimizer.lr")
    ]
    assert "`loss.distillation.self_target`" not in report
    runs = {run["entry"]: run for run in values["runs"]}
    teacher = f"loss.distillation.teacher={output / 'longer-seed0'}"
    assert teacher in runs["taught"]["commands"][0]
    assert {name: run["image_timesteps"] for name, run in runs.items()} == {
        "short": 80,
        "longer": 120,
        "taught": 80,
        "second": 120,
    }
    # Of the steps that a later phase begins after, none counts among its own.
    metrics = (output / "second-seed0" / "metrics.jsonl").read_text().splitlines()
    trained = [line for line in map(json.loads, metrics) if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [6, 7, 8, 9, 10]
    seconds = sum(8 / line["samples_per_s"] for line in trained)
    assert runs["second"]["seconds"] == pytest.approx(seconds)
    (val,) = tiny.metrics(output / "short-seed0", "val")
    assert runs["short"]["by_timestep"][:2] == pytest.approx(val["per_timestep_top1"])
    assert len(runs["short"]["by_timestep"]) == 3
    assert "tools/eval.py" in runs["short"]["commands"][1]
    assert f"\n{runs['short']['commands'][1]}\n" in report
    assert len(runs["longer"]["commands"]) == 1


# --- however a study ends, its runs end with it ---------------------------------------------------

ENDLESS = {"seeds": [0], "entries": {"long": {}}, "overrides": {"phases.0.epochs": 100_000}}


def test_ctrl_c_ends_the_runs_and_they_go_on(call, write, tmp_path):
    output = tmp_path / "out"
    metrics = output / "long-seed0" / "metrics.jsonl"

    def ctrl_c() -> None:
        tiny.wait_until(lambda: metrics.exists() and metrics.stat().st_size, 90)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell has what a script starts in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = threading.Thread(target=ctrl_c)
    waiting.start()
    try:
        status, printed = call("study", write(ENDLESS), "--output", output)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
        waiting.join()
    assert (status, "stopped; the same command continues" in printed) == (130, True), printed
    assert "stopped at step" in (output / "logs" / "long-seed0.log").read_text()
    assert list((output / "long-seed0" / "checkpoints").glob("step-*"))


def test_runs_of_a_killed_study_save_and_end(call, write, tmp_path):
    file = write(ENDLESS)
    output = tmp_path / "out"
    run, log = output / "long-seed0", output / "logs" / "long-seed0.log"
    mark, env = tiny.marked(tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT)))
    command = tiny.python(STUDY, file, "--output", output)
    with tiny.started(command, tmp_path, env) as process:
        metrics = run / "metrics.jsonl"
        tiny.wait_until(lambda: metrics.exists() and metrics.stat().st_size, 90)
        (child,) = set(tiny.alive(mark)) - {process.pid}
        try:
            os.kill(child, signal.SIGSTOP)
            process.kill()
            process.communicate()
            # Meanwhile the same command leaves it alone.
            status, printed = call("study", file, "--output", output)
            at_work = f"error: another process is using {run}; wait for it"
            assert (status, at_work in printed) == (2, True), printed
        finally:
            os.kill(child, signal.SIGCONT)
        tiny.wait_until(lambda: not tiny.alive(mark), 60)
    assert "stopped at step" in log.read_text()
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_being_started_ends_with_the_study(number, write, tmp_path, monkeypatch):
    """The signal comes before the new process is known by its number."""
    mark, env = tiny.marked({})
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            signal.raise_signal(number)

    monkeypatch.setattr(local.subprocess, "Popen", Popen)
    sleep = property(lambda _: tiny.python("-c", "import time; time.sleep(300)"))
    monkeypatch.setattr(plan.Command, "words", sleep)
    runs = runs_of(write(ENDLESS), tmp_path / "out")
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        local.work(runs, 1, tracking.Parent("study", [], tmp_path))
    assert tiny.alive(mark) == []
    assert signal.getsignal(number) is before


def test_two_studies_do_not_share_a_run(write, tmp_path, monkeypatch):
    """The second has looked before the first has begun."""
    runs = runs_of(write(ENDLESS), tmp_path / "out")
    sleep = property(lambda _: tiny.python("-c", "import time; time.sleep(300)"))
    monkeypatch.setattr(plan.Command, "words", sleep)
    first = local.Child(runs[0], 1, runs[0].train_command)
    try:
        failed = local.work(runs, 1, tracking.Parent("study", [], tmp_path))
        assert "another process is using" in failed["long-seed0"]
    finally:
        first.process.kill()
        first.process.wait()


def test_mlflow_has_the_runs_below_the_study_and_is_sent_what_it_lacks_at_its_end(
    call, write, here, tmp_path, monkeypatch
):
    port, database, output = tiny.free_port(), tmp_path / "mlflow.db", tmp_path / "out"
    uri = f"http://127.0.0.1:{port}"
    overrides = {"tracking.mlflow": True, "tracking.uri": uri}
    entries = {"sdt": {"overrides": {"loss.kind": "sdt"}}}
    file = write({"seeds": [0], "overrides": overrides, "entries": entries})
    run = output / "sdt-seed0"
    server, start, environment = contextlib.ExitStack(), here.start, list[int]()

    def asked(query: str) -> list[Any]:
        with sqlite3.connect(database) as store:
            return store.execute(query).fetchall()

    def away_meanwhile(words: list[str], **options: Any) -> Any:
        server.close()
        monkeypatch.setattr(local.subprocess, "Popen", start)
        ended = start(words, **options)
        assert asked("select status from runs where name = 'sdt-seed0'") == [("SCHEDULED",)]
        assert asked("select key from metrics where key = 'train/loss'") == []
        environment.append((run / "environment.json").stat().st_mtime_ns)
        server.enter_context(tiny.mlflow_server(database, port))
        return ended

    monkeypatch.setattr(local.subprocess, "Popen", away_meanwhile)
    with server:
        server.enter_context(tiny.mlflow_server(database, port))
        # As a command whose runs fail, and the same command again.
        untracked = {"untracked": {"overrides": {"tracking.mlflow": False}}}
        told = {"seeds": [7], "overrides": overrides, "entries": ENTRIES | untracked}
        for ended in ("SCHEDULED", "FAILED"):
            failing = runs_of(write(told), output)
            parent = tracking.Parent("study", failing, output)
            for one in failing:
                parent.announce(one, ended)
        write({"seeds": [0], "overrides": overrides, "entries": entries})
        status, printed = call("study", file, "--output", output)
        assert status == 0, printed
        assert "checking whether MLflow has all points of all runs\n" in printed
        assert "MLflow lacks points of 1 run (sdt-seed0): sending them" in printed
        assert "the same command sends" not in printed
    statuses = dict(asked("select name, status from runs"))
    assert statuses == {
        "study": "FINISHED",
        "sdt-seed0": "FINISHED",
        "sdt-seed7": "FAILED",
        "tet-seed7": "FAILED",
    }
    losses = asked("select step, value from metrics where key = 'train/loss' order by step")
    assert losses == [(line["step"], line["loss"]) for line in tiny.metrics(run, "train")]
    ((parent_id,),) = asked("select run_uuid from runs where name = 'study'")
    own = {"mlflow.parentRunId": parent_id, "study": "study", "entry": "sdt", "seed": "0"}
    for name, more in (
        ("sdt-seed0", own | {"model": "spiking_convnet"}),
        ("tet-seed7", own | {"entry": "tet", "seed": "7", "control": "sdt"}),
    ):
        tags = dict(asked(f"select key, value from tags natural join runs where name = '{name}'"))
        assert {key: tags[key] for key in more} == more
        assert ("control" in tags) == ("control" in more)
    # It was started again, but its numbers are of the environment of before.
    assert (run / "environment.json").stat().st_mtime_ns == environment[0]

    # A run that sent all by itself while the study could not tell MLflow whose it is.
    with sqlite3.connect(database) as store:
        store.execute("delete from tags where key in ('study', 'mlflow.parentRunId')")
    with tiny.mlflow_server(database, port):
        assert call("study", file, "--output", output)[0] == 0
    assert len(asked("select key from tags where key = 'mlflow.parentRunId'")) == 1
    status, printed = call("study", file, "--output", output)
    assert status == 0
    assert f"MLflow at {uri}: " in printed
    assert "the same command sends MLflow the missing ones" in printed


# --- on a cluster, of which tests/slurm/test_studies.py has one -----------------------------------


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither its programs nor the facts of this machine's real cluster."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TETDIST_CLUSTER", raising=False)


@pytest.mark.usefixtures("no_slurm")
def test_dry_run_shows_each_job_after_those_it_needs(call, write, tmp_path):
    entries = ENTRIES | {"both": {"init": "sdt", "teacher": "tet"}}
    file = write({"entries": entries, "seeds": [0]})
    dry = ("--slurm", "--dry-run", "--gpus-per-node", "0")
    status, output = call("study", file, "--output", tmp_path / "new", *dry)
    assert status == 0, output
    jobs = output.split("# === ")[1:]
    assert [job.splitlines()[0] for job in jobs] == [
        "sdt-seed0",
        "tet-seed0",
        "both-seed0, starts after sdt-seed0, tet-seed0",
    ]
    assert "--dependency" not in jobs[0] + jobs[1]
    assert "#SBATCH --dependency=afterok:JOB_OF_sdt-seed0:JOB_OF_tet-seed0\n" in jobs[2]
    # Otherwise it would wait for ever if one of them fails.
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in jobs[2]
    # The job runs in another folder.
    assert f"init_checkpoint: {tmp_path / 'new' / 'sdt-seed0'}\n" in jobs[2]
    assert f"teacher: {tmp_path / 'new' / 'tet-seed0'}\n" in jobs[2]
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_slurm")
def test_dry_run_leaves_out_what_is_finished(call, finished):
    file, output = finished
    dry = ("--slurm", "--dry-run", "--gpus-per-node", "0")
    status, printed = call("study", file, "--output", output, *dry)
    assert (status, printed.count(": finished\n"), "#SBATCH" in printed) == (0, 6, False)


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpus-per-node", "0"), ("there is no Slurm here", "leave out --slurm", "--dry-run")),
        (("--dry-run",), ("without --gpus-per-node, the plan", "among 8 processes")),
        (("--dry-run", "--time", "soon"), ("--time: 'soon' is not a time", "24:00:00")),
        (("--after", "x"), ("--after applies to single runs",)),
        (("--config", "other.yaml"), ("--config applies to single runs",)),
        (("seed=3",), ("write seed=3 before it",)),
    ],
)
def test_mistakes_in_what_follows_slurm_are_named(call, write, tmp_path, flags, words):
    status, output = call("study", write(), "--output", tmp_path / "out", "--slurm", *flags)
    assert status == 2
    assert [word for word in words if word not in output] == [], output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("again", [False, True])
def test_what_is_submitted_by_how_the_runs_are(write, tmp_path, again):
    """A failed run is tried again only with --again; those that need it wait for that, too."""
    words = {"done": "finished", "bad": "failed", "ended": "cancelled", "waits": "queued"}
    needs = {"of_done": "done", "of_bad": "bad", "of_of_bad": "of_bad", "of_waits": "waits"}
    # Slurm has not removed it yet.
    needs |= {"still_queued": "bad"}
    entries = {name: {} for name in words} | {name: {"init": of} for name, of in needs.items()}
    study = plan.read(write({"entries": entries, "seeds": [0]}))
    runs = plan.runs_of(study, tmp_path / "out", [])
    found = {run: slurm.Standing(words.get(run.entry, "new"), "") for run in runs}
    found |= {run: slurm.Standing("queued", "") for run in runs if run.entry == "still_queued"}
    decided = slurm.decide(found, again)
    expected = words | dict.fromkeys(needs, "new")
    if again:
        expected |= {"bad": "new", "ended": "new"}
    else:
        expected |= dict.fromkeys(("of_bad", "of_of_bad", "still_queued"), "held back")
    assert {run.entry: standing.word for run, standing in decided.items()} == expected


def test_commands_of_an_installed_package(write, tmp_path, monkeypatch):
    """Without a checkout there are no scripts: the package itself is run."""
    from tetdist import errors

    run = runs_of(write(), tmp_path / "out")[0]
    train, evaluate = run.train_command, run.eval_command
    assert train.words[:2] == [sys.executable, str(tiny.PROJECT / "tetdist" / "train.py")]
    assert str(evaluate).startswith(f"python tools/eval.py --checkpoint {run.folder} ")
    monkeypatch.setattr(errors, "_CHECKOUT", tmp_path)
    assert train.words[:5] == [sys.executable, "-m", "tetdist_command", "train", "--config"]
    assert str(evaluate).startswith(f"tetdist eval --checkpoint {run.folder} ")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [0]}, ("unknown key 'sedes'", "seeds")),
        ({"title": ...}, ("'title' is missing",)),
        ({"seeds": [1, 1]}, ("seeds: [1, 1] has a duplicate",)),
        ({"seeds": [-1]}, ("study.yaml: 'seeds.0': must be 0 or more, not -1\n",)),
        ({"test_timesteps": []}, ("'test_timesteps'",)),
        ({"test_timesteps": [4, 2, 2]}, ("test_timesteps", "must ascend")),
        ({"entries.tet.controll": "sdt"}, ("unknown key 'entries.tet.controll'", "control")),
        ({"entries.tet.control": "std"}, ("entries.tet.control", "'std'", "sdt")),
        ({"entries.tet.init": "tet"}, ("entries.tet.init", "'tet'")),
        ({"entries.tet.init": "sdt", "entries.sdt.init": "tet"}, ("circle",)),
        ({"entries.tet.init": "sdt", "entries.sdt.teacher": "tet"}, ("circle",)),
        ({"entries.tet.teacher": "std"}, ("entries.tet.teacher", "'std'", "sdt")),
        ({"entries.tet.overrides": {"loss.kid": "tet"}}, ("entries.tet", "'loss.kid'")),
        ({"entries.tet.overrides": {"seed": 3}}, ("entries.tet", "itself sets seed", "seeds")),
        ({"overrides": {"runs_dir": "here"}}, ("itself sets runs_dir", "--output")),
        (
            {"entries.tet": {"init": "sdt", "overrides": {"init_checkpoint": "there"}}},
            ("itself sets init_checkpoint", "init provides it (sdt)"),
        ),
        (
            {
                "entries.tet.teacher": "sdt",
                "entries.tet.overrides": {"loss": {"distillation": {"teacher": "timm:resnet18"}}},
            },
            ("itself sets loss.distillation.teacher", "teacher provides it (sdt)"),
        ),
        ({"overrides": {"data.root": "nowhere"}}, ("data.root", "nowhere", "sdt")),
        (
            {"entries.tet.overrides": {"model.num_classes": 3}},
            ("entries.tet: model.num_classes=3", "4 classes"),
        ),
        ({"config": "nothing.yaml"}, ("nothing.yaml",)),
        (
            {"test_timesteps": [1], "overrides": {"data.held_out": 0.2}},
            ("test_timesteps", "entries.sdt", "up to 1 timestep only", "trained with T=2"),
        ),
        ({"exit_within": 1.0}, ("exit_within", "entries.sdt", "data.held_out: 0.1")),
        (
            {"exit_within": 1.0, "test_timesteps": [1], "overrides": {"data.held_out": 0.2}},
            ("test_timesteps", "entries.sdt", "up to 1 timestep only", "trained with T=2"),
        ),
        ({"entries.tet.average": True}, ("entries.tet.average", "set ema.decay")),
        ({"exit_within": -1.0, "overrides": {"data.held_out": 0.2}}, ("'exit_within'",)),
    ],
)
def test_mistakes_in_a_study_are_named(call, write, tmp_path, changes, words):
    status, output = call("study", write(changes), "--output", tmp_path / "out")
    assert status == 2
    assert output.count("\n") == 1
    assert [word for word in words if word not in output] == [], output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_left_to_train(call, write, tmp_path):
    status, output = call("study", write(), "--output", tmp_path / "out", "--dry-run")
    assert status == 0
    assert output.splitlines()[-1] == "4 of 4 runs to train, 4 epochs in total"
    assert not (tmp_path / "out").exists()
    # A run that begins with the second phase trains that alone.
    phases = [{"epochs": e, "timesteps": 2, "optimizer": {"lr": 0.01}} for e in (5, 1)]
    later = {"init": "short", "overrides": {"phases": phases, "start_phase": 1}}
    file = write({"entries": {"short": {}, "later": later}, "seeds": [0]})
    status, output = call("study", file, "--output", tmp_path / "out", "--dry-run")
    assert status == 0
    assert output.splitlines()[1:] == [
        "later-seed0: 1 epoch",
        "2 of 2 runs to train, 2 epochs in total",
    ]


def test_the_command_lines_key_that_entries_have_too_is_named(call, write, tmp_path):
    longer = {"control": "sdt", "overrides": {"phases.0.epochs": 3}}
    file = write({"entries": ENTRIES | {"longer": longer}})
    more = ("--output", tmp_path / "out", "--dry-run")
    status, output = call("study", file, "phases.0.epochs=2", "batch.micro=1", *more)
    assert status == 0
    assert "phases.0.epochs on the command line replaces values of entries" in output
    assert "compares: longer (phases.0.epochs=3)" in output
    assert "batch.micro" not in output
    # A whole section replaces its keys.
    output = call("study", file, "loss={kind: tet, lambda: 0.1}", *more)[1]
    assert "loss on the command line replaces" in output
    assert "compares: sdt (loss.kind=sdt), tet (loss.kind=tet)" in output
    assert "replaces" not in call("study", file, *more)[1]


def test_runs_that_others_wait_for_go_first_side_by_side(write, tmp_path):
    begun = {"begun": {}, "sdt": {"init": "begun"}, "tet": {"init": "begun", "teacher": "sdt"}}
    study = plan.read(write({"entries": {"alone": {}, **begun}}))
    runs = plan.runs_of(study, tmp_path / "out", [])
    assert [run.name for run in local.needed_first(runs)] == [
        *("begun-seed0", "begun-seed1", "sdt-seed0", "sdt-seed1"),
        *("alone-seed0", "tet-seed0", "alone-seed1", "tet-seed1"),
    ]
    # What was needed and is done already holds nothing up.
    left = [run for run in runs if run.entry in ("alone", "tet")]
    assert local.needed_first(left) == left


def test_the_time_left_goes_by_the_size_of_runs(capsys, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(local.time, "monotonic", lambda: clock)
    sizes = {"long": 20, "broken": 4, "short": 4, "other": 12}
    left: Any = [SimpleNamespace(name=name, size=size) for name, size in sizes.items()]
    progress = local.StudyProgress(5, left)
    for at, number, finished in ((60, 1, False), (300, 0, True), (360, 2, True), (900, 3, True)):
        clock = at
        progress.end(left[number], "well" if finished else "lost", finished=finished)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 5 runs are already done",
        "[2/5] broken: lost",
        # 15 s for the size of 1, of which 16 are left, and then 12.
        "[3/5] long: well; about 4 min left",
        "[4/5] short: well; about 3 min left",
        "[5/5] other: well",
    ]


def test_mistakes_on_the_command_line_are_named(call, write, tmp_path):
    file, output = write(), tmp_path / "out"
    for arguments, word in (
        (("no_such_study",), "tet_vs_sdt_digits"),
        (("tit_cifar",), "did you mean tit_cifar10?"),
        ((file, "--only", "tte"), "sdt, tet"),
        ((file, "--jobs", 0), "--jobs"),
        ((file, "--report-only"), "none of 4 runs is finished"),
        ((file, "--report-only", "--slurm"), "leave out --slurm"),
        ((file, "--again"), "--again needs --slurm"),
        ((file, "seed"), "'seed' is not an override"),
        ((file, "resume=must"), "the study itself sets resume"),
        ((file, "--pages", file), "--pages takes a folder"),
    ):
        status, printed = call("study", *arguments, "--output", output)
        assert (status, word in printed) == (2, True), printed


def test_the_studies_of_the_project_resolve(tmp_path):
    files = sorted((tiny.PROJECT / "configs" / "studies").glob("*.yaml"))
    studies = [plan.read(file) for file in files if not search.is_search(file)]
    assert studies
    for study in studies:
        one_seed = study.model_copy(update={"seeds": study.seeds[:1]})
        assert len(plan.runs_of(one_seed, tmp_path / "out", [])) == len(study.entries)


# --- numbers --------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
ACCURACIES = {
    "sdt": RNG.normal(90, 1, (3, 4)),  # seed, timestep
    "tet": RNG.normal(92, 1, (3, 4)),
}


@pytest.fixture
def finished(write: Write, tmp_path: Path) -> tuple[Path, Path]:
    """A study of three seeds whose runs are written by hand, and its folder.

    The runs end in the middle of the second phase, T=2 for an epoch and then T=4.
    """
    changes = {"seeds": [3, 4, 5], "test_timesteps": [1, 2, 4]}
    first = {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}}
    overrides = {"phases": [first, first | {"epochs": 3, "timesteps": 4}], "max_steps": 10}
    file, output = write(changes | {"overrides": overrides}), tmp_path / "out"
    for run in runs_of(file, output):
        finish(run, ACCURACIES[run.entry][run.seed - 3].tolist())
    return file, output


def test_numbers_are_numpys(call, finished):
    file, output = finished
    status, printed = call("study", file, "--output", output, "--jobs", 2, "--report-only")
    assert status == 0, printed
    values = json.loads((output / "report.json").read_text())
    for entry, accuracies in ACCURACIES.items():
        found = values["entries"][entry]
        for t in (1, 2, 4):
            column = accuracies[:, t - 1]
            expected = {"n": 3, "mean": column.mean(), "std": column.std(ddof=1)}
            assert found["by_timestep"][str(t)] == pytest.approx(expected)
        assert found["top1"] == found["by_timestep"]["4"]
        assert found["best_top1"] == {"n": 3, "mean": 99, "std": 0}
        assert found["loss"] == pytest.approx({"n": 3, "mean": 4.25, "std": 1})
        assert found["image_timesteps"] == 5 * 8 * 2 + 5 * 8 * 4
        assert found["seconds"] == pytest.approx(4 + 2)
    difference = values["differences"]["tet"]
    assert difference["control"] == "sdt"
    for t, result in difference["by_timestep"].items():
        pairs = [ACCURACIES[entry][:, int(t) - 1] for entry in ("tet", "sdt")]
        test = stats.ttest_rel(*pairs)
        low, high = test.confidence_interval(0.95)
        expected = {"n": 3, "mean": np.subtract(*pairs).mean(), "low": low, "high": high}
        assert result == pytest.approx(expected | {"p": test.pvalue})
    assert difference["top1"] == difference["by_timestep"]["4"]

    report = (output / "report.md").read_text()
    top1 = ACCURACIES["tet"][:, 3]
    assert f"| {top1.mean():.2f} ± {top1.std(ddof=1):.2f} | 99.00 ± 0.00 |" in report
    picture = Image.open(output / "report.png")
    assert min(picture.size) > 300
    # What differs between the entries, and how each was trained.
    assert "| `sdt` | sdt |" in report
    assert f"runs_dir={output}" in report
    assert "name=tet-seed3" in report
    assert f"`python tools/study.py {file}`" in report


def test_the_figure_tells_entries_and_epochs_apart(by_hand):
    # Pairs, two controls of several, a control of a control; more of them than there are colours.
    controls = {"b": "a", "d": "c", "f": "e", "g": "e", "i": "h", "j": "h", "l": "k", "m": "l"}
    controls |= {f"n{i}": "e" for i in range(8)}
    entries: dict[str, Any] = {name: {} for name in (*controls, *controls.values())}
    entries |= {name: {"control": control} for name, control in controls.items()}
    entries["b"]["init"], entries["d"]["init"] = "a", "b"
    phase = {"epochs": 1, "timesteps": 4, "optimizer": {"kind": "sgd", "lr": 0.05}}
    entries["f"] |= {"init": "a", "overrides": {"start_phase": 1, "phases": [phase, phase]}}
    numbers = by_hand({"entries": entries, "seeds": [3]})

    styles = figures.styles_of(numbers)
    colours = {name: style["color"] for name, style in styles.items()}
    pairs = {"a": "b", "c": "d", "l": "m"}
    assert {name: colours[name] == colours[other] for name, other in pairs.items()} == (
        dict.fromkeys(pairs, True)
    )
    assert len(set(colours.values())) == len(entries) - len(pairs)
    axis = figures.draw(numbers).axes[1]
    epochs = {str(line.get_color()): list(line.get_xdata()) for line in axis.get_lines()}
    # b and d go on where a, and a and b, have ended.
    assert epochs[colours["e"]] == [1, 2]
    assert epochs[colours["d"]] == [5, 6]
    # f begins with its second phase, whose epochs it counts from the first one's.
    assert epochs[colours["f"]] == [1, 2]
    assert [tick for tick in axis.get_xticks() if tick != round(tick)] == []


def test_what_sets_entries_apart_unnamed_is_listed(by_hand):
    like_lif = {"surrogate": "triangle", "surrogate_width": 1, "fires_at_threshold": False}
    neuron = like_lif | {"kind": "plif", "decay_input": False}
    entries: dict[str, Any] = {
        "base": {"overrides": {"model.neuron.kind": "lif"}},
        "plif": {"overrides": {"model.neuron.kind": "plif"}},
        "like": {"control": "base", "overrides": {"model.neuron": neuron}},
        "sdt": {"control": "plif", "overrides": {"model.neuron.kind": "plif", "loss.kind": "sdt"}},
        "section": {"control": "base", "overrides": {"loss": {"kind": "tet"}}},
    }
    numbers = by_hand({"entries": entries, "seeds": [3], "overrides": {"loss.lambda": 0.05}})
    heading = "Entries also differ in keys that they do not set, here with both values:"
    of_plif = (("surrogate=sigmoid", "triangle"), ("surrogate_width=4.0", "1.0"))
    of_plif += (("fires_at_threshold=true", "false"), ("decay_input=true", "none"))
    keys = ", ".join(f"`model.neuron.{key}` ({other})" for key, other in of_plif)
    listed = [
        f"* `plif` against `base`: {keys}",
        "* `section` against `base`: `loss.lambda=0.001` (0.05)",
    ]
    head, _, _ = differs_unnamed(numbers).partition("\n* `like` against")
    assert head.split("\n") == [heading, "", *listed]


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        # Against 90, 90 and 90; the interval is of 4.3 standard errors to either side.
        ([92.0, 93.0, 94.0], "3 | +3.00 [+0.52, +5.48] | 3.26 | 0.035 | **better**"),
        ([88.0, 87.0, 86.0], "3 | -3.00 [-5.48, -0.52] | 3.26 | 0.035 | **worse**"),
        ([91.0, 92.0, 93.0], "3 | +2.00 [-0.48, +4.48] | 3.26 | 0.074 | not significant"),
        ([91.0, 91.0, 91.0], "3 | +1.00 |  |  | no test (no spread)"),
        # But for rounding.
        ([90.3, math.nextafter(90.3, 91)], "2 | +0.30 |  |  | no test (no spread)"),
        ([88.0], "1 | -2.00 |  |  | no test (one seed)"),
    ],
)
def test_a_verdict_is_as_sure_as_the_interval(by_hand, top1, words):
    def accuracies(run: StudyRun) -> list[float]:
        return [0.0, 0.0, 0.0, top1[run.seed] if run.entry == "tet" else 90.0]

    numbers = by_hand({"seeds": list(range(len(top1))), "test_timesteps": [4]}, accuracies)
    assert f"| `tet` - `sdt` | {words} |\n" in comparisons(numbers)
    # An interval that cannot be told is not drawn as one of no width.
    (bar,) = figures.draw(numbers).axes[2].containers
    assert bar.has_xerr == ("[" in words)


def test_early_exit_is_compared_with_the_full_t_of_the_study():
    """The entry was trained with fewer timesteps."""
    chosen = {"threshold": 0.5, "top1": 55.0, "mean_timesteps": 1.5, "chosen_on": {"samples": 9}}
    result = SimpleNamespace(top1=50.0, by_timestep=[50.0, 60.0], chosen_exit=chosen)
    numbers: Any = SimpleNamespace(
        study=SimpleNamespace(exit_within=1.0, test_timesteps=(1, 2)),
        entries=["a"],
        of=lambda _: [result, result],
        difference=lambda *_: paired_difference([], []),
        spread=lambda _, value: spread([value(result), value(result)]),
        timesteps=lambda _: 1,
        at_equal_top1=lambda _: dict.fromkeys(EQUAL, paired_difference([], [])),
    )
    assert "| 1.50 ± 0.00 | 55.00 ± 0.00 | -5.00 ± 0.00 |" in early_exit(numbers)


def test_a_page_is_made_of_the_runs_and_anew_of_its_numbers(call, finished, tmp_path):
    file, output = finished
    pages, results = tmp_path / "results", tmp_path / "results.md"
    results.symlink_to("target.md")
    results.write_text(f"# Results\n\nBy hand.\n\n{summary.MARK}an old table\n")
    given = "tracking.uri=http://me:secret@host"
    arguments = (file, given, "--report-only", "--pages", pages, "--output")
    assert call("study", *arguments, output)[0] == 0
    written = {path.suffix: path.read_bytes() for path in pages.glob("study.*")}
    assert set(written) == {".md", ".json", ".png"}
    assert b"secret" not in written[".md"] + written[".json"] + results.read_bytes()
    assert b"![A tiny study](study.png)" in written[".md"]
    once = results.read_text()
    assert once.startswith(f"# Results\n\nBy hand.\n\n{summary.MARK}\n## TET against SDT\n")
    assert "an old table" not in once
    assert results.is_symlink()

    # Elsewhere, without the runs.
    elsewhere = tmp_path / "elsewhere"
    assert call("study", *arguments, elsewhere)[0] == 0
    assert {path.suffix: path.read_bytes() for path in pages.glob("study.*")} == written
    assert not elsewhere.exists()
    worded = file.read_text() + "answer: |\n  TET minus SDT is {tet -\n  sdt: 1}; {tet} %.\n"
    file.write_text(worded)
    assert call("study", *arguments, elsewhere)[0] == 0
    difference = paired_difference(*(list(ACCURACIES[name][:, 0]) for name in ("tet", "sdt")))
    answer = f"TET minus SDT is {difference}; {spread(list(ACCURACIES['tet'][:, 3]))} %."
    assert f"**Answer.** {answer}\n" in (pages / "study.md").read_text()
    assert f"| [A tiny study](results/study.md) | {answer} | 3 |\n" in results.read_text()
    (pages / "study.json").write_text("{}")
    status, printed = call("study", *arguments, elsewhere)
    assert (status, "no numbers of a study" in printed) == (2, True), printed


@pytest.mark.parametrize("blank", ["{tte}", "{tet - sdt: 9}", "{tet: exit_top1}", "{tet: top}"])
def test_an_answer_names_numbers_of_its_study(write, blank):
    with pytest.raises(UserError, match=re.escape(f"answer: {blank} is no number of this study")):
        plan.read(write({"answer": f"It is {blank}."}))


def test_a_folder_of_another_study_is_left_alone(call, finished, write):
    _, output = finished
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    changes = {"seeds": [3, 4, 5], "overrides": {"phases.0.timesteps": 4, "loss.phi": 2.0}}
    status, printed = call("study", write(changes), "--output", output)
    assert status == 2
    assert "sdt-seed3 holds a run of another configuration: loss.phi is 2.0 and was 1.0" in printed
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
