"""Transformers in and out: from a published file to a program that somebody else runs."""

import pytest
import timm
import tiny
import torch
from published import Published
from test_export import PROGRAMS, export_program, run_program

from tetdist.apps.weights.trained import Trained, load
from tetdist.config.loading import parse
from tetdist.nn.integer_neurons import NILIF
from tetdist.storage import checkpoint

# By its file: the repository's wrapper of the weights, and the side that an image is resized to.
FAMILIES = {
    "qkformer": ("model", 256),
    "sdt": ("state_dict", 235),  # as timm rounds it, of a crop of 95 %
    "espikeformer": ("model", 232),
    "maxformer": ("model", 256),
    "ms_qkformer": ("model", 256),
}
each_family = pytest.mark.parametrize("family", FAMILIES)

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(family, output_of, folder, *more):
    """A file made of a small published one, and the command's output."""
    case = Published(family)
    source, output = folder / f"{family}.pth", folder / f"{family}{len(more)}.safetensors"
    state = {key: x.float() if x.is_floating_point() else x for key, x in case.state().items()}
    torch.save({FAMILIES[family][0]: state, "epoch": 199}, source)
    command = [source, "--model", case.model, "--timesteps", case.timesteps, "--output", output]
    arguments = [f"model.arguments.{key}={value}" for key, value in case.arguments.items()]
    printed = output_of("convert", *command, *arguments, "data.image_size=32", *more)
    return output, printed


@each_family
def test_published_file_is_recognised_computes_what_it_did_and_goes_out_again(
    family, output_of, tmp_path
):
    case = Published(family)
    file, out = converted(family, output_of, tmp_path)
    assert f"as weights of {case.source}" in out
    trained, x = load(file), case.batch()
    with torch.no_grad():
        logits = trained.model(x.float())
        # float32 has the published weights.
        found = trained.model.double()(x, per_timestep=True)
    expected = torch.tensor(case.logits["eval"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    assert trained.config.data.interpolation == "bicubic"
    assert trained.config.data.resize_side == FAMILIES[family][1]
    neuron = trained.config.model.neuron
    assert neuron == NILIF(most_spikes=4) if family == "espikeformer" else neuron.threshold == 2

    output = output_of("export", file, "--format", "timm", "--output", tmp_path / "given")
    model = timm.create_model(f"local-dir:{tmp_path / 'given'}", pretrained=True).eval()
    model.set_execution("reference")
    with torch.no_grad():
        assert torch.equal(model(x.float()), logits)
    output = output_of(
        "export", file, "--format", "nir", "--output", tmp_path / "net.nir", status=2
    )
    assert "needs products of two signals for attention" in output
    assert "for which NIR has no node" in output


def test_unused_weights_are_named(output_of, tmp_path):
    _, out = converted("sdt", output_of, tmp_path)
    assert "2 tensors that the network does not use: block.0.attn.talking_heads.weight" in out


def test_mixing_of_samples_is_reported_and_may_be_asked_for(output_of, tmp_path):
    plain, out = converted("qkformer", output_of, tmp_path)
    assert "the samples of a batch influence each other" in out
    mixing, out = converted("qkformer", output_of, tmp_path, "model.arguments.mixes_samples=true")
    assert "QKFormer's published accuracies" not in out
    x = Published("qkformer").batch().float()
    with torch.no_grad():
        logits = [load(file).model(x) for file in (plain, mixing)]
    assert not torch.allclose(*logits)


# Traced with all timesteps, each of which is some tens of operations a layer.
@pytest.mark.long
@each_family
def test_programs_are_the_network(family, output_of, tmp_path):
    file, _ = converted(family, output_of, tmp_path)
    trained = load(file)
    trained.model.set_timesteps(2)
    x = trained.examples(5)  # another batch size than they are traced with
    for form in PROGRAMS:
        path = export_program(output_of, file, form, "--timesteps", 2)
        if form != "onnx-step":
            with torch.no_grad():
                actual, expected = run_program(form, path, x)[0], trained.model(x)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_program_of_events_has_the_size_that_the_network_is_described_with():
    """Of a network that takes frames of any size."""
    arguments = {"channels": 16, "depth": 1}
    changes = {"model": {"name": "sdt_2_256_dvs", "arguments": arguments}, "name": "small"}
    changes |= {"data": {"root": "data", "kind": "events"}}
    config = parse(tiny.changed(tiny.CONFIG, changes), "test")
    model = config.model.build(num_classes=3, timesteps=2)
    description = checkpoint.Description(
        config=config.as_dict(), classes=None, timesteps=2, step=0, validation=None
    )
    assert Trained(model, config, description).input_shape == (2, 64, 64)
