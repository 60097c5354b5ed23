"""tools/study.py: runs trained, continued, skipped and failed, here and as jobs."""

import json
import os
import re
import runpy
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import farm
import pytest
import tiny
import yaml

from tetdist.apps.cli.study import find
from tetdist.apps.slurm.command import parse_arguments
from tetdist.apps.slurm.jobs import State
from tetdist.apps.studies import local, plan, slurm
from tetdist.config.sections.model import ModelSection
from tetdist.errors import UserError
from tetdist.tracking import environment

STUDY = tiny.PROJECT / "tools" / "study.py"


def runs_of(file, output):
    return plan.runs_of(plan.read(file), output, [])


def test_the_example_of_the_page_is_a_study_and_its_table_has_every_key(tmp_path):
    text = (tiny.PROJECT / "docs/studies.md").read_text()
    file = tmp_path / "study.yaml"
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    runs = runs_of(file, tmp_path)
    assert runs[0].study.test_timesteps == (1, 2, 3, 4)  # by default up to quickstart's T
    losses = [(run.entry, run.config.loss.kind) for run in runs]
    assert losses == 3 * [("sdt", "sdt"), ("tet", "tet")]
    keys = (
        plan.StudySection.model_fields.keys() - {"entries"} | plan.EntrySection.model_fields.keys()
    )
    table = text.partition("| key | value |")[2].partition("\n\n")[0]
    assert [key for key in keys if f"`{key}`" not in table and f".{key}`" not in table] == []


def test_a_study_is_trained_and_continued(output_of, write, main, tmp_path, here, monkeypatch):
    file, output = write(), tmp_path / "out"
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,9")
    # Of the control, one run has been trained by hand, one stopped at step 3; another has no place.
    for seed, more in ((0, ()), (1, ("max_steps=3",))):
        begun = [f"runs_dir={output}", f"name=sdt-seed{seed}", f"seed={seed}", "loss.kind=sdt"]
        assert main(tmp_path / "tiny.yaml", *begun, *more).status == 0
    (output / "tet-seed1").touch()
    printed = output_of("study", file, "--output", output, "--jobs", 2, status=1)
    assert here.gpus == ["7", "3", "7"]
    failure = r"\] tet-seed1: exit status 2: error: cannot write to .*tet-seed1\.log\); "
    assert re.search(failure, printed), printed
    assert printed.endswith(f"failed: tet-seed1; the logs are in {output / 'logs'}\n")
    assert f"1 of 4 runs are already done; logs are in {output / 'logs'}, and `" in printed
    assert re.search(r"\[2/4\] .*; .* so far, about .* left\n", printed), printed
    assert re.search(r"\[\d/4\] sdt-seed1: top-1 \d+\.\d\d %", printed), printed
    log = (output / "logs" / "sdt-seed1.log").read_text()
    assert re.findall(r"continuing \S+ from step (\d+)", log) == ["3"]
    # What is finished is reported, and what is not is named.
    assert re.search(r"^ +T +n +top-1, % +minus .*\n  sdt +2 +2 ", printed, re.MULTILINE), printed
    assert f"the report is {output / 'report.md'}" in printed
    report = (output / "report.md").read_text()
    assert "**Incomplete**: 1 of 4 runs is missing (tet-seed1 failed)" in report
    before = {path: path.read_bytes() for path in output.glob("*/metrics.jsonl")}
    assert len(before) == 3

    # With room, the same command trains what is missing, and that alone.
    (output / "tet-seed1").unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    printed = output_of("study", file, "--output", output, "--jobs", 2)
    assert here.gpus[3:] == ["0"]
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
    printed = output_of("study", file, "--output", output, status=1)
    lacks = f"] tet-seed1: {metrics} lacks evaluations; remove {metrics.parent} to retrain"
    assert lacks in printed


