"""Plots of a sample: what they show is what the network computes."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tetdist.apps.reports import sample_plot
from tetdist.apps.reports.replay_gif import coloured
from tetdist.apps.reports.style import RATE
from tetdist.apps.weights.trained import load
from tetdist.models import SpikingNetwork
from tetdist.nn.norm_neuron import firing_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def images_and_durations(file):
    with Image.open(file) as gif:
        for number in range(gif.n_frames):
            gif.seek(number)
            yield np.asarray(gif.convert("RGB")).astype(int), gif.info["duration"]


def test_command_draws_a_sample(output_of, tiny_config, tiny_root, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_config({"plots": False}), "max_steps=1").status == 0
    run = tmp_path / "runs" / "tiny"
    assert f"wrote {run}/sample-0.png and" in output_of("show", run, "--output", run)
    printed = output_of("show", run, "--sample", 1, "--output", "it.png")
    seen = sample_plot.see(run, "last", 1, "val", None, [])
    timesteps = len(seen.probabilities)
    assert printed.startswith(f"{seen.title}\n")
    for t, probabilities in enumerate(seen.probabilities, start=1):
        answer = probabilities.argmax()
        assert f"  t={t}  {seen.classes[answer]}  {100 * probabilities[answer]:.1f} %" in printed
    assert printed.endswith("wrote it.png and it.gif\n")
    with Image.open("it.png") as image:
        assert image.width == sample_plot.WIDTH * sample_plot.DPI
        assert np.unique(np.asarray(image)).size > 20
    drawn = list(images_and_durations("it.gif"))
    assert [duration for _, duration in drawn] == [700] * (timesteps - 1) + [2000]
    trained = load(run)
    assert seen.classes == trained.description.classes
    file, label = re.fullmatch(r"(val/.+), class (.+)", seen.title).groups()
    assert file.split("/")[1] == label
    assert (tiny_root / file).exists()
    data, image = trained.config.data, seen.rows["input"][0]
    assert image.shape == (data.image_size, data.image_size, 3)
    x = torch.tensor((image - data.mean) / data.std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = trained.model(x, per_timestep=True)[:, 0]
    assert [*seen.rows][-1].endswith(f"the input speaks for {seen.classes[answer]} (orange)")
    for t, probabilities in enumerate(seen.probabilities, start=1):
        np.testing.assert_allclose(probabilities, logits[:t].mean(0).softmax(-1), atol=1e-4)
    printed = output_of("show", run, "--sample", 1000, status=2)
    assert "there is no sample 1000 in val, which has" in printed
    printed = output_of("show", run, "--output", "/proc/it", status=2)
    assert re.search(
        r"error: (--output: cannot write )?/proc/it\.png( cannot be written \(|: name)", printed
    )


def test_colours_of_events_are_named(tiny_config, main, tmp_path):
    assert main(tiny_config({"data.images_as_events": {}}), "max_steps=1").status == 0
    seen = sample_plot.see(tmp_path / "runs" / "tiny", "last", 1, "val", None, [])
    title, frames = next(iter(seen.rows.items()))
    assert title == "input: ON events blue, OFF events orange"
    on, off = (np.stack(frames)[..., channel] == 0 for channel in (0, 2))  # no red, no blue
    assert on.any()
    assert off.any()


@pytest.fixture
def network() -> SpikingNetwork:
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet18", num_classes=5, timesteps=3, width=8)
    x = torch.rand(4, 3, 64, 64)
    for _ in range(20):
        model(x)  # running statistics
    return model.eval()


def test_spikes_and_answers_are_the_networks(network):
    x = torch.rand(1, 3, 64, 64)
    spikes, logits = sample_plot._spikes(network, x)
    with torch.no_grad():
        assert torch.equal(logits, network(x, per_timestep=True))
    layers = list(firing_layers(network))
    first, middle, last = spikes
    assert (first, last) == (layers[0], layers[-1])
    assert middle.startswith("blocks.4.")
    found = {}
    network.get_submodule(layers[-1]).register_forward_hook(
        lambda _module, _inputs, output: found.update(output=output)
    )
    with torch.no_grad():
        network(x)
    expected = found["output"][:, 0].float().mean(1)
    assert 0 < expected.mean() < 1
    np.testing.assert_allclose(spikes[layers[-1]], expected, rtol=1e-6)


def test_class_activation_adds_up_to_the_logit(network):
    """Behind a mean over positions, what it shows is the classifier's, if it is positive."""
    network.fc.bias.data.zero_()
    x = torch.rand(1, 3, 64, 64)
    activation = sample_plot._activation(network, x)
    with torch.no_grad():
        logits = network(x, per_timestep=True)
        features = network.forward_features(x).float()
    answer = int(logits.mean(0).argmax())
    weights = network.fc.weight[answer].detach()
    expected = torch.einsum("c,tchw->thw", weights, features[:, 0]) / features[0, 0, 0].numel() / 3
    assert expected.sum() == pytest.approx(float(logits.mean(0)[0, answer]), rel=1e-5)
    assert expected.min() < 0 < expected.max()
    np.testing.assert_allclose(activation, expected.clamp(min=0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("timesteps", [1, 7])
def test_events_are_drawn_at_any_number_of_timesteps(timesteps, tmp_path):
    rng = np.random.default_rng(0)
    events = [coloured(frame) / 255 for frame in rng.integers(0, 3, (timesteps, 2, 8, 6))]
    moves = sample_plot._tinted(
        np.ones((timesteps, 1, timesteps, 3)), np.eye(timesteps)[:, None], RATE
    )
    seen = sample_plot.Seen(
        title="val/left/1.npy, class left",
        classes=["left", "right", "up", "down"],
        rows={"input": events, "stem: a spike moves from left to right": moves},
        probabilities=rng.dirichlet(np.ones(4), timesteps),
    )
    sample_plot.draw(seen, tmp_path / "it.png", tmp_path / "it.gif")
    with Image.open(tmp_path / "it.png") as image:
        assert image.width == sample_plot.WIDTH * sample_plot.DPI
    places = []
    for image, _ in images_and_durations(tmp_path / "it.gif"):
        red, green, blue = image[: len(image) // 3].transpose(2, 0, 1)
        places.append(np.nonzero((green > red + 60) & (green > blue + 20))[1].mean())
    assert len(places) == timesteps
    assert (np.diff(places) > 0).all()
