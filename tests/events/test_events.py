"""From images to a spiking network on simulated events, and the split's name on every result."""

import importlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cameras
import pytest
import tiny
import torch
from tiny import Outcome

TOOLS = tiny.PROJECT / "tools"
SPLIT = "simulated-published"


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"tetdist.apps.cli.{name}")


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    images, dest = cameras.draw_bars(tmp_path / "images", train=8, val=3), tmp_path / "events"
    options = ["--simulate", "--timesteps", "2", "--size", "16", "--workers", "1"]
    assert tool("prebin_dvs").main([str(images), str(dest), *options]) == 0
    return dest / "splits" / SPLIT


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