def test_thresholds_averages_and_own_losses_are_evaluated_and_compared(
    output_of, write, here, tmp_path
):
    output, own = tmp_path / "out", tmp_path / "my_loss.py"
    own.write_text(
        "from tetdist.losses import register_loss, tet_loss\n"
        "@register_loss('own')\n"
        "def own(logits, target):\n"
        "    return tet_loss(logits, target, lambda_=0.0) + 100\n"
    )
    changes = {
        "entries.averaged": {"control": "tet", "average": True, "overrides": {"ema.decay": 0.5}},
        "entries.fewer": {"overrides": {"phases.0.timesteps": 1, "loss.kind": "own"}},
        "overrides": {"data.held_out": 0.25, "phases.0.optimizer.lr": 0.5},
    }
    file = write(changes | {"exit_within": 20.0, "seeds": [0]})
    assert "there is no loss 'own'" in output_of("study", file, "--output", output, status=2)
    output_of("study", file, "--output", output, "--import", own)
    assert [words[-2:] for words in here.started] == [["--import", str(own)]] * 8
    values = json.loads((output / "report.json").read_text())
    runs = {run["entry"]: run for run in values["runs"]}
    for entry, run in runs.items():
        found = json.loads((output / run["name"] / "test_timesteps.json").read_text())
        # It is the accuracy at the T of training; early exit is with up to the last of the study's.
        trained = 1 if entry == "fewer" else 2
        of_t = [found[f"per_timestep_{key}"][trained - 1] for key in ("top1", "loss")]
        assert [run["top1"], run["loss"]] == of_t
        # The validation split is what is reported, not what the run held out.
        assert run["samples"] == sum(tiny.VAL_SIZES)
        assert run["chosen_exit"] == found["chosen_exit"]
        points = [[p["threshold"], p["top1"], p["mean_timesteps"]] for p in found["early_exit"]]
        assert run["early_exit"] == points
        assert "--exit-within 20" in run["commands"][1]
        is_averaged = entry == "averaged"
        assert ("averaged" in found) == ("--ema" in run["commands"][1]) == is_averaged
        metrics = tiny.metrics(output / run["name"], "val_ema" if is_averaged else "val")
        assert run["curve"] == [[p["epoch"], p["loss"], p["top1"]] for p in metrics]
    # It is the same training, of which other weights are evaluated.
    assert runs["averaged"]["loss"] != runs["tet"]["loss"]
    spent = {entry: run["chosen_exit"]["mean_timesteps"] for entry, run in runs.items()}
    difference = values["differences"]["tet"]["exit_timesteps"]
    assert difference["mean"] == pytest.approx(spent["tet"] - spent["sdt"])
    report = (output / "report.md").read_text()
    assert "loses at most 20 points on the 12 training samples that a run holds out" in report
    assert re.search(rf"\| `fewer` \|.* \| {spent['fewer']:.2f} \|\n", report), report
    assert f"--import {own}`" in report


