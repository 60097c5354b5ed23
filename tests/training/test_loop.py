"""State that the training loop keeps or resets between phases, and the best checkpoints."""

import dataclasses
import json
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import expect

from tetdist import order
from tetdist.apps.reports import observers
from tetdist.distributed.watchdog import CONTINUES
from tetdist.distributed.world import join
from tetdist.nn.fast import native_zeros
from tetdist.storage import checkpoint, selection
from tetdist.tracking.tracker import Tracker
from tetdist.training import evaluating, window
from tetdist.training import step as step_module
from tetdist.training.engines.base import Update
from tetdist.training.observers import Observer
from tetdist.training.trainer import Trainer


def test_first_of_equal_results_stays_the_best(main, tiny_config, tmp_path, monkeypatch):
    """Which checkpoint is published does not depend on how long the run went on at its best."""
    real = evaluating.evaluate
    answers = iter([40.0, 60.0, 60.0, 50.0])

    def evaluate(*arguments, **options):
        result = real(*arguments, **options)
        return type(result)(**vars(result) | {"top1": next(answers)})

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    expect(main(tiny_config({"phases.0.epochs": 4, "log_every": 5})))
    run = tmp_path / "runs/tiny"
    assert [line["best_top1"] for line in tiny.metrics(run, "val")] == [40, 60, 60, 60]
    assert selection.best(run / "checkpoints").name == "step-00000010"
    state = json.loads((tiny.newest(run) / "state.json").read_text())
    assert state["result"] == {"best_top1": 60.0, "best_step": 10, "top1": 50.0}


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_run_that_goes_on_with_other_convolutions_says_so(
    main, tiny_config, monkeypatch, before, after
):
    file, logs = tiny_config({"execution": "fused", "precision": "fp32"}), []
    for last, skips in ((3, before), (5, after)):
        types = frozenset({torch.float32} if skips else {})
        monkeypatch.setattr(native_zeros, "types_here", lambda types=types: types)
        logs.append(expect(main(file, f"max_steps={last}")))
    assert "convolutions of spikes" not in logs[0]
    now = ("skipped zeros, and here they do not:", "did not skip zeros, and here they do:")[after]
    assert (f"before, convolutions of spikes {now}" in logs[1]) == (before != after)


def test_checkpoints_come_at_their_steps_and_at_the_end_of_each_epoch(
    main, tiny_config, tmp_path, monkeypatch
):
    """Only a run that has one is said to continue from it if a process is lost."""
    advice, train_step = [], Trainer._train_step

    def noting(self):
        advice.append(self.watch.after)
        return train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", noting)
    file = tiny_config({"save": {"every_steps": 2, "keep_last": 100}, "evaluate_every": 2})
    for last in (5, 10):
        expect(main(file, f"max_steps={last}"))
    # In the third and fourth step the first one is perhaps being written.
    assert [text == CONTINUES for text in advice[:2] + advice[4:]] == [False] * 2 + [True] * 6
    saved = sorted(path.name for path in (tmp_path / "runs/tiny/checkpoints").glob("step-*"))
    assert saved == [f"step-{step:08}" for step in (2, 4, 5, 6, 8, 10)]


def test_training_goes_on_while_a_checkpoint_is_written(main, tiny_config, tmp_path, monkeypatch):
    """What is written is the state of its step, copied before the next ones change it."""
    written, train_step, write = threading.Event(), Trainer._train_step, checkpoint.save
    synced = []

    def write_later(*arguments, **options):
        assert synced.pop()  # After a power cut the checkpoint has no more steps than the metrics.
        assert written.wait(30)
        return write(*arguments, **options)

    def step(self):
        if self.step == 3:
            assert self.watch.after != CONTINUES
            assert not (tmp_path / "runs/long/checkpoints").exists()
            written.set()
        return train_step(self)

    monkeypatch.setattr(Tracker, "sync", lambda _: synced.append(True))
    monkeypatch.setattr(checkpoint, "save", write_later)
    monkeypatch.setattr(Trainer, "_train_step", step)
    file = tiny_config({"save": {"every_steps": 2, "keep_last": 9}, "ema.decay": 0.8})
    expect(main(file, "name=long", "max_steps=5"))
    expect(main(file, "name=short", "max_steps=2"))
    long, short = (tiny.newest(tmp_path / "runs" / name) for name in ("long", "short"))
    long = long.with_name(short.name)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = load_file(long / name), load_file(short / name)
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
    assert (long / "optimizer.pt").read_bytes() == (short / "optimizer.pt").read_bytes()


