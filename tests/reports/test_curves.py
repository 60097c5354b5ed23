"""The pictures of a run: that they show what they should, from a run's first minute to its last."""

import json

import pytest
from samples import pixels

from tetdist.apps.reports import style
from tetdist.apps.reports.curves import Metrics, _phase_borders, firing_rates, learning_curves
from tetdist.apps.reports.style import TRAIN, VALIDATION


def train_line(step, **values):
    line = {"kind": "train", "step": step, "time": 0.0, "epoch": step / 100, "phase": 0}
    line |= {"loss": 7 / step, "top1": 60 - 50 / step, "lr": 0.1, "grad_norm": 1.0}
    return line | {"samples_per_s": 1400.0, "data_wait": 3.0} | values


def val_line(step, **values):
    line = {"kind": "val", "step": step, "time": 0.0, "epoch": step / 100, "phase": 0}
    line |= {"timesteps": 3, "loss": 6 / step, "top1": 55 - 50 / step, "top5": 80.0}
    line |= {"per_timestep_top1": [50.0, 52.0, 54.5], "firing_rate": {"layer1": 0.2}}
    return line | {"samples": 1000, "seconds": 1.0} | values


def draw(folder, lines):
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "plots" / "learning_curves.png"
    learning_curves(Metrics(metrics), out)
    return out


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by the titles of their panels."""
    drawn, save = [], style.save

    def keep(figure, out):
        drawn.append({axis.get_title(loc="left"): axis for axis in figure.axes})
        save(figure, out)

    monkeypatch.setattr(style, "save", keep)
    return drawn


def shown(axis):
    """The points of an axis's lines."""
    return [[*map(tuple, line.get_xydata().round(4).tolist())] for line in axis.lines]


def test_a_whole_run_with_two_phases(tmp_path, figures):
    lines = []
    for step in range(10, 1210, 10):
        later = step > 900
        speed = {"phase": 1, "lr": 1e-4, "samples_per_s": 900.0} if later else {}
        lines.append(train_line(step, **speed))
        if step % 100 == 0:
            lines.append(val_line(step, **({"phase": 1, "timesteps": 6} if later else {})))
    out = draw(tmp_path, lines)
    for colour in (TRAIN, VALIDATION, style.RATE, style.SPEED, style.QUIET):
        assert pixels(out, colour) > 100, colour
    (panels,) = figures
    # Training's values and its running means in each phase, then the evaluations.
    assert shown(panels["Loss"])[3] == [(n, round(0.06 / n, 4)) for n in range(1, 13)]
    best = next(line for line in panels["Top-1 accuracy"].lines if line.get_marker() == "*")
    assert best.get_label() == "best: 54.96 % (epoch 12)"
    assert shown(panels["Accuracy by timestep, epoch 12"]) == [[(1, 50), (2, 52), (3, 54.5)]]
    assert panels["Learning rate"].get_yscale() == "log"
    assert panels["Throughput"].get_ylabel().endswith(", median 1,400")
    # A moving average has curves of its own.
    assert pixels(out, style.AVERAGE) == 0
    averages = [
        val_line(step, kind="val_ema", top1=70.0, loss=0.5) for step in range(100, 1201, 99)
    ]
    assert pixels(draw(tmp_path, [*lines, *averages]), style.AVERAGE) > 1000
    assert pixels(out, VALIDATION) > 100
    assert [entry.name for entry in out.parent.iterdir()] == ["learning_curves.png"]
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    assert _phase_borders(train, val) == [(9.0, "phase 1: T = 6")]
    assert _phase_borders(train[:90], val) == []


def test_a_published_training_beside_it(tmp_path, figures):
    published = {"reference_top1": 12.6, "reference_train_loss": 5.4, "reference_train_top1": 6.4}
    draw(tmp_path, [train_line(50), train_line(100), val_line(100, **published)])
    (panels,) = figures
    loss, *_ = (line for line in panels["Loss"].lines if line.get_linestyle() == "--")
    assert loss.get_label() == "published, of the mean output"
    assert loss.get_marker() == "o"  # the first value has no line
    assert shown(panels["Loss"])[-1] == [(0.5, 5.4)]  # the mean over an epoch is at its middle
    assert panels["Top-1"].get_ylabel() == "top-1 (%); dashed: published"
    assert shown(panels["Top-1"])[-2:] == [[(0.5, 6.4)], [(1, 12.6)]]


