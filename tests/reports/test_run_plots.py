"""When a run draws itself, with each network, and what it says in the log."""

from types import SimpleNamespace

import pytest
import tiny

from tetdist.apps.reports import style
from tetdist.apps.reports.run_plots import RunPlots
from tetdist.config import loading as configuration
from tetdist.datasets import index
from tetdist.tracking.tracker import Tracker
from tetdist.tracking.trackers import TrackedRun
from tetdist.training.observers import Watched


@pytest.fixture
def config(tmp_path):
    file = tiny.write_config(tmp_path / "tiny.yaml", tmp_path, {"plots": True})
    return configuration.load(str(file))


@pytest.fixture
def tracker(config):
    config.run_dir.mkdir(parents=True)
    tracker = Tracker(TrackedRun(config.run_dir, "r", {}, {}, None), None)
    yield tracker
    tracker.close("FINISHED")


LAST = 4


def watching(config, tracker):
    train = SimpleNamespace(classes=tiny.CLASSES)
    run = SimpleNamespace(config=config, last_step=LAST, train=train, model=None)
    return RunPlots(Watched(run, tracker, step=0, finished=False))


def evaluate(pictures, tracker, epoch, rate):
    """Tell of an evaluation, as the trainer does, after epochs of one step."""
    values = {"epoch": float(epoch), "phase": 0, "top1": 50.0, "firing_rate": {"stem": rate}}
    tracker.log("val", epoch, values)
    pictures.on_line("val", epoch, values)


def test_plots_at_evaluations_and_warnings_at_once(config, tracker, caplog):
    pictures = watching(config, tracker)

    def drawn(epoch, rate):
        evaluate(pictures, tracker, epoch, rate)
        return {path.name: path.read_bytes() for path in pictures.folder.iterdir()}

    first = drawn(1, 0.2)
    assert first.keys() == {"learning_curves.png", "firing_rates.png"}
    assert caplog.text == ""
    assert drawn(2, 0.0) == first
    assert drawn(3, 0.0) == first
    assert caplog.text.count("epoch 2: dead layers, firing below 0.1 %: stem (0 %)") == 1
    assert "epoch 3" not in caplog.text
    last = drawn(4, 0.5)
    assert "epoch 4: layers that fire again: stem (50 %)" in caplog.text
    assert all(last[name] != first[name] for name in first)


def test_a_plot_that_cannot_be_written_ends_nothing(config, tracker, caplog):
    (config.run_dir / "plots").write_text("in the way")
    evaluate(watching(config, tracker), tracker, LAST, 0.2)
    for name in ("learning_curves.png", "firing_rates.png"):
        assert f"cannot draw the plot {name}: " in caplog.text


def test_without_plots_the_log_still_names_dead_layers(main, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "png", lambda _: b"rendering takes its time")
    changes = {"model.neuron.threshold": 1e6, "loss.phi": 1e6}
    for plots in (True, False):
        named = tiny_config(changes | {"name": f"{plots}", "plots": plots})
        tiny.expect(main(named), "dead layers, firing below 0.1 %")
        assert (tmp_path / f"runs/{plots}/plots").exists() == plots
    tiny.assert_same_run(tmp_path / "runs/True", tmp_path / "runs/False")


TRANSFORMER = {"widths": [8, 16, 24], "depths": [1, 1, 1], "heads": 2}
# Small networks with a neuron: transformers, integer spikes, membrane shortcuts, one T, events.
FAMILIES = {
    "espikeformer_t": (
        TRANSFORMER | {"widths": [8, 8, 16, 16], "depths": [1, 1], "mlp_ratio": 2},
        "ilif",
    ),
    "maxformer_10_384": (TRANSFORMER, "lif"),
    "preact_resnet18": ({"width": 4}, "ilif"),
    "psn_sew_resnet18": ({"width": 4}, "psn"),
    "spiking_convnet": ({"channels": [4, 4], "input_size": 32}, "ilif"),
    "spiking_convnet_dvs": ({"channels": [4, 4], "input_size": 16}, "lif"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_plots_are_complete_at_the_end(name, main, tiny_config, event_root, tmp_path, monkeypatch):
    """With all observers; the first epoch's drawing is not the last."""
    # Rendering takes ten times as long as the rest of a drawing; the title says what it shows.
    monkeypatch.setattr(style, "png", lambda figure: figure.get_suptitle().encode())
    (arguments, kind), events = FAMILIES[name], name.endswith("dvs")
    timesteps = 1 if kind == "ilif" else 2
    neuron = {"kind": kind} | ({"timesteps": timesteps} if kind == "psn" else {})
    changes = {
        "model": {"name": name, "arguments": arguments, "neuron": neuron},
        "batch": {"global": 10, "micro": 10, "eval": 23} if events else {"global": 24, "micro": 8},
        "phases.0.timesteps": timesteps,
        "plots": True,
        "profile": [1, 1] if name == "spiking_convnet" else None,
        "reference": "sew34",
    }
    if events:
        root = event_root(shape=(timesteps + 1, 2, 16, 16))
        index.index_splits(root, kind="events")
        changes["data"] = {"kind": "events", "root": str(root)}
    else:
        changes |= {"data.image_size": 32, "data.resize": 32}
    text = tiny.expect(main(tiny_config(changes)))
    assert "was disabled" not in text
    run = tmp_path / "runs/tiny"
    assert [line["epoch"] for line in tiny.metrics(run, "val")] == [1, 2]
    for plot in ("learning_curves.png", "firing_rates.png"):
        assert "epoch 2, " in (run / "plots" / plot).read_text()
    title = (run / "plots/inputs.png").read_text()
    assert title.endswith(f" {timesteps} time bins" if events else " 32x32 pixels")
    assert (run / "profile/table.md").exists() == bool(changes["profile"])
