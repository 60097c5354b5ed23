"""From images to a spiking network on simulated events, and the split's name on every result."""

import importlib
import json
import re
import sqlite3
import sys
import time

import cameras
import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from tiny import expect, refused

from tetdist.apps.events.binning import Binning, bin_events
from tetdist.apps.events.recording import Events, Sensor
from tetdist.apps.events.simulate import DEFAULT_SENSOR
from tetdist.apps.reports.replay_gif import ReplayGif
from tetdist.apps.weights.trained import load
from tetdist.datasets.recorded_split import other_binning
from tetdist.models.streaming import Stream
from tetdist.storage import checkpoint

SPLIT = "simulated-published"


def tool(name):
    return importlib.import_module(f"tetdist.apps.cli.{name}")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    images, dest = cameras.draw_bars(folder / "images", train=8, val=3), folder / "events"
    options = ["--simulate", "--timesteps", "2", "--size", "16", "--workers", "1", "--bins", "9ms"]
    assert tool("prebin_dvs").main([str(images), str(dest), *options]) == 0
    return dest / "splits" / SPLIT


@pytest.fixture(scope="module")
def run(data_root, farm, tmp_path_factory):
    """A network that was trained on the simulated recordings, in windows of 9 ms."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "model": {"name": "spiking_convnet_dvs", "arguments": {"input_size": 16}},
        "data": {"root": str(data_root), "kind": "events", "threads": 1},
        "batch": {"global": 4, "micro": 4, "eval": 4},
        "phases.0.epochs": 1,
        "tracking": {"mlflow": True},
    }
    file = tiny.write_config(folder / "tiny.yaml", data_root, changes)
    refused(farm(file, "phases.0.timesteps=3"), "phases.0.timesteps: 3 exceeds the 2 time bins of")
    refused(farm(file, "phases.0.timesteps=1", "profile=[98,99]"), "the first 1 of the data's 2")
    expect(farm(file))
    return folder / "runs" / "tiny"


MADE = cameras.events(900, *DEFAULT_SENSOR, duration=40_000)


@pytest.fixture
def command(run, tmp_path):
    """Arguments that replay MADE."""
    np.savez(tmp_path / "it.npz", **MADE._asdict(), **DEFAULT_SENSOR._asdict())
    return [str(tmp_path / "it.npz"), "--checkpoint", str(run)]


def lines_of(text):
    """The lines of the frames, without their milliseconds."""
    return [
        re.sub(r"\d+\.\d\d ms$", "", line) for line in text.splitlines() if "  timestep " in line
    ]


def frames_of(made):
    """The recording's windows as training reads them."""
    number = (int(made.t[-1]) - int(made.t[0])) // 9000 + 1
    binning = Binning(number, Sensor(16, 16), "9ms", "count", "area", "uint8")
    return torch.from_numpy(bin_events(Events(*made, DEFAULT_SENSOR), binning).tensor).float()


def lines_of_frames(run, frames):
    """The lines that a replay is to print."""
    trained = load(run)
    trained.model.set_execution("fused")
    stream, expected = trained.model.stream(), []
    for t, frame in enumerate(frames):
        if t % 2 == 0:  # The network starts anew after two windows.
            stream.reset()
        at = f"{(t + 1) * 9 / 1000:8.3f} s  timestep {t % 2 + 1}/2"
        confidence, number = stream.step(frame[None])[0].softmax(-1).max(-1)
        name = trained.description.classes[number]
        expected.append(f"{at}  {name}  {100 * float(confidence):.1f} %  ")
    return expected


