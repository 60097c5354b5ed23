"""The pictures of a run: that they show what they should, from a run's first minute to its last."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tetdist import plots
from tetdist.errors import UserError
from tetdist.plots import learning_curves


def train_line(step: int, **values: Any) -> dict[str, Any]:
    line = {"kind": "train", "step": step, "time": 0.0, "epoch": step / 100, "phase": 0}
    line |= {"loss": 7 / step, "top1": 60 - 50 / step, "lr": 0.1, "grad_norm": 1.0}
    return line | {"samples_per_s": 1400.0, "data_wait": 3.0} | values


def val_line(step: int, **values: Any) -> dict[str, Any]:
    line = {"kind": "val", "step": step, "time": 0.0, "epoch": step / 100, "phase": 0}
    line |= {"timesteps": 3, "loss": 6 / step, "top1": 55 - 50 / step, "top5": 80.0}
    line |= {"per_timestep_top1": [50.0, 52.0, 54.5], "firing_rate": {"layer1": 0.2}}
    return line | {"samples": 1000, "seconds": 1.0} | values


def draw(folder: Path, lines: list[dict[str, Any]]) -> Path:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "plots" / "learning_curves.png"
    learning_curves(metrics, out)
    return out


def pixels(picture: Path, colour: str) -> int:
    """How many pixels have a colour exactly."""
    from PIL import Image

    wanted = tuple(bytes.fromhex(colour[1:]))
    with Image.open(picture) as image:
        counted = image.convert("RGB").getcolors(image.width * image.height)
    assert counted is not None
    return sum(count for count, value in counted if value == wanted)


def test_a_whole_run_with_two_phases(tmp_path: Path) -> None:
    lines = []
    for step in range(10, 1210, 10):
        later = step > 900
        speed = {"phase": 1, "lr": 1e-4, "samples_per_s": 900.0} if later else {}
        lines.append(train_line(step, **speed))
        if step % 100 == 0:
            lines.append(val_line(step, **({"phase": 1, "timesteps": 6} if later else {})))
    out = draw(tmp_path, lines)
    colours = (plots.TRAIN, plots.VALIDATION, plots.RATE, plots.SPEED, plots.QUIET)
    for colour in colours:
        assert pixels(out, colour) > 100, colour
    assert [entry.name for entry in out.parent.iterdir()] == ["learning_curves.png"]

    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    assert plots._phase_borders(train, val) == [(9.0, "phase 1: T = 6")]
    assert plots._phase_borders(train[:90], val) == []


def test_before_the_first_evaluation(tmp_path: Path) -> None:
    out = draw(tmp_path, [train_line(step) for step in (10, 20, 30)])
    assert pixels(out, plots.TRAIN) > 100
    assert pixels(out, plots.VALIDATION) == 0


def test_one_line_of_each(tmp_path: Path) -> None:
    assert pixels(draw(tmp_path, [train_line(10)]), plots.TRAIN) > 20
    assert pixels(draw(tmp_path, [train_line(10), val_line(10)]), plots.VALIDATION) > 100
    assert pixels(draw(tmp_path, [val_line(10)]), plots.VALIDATION) > 100
    assert pixels(draw(tmp_path, [val_line(1, epoch=0.0)]), plots.VALIDATION) > 100


def test_lines_that_lack_something_or_are_not_finite(tmp_path: Path) -> None:
    bare = {"kind": "train", "step": 5, "time": 0.0, "epoch": 0.05}
    lines = [bare, train_line(10), train_line(20, loss="NaN", samples_per_s="Infinity")]
    lines += [train_line(30, top1=None), val_line(30, top1="NaN", per_timestep_top1=["NaN"] * 3)]
    lines += [{"kind": "other", "step": 3, "time": 0.0}]
    assert pixels(draw(tmp_path, lines), plots.TRAIN) > 100


def test_nothing_to_draw(tmp_path: Path) -> None:
    out = draw(tmp_path, [])
    assert not out.parent.exists()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st')
    learning_curves(tmp_path / "metrics.jsonl", out)
    assert not out.parent.exists()


def test_a_new_picture_replaces_the_old_one(tmp_path: Path) -> None:
    out = draw(tmp_path, [train_line(10)])
    before = out.read_bytes()
    with out.open("rb") as reader:  # somebody looks at it
        draw(tmp_path, [train_line(10), train_line(20)])
        assert reader.read() == before
    assert out.read_bytes() != before


def test_running_mean() -> None:
    values = [1.0, 2.0, 6.0, 3.0, 5.0]
    assert plots._running_mean(values, 1) == [1.5, 3.0, 11 / 3, 14 / 3, 4.0]
    assert plots._running_mean(values, 0) == values
    assert all(map(math.isclose, plots._running_mean(values, 9), [3.4] * 5))


def test_no_display_and_no_global_figures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_line(10)) + "\n")
    code = (
        "import sys; from pathlib import Path; from tetdist.plots import learning_curves\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "learning_curves(Path('metrics.jsonl'), Path('a.png'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'mlflow' not in sys.modules\n"
    )
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}
    environment.pop("DISPLAY", None)
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=60
    )
    assert (tmp_path / "a.png").is_file()


def test_matplotlib_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed: pip install"):
        draw(tmp_path, [train_line(10)])