@pytest.mark.usefixtures("here")
def test_one_begins_with_another(output_of, write, tmp_path):
    longer = {"phases.0.timesteps": 3, "phases.0.optimizer.lr": 0.01}
    phases = [{"epochs": 1, "timesteps": t, "optimizer": {"lr": 0.01}} for t in (2, 3)]
    entries = {
        "short": {},
        "longer": {"init": "short", "overrides": longer},
        "taught": {"init": "short", "teacher": "longer"},
        "second": {"init": "short", "overrides": {"phases": phases, "start_phase": 1}},
        "not_chosen": {"overrides": {"max_steps": 3}},
    }
    file = write({"entries": entries, "seeds": [0], "test_timesteps": [1, 3]})
    output = tmp_path / "o"
    printed = output_of("study", file, "--output", output, "--dry-run")
    assert not output.exists()
    dry = {f"{name}-seed0: 1 epoch" for name in entries if name != "not_chosen"}
    dry |= {"not_chosen-seed0: 1 epoch, at most 3 steps", "5 of 5 runs to train"}
    assert set(printed.splitlines()) == dry
    # Asked for some, it trains the others first; those are evaluated beyond their T, too.
    only = ("--only", "taught", "--only", "second")
    output_of("study", file, "--output", output, *only)
    log = (output / "logs" / "longer-seed0.log").read_text()
    assert f"beginning with the weights of {output / 'short-seed0'} (step 5, T=2)" in log
    values = json.loads((output / "report.json").read_text())
    runs = {run["entry"]: run for run in values["runs"]}
    own = {name: run["image_timesteps"] for name, run in runs.items()}
    assert own == {"short": 80, "longer": 120, "taught": 80, "second": 120}
    # What two of a run's needs begin with is paid for once.
    cost = {name: entry["image_timesteps"] for name, entry in values["entries"].items()}
    assert cost == {"short": 80, "longer": 80 + 120, "taught": 80 + 120 + 80, "second": 80 + 120}
    report = (output / "report.md").read_text()
    assert "| init | short | short |  | short |\n| teacher |  |  |  | longer |\n" in report
    # Of the phase that the others lack those keys that are set.
    shown = [f"phases.1.{key}" for key in ("epochs", "timesteps", "optimizer.lr")]
    assert re.findall(r"`(phases\.1\.[\w.]+)`", report) == shown
    teacher = f"loss.distillation.teacher={output / 'longer-seed0'}"
    assert teacher in runs["taught"]["commands"][0]
    # Of the steps that a later phase begins after, none counts among its own.
    metrics = (output / "second-seed0" / "metrics.jsonl").read_text().splitlines()
    trained = [line for line in map(json.loads, metrics) if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [6, 7, 8, 9, 10]
    seconds = sum(8 / line["samples_per_s"] for line in trained)
    assert runs["second"]["seconds"] == pytest.approx(seconds)
    (val,) = tiny.metrics(output / "short-seed0", "val")
    assert runs["short"]["by_timestep"][:2] == pytest.approx(val["per_timestep_top1"])
    assert [len(runs[one]["by_timestep"]) for one in ("short", "longer")] == [3, 3]
    assert [len(runs[one]["commands"]) for one in ("short", "longer")] == [2, 1]
    assert "tools/eval.py" in runs["short"]["commands"][1]
    assert f"\n{runs['short']['commands'][1]}\n" in report


def test_the_search_of_the_page_prunes_and_continues(tiny_config, tmp_path, monkeypatch, capsys):
    import optuna

    page = (tiny.PROJECT / "docs" / "studies.md").read_text()
    script = page.split("```python\n# search.py\n")[1].split("```")[0]
    assert "left = 9 - " in script
    for name, function in farm.environment().items():
        monkeypatch.setattr(environment, name, function)
    file = tiny_config({"phases.0.epochs": 4})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["search.py", str(file), "batch.micro=4"])
    sampler = optuna.samplers.RandomSampler(seed=0)
    monkeypatch.setattr(optuna, "create_study", partial(optuna.create_study, sampler=sampler))
    for number in (2, 4, 4):
        (tmp_path / "search.py").write_text(script.replace("left = 9", f"left = {number}"))
        study = runpy.run_path("search.py", run_name="__main__")["study"]
        assert [trial.number for trial in study.trials] == list(range(number))
    for trial in study.trials:
        (run,) = tmp_path.glob(f"runs/search/*tiny.yaml_batch.micro=4/trial-{trial.number}")
        lines = tiny.metrics(run, "val")
        assert {line["data_split"] for line in lines} == {"train-held-out-0.1-seed-0"}
        assert trial.value == lines[-1]["top1"]
        assert trial.intermediate_values == {line["step"]: line["top1"] for line in lines}
        # Of 4 epochs; a pruned run has saved where it stopped.
        assert (len(lines) == 4) == (trial.state.name == "COMPLETE"), trial
        ends = (lines[-1]["step"], lines[-1]["step"] + 1)
        assert tiny.newest(run).name in [f"step-{end:08d}" for end in ends]
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED"}
    best = f"phases.0.optimizer.lr={study.best_params['phases.0.optimizer.lr']}"
    assert f"top-1 {study.best_value:.2f} % with {best}\n" in capsys.readouterr().out


# --- however a study ends, its runs end with it ---------------------------------------------------

ENDLESS = {"seeds": [0], "entries": {"long": {}}, "overrides": {"phases.0.epochs": 100_000}}


def test_a_run_of_a_killed_study_saves_and_ends(call, write, tmp_path):
    file, output = write(ENDLESS), tmp_path / "out"
    run, log = output / "long-seed0", output / "logs" / "long-seed0.log"
    mark, env = tiny.marked(tiny.clean_environment(PYTHONPATH=str(tiny.PROJECT)))
    command = tiny.python(STUDY, file, "--output", output)
    with tiny.started(command, tmp_path, env) as process:
        metrics = run / "metrics.jsonl"
        tiny.wait_until(lambda: metrics.exists() and metrics.stat().st_size, 90)
        (child,) = set(tiny.alive(mark)) - {process.pid}
        os.kill(child, signal.SIGSTOP)
        process.kill()
        process.communicate()
        # Meanwhile the same command leaves it alone, also if it has looked before.
        try:
            status, printed = call("study", file, "--output", output)
            at_work = f"another process is using {run}; wait for it"
            assert (status, f"error: {at_work}" in printed) == (2, True), printed
            failed = local.work(runs_of(file, output), 1)
            assert at_work in failed["long-seed0"]
        finally:
            os.kill(child, signal.SIGCONT)
        tiny.wait_until(lambda: not tiny.alive(mark), 60)
    assert "stopped at step" in log.read_text()
    assert list((run / "checkpoints").glob("step-*"))


