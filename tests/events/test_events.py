"""From images to a spiking network on simulated events, and the split's name on every result."""

import importlib
import json
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cameras
import numpy as np
import pytest
import timm
import tiny
import torch
from tiny import Outcome

from tetdist.apps.events.binning import Binning, bin_events
from tetdist.apps.events.recording import Events, Sensor
from tetdist.apps.events.simulate import DEFAULT_SENSOR
from tetdist.apps.weights.trained import load
from tetdist.models.streaming import Stream
from tetdist.storage import checkpoint

TOOLS = tiny.PROJECT / "tools"
SPLIT = "simulated-published"


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"tetdist.apps.cli.{name}")


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    images, dest = cameras.draw_bars(tmp_path / "images", train=8, val=3), tmp_path / "events"
    options = ["--simulate", "--timesteps", "2", "--size", "16", "--workers", "1", "--bins", "9ms"]
    assert tool("prebin_dvs").main([str(images), str(dest), *options]) == 0
    return dest / "splits" / SPLIT


def replayed_is_a_stream(run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Replay prints what a stream of the recording's windows returns."""
    made = cameras.events(900, *DEFAULT_SENSOR, duration=40_000)
    np.savez(folder / "it.npz", **made._asdict(), **DEFAULT_SENSOR._asdict())
    replay, command = tool("replay"), [str(folder / "it.npz"), "--checkpoint", str(run)]
    capfd.readouterr()
    started = time.monotonic()
    assert replay.main(command) == 0
    assert time.monotonic() - started > 0.04  # at the recording's speed
    assert replay.main([*command, "--fast"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "timestep" in line]
    step = Stream.step

    def slow(*given: Any) -> torch.Tensor:
        time.sleep(0.02)  # longer than a window
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "step", slow)
        assert replay.main(command) == 0
        assert re.search(r"\n[45] frames late: ", capfd.readouterr().out)
        assert replay.main([*command, "--fast"]) == 0
        assert " late: " not in capfd.readouterr().out
    trained = load(run)
    trained.model.set_execution("fused")
    binning = Binning(6, Sensor(16, 16), "9ms", "count", "area", "uint8")
    frames = bin_events(Events(*made, DEFAULT_SENSOR), binning).tensor[:5]
    stream, expected = trained.model.stream(), []
    for t, frame in enumerate(frames):
        if t % 2 == 0:  # The network starts anew after two of the five windows.
            stream.reset()
        at = f"{(t + 1) * 9 / 1000:8.3f} s  timestep {t % 2 + 1}/2"
        mean = stream.step(torch.from_numpy(frame[None]).float())[0]
        confidence, number = mean.softmax(-1).max(-1)
        name = trained.description.classes[number]
        expected.append(f"{at}  {name}  {100 * float(confidence):.1f} %  ")
    assert [re.sub(r"\d+\.\d\d ms$", "", line) for line in lines] == 2 * expected
    np.savez(folder / "other.npz", **made._asdict(), width=99, height=99)
    assert replay.main([str(folder / "other.npz"), "--checkpoint", str(run)]) == 2
    refusal = f"other.npz: its sensor is 99x99, not {DEFAULT_SENSOR} as expected"
    assert refusal in capfd.readouterr().err
    (folder / "torn.npz").write_bytes((folder / "it.npz").read_bytes()[:500])
    assert replay.main([str(folder / "torn.npz"), "--checkpoint", str(run)]) == 2
    assert "torn.npz: it is not an NPZ file, or damaged" in capfd.readouterr().err
    (run / "checkpoints" / "best").write_text("none")
    assert replay.main([*command, "--best"]) == 2
    assert "best is damaged" in capfd.readouterr().err


def test_replay_needs_windows_of_a_fixed_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "model.safetensors"
    config = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d", "data.kind": "events"})
    config["model"] = {"name": "vggsnn", "num_classes": 2, "arguments": {"input_size": 16}}
    weights = timm.create_model("vggsnn", num_classes=2, input_size=16).state_dict()
    for binning, expected in (
        (None, "was trained on images, or on recordings whose binning it does not know; train on"),
        ({"bins": "count"}, "parts of a whole recording, which a stream cannot know; bin by wind"),
    ):
        values = {"config": config, "classes": ["a", "b"], "timesteps": 2, "step": 0}
        description = checkpoint.Description(**values, binning=binning)
        checkpoint.write_model_file(trained, weights, description)
        assert tool("replay").main(["it.npz", "--checkpoint", str(trained)]) == 2
        assert expected in capfd.readouterr().err
        trained.unlink()


def test_results_carry_the_name_of_the_split(
    data_root: Path,
    tmp_path: Path,
    main: Callable[..., Outcome],
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes = {
        "model": {"name": "vggsnn", "arguments": {"input_size": 16}},
        "data": {"root": str(data_root), "kind": "events", "threads": 1},
        "batch": {"global": 4, "micro": 4, "eval": 4},
        "phases.0.epochs": 1,
        "tracking": {"mlflow": True},
    }
    outcome = main(tiny.write_config(tmp_path / "tiny.yaml", data_root, changes))
    assert outcome.status == 0, outcome.text
    run = tmp_path / "runs" / "tiny"
    assert [line["data_split"] for line in tiny.metrics(run, "val")] == [SPLIT]
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
        assert store.execute("select value from tags where key = 'data_split'").fetchall() == [
            (SPLIT,)
        ]

    replayed_is_a_stream(run, tmp_path, capfd)
    result = tmp_path / "result.json"
    arguments = ["--checkpoint", str(run), "--json", str(result), "--execution", "reference"]
    threads = torch.get_num_threads()
    try:
        assert tool("eval").main(arguments) == 0
        assert f"6 samples of val of the split {SPLIT}" in capfd.readouterr().out
        assert json.loads(result.read_text())["data_split"] == SPLIT

        # Where the data does not say its split, nothing does.
        (data_root / "dataset.json").unlink()
        assert tool("eval").main(arguments) == 0
        assert "data_split" not in json.loads(result.read_text())
    finally:
        torch.set_num_threads(threads)
