"""Transformers in and out: from a published file to a program that somebody else runs."""

import onnxruntime
import published_formers as formers
import published_transformers as published
import pytest
import timm
import torch
from published_transformers import Published, QKFormerSize, SDTSize

from tetdist.apps.weights.trained import Trained, load
from tetdist.nn.integer_neurons import NILIF
from tetdist.storage import checkpoint

QKFORMER = QKFormerSize("imagenet", (8, 16, 24), (1, 1, 1), 2)
SDT = SDTSize(32, 1)
ESPIKEFORMER = formers.ESpikeFormerSize((8, 8, 8, 12), (1, 1), heads=2)
MAXFORMER = formers.MaxFormerSize((8, 16, 24), (1, 1, 1), heads=2)
NAMES = {
    "qkformer": "qkformer_10_384",
    "sdt": "sdt_8_384",
    "espikeformer": "espikeformer_s",
    "maxformer": "maxformer_10_384",
    "ms_qkformer": "ms_qkformer_10_384",
}
TIMESTEPS = dict.fromkeys(NAMES, 2) | {"espikeformer": 1}  # which is published so
each_family = pytest.mark.parametrize("family", NAMES)


pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(family):
    shapes = {
        "qkformer": published.qkformer_shapes(QKFORMER),
        "sdt": published.sdt_shapes(SDT),
        "espikeformer": formers.espikeformer_shapes(ESPIKEFORMER),
        "maxformer": formers.maxformer_shapes(MAXFORMER),
        "ms_qkformer": formers.ms_qkformer_shapes(QKFORMER),
    }
    gain = 4.0 if family == "espikeformer" else 1.0
    return published.random_state(shapes[family], gain=gain)


def converted(family, call, folder, *more):
    """A file made of a small published one, and the command's output."""
    wrapper, small = {
        "qkformer": ("model", {"widths": [8, 16, 24], "depths": [1, 1, 1], "heads": 2}),
        "sdt": ("state_dict", {"channels": 32, "depth": 1}),
        "espikeformer": ("model", {"widths": [8, 8, 8, 12], "depths": [1, 1], "heads": 2}),
        "maxformer": ("model", {"widths": [8, 16, 24], "depths": [1, 1, 1], "heads": 2}),
        "ms_qkformer": ("model", {"widths": [8, 16, 24], "depths": [1, 1, 1], "heads": 2}),
    }[family]
    name = "".join(letter for letter in "-".join(more) if letter.isalnum())
    source, output = folder / f"{family}.pth", folder / f"{family}{name}.safetensors"
    torch.save({wrapper: state_of(family), "epoch": 199}, source)
    command = [
        source,
        "--model",
        NAMES[family],
        "--timesteps",
        TIMESTEPS[family],
        "--output",
        output,
    ]
    arguments = [f"model.arguments.{key}={value}" for key, value in small.items()]
    status, printed = call("convert", *command, *arguments, "data.image_size=32", *more)
    assert status == 0, printed
    return output, printed


def images(batch):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 3, 32, 32, generator=generator)