def test_few_and_flawed_lines(tmp_path, figures):
    out = draw(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "st')
    learning_curves(Metrics(tmp_path / "metrics.jsonl"), out)
    assert not out.parent.exists()
    draw(tmp_path, [val_line(1, epoch=0.0)])
    assert pixels(out, VALIDATION) > 20
    assert pixels(out, TRAIN) == 0
    before = out.read_bytes()
    flawed = [
        {"kind": "train", "step": 5, "time": 0.0, "epoch": 0.05},
        {"kind": "other", "step": 3, "time": 0.0},
        train_line(10),
        train_line(20, loss="NaN", samples_per_s="Infinity"),
        train_line(30, top1=None),
        val_line(30, top1="NaN", per_timestep_top1=["NaN"] * 3),
    ]
    with out.open("rb") as reader:  # somebody looks at it
        draw(tmp_path, flawed)
        assert reader.read() == before
    assert pixels(out, TRAIN) > 20
    loss, top1, *_, speed, _ = figures[-1].values()
    assert shown(loss)[:2] == [[(0.1, 0.7), (0.3, 0.2333)], [(0.3, 0.2)]]
    assert shown(top1)[:2] == [[(0.1, 55), (0.2, 57.5)], []]
    assert shown(speed)[0] == [(0.1, 1400), (0.3, 1400)]


def test_many_lines_are_read_once_and_drawn_by_their_extremes(tmp_path, figures):
    steps = range(1, 8001)
    high, low = 7000, 5
    lines = [train_line(n, loss=9 if n == high else 0.1 if n == low else 1 + n % 2) for n in steps]
    out = draw(tmp_path, lines)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    learning_curves(metrics, out)
    raw, means, *_ = shown(figures[-1]["Loss"])
    assert len(raw) <= 4000
    assert max(raw, key=lambda point: point[1]) == (high / 100, 9)
    assert min(raw, key=lambda point: point[1]) == (low / 100, 0.1)
    assert raw == sorted(raw)
    assert raw[-1][0] > 79.9
    assert all(1.4 < mean < 1.6 for _, mean in means)
    # What was read is not read again.
    text = metrics.file.read_text()
    metrics.file.write_text("?" * len(text) + json.dumps(val_line(8001, loss=0.5)) + "\n")
    learning_curves(metrics, out)
    assert shown(figures[-1]["Loss"])[:3] == [raw, means, [(80.01, 0.5)]]


def test_firing_rates_show_what_is_dead_and_saturated(tmp_path, figures):
    def colours(*rates):
        metrics = tmp_path / "metrics.jsonl"
        lines = [val_line(100 * i, firing_rate=rate) for i, rate in enumerate(rates, start=1)]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = tmp_path / "plots" / "firing_rates.png"
        firing_rates(Metrics(metrics), out)
        return pixels(out, VALIDATION), pixels(out, "#000000")

    alive = {f"layer{i}": 0.1 for i in range(4)}
    dead, saturated = colours(alive, alive)
    more_dead, as_saturated = colours(alive, alive | {"layer1": 0.0})
    assert more_dead > dead + 5000  # half a row
    assert as_saturated < saturated + 500
    as_dead, more_saturated = colours(alive, alive | {"layer1": 0.95})
    assert as_dead == dead
    assert more_saturated > saturated + 5000
    # A single evaluation, a layer that has no value, and no layer or evaluation at all.
    assert colours({"layer1": 0.0})[0] > 5000
    colours({"layer0": 0.1}, alive)
    (axis, _) = figures[-1].values()
    rates = axis.collections[0].get_array()
    assert rates[0].tolist() == [0.1, 0.1]
    assert rates[1:].mask.tolist() == [[True, False]] * 3
    assert axis.get_yticklabels()[0].get_text() == "layer0   10 %"
    (tmp_path / "plots" / "firing_rates.png").unlink()
    for line in (train_line(10), val_line(10, firing_rate={})):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        firing_rates(Metrics(tmp_path / "metrics.jsonl"), tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()
