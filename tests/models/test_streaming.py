"""Streaming: one timestep at a time is the whole pass, for every family and kind of neuron."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from tetdist.errors import UserError
from tetdist.losses import running_means
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm, update_running_statistics
from tetdist.nn.norm_neuron import Neuron, NormNeuron, carrying_membranes

T = 3
NETWORKS = [
    ("spiking_convnet", {}),
    ("spiking_convnet", {"kind": "plif"}),
    ("spiking_convnet", {"kind": "ilif"}),
    ("spiking_convnet", {"kind": "nilif"}),
    ("spiking_convnet", {"kind": "sliding_psn", "order": 3}),
    ("spiking_convnet_dvs", {}),
    ("sew_resnet18", {}),
    ("psn_sew_resnet18", {"kind": "sliding_psn"}),
    ("spiking_resnet18_cifar", {}),
    ("ms_resnet14_cifar", {}),
    ("preact_resnet18", {}),
    ("i2e_msnet18", {}),
    ("vggsnn", {}),
    ("qkformer_4_384_cifar", {}),
    ("sdt_2_256_dvs", {}),
    ("espikeformer_t", {}),
    ("maxformer_10_384", {}),
    ("ms_qkformer_2_256_dvs", {}),
]

# Of networks that would take seconds: fewer channels, or pixels.
SMALLER = {
    "vggsnn": {"input_size": 16},
    "espikeformer_t": {"widths": (16, 16, 32, 32)},
    "maxformer_10_384": {"widths": (16, 32, 48), "depths": (1, 1, 2)},
    "qkformer_4_384_cifar": {"widths": (16, 32, 64)},
    "sew_resnet18": {"width": 16},
    "psn_sew_resnet18": {"width": 16},
    "preact_resnet18": {"width": 16},
    "ms_resnet14_cifar": {"width": 16},
    "spiking_resnet18_cifar": {"width": 16},
    "sdt_2_256_dvs": {"channels": 64},
    "ms_qkformer_2_256_dvs": {"widths": (32, 64)},
}


def make(name, neuron):
    """A network in float64 whose neurons fire, in evaluation mode, and six samples."""
    torch.manual_seed(0)
    arguments = {"timesteps": T, "neuron": neuron or None} | SMALLER.get(name, {})
    model = timm.create_model(name, **arguments).double()
    *_, channels, size, _ = model.pretrained_cfg["input_size"]
    size = model.input_size or min(size, 32)
    frames = (T,) if model.input_kind == "events" else ()
    x = torch.rand(6, *frames, channels, size, size, dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model(x)
        update_running_statistics(model, lambda flat: flat)
        for norm in norms:
            norm.weight.mul_(1.5)
            norm.bias.add_(0.3)
    return model.eval(), x


def whole(model, x):
    """The outputs at every t of the whole pass, (T, B, K)."""
    with torch.no_grad():
        return running_means(model(x, per_timestep=True))


def frame(model, x, t):
    """Return a step's input: an event frame, or an image, once."""
    if model.input_kind == "events":
        return x[:, t]
    return x if t == 0 else None


@pytest.mark.parametrize(("name", "neuron"), NETWORKS, ids=lambda one: str(one))
def test_each_step_is_the_whole_pass_up_to_it(name, neuron):
    """Also for the samples that remain when others are dropped."""
    model, x = make(name, neuron)
    expected = whole(model, x)
    assert expected.std(0).mean() > 1e-3  # Neurons fire, differently at each timestep.
    stream = model.stream()
    for t in range(T):
        output = stream.step(frame(model, x, t))
        torch.testing.assert_close(output, expected[t], rtol=0, atol=1e-12)
        if t == 1:
            mask = torch.tensor([True, False, True, True, True, False])
            stream.keep(mask)
            x, expected = x[mask], expected[:, mask]


