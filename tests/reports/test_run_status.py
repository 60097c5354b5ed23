"""A run's folder alone tells how the run is, without torch."""

import fcntl
import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tetdist.apps.cli import status as command
from tetdist.apps.reports.run_status import as_table, as_text, find_runs, read_status
from tetdist.apps.slurm import history
from tetdist.apps.slurm.status import read

CONFIG = {"phases": [{"epochs": 3}, {"epochs": 1}], "max_steps": None, "precision": "fp32"}
CONFIG |= {"model": {"name": "sew_resnet18"}, "data": {"kind": "images", "image_size": 64}}


def train_line(step):
    values = {"epoch": step / 5, "phase": 0, "loss": 1 / step, "top1": 50.0, "lr": 0.1}
    speed = {"samples_per_s": 16.0, "image_timesteps_per_s": 64.0, "data_wait": 3.0, "eta_s": 24.4}
    return {"kind": "train", "step": step, **values, **speed}


def val_line(step, top1, best):
    values = {"epoch": step / 5, "phase": 0, "loss": 1.0, "top1": top1, "best_top1": best}
    values |= {"samples": 50, "data_split": "train-held-out-0.1-seed-0"}
    return {"kind": "val", "step": step, **values}


def made(folder, lines, saved, **config):
    """The folder of a run of 20 steps, 5 an epoch, whose best checkpoint is the first."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    if lines:
        text = "".join(json.dumps({"time": time.time() - 60} | line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    for step, top1 in {} if saved is None else {5: 70.0, saved: 60.0}.items():
        path = folder / "checkpoints" / f"step-{step:08d}.1"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text('{"files": {"model.safetensors": {}}}')
        (path / "state.json").write_text('{"world_size": 2}')
        described = json.dumps({"validation": {"top1": top1, "top5": 99.0}})
        weights = {"weight": np.zeros(1)}
        save_file(weights, path / "model.safetensors", metadata={"tetdist": described})
    (folder / ".lock").touch()
    return folder


LINES = [
    train_line(5),
    val_line(5, 70.0, 70.0),
    train_line(10),
    val_line(10, 60.0, 70.0),
    train_line(12),
]
FINISHED = [*LINES, train_line(20), val_line(20, 65.0, 70.0), {"kind": "final", "step": 20}]


@pytest.mark.parametrize(
    ("lines", "saved", "state", "text"),
    [
        ([], None, "begun", ""),
        (LINES, 12, "stopped", "saved; the same command continues"),
        (LINES, 10, "broken off", "2 logged steps after the last checkpoint"),
        (FINISHED, 20, "finished", ""),
    ],
)
def test_the_state(lines, saved, state, text, tmp_path):
    status = read_status(made(tmp_path / "run", lines, saved))
    assert status.state == state
    assert status.text.startswith(text)
    assert status.eta_s is None  # Nothing trains.
    as_text(status)  # of whatever there is


@pytest.mark.parametrize(
    ("lines", "kind", "state", "text"),
    [
        ([], "submitted", "unknown", "Slurm does not know the job, and it did not start"),
        (LINES, "started", "unknown", "by the run's history, started 20"),
        (LINES, "stopped", "unknown", "by the run's history, stopped 20"),
        (LINES, "failed", "failed", "by the run's history, failed 20"),
        (LINES, "cancelled", "cancelled", "by the run's history, cancelled 20"),
        (FINISHED, "finished", "finished", "by the run's history, finished 20"),
    ],
)
def test_the_state_of_a_job_without_slurm(lines, kind, state, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tetdist.apps.slurm.jobs.is_here", lambda: False)
    run = made(tmp_path / "run", lines, 12 if lines else None)
    submission = history.Submission("7", str(run), "", "", "log", {}, 20, 0.0)
    history.note_submission(history.next_submission(run), submission)
    events = [("started", 0, ""), ("started", 5, "preempted"), (kind, 10, "out of memory")]
    for event, step, reason in events if kind != "submitted" else []:
        history.note(run, history.JobEvent(event, "7", step=step, text=reason))
    assert command.main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run}: {state}" + (" (job 7)" if state != "finished" else "") + "\n")
    assert f"\n  job         7 {'completed' if state == 'finished' else state}: {text}" in shown
    assert "\n  log         log/7_0_log.out\n" in shown
    assert ("from step 5: preempted\n" in shown) == (kind != "submitted")
    assert ("\n  failed      out of memory\n" in shown) == (kind == "failed")
    (told,) = read([run])
    table = as_table([told, told])
    assert table.splitlines()[0].endswith("  job")
    assert (f"\n{run} failed: out of memory" in table) == (kind == "failed")


def test_a_run_that_trains_says_how_far_it_is(tmp_path):
    run = made(tmp_path / "run", LINES, 10)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(run)
        assert status.state == "training"
        assert (status.step, status.last_step, status.epoch, status.epochs) == (12, 20, 2.4, 4)
        assert (status.best_top1, status.best_step) == (70.0, 5)
        assert status.eta_s == 24.4
        lines = as_text(status).splitlines()
    assert lines[0].startswith(f"{run}: training (for ")
    assert lines[1].startswith("  epoch 2.40/4  phase 0  step 12/20 logged, 10 saved  ETA 24 s  ")
    assert lines[2] == "  train       loss 0.083  top-1 50.0 %  lr 0.1  16 samples/s  data wait 3 %"
    evaluated = "top-1 60.00 %  loss 1.000, epoch 2; best 70.00 %, step 5 (50 held-out samples)"
    assert lines[3].endswith(evaluated)
    assert lines[4].startswith("  checkpoint  step-00000010.1, ")
    flag = "--images-per-s 8 (sew_resnet18, 64 pixels, fp32, 2 processes, T=4)"
    assert lines[5] == f"  for slurm   {flag}"


def test_the_speed_is_the_median_of_the_last_lines(tmp_path):
    """The first steps built kernels, and the steps had T = 2, then 4."""
    rates = ((1, 2), *(((98, 392), (100, 400), (102, 408)) * 33), (100, 400))
    lines = [
        train_line(step) | {"samples_per_s": rate, "image_timesteps_per_s": timesteps}
        for step, (rate, timesteps) in enumerate(rates, start=1)
    ]
    recordings = {"data": {"kind": "events", "image_size": 64}}
    speed = read_status(made(tmp_path / "run", lines, 101, **recordings)).speed
    assert speed == "--images-per-s 50 (sew_resnet18, recordings, fp32, 2 processes, T=4)"


def test_several_runs_are_a_table_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made(Path("runs/one"), LINES, 10)
    made(Path("runs/two"), FINISHED, 20)
    log = made(Path("runs/study/wild"), [], None).parent / "logs/wild.log"
    log.parent.mkdir()
    log.write_text("training\nerror: the loss is not finite\n")
    assert command.main([]) == 0
    head, one, wild, two, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:4] == ["run", "state", "epoch", "step"]
    assert wild[:2] == ["runs/study/wild", "failed"]
    assert one[:6] == ["runs/one", "broken", "off", "2.40/4", "12/20", "0.083"]
    assert one[-5:-3] == ["step", "10,"]
    assert "step" not in two
    assert two[:4] == ["runs/two", "finished", "4.00/4", "20/20"]
    assert "held-out" in two
    assert command.main(["two", "runs/two", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)  # once, however it is named
    assert (told["run"], told["state"], told["val"]["top1"]) == ("two", "finished", 65.0)
    Path("runs/one/traceback.txt").touch()  # of an error in a user's file
    assert command.main(["study", "one"]) == 0
    failed = f"\nruns/study/wild failed: see {log.resolve()}\nruns/one failed: see runs/one/trace"
    assert failed in capsys.readouterr().out
    assert command.main(["study"]) == 0
    assert f"runs/study/wild: failed (see {log.resolve()})\n" in capsys.readouterr().out
    log.write_text("error: of an earlier start\ntraining\n")
    assert command.main(["study"]) == 0
    assert "runs/study/wild: begun\n" in capsys.readouterr().out
    made(Path("runs/study/more/deep"), [], None)  # below a study, such as a data set
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, what: listed.append(path) or glob(path, what))
    assert find_runs(["runs"]) == [Path("runs", name) for name in ("one", "study/wild", "two")]
    assert listed == [Path("runs"), Path("runs/study")]
    assert command.main(["three"]) == 2
    assert "there is no run three; give a run folder" in capsys.readouterr().err
    assert command.main(["study/logs"]) == 2
    assert "no run has begun in study/logs; give" in capsys.readouterr().err
    for mistaken, meant in (("tow", "two"), ("runs/tow", "two"), ("wild", "study/wild")):
        assert command.main([mistaken]) == 2
        hint = f"there is no run {mistaken}; did you mean runs/{meant}?"
        assert hint in capsys.readouterr().err


def test_no_run_is_none_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    assert capsys.readouterr().out == "there are no runs yet in runs/\n"
    assert command.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("config.yaml", "phases: [{epochs: 1}]\nmax_steps: abc", "not the configuration of a run"),
        ("metrics.jsonl", "\udcff", "line 1 is damaged"),
    ],
)
def test_one_damaged_run_leaves_the_table(name, text, expected, tmp_path, capsys):
    runs = [made(tmp_path / run, LINES, 12) for run in ("a", "b")]
    (runs[0] / name).write_text(text + "\n", errors="surrogateescape")
    assert command.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    rows = [line.split()[:2] for line in out.splitlines()[1:]]
    assert rows == [[str(runs[0]), "damaged"], [str(runs[1]), "stopped"]]
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert command.main([str(tmp_path), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in told] == ["damaged", "stopped"]
    # Of one run there is nothing to show.
    assert command.main([str(runs[0])]) == 2
    assert capsys.readouterr() == ("", err)