def test_replay_prints_what_a_stream_of_the_windows_returns(run, command, capfd):
    replay, expected = tool("replay"), lines_of_frames(run, frames_of(MADE))
    started = time.monotonic()
    assert replay.main(command) == 0
    assert time.monotonic() - started > 0.04  # at the recording's speed
    assert replay.main([*command, "--fast"]) == 0
    shown = capfd.readouterr().out
    assert lines_of(shown) == 2 * expected
    spent = [float(text) for text in re.findall(r"(\S+) ms$", shown, re.M)][-5:]
    middle, most = np.percentile(spent, [50, 99])
    # The last whole answer comes last, not the one of a single window.
    at, _, *timestep, name, percent, _ = expected[3].split()
    answer = f"answer at {at} s, {' '.join(timestep)}: {name}  {percent} %"
    found = re.search(rf"\n5 frames: (\S+) ms \(p50\), (\S+) ms \(p99\)\n{answer}\n$", shown)
    assert found is not None, shown
    assert [float(text) for text in found.groups()] == pytest.approx([middle, most], abs=0.011)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        assert replay.main([*command, "--fast"]) == 0
    # In a terminal, the answers after two windows and the last one stay.
    stay = [line.rpartition("\r")[2].rstrip() for line in capfd.readouterr().out.split("\n")]
    assert lines_of("\n".join(stay)) == [expected[i] for i in (1, 3, 4)]
    # Of fewer windows than T, the last one has the answer.
    trained, frames = load(run), enumerate(frames_of(MADE).numpy(), 1)
    trained.model.set_timesteps(9)
    windows, classes = ((9000 * number, frame) for number, frame in frames), list("abcdefghij")
    replay.run(trained.model, Sensor(16, 16), classes, windows, None, fast=True)
    assert "\nanswer at 0.045 s, timestep 5/9: " in capfd.readouterr().out