@each_family
def test_published_file_is_recognised_computes_what_it_did_and_goes_out_again(
    family, call, tmp_path
):
    file, out = converted(family, call, tmp_path)
    repository = {"ms_qkformer": "maxformer"}.get(family, family)
    assert f"as weights of {repository}" in out
    trained = load(file)
    net = Published({k: v.float() for k, v in state_of(family).items()}, training=False)
    frames = images(4).expand(TIMESTEPS[family], -1, -1, -1, -1)
    match family:
        case "qkformer":
            expected = published.qkformer(net, frames, QKFORMER, mixes_samples=False)
        case "sdt":
            expected = published.sdt(net, frames, SDT)
        case "espikeformer":
            expected = formers.espikeformer(net, frames, ESPIKEFORMER)
        case "maxformer":
            expected = formers.maxformer(net, frames, MAXFORMER)
        case "ms_qkformer":
            expected = formers.ms_qkformer(net, frames, QKFORMER)
    with torch.no_grad():
        logits = trained.model(images(4))
        torch.testing.assert_close(logits, expected.mean(0), rtol=1e-4, atol=1e-5)
    data = trained.config.data
    assert data.interpolation == "bicubic"
    side = {"sdt": 235, "espikeformer": 232}.get(family, 256)
    assert data.resize_side == side  # as timm rounds it, of a crop of 95 % of the SDT's
    neuron = trained.config.model.neuron
    if family == "espikeformer":
        assert neuron == NILIF(most_spikes=4)
    else:
        assert neuron.threshold == 2

    status, output = call("export", file, "--format", "timm", "--output", tmp_path / "given")
    assert status == 0, output
    model = timm.create_model(f"local-dir:{tmp_path / 'given'}", pretrained=True).eval()
    model.set_execution("reference")
    with torch.no_grad():
        assert torch.equal(model(images(4)), logits)
    status, output = call("export", file, "--format", "nir", "--output", tmp_path / "net.nir")
    assert status == 2
    assert "NIR cannot express" in output
    assert "the product of two signals, which attention needs" in output


def test_unused_weights_are_named(call, tmp_path):
    _, out = converted("sdt", call, tmp_path)
    assert "1 tensor that the network does not use: block.0.attn.talking_heads.weight" in out


def test_mixing_of_samples_is_reported_and_may_be_asked_for(call, tmp_path):
    plain, out = converted("qkformer", call, tmp_path)
    assert "the samples of a batch influence each other" in out
    mixing, out = converted("qkformer", call, tmp_path, "model.arguments.mixes_samples=true")
    assert "QKFormer's published accuracies" not in out
    with torch.no_grad():
        logits = [load(file).model(images(4)) for file in (plain, mixing)]
    assert not torch.allclose(*logits)


# Traced with all timesteps, of which each is some tens of operations a layer: that takes its time.
LONG = ("qkformer", "espikeformer", "maxformer", "ms_qkformer")


@pytest.mark.parametrize(
    "family", ["sdt", *(pytest.param(family, marks=pytest.mark.long) for family in LONG)]
)
def test_program_of_torch_is_the_network(family, call, tmp_path):
    file, _ = converted(family, call, tmp_path)
    status, output = call("export", file, "--format", "torch", "--output", tmp_path / "net.pt2")
    assert status == 0, output
    assert "its logits match the model's" in output
    x = images(5)  # another batch size than it was traced with
    with torch.no_grad():
        actual = torch.export.load(tmp_path / "net.pt2").module()(x)
        torch.testing.assert_close(actual, load(file).model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@each_family
def test_onnx_graph_is_the_network(family, call, tmp_path):
    file, _ = converted(family, call, tmp_path)
    path = tmp_path / "net.onnx"
    status, output = call("export", file, "--format", "onnx", "--output", path)
    assert status == 0, output
    assert "its logits match the model's" in output
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(5)
    (actual,) = session.run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        expected = load(file).model(x)
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-4)
    step = tmp_path / "step.onnx"
    status, output = call("export", file, "--format", "onnx-step", "--output", step)
    assert status == 0, output
    assert "its logits match the model's" in output


def test_program_of_events_has_the_size_that_the_network_is_described_with():
    """Of a network that takes frames of any size."""
    description = {
        "name": "small",
        "model": {
            "name": "sdt_2_256_dvs",
            "num_classes": 3,
            "arguments": {"channels": 16, "depth": 1},
        },
        "data": {"root": "data", "kind": "events"},
        "batch": {"global": 8, "micro": 4},
        "phases": [{"epochs": 1, "timesteps": 2, "optimizer": {"lr": 0.1}}],
    }
    from tetdist.config.loading import parse

    config = parse(description, "test", warn=False)
    model = config.model.build(num_classes=3, timesteps=2)
    trained = Trained(
        model,
        config,
        checkpoint.Description(
            config=config.as_dict(), classes=None, timesteps=2, step=0, validation=None
        ),
    )
    assert trained.input_shape == (2, 64, 64)