SAVING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit()))
pathlib.Path("ready").touch()
time.sleep(300)
"""


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_being_started_ends_with_the_study(number, write, tmp_path, monkeypatch):
    """The signal comes before the new process is known by its number. Each run may save."""
    monkeypatch.chdir(tmp_path)
    mark, env = tiny.marked({})
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            tiny.wait_until(Path("ready").exists, 30)
            signal.raise_signal(number)

    monkeypatch.setattr(local.subprocess, "Popen", Popen)
    monkeypatch.setattr(plan.Command, "words", property(lambda _: tiny.python("-c", SAVING)))
    runs = runs_of(write(ENDLESS), tmp_path / "out")
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        local.work(runs, 1)
    assert tiny.alive(mark) == []
    assert Path("saved").exists()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_study_and_its_runs_at_once(farm, tmp_path, monkeypatch):
    mark, env = tiny.marked({})
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code = f"""
import os, signal, subprocess, sys, threading, types
from tetdist.apps.studies import local
run = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
run += "; print(flush=True); time.sleep(300)"
options = dict(start_new_session=True, stdout=subprocess.PIPE)
process = subprocess.Popen([{sys.executable!r}, "-c", run], **options)
process.stdout.readline()
child = types.SimpleNamespace(process=process)
with local.StopRequest(local.ALONE) as stop, local.ended_at_exit({{"run": child}}, stop):
    for seconds in (0, 1):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
"""
    ((status, text),) = farm.side_by_side(1, tiny.python("-c", code), tmp_path)
    assert (status, text) == (130, "interrupted; earlier checkpoints are kept\n")
    tiny.wait_until(lambda: not tiny.alive(mark), 10)


def test_mlflow_has_the_runs_that_the_study_prints(output_of, write, tmp_path):
    database, output = tmp_path / "mlflow.db", tmp_path / "out"
    overrides = {"tracking.mlflow": True, "tracking.uri": f"sqlite:///{database}"}
    file = write({"seeds": [0], "overrides": overrides, "entries.tet": ...})
    printed = output_of("study", file, "--output", output)
    experiment = (output / "sdt-seed0" / "mlflow_run_id").read_text().split()[1]
    shown = rf"MLflow: .* sqlite:///{database}\n +then open http\S*/{experiment}/runs\?compareRuns"
    assert re.search(shown, printed)
    with sqlite3.connect(database) as store:
        found = store.execute("select name, status from runs").fetchall()
    assert found == [("sdt-seed0", "FINISHED")]


# --- on a cluster, of which tests/slurm/test_studies.py has one -----------------------------------


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """Neither its programs nor the facts of this machine's real cluster."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("TETDIST_CLUSTER", raising=False)


@pytest.mark.usefixtures("no_slurm")
def test_dry_run_shows_each_job_after_those_it_needs(output_of, write, tmp_path, monkeypatch):
    both = {"entries.both": {"init": "sdt", "teacher": "tet"}, "entries.done": {}}
    file = write(both | {"seeds": [0]})
    monkeypatch.setattr(slurm, "is_trained", lambda run: run.entry == "done")
    dry = ("--slurm", "--dry-run", "--gpus-per-node", "0")
    output = output_of("study", file, "--output", tmp_path / "new", *dry)
    jobs, _, after = output.partition("3 runs to submit: time unknown. ")
    assert {
        "done-seed0: finished",
        "sdt-seed0: time unknown",
        "both-seed0: time unknown, starts after sdt-seed0, tet-seed0",
    } < set(jobs.splitlines())
    assert f"cd {tmp_path / 'new' / 'slurm' / 'submission-N' / 'code'}\n" in after
    assert "#SBATCH --dependency=afterok:JOB_OF_sdt-seed0:JOB_OF_tet-seed0\n" in after
    assert after.count("# --- batch script") == 1
    # Otherwise it would wait for ever if one of them fails.
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in after
    assert not (tmp_path / "new").exists()
    # A run trains on 40 images, and evaluates 23 at three times the speed.
    times = {"0.01": ("1 h 19 min", "3 h 58 min"), "0.1": ("7 min 57 s", "23 min 50 s")}
    for speed, (own, total) in times.items():
        output = output_of("study", file, "--output", tmp_path, *dry, "--images-per-s", speed)
        assert f"both-seed0: {own}, starts" in output
        assert f"submit: {total}, at the given samples/s whatever the T of a run. The" in output