def test_late_frames_are_counted_and_ctrl_c_ends_with_a_summary(
    command, tmp_path, capfd, monkeypatch
):
    replay, step = tool("replay"), Stream.step

    def slow(*given):
        time.sleep(0.02)  # longer than a window
        return step(*given)

    monkeypatch.setattr(Stream, "step", slow)
    assert replay.main(command) == 0
    assert "; 4 late, after the next was due\nanswer at " in capfd.readouterr().out
    assert replay.main([*command, "--fast"]) == 0
    assert " late" not in capfd.readouterr().out
    # Ctrl-C in the third frame, with the summary and the GIF of two.
    steps = []

    def pressing(*given):
        steps.append(given)
        if len(steps) == 4:  # after the warm-up
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(Stream, "step", pressing)
    assert replay.main([*command, "--output", str(tmp_path / "two.gif")]) == 130
    shown = capfd.readouterr()
    assert (shown.err, len(lines_of(shown.out))) == ("stopped\n", 2)
    assert "\n2 frames: " in shown.out
    assert "two.gif, 2 frames" in shown.out


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        (["none.npz"], "there is no recording "),
        ([""], " is no file; give the network, then a file"),
        (["other.npz"], f" 99x99, not {DEFAULT_SENSOR} as expected; the network was trained for a"),
        (["other.dat"], f"is outside the {DEFAULT_SENSOR} sensor, as are "),
        (["it.npz", "--output", "it.png"], "--output: it.png must end in .gif"),
        (["it.npz", "--output", "nosuch/it.gif"], "--output: cannot write nosuch/it.gif: name"),
        (["it.npz", "--best"], " is damaged: the header of model.safetensors cannot be read"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_the_first_frame(
    run, command, tmp_path, capfd, given, refusal
):
    np.savez(tmp_path / "other.npz", **MADE._asdict(), width=99, height=99)
    other = MADE._replace(x=MADE.x + 29 * (MADE.t > MADE.t[0]))
    (tmp_path / "other.dat").write_bytes(cameras.dat(other, header="% Version 2\n"))
    (run / "checkpoints" / "step-00000000").mkdir(exist_ok=True)
    assert tool("replay").main([str(tmp_path / given[0]), *command[1:], "--fast", *given[1:]]) == 2
    shown = capfd.readouterr()
    assert refusal in shown.err
    assert not lines_of(shown.out)


def test_a_gif_has_an_image_of_each_windows_events(command, tmp_path):
    made = MADE._replace(p=((MADE.t - MADE.t[0]) // 9000 % 2 == 0).astype(np.int64))
    np.savez(tmp_path / "it.npz", **made._asdict(), **DEFAULT_SENSOR._asdict())
    assert tool("replay").main([*command, "--fast", "--output", str(tmp_path / "it.gif")]) == 0
    with Image.open(tmp_path / "it.gif") as gif:
        assert gif.n_frames == 5
        for number in range(5):
            gif.seek(number)
            pixels = np.asarray(gif.convert("RGB").crop((10, 30, 160, 170)), int)
            red, _, blue = pixels.transpose(2, 0, 1)
            more_blue = [int((blue > red + 50).sum()), int((red > blue + 50).sum())]
            assert min(more_blue) == 0
            assert more_blue[number % 2] > 1000  # ON is blue
        # The label of the last answer, which begins at the right end, stays in its axis.
        assert np.asarray(gif.convert("L"))[30:160, 378:].min() > 240
    # The number at the right end of the time axis is whole.
    gif = ReplayGif(tmp_path / "ticks.gif", ["a", "b"])
    for end in range(1, 21):
        gif.add(end / 1000, np.ones((2, 4, 4)), np.float32([0.3, 0.7]), end == 1)
    gif.save()
    with Image.open(tmp_path / "ticks.gif") as image:
        image.seek(19)
        pixels = np.asarray(image.convert("L"))
        assert pixels[165:185, 360:394].min() < 100  # it is there
        assert pixels[:, 397:].min() > 240


HEADER = {"timesteps": 2, "size": None, "bins": "20ms", "values": "count", "resize": "area"}
HEADER |= {"dtype": "uint8", "sensor": "34x34"}


def test_replay_needs_windows_of_a_fixed_size(tmp_path, capfd):
    trained, recording = tmp_path / "model.safetensors", tmp_path / "it.npz"
    recording.touch()
    config = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d", "data.kind": "events"})
    small = {"name": "spiking_convnet_dvs", "arguments": {"channels": [4, 8], "input_size": 16}}
    config["model"] = small | {"num_classes": 2}
    network = timm.create_model(small["name"], num_classes=2, **small["arguments"])
    weights = network.state_dict()
    for binning, expected in (
        (None, "was trained on images, or on recordings whose binning it does not know; train on"),
        ({"bins": "count"}, "parts of a whole recording, which a stream cannot know; bin by wind"),
        ({}, "binning of its recordings is damaged: timesteps cannot be read"),
        (HEADER | {"size": "-1x5"}, "damaged: size cannot be read"),
        (HEADER | {"sensor": "1000000x1000000"}, "damaged: sensor cannot be read"),
        (HEADER, "it.npz: the file is empty"),
    ):
        values = {"config": config, "classes": ["a", "b"], "timesteps": 2, "step": 0}
        description = checkpoint.Description(**values, binning=binning)
        checkpoint.write_model_file(trained, weights, description)
        assert tool("replay").main([str(recording), "--checkpoint", str(trained)]) == 2
        assert expected in capfd.readouterr().err
        trained.unlink()


def test_results_carry_the_split(data_root, run, tmp_path, capfd, caplog, monkeypatch):
    assert [line["data_split"] for line in tiny.metrics(run, "val")] == [SPLIT]
    with sqlite3.connect(run.parent / "mlflow.db") as store:
        assert store.execute("select value from tags where key = 'data_split'").fetchall() == [
            (SPLIT,)
        ]
    result = tmp_path / "result.json"
    monkeypatch.chdir(run.parents[1])
    arguments = ["--checkpoint", run.name, "--json", str(result), "--execution", "reference"]
    threads = torch.get_num_threads()
    try:
        assert tool("eval").main(arguments) == 0
        assert f"6 samples of val of the split {SPLIT}" in capfd.readouterr().out
        assert "binned" not in caplog.text
        found = json.loads(result.read_text())
        assert found["data_split"] == SPLIT
        # Numbers of events are accumulates, and so are means of spikes.
        assert found["operations"]["multiply_accumulates"] == 0
        described = data_root / "dataset.json"
        described.write_text(described.read_text().replace('"count"', '"occupancy"'))
        assert tool("eval").main([*arguments, "--timesteps", "3"]) == 2
        assert "exceeds the data's 2 time bins" in capfd.readouterr().err
        assert "binned with --values occupancy, but those of the training with" in caplog.text

        # Where the data does not say its split, nothing does.
        described.unlink()
        assert tool("eval").main(arguments) == 0
        assert "data_split" not in json.loads(result.read_text())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("bins", "depends"), [("count", True), ("20ms", False)])
def test_another_number_of_timesteps_matters_if_bins_depend_on_it(tmp_path, bins, depends):
    data = {"split": "published", "parameters": {"bins": bins, "timesteps": 4}}
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    assert bool(other_binning({"bins": bins, "timesteps": 2}, str(tmp_path))) == depends
