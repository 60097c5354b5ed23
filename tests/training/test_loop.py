"""What the training loop keeps and what it lets go of: from phase to phase, from best to best."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import Outcome

from tetdist.training import trainer

ConfigWriter = Callable[..., Path]
Main = Callable[..., Outcome]


def test_run_that_ended_at_a_phases_border_goes_on_as_the_straight_one(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path
) -> None:
    """The second phase's optimiser begins anew, though the checkpoint holds one of the same kind:
    the first phase's momentum and numbers would fit it, and would be wrong."""
    phases = [
        {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9}},
        {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.5}},
    ]
    changes = {"phases": phases}
    assert main(tiny_config(changes | {"name": "straight"})).status == 0
    file = tiny_config(changes | {"name": "run"})
    assert main(file, f"max_steps={tiny.STEPS_PER_EPOCH}").status == 0
    outcome = main(file)
    assert f"from step {tiny.STEPS_PER_EPOCH}" in outcome.text
    for kind in ("train", "val"):
        ours, theirs = (
            tiny.metrics(tmp_path / "runs" / name, kind) for name in ("run", "straight")
        )
        assert ours == theirs


def test_first_of_equal_results_stays_the_best(
    main: Main, tiny_config: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which checkpoint is published does not depend on how long the run went on at its best."""
    real = trainer.evaluate
    answers: Iterator[float] = iter([40.0, 60.0, 60.0, 50.0])

    def evaluate(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        return type(result)(**vars(result) | {"top1": next(answers)})

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    outcome = main(tiny_config({"phases.0.epochs": 4, "log_every": 5}))
    assert outcome.status == 0, outcome.text
    run = tmp_path / "runs/tiny"
    assert [line["best_top1"] for line in tiny.metrics(run, "val")] == [40, 60, 60, 60]
    assert (run / "checkpoints/best").read_text().strip() == "step-00000010"
    state = json.loads((tiny.newest(run) / "state.json").read_text())
    assert state["result"] == {"best_top1": 60.0, "best_step": 10, "top1": 50.0}
