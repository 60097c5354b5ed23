"""Neurons without a norm, fused, against their definition: in C++, and in Triton."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import (
    IMPLEMENTATIONS,
    assert_same,
    draw,
    each_implementation,
    fused_and_defined,
    kept_tensors,
    results_of,
)
from torch import nn

from tetdist.nn import neurons
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron, carrying_membranes, spiking_layers

# test_fused.py builds the libraries of these, too.
KINDS = {
    "hard": LIF(),
    "hard, at the threshold": LIF(
        decay=1.0, detach_reset=True, surrogate="atan", fires_at_threshold=True
    ),
    "soft": LIF(
        decay=0.9, threshold=0.7, reset="soft", surrogate="sigmoid", fires_at_threshold=True
    ),
    "soft, detached": LIF(
        reset="soft", detach_reset=True, surrogate="rectangle", surrogate_width=0.5
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


# Shapes that networks have, and some unusual ones; each (T, B, ...).
LAYOUTS = {
    "image": lambda t: draw(0, t, 2, 3, 4, 5),
    "image, channels last": lambda t: channels_last(draw(0, t, 2, 8, 4, 4)),
    "tokens": lambda t: draw(0, t, 2, 5, 16),
    "tokens, transposed": lambda t: draw(0, t, 2, 16, 5).transpose(2, 3),
    "heads": lambda t: draw(0, t, 2, 4, 5, 8).transpose(2, 3),
    "vector": lambda t: draw(0, t, 2, 7),
    "a number": lambda t: draw(0, t),
    "batch first": lambda t: draw(0, 3, t, 6).transpose(0, 1),
    "with gaps": lambda t: draw(0, t, 2, 130)[:, :, ::2],
    "expanded": lambda t: draw(0, t, 1, 6).expand(t, 3, 6),
    "more than is worked on at a time": lambda t: draw(0, t, 3, 43),
}


def assert_fused_is_the_definition(neuron, current, implementation, timesteps=None):
    leaf = current.detach().requires_grad_()
    inputs = {"current": leaf}
    results = fused_and_defined(neuron, lambda m: m(leaf, timesteps), inputs, implementation)
    assert 0.05 < results["output"].mean() < 0.95


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_any_layout(implementation, layout):
    current = 2 * LAYOUTS[layout](4)
    assert_fused_is_the_definition(Neuron(LIF()), current, implementation)
    with IMPLEMENTATIONS[implementation]():
        spikes = Neuron(LIF())(current)
    assert spikes.shape == current.shape
    if "channels last" in layout or layout in ("tokens, transposed", "heads"):
        assert spikes.stride() == current.stride()


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(st.sampled_from(list(KINDS)), st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**31))
def test_any_combination_native(kind, timesteps, size, seed):
    leaf = (2 * draw(seed, timesteps, 2, size) + 0.5).requires_grad_()
    fused_and_defined(Neuron(KINDS[kind]), lambda m: m(leaf), {"current": leaf})


@each_kind
@each_implementation
def test_whole_numbers_meet_the_threshold_exactly(implementation, kind):
    """Input as in attention, whose neurons get sums of spikes."""
    config = dataclasses.replace(KINDS[kind], threshold=1.0)
    current = draw(3, 4, 2, 64).round()
    assert (current[0] == 1).double().mean() > 0.1
    assert_fused_is_the_definition(Neuron(config), current, implementation)
    with IMPLEMENTATIONS[implementation]():
        spikes = Neuron(config)(current)
    assert (spikes[0][current[0] == 1] == config.fires_at_threshold).all()


@pytest.mark.parametrize("fires_at_threshold", [False, True])
@each_implementation
def test_one_current_for_all_timesteps(implementation, fires_at_threshold):
    """Input as from a static image after the stem."""
    config = dataclasses.replace(
        KINDS["hard, at the threshold"], fires_at_threshold=fires_at_threshold
    )
    current = 2 * channels_last(draw(0, 1, 2, 8, 3, 2))
    assert_fused_is_the_definition(Neuron(config), current, implementation, timesteps=3)
    with IMPLEMENTATIONS[implementation]():
        assert Neuron(config)(current, 3).shape == (3, 2, 8, 3, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@each_implementation
def test_types(implementation, dtype):
    """Membranes are float32, also in the definition, so the spikes are equal."""
    current = (2 * draw(0, 4, 2, 48)).to(dtype)
    results = []
    for execution in ("fused", "reference"):
        neuron = Neuron(LIF(surrogate="atan", detach_reset=True, fires_at_threshold=True))
        neuron.execution = execution
        leaf = current.clone().requires_grad_()
        with IMPLEMENTATIONS[implementation]():
            results.append(results_of(neuron, lambda m, x=leaf: m(x), {"current": leaf}))
    assert results[0]["output"].dtype == dtype
    assert torch.equal(results[0]["output"], results[1]["output"])
    ours, theirs = (result["gradient of current"].double() for result in results)
    assert (ours - theirs).norm() / theirs.norm() < 4 * torch.finfo(dtype).eps


@each_implementation
def test_nothing_but_the_current_is_kept(implementation):
    current = channels_last(draw(0, 16, 2, 8, 4, 4)).requires_grad_()
    with IMPLEMENTATIONS[implementation](), kept_tensors() as kept:
        Neuron(LIF())(current)
    assert [tensor.data_ptr() for tensor in kept] == [current.data_ptr()]
    assert kept[0].numel() == current.numel()


@each_implementation
def test_gradient_of_the_last_membrane_alone(implementation):
    current, results = 2 * draw(0, 3, 2, 16), []
    for execution in ("fused", "reference"):
        neuron = Neuron(LIF())
        neuron.execution = execution
        leaf, start = current.clone().requires_grad_(), draw(1, 2, 16).requires_grad_()
        with IMPLEMENTATIONS[implementation](), carrying_membranes([neuron], [start]) as ends:
            neuron(leaf)
            ends()[0].square().sum().backward()
        assert leaf.grad is not None
        assert start.grad is not None
        results.append({"current": leaf.grad, "start": start.grad})
    assert_same(*results)


def test_it_is_a_layer_of_neurons():
    net = nn.ModuleDict({"spiking": Neuron(LIF()), "relu": Neuron(neurons.make({"kind": "relu"}))})
    assert spiking_layers(net).keys() == {"spiking"}
    neuron = Neuron(LIF())
    neuron.execution = "fast"
    with pytest.raises(ValueError, match="execution must be 'fused' or 'reference', not 'fast'"):
        neuron(torch.zeros(1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnThresholds(LIF):
    """A kind without fused kernels, with a shift per channel."""

    def parameters(self, num_channels):
        return {"shift": torch.arange(num_channels) / num_channels}

    def run(self, current, membrane, **parameters):
        return neurons.run(current + parameters["shift"], self, membrane)


def test_what_a_channel_learns_is_of_the_channel():
    neuron = Neuron(OwnThresholds(), 4)
    for current, view in (
        (draw(0, 3, 2, 4, 2, 2), (4, 1, 1)),
        (draw(0, 3, 2, 5, 4), (4,)),
        (draw(0, 3, 2, 4), (4,)),
    ):
        shift = neuron.learned["shift"].detach().view(view)
        assert torch.equal(neuron(current), neurons.run(current + shift, LIF())[0])