def test_what_is_submitted_by_how_the_runs_are(write, tmp_path, monkeypatch, capsys):
    """What is neither finished nor queued, and what waits in the queue for such a run."""
    needs = {"of_done": "done", "of_bad": "bad", "of_of_bad": "of_bad", "of_waits": "waits"}
    needs |= {"began": "bad"}
    alone = ("done", "bad", "waits", "ends")
    entries = {name: {} for name in alone} | {name: {"init": of} for name, of in needs.items()}
    runs = runs_of(write({"entries": entries, "seeds": [0]}), tmp_path / "out")
    # Slurm has not removed of_bad yet; one has its last step, and has not ended.
    names = dict.fromkeys(("waits", "of_bad"), "PENDING") | dict.fromkeys(
        ("ends", "began"), "RUNNING"
    )
    queued = {r: (r.entry, State(names[r.entry], "", True)) for r in runs if r.entry in names}
    cancelled, sent = [], []
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "is_trained", lambda run: run.entry in ("done", "ends"))
    monkeypatch.setattr(slurm, "queued_runs", lambda _: queued)
    monkeypatch.setattr(slurm, "cancel", cancelled.append)
    monkeypatch.setattr(slurm, "send_all", lambda left, _: sent.extend(r.entry for r in left))
    options = parse_arguments(["--config", "none", "--gpus-per-node", "0"])
    assert slurm.submit(runs, tmp_path / "out", options) == 0
    assert set(sent) == {"bad", "of_done", "of_bad", "of_of_bad", "of_waits"}
    assert sent.index("bad") < sent.index("of_bad") < sent.index("of_of_bad")
    assert cancelled == ["of_bad"]
    shown = dict(re.findall(r"^(\w+)-seed0: (\w+)", capsys.readouterr().out, re.MULTILINE))
    running = dict.fromkeys(("began", "ends"), "RUNNING")
    assert shown == {"done": "finished", "waits": "PENDING", **running}


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


def test_an_imported_network_is_evaluated_at_each_t_apart(write, tmp_path, monkeypatch):
    """It may look ahead, which only its training shows; others show all T in one evaluation."""
    run = runs_of(write(), tmp_path / "out")[0]
    assert "--timesteps 2 " in str(run.eval_command)
    assert not run.is_evaluated_again
    monkeypatch.setattr(ModelSection, "is_own", True)
    assert "--timesteps 1,2 " in str(run.eval_command)
    assert run.is_evaluated_again


# --- mistakes -------------------------------------------------------------------------------------