def test_checkpoint_is_evaluated_from_any_folder(
    main, tiny_root, tiny_config, tmp_path, monkeypatch
):
    """Although the run's data path was relative to its working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tiny_root)
    changes = {"data.root": "data", "data.index": "data/index", "max_steps": 1}
    expect(main(tiny_config(changes)))
    _, description = checkpoint.load_model_file(tmp_path / "runs/tiny")
    data = description.config["data"]
    assert (data["root"], data["index"]) == (str(tiny_root), str(tiny_root / "index"))
    assert (description.classes, description.step) == (list(tiny.CLASSES), 1)
    (line,) = tiny.metrics(tmp_path / "runs/tiny", "val")
    assert description.validation["top1"] == line["top1"]


def test_sums_of_a_micro_batch():
    logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])  # (T, B, K)
    loss = torch.tensor(0.25)
    # The time-mean decides: class 0, then class 1.
    assert step_module.sums_of(logits, torch.tensor([0, 0]), loss).tolist() == [0.5, 1.0, 2.0]
    # A mixed sample is as correct as the predicted class's share in it.
    shares = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert step_module.sums_of(logits, shares, loss).tolist() == [0.5, 1.25, 2.0]


def test_networks_of_imported_files_draw_from_generators_that_are_seeded(monkeypatch):
    """On a GPU from its own."""
    seeded, seed = [], order.forward_seed(5, 3, 1)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    config = SimpleNamespace(imports=["x.py"], seed=5)
    for device, expected in (("cpu", []), ("cuda", [seed])):
        world = SimpleNamespace(device=torch.device(device))
        torch.manual_seed(0)
        seeded.clear()
        step_module.Step._draw(SimpleNamespace(config=config, world=world, _dropping=()), 3, 1)
        assert (torch.initial_seed(), seeded) == (seed, expected)


def test_speed_and_waiting_are_those_since_the_last_line(monkeypatch, caplog):
    now = 10.0

    class Clock:
        @staticmethod
        def monotonic():
            return now

    monkeypatch.setattr(window, "time", Clock)
    update = Update(grad_norm=torch.tensor(1.0), applied=torch.tensor(True))
    sums = torch.tensor([8.0, 4.0, 16.0], dtype=torch.float64)
    with join("cpu") as alone:
        found = window.Window(11, alone)
        monkeypatch.delattr(type(alone), "gather")  # a line costs one collective, without pickle
        found.restart(waited=5.0)
        for step in (1, 2):
            now += 5.5
            found.add(step, update, sums, timesteps=2 * step)
        # A step that changed nothing counts for the speed alone.
        found.add(3, update._replace(applied=torch.tensor(False)), sums * torch.nan, timesteps=0)
        values = found.close(waited=8.3, scale=None)
        assert (values["samples_per_s"], values["image_timesteps_per_s"]) == (3, 6)
        assert values["data_wait"] == pytest.approx(30)
        assert (values["loss"], values["top1"]) == (0.5, 25.0)
        assert values["non_finite_steps"] == 1
        found.restart(waited=8.3)
        now += 2
        found.add(4, update, sums * torch.nan, timesteps=0)
        values = found.close(waited=8.3, scale=None)
        assert values["samples_per_s"] == 5.5
        assert "peak_memory" not in values
        found._world = dataclasses.replace(alone, device=torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**29)
        assert found.close(waited=8.3, scale=None)["peak_memory"] == 1.5
    assert caplog.text.count("the loss is nan though its gradient is finite") == 1


def test_an_observer_that_fails_ends_nothing(main, tiny_config, tmp_path, monkeypatch):
    events = []

    class Counting(Observer):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                events.append(name)
            return super().__getattribute__(name)

    class Faulty(Observer):
        def on_line(self, kind, step, values):
            raise LookupError(f"{kind} {step} {sorted(values)[0]}")

    class Unmade(Observer):
        def __init__(self, _):
            raise LookupError("none")

    class Replacing(Observer):
        def on_evaluation(self, *_):
            return {"top1": -1.0}

    class Odd(Observer):
        def on_evaluation(self, *_):
            return {"new": "text"}

    made = [lambda _, kind=kind: kind() for kind in (Faulty, Replacing, Odd, Counting)]
    expect(main(tiny_config({"name": "usual"})))
    monkeypatch.setattr(observers, "observers", lambda _: [Unmade, *made])
    text = expect(main(tiny_config({"name": "faulty"})))
    message = "Faulty failed and was disabled; the run continues (LookupError: train 1 data_wait)"
    assert text.count(message) == 1
    # 10 steps of 4 micro-batches, and a line a step; 2 evaluations.
    assert Counter(events) == {"on_batch": 40, "on_line": 12, "on_evaluation": 2, "on_end": 1}
    for name in ("Unmade", "Replacing", "Odd"):
        assert text.count(f"{name} failed and was disabled") == 1
    assert "(ValueError: the line of metrics already has top1)" in text
    tiny.assert_same_run(tmp_path / "runs/usual", tmp_path / "runs/faulty")