def test_a_stream_in_bfloat16_is_the_whole_pass(monkeypatch):
    model, x = make("sew_resnet18", {})
    model, x = model.float(), x.float()
    convolve = torch.nn.Conv2d._conv_forward

    def one_by_one(self, images, *weights):
        return torch.cat([convolve(self, one.clone(), *weights) for one in images.split(1)])

    # On some processors convolutions of T * B images round otherwise than those of B.
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", one_by_one)
    with torch.autocast("cpu", torch.bfloat16):
        expected, stream = whole(model, x), model.stream()
        for t in range(T):
            output = stream.step(frame(model, x, t))
            torch.testing.assert_close(output, expected[t], rtol=0, atol=1e-5)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("execution", ["fused", "reference"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [k for k, one in neurons.NEURONS.items() if one.segments])
def test_layers_carry_membranes_bitwise(kind, precision, execution):
    torch.manual_seed(0)
    neuron, current = neurons.make({"kind": kind}), 2 * torch.rand(T, 4, 8, 5, 5).to(precision)
    for layer in (Neuron(neuron, 8), NormNeuron(8, neuron)):
        layer.eval().execution = execution
        expected, steps, membranes = layer(current, T), [], None
        for one in current.split(1):
            with carrying_membranes([layer], membranes) as ends:
                steps.append(layer(one, 1))
                membranes = ends()
        assert torch.equal(torch.cat(steps), expected)
        assert kind == "relu" or not torch.equal(layer(one, 1), expected[-1:])  # without membranes


def test_a_state_continues_in_another_stream():
    model, x = make("spiking_convnet_dvs", {})
    first, second = model.stream(), model.stream()
    for t in range(2):
        first.step(x[:, t])
    second.load_state_dict(first.state_dict())
    second.keep(torch.ones(6, dtype=torch.bool))
    assert torch.equal(second.step(x[:, 2]), first.step(x[:, 2]))
    assert second.timesteps == 3
    fresh = model.stream()
    fresh.load_state_dict(model.stream().state_dict())
    assert torch.equal(fresh.step(x[:, 0]), model.stream().step(x[:, 0]))
    kept, expected = first.state_dict(), first.step(x[:, 2])
    for name, arguments, words in (
        ("spiking_convnet", {}, "has .* neurons|34x34|channels"),
        ("spiking_convnet_dvs", {"num_classes": 3}, r"is Tensor \(6, 10\) .*, not Tensor \(6, 3\)"),
        ("spiking_convnet_dvs", {"channels": (64, 128, 128, 128)}, "is .*, not"),
        ("spiking_convnet_dvs", {}, "float64 on cpu, not"),  # in float32
    ):
        other = timm.create_model(name, **arguments).eval()
        other = other if words.startswith("float64") else other.double()
        with pytest.raises(UserError, match=f"not one of this network.*({words})"):
            other.stream().load_state_dict(kept)
    layer, membrane = next(iter(kept["membranes"].items()))
    stream = model.stream()
    stream.load_state_dict(kept)
    for change, words in (
        (None, r"not one that a stream's state_dict\(\) returned"),
        (kept | {"timesteps": -1}, "timesteps=-1"),
        (kept | {"shape": (2, 34, -1)}, "not one of this network"),
        (kept | {"sum": None}, "which its sum contradicts"),
        (kept | {"membranes": {}}, "it has other neurons"),
        (kept | {"membranes": kept["membranes"] | {layer: membrane[:-1]}}, f"{layer} is"),
        (kept | {"membranes": kept["membranes"] | {layer: membrane * math.nan}}, f"{layer} holds"),
    ):
        with pytest.raises(UserError, match=words):
            stream.load_state_dict(change)
    assert torch.equal(stream.step(x[:, 2]), expected)


def test_streams_of_one_model_run_in_many_threads():
    model, x = make("spiking_convnet", {})
    expected, wrong = whole(model, x), []

    def run(k):
        stream = model.stream()
        for t in (*range(T), *range(T)):
            if t == 0:
                stream.reset()
            output = stream.step(x[k : k + 1] if t == 0 else None)
            if not torch.allclose(output[0], expected[t, k], rtol=0, atol=1e-12):
                wrong.append((k, t))
        return stream.timesteps

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(run, [k % 6 for k in range(32)])) == [T] * 32
    assert not wrong


def test_a_repeated_image_is_convolved_once(monkeypatch):
    model, x = make("sew_resnet18", {})
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    calls, forward = [], type(first)._conv_forward

    def count(self, *arguments):
        calls.extend([1] if self is first else [])
        return forward(self, *arguments)

    monkeypatch.setattr(type(first), "_conv_forward", count)
    stream = model.stream()
    stream.step(x)
    stream.step()
    stream.keep(torch.tensor([True] * 5 + [False]))
    stream.step()
    assert len(calls) == 1
    stream.step(x[:5].clone())  # Its pixels may differ.
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["sew_resnet18", "spiking_convnet_dvs"])
def test_a_frame_written_into_the_memory_of_the_last_one_is_taken_anew(name):
    """And `step()` repeats the last frame as it was, whatever stands in its memory now."""
    model, x = make(name, {})
    frames = x.transpose(0, 1) if model.input_kind == "events" else (x, x.flip(0), x.flip(1))
    ours, expected, buffer = model.stream(), model.stream(), torch.empty_like(frames[0])
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    for image in frames:
        assert torch.equal(ours.step(buffer.copy_(image)), expected.step(image.clone()))
        buffer.zero_()
        assert torch.equal(ours.step(), expected.step())


def test_misuse_is_one_sentence():
    model, x = make("spiking_convnet", {})
    stream = model.stream()
    with pytest.raises(UserError, match=r"no samples before its first step; call step\(x\)"):
        stream.keep(torch.ones(6, dtype=torch.bool))
    for wrong, words in (
        (None, r"there is none; call step\(x\)"),
        (torch.cat([x, x], 1), "the network takes frames of 3 channels, not of 6"),
        (x[..., :-1], "the model is built for 28x28 pixels, but the input has 28x27"),
        (x[None], r"a frame must be a tensor of one timestep \(B, C, H, W\) of floating-point"),
        (x.numpy(), "numbers, not ndarray"),
        (x.float(), r"takes frames of torch.float64; call x.to\(torch.float64\)"),
        (x.index_fill(2, torch.tensor(3), float("nan")), "holds NaN or infinity"),
        (x.to(torch.uint8), r"not Tensor \(6, 3, 28, 28\) of torch.uint8"),
    ):
        with pytest.raises(UserError, match=words):
            stream.step(wrong)
    stream.step(x)
    for wrong in (x[:5], x[..., :-1]):
        with pytest.raises(UserError, match=r"the stream's are \(6, 3, 28, 28\); call reset"):
            stream.step(wrong)
    with pytest.raises(UserError, match="has 28x27; give that size, or"):
        model(x[..., :-1])
    with pytest.raises(UserError, match=r"a bool mask \(6,\)"):
        stream.keep(torch.ones(5, dtype=torch.bool))
    model.train()
    with pytest.raises(UserError, match=r"call model\.eval"):
        stream.step()
    # None of these changed the stream.
    model.eval()
    torch.testing.assert_close(stream.step(), whole(model, x)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["psn", "masked_psn"])
def test_neurons_that_need_all_timesteps_are_refused_by_name(kind):
    model, _ = make("spiking_convnet", {"kind": kind, "timesteps": T})
    with pytest.raises(UserError, match=rf"stem.* has {kind} neurons, .*sliding_psn"):
        model.stream()