HELD_OUT = {"data.held_out": 0.2}
OWN_WEIGHTS = {"init": "sdt", "overrides": {"init_checkpoint": "there"}}
TIMM = {"loss": {"distillation": {"teacher": "timm:resnet18"}}}
OWN_TEACHER = {"teacher": "sdt", "overrides": TIMM}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": "studies/init_cifar10.yaml"}, ("init_cifar10.yaml is a study; run it with `",)),
        ({"phases": [], "model": {}}, ("study.yaml is a configuration, not a study; train it",)),
        ({"sedes": [0]}, ("sedes: unknown key", "'seeds'")),
        ({"title": ...}, ("title is missing",)),
        ({"seeds": [1, 1]}, ("seeds: [1, 1] has a duplicate",)),
        ({"test_timesteps": [4, 2, 2]}, ("test_timesteps", "must ascend")),
        (
            {"entries.tet.controll": "sdt"},
            ("entries.tet.controll: unknown", "'entries.tet.control'"),
        ),
        ({"entries.te t": {}}, ("entries: rename 'te t'; use letters",)),
        ({"entries.tet": {"loss.kind": "sdt"}}, ('; write it in overrides: {loss.kind: "sdt"}',)),
        ({"overrides": ["max_steps=3"]}, ("must hold keys and values, such as {key: value}",)),
        ({"seeds": 3}, ("seeds must be a list, in brackets, not 3",)),
        ({"entries.tet.control": "std"}, ("entries.tet.control", "'std'", "sdt")),
        ({"entries.tet.init": "tet"}, ("entries.tet.init", "'tet'")),
        ({"entries.tet.init": "sdt", "entries.sdt.init": "tet"}, ("circle",)),
        ({"entries.tet.init": "sdt", "entries.sdt.teacher": "tet"}, ("circle",)),
        ({"entries.tet.teacher": "std"}, ("entries.tet.teacher", "'std'", "sdt")),
        ({"entries.tet.overrides": {"loss.kid": "tet"}}, ("entries.tet", "loss.kid=tet: unknown")),
        ({"entries.tet.overrides": {"seed": 3}}, ("entries.tet", "itself sets seed", "seeds")),
        ({"overrides": {"runs_dir": "here"}}, ("itself sets runs_dir", "--output")),
        ({"entries.tet": OWN_WEIGHTS}, ("sets init_checkpoint", "init provides it (sdt)")),
        ({"entries.tet": OWN_TEACHER}, ("distillation.teacher", "teacher provides it (sdt)")),
        ({"overrides": {"data.root": "nowhere"}}, ("study.yaml: entries.sdt: data.root: ",)),
        ({"entries.tet.overrides": {"model.num_classes": 3}}, ("entries.tet: ", "4 classes")),
        ({"test_timesteps": [1], "overrides": HELD_OUT}, ("entries.sdt", "with T=2", "add 2")),
        ({"exit_within": 1.0}, ("exit_within", "entries.sdt", "data.held_out: 0.1")),
        ({"entries.tet.average": True}, ("entries.tet.average", "set ema.decay")),
    ],
)
def test_mistakes_in_a_study_are_named(output_of, write, tmp_path, changes, words):
    output = output_of("study", write(changes), "--output", tmp_path / "out", status=2)
    assert output.count("\n") == 1
    assert [word for word in words if word not in output] == [], output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--only", "tte"), ("did you mean tet?",)),
        (("--jobs", 0), ("--jobs",)),
        (("--report-only",), ("none of 4 runs is finished",)),
        (("--dry-run", "--slurm"), ("must follow --slurm",)),
        (("seed",), ("'seed' is not of the form key=value",)),
        (("--output", __file__), ("test_study.py/logs cannot be written (Not a directory)",)),
        (("--time", "3", "--slurm"), ("--time", "; write flags of launch/slurm.py after --slurm")),
        (("data.root=nowhere", "--dry-run"), ("4 of 4 runs to train\n", "error: ", "nowhere")),
        (("loss.kind=sdt", "--report-only"), ("warning: entries.tet trains the same as sdt",)),
        (("--slurm",), ("there is no Slurm here", "leave out --slurm", "--dry-run")),
        (("--slurm", "--jobs", "2"), ("write --jobs, a flag of the study, before --slurm",)),
        (("--slurm", "--after", "x"), ("--after applies to single runs",)),
        (("--slurm", "seed=3"), ("write seed=3 before it",)),
    ],
)
def test_mistakes_on_the_command_line_are_named(output_of, write, tmp_path, flags, words):
    output = output_of("study", write(), "--output", tmp_path / "out", *flags, status=2)
    assert [word for word in words if word not in output] == [], output
    assert not (tmp_path / "out").exists()


def test_the_studies_of_the_project_resolve(tmp_path):
    for name, hint in (("none", "give.*configs/studies"), ("tet_vs_sdt_digit", "did you mean")):
        with pytest.raises(UserError, match=rf"there is no study '{name}'; {hint}"):
            find(name)
    with pytest.raises(UserError, match="is a configuration, not a study"):
        plan.read(find("quickstart.yaml"))
    studies = find("tet_vs_sdt_digits").parent
    for file in sorted(studies.glob("*.yaml")):
        study = plan.read(file)
        one_seed = study.model_copy(update={"seeds": study.seeds[:1]})
        assert len(plan.runs_of(one_seed, tmp_path / "out", [])) == len(study.entries)


def test_a_folder_of_another_study_is_left_alone(output_of, write, tmp_path):
    folder = tmp_path / "out" / "sdt-seed0"
    folder.mkdir(parents=True)
    config = runs_of(write({"overrides": {"loss.phi": 2.0}}), tmp_path / "out")[0].config
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    printed = output_of("study", write(), "--output", tmp_path / "out", status=2)
    assert "sdt-seed0 holds a run of another configuration: loss.phi is 1.0 and was 2.0" in printed
    assert "Set it back in the study's file or by key=value, give another --output" in printed
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
