"""TensorBoard and Weights & Biases end up with each point of metrics.jsonl once, without a network,
whatever happens between; and both go on beside each other."""

import json
import math
import os

import pytest
import tiny
from tiny import refused

from tetdist.errors import UserError, pip_install
from tetdist.tracking import trackers
from tetdist.tracking.metrics_file import points_of, read_metrics
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TRACKERS, TrackedRun


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(trackers, "SEND_EVERY", 0.02)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # The tests ignore the user's own settings of W&B.
    monkeypatch.setenv("WANDB_CONFIG_DIR", "/nonexistent")


def opened(folder, names, resume_step=None):
    folder.mkdir(exist_ok=True)
    params = {"model.name": "sew_resnet18", "tracking.experiment": "trials"}
    run = TrackedRun(folder, "a run", params, {"loss": "tet"}, resume_step)
    return Tracker(run, None, names)


def train(tracker, first, last):
    """Log steps as a run of epochs of four steps does."""
    for step in range(first, last + 1):
        tracker.log("train", step, {"loss": 1 / step, "lr": 0.1})
        if step % 4 == 0:
            values = {"top1": float(step), "per_timestep_top1": [1.0, math.nan]}
            tracker.log("val", step, values | {"firing_rate": {"stem.sn": 0.5}, "split": "a"})


def in_file(folder):
    """What metrics.jsonl has, rounded as TensorBoard keeps it; NaN as None, which equals itself."""
    lines = read_metrics(folder / "metrics.jsonl")
    return points((name, line["step"], value) for line in lines for name, value in points_of(line))


def points(values):
    return sorted(
        (name, step, -1.0 if math.isnan(value) else round(value, 6)) for name, step, value in values
    )


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return points(
        (name, event.step, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    )


def in_wandb(folder):
    """What `wandb sync` would send of the latest run."""
    found = []
    for record in wandb_records(folder):
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        kind = {name.partition("/")[0] for name in row if not name.startswith("_")}
        if not kind:
            continue
        (kind_of_line,) = kind
        step = row.pop(f"{kind_of_line}/step")
        found += [(n, step, float(v)) for n, v in row.items() if not n.startswith("_")]
    return points(found)


def wandb_records(folder):
    """Records of the file of the latest offline run: LevelDB's log, in blocks of 32 KiB, behind a
    header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (folder / "wandb" / "latest-run").glob("*.wandb")
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole = (whole if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)


READ = {"tensorboard": in_tensorboard, "wandb": in_wandb}


def test_both_have_each_point_once_across_stops_and_steps_computed_again(tmp_path):
    run, names = tmp_path / "run", list(READ)
    tracker = opened(run, names)
    train(tracker, 1, 6)
    tracker.close("KILLED")
    # Its last checkpoint is of step 4; it is computed further this time.
    tracker = opened(run, names, resume_step=4)
    train(tracker, 5, 9)
    tracker.close("RUNNING")
    expected = in_file(run)
    assert len(expected) == 9 * 2 + 2 * 4
    for name, read in READ.items():
        assert read(run) == expected, name
    # Neither leaves a mark of where it was, nor files of earlier starts.
    assert not (run / "trackers").exists()
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1


def test_online_only_what_wandb_lacks_is_sent(tmp_path, monkeypatch):
    """A stand-in for the server, which keeps a summary: there is no network in a test."""
    import wandb

    rows = []

    class Run:
        url, offline = "https://there", False
        summary: dict[str, float] = {}  # noqa: RUF012  # the server's, for all starts

        def define_metric(self, *_, **__):
            pass

        def log(self, row):
            rows.append(row)
            self.summary.update(row)

        def finish(self, **_):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    run = tmp_path / "run"
    tracker = opened(run, ["wandb"])
    train(tracker, 1, 6)
    tracker.close("KILLED")
    tracker = opened(run, ["wandb"], resume_step=4)
    train(tracker, 5, 9)
    tracker.close("FINISHED")
    steps = {kind: [r[kind] for r in rows if kind in r] for kind in ("train/step", "val/step")}
    assert steps == {"train/step": list(range(1, 10)), "val/step": [4, 8]}


def test_after_errors_it_is_made_anew_and_given_everything(tmp_path, monkeypatch, caplog):
    from tetdist.tracking.tensorboard_logger import TensorBoard

    make, write, made, calls = TensorBoard.__init__, TensorBoard.log, [], []

    def fails_for_a_day(self, run):
        made.append(run)
        if len(made) <= 1500:
            raise OSError("down")
        make(self, run)

    def fails_twice(self, lines):
        write(self, lines)
        calls.append(len(lines))
        if len(calls) <= 2:
            raise OSError("no space left")

    monkeypatch.setattr(trackers, "SEND_EVERY", 0.0)
    monkeypatch.setattr(TensorBoard, "__init__", fails_for_a_day)
    monkeypatch.setattr(TensorBoard, "log", fails_twice)
    run = tmp_path / "run"
    tracker = opened(run, ["tensorboard"])
    train(tracker, 1, 3)
    tiny.wait_until(lambda: len(calls) > 2, 30)
    tracker.close("FINISHED")
    assert in_tensorboard(run) == in_file(run)
    assert "tracker tensorboard failed: OSError: down. Training continues" in caplog.text


@pytest.mark.parametrize("name", list(READ))
def test_a_missing_package_is_reported_before_the_run_begins(
    name, main, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    refused(main(tiny_config(), f"tracking.trackers=[{name}er]"), f"did you mean {name}?")
    text = refused(main(tiny_config(), f"tracking.trackers=[{name}]", "name=without"))
    message = f"the package {name} is not installed; {pip_install(name)}, or leave {name} out"
    assert message in text
    assert not (tmp_path / "runs" / "without").exists()


def test_wandb_without_an_account_is_reported_instead_of_asked(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", "/nonexistent")
    wandb.teardown()  # it has read the variables before
    try:
        with pytest.raises(UserError, match=r"wandb is not logged in.*WANDB_MODE=offline"):
            TRACKERS["wandb"].check()
    finally:
        wandb.teardown()
