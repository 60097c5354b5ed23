"""Fused kernels of the neurons other than LIF, against their definition: C++ and Triton."""

import itertools

import pytest
import torch
from kernel_runs import (
    IMPLEMENTATIONS,
    draw,
    each_implementation,
    fused_and_defined,
    randomize,
)
from torch import nn

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import make
from tetdist.nn.norm_neuron import Neuron, NormNeuron, carrying_membranes
from tetdist.nn.packed import carried

T = 3
KINDS = {
    "lif": {},
    "plif": {"kind": "plif"},
    "plif, soft": {
        "kind": "plif",
        "decay": 0.75,
        "threshold": 0.7,
        "reset": "soft",
        "decay_input": False,
        "surrogate": "atan",
        "surrogate_width": 2.0,
    },
    "ilif": {"kind": "ilif", "threshold": 0.5},
    "nilif": {"kind": "nilif", "threshold": 0.4, "most_spikes": 8, "detach_reset": True},
    "psn": {"kind": "psn", "timesteps": T},
    "masked_psn": {"kind": "masked_psn", "timesteps": T, "mask": 0.5, "surrogate": "sigmoid"},
    "sliding_psn": {"kind": "sliding_psn", "order": 3},
    "sliding_psn, order 12": {"kind": "sliding_psn", "order": 12, "surrogate": "triangle"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(kind, channels=5):
    torch.manual_seed(0)
    module = NormNeuron(channels, make(KINDS[kind])).double()
    randomize(module)
    with torch.no_grad():
        for value in module.learned.values():
            value += 0.3 * torch.randn_like(value)
    return module


class Whole(nn.Module):
    """A layer with everything that can be added: a normalised shortcut, and spikes."""

    def __init__(self, kind, form):
        super().__init__()
        self.layer = layer(kind)
        if "normalised" in form:
            self.norm = BatchNorm(5).double()
            randomize(self.norm, seed=1)


FORMS = {
    "alone": (lambda m, x: m.layer(x["current"], T), ("current",)),
    "one for all timesteps": (lambda m, x: m.layer(x["still"], T), ("still",)),
    "with a shortcut": (
        lambda m, x: m.layer(x["current"], T, shortcut=x["added"]),
        ("current", "added"),
    ),
    "with a normalised shortcut": (
        lambda m, x: m.layer(x["current"], T, shortcut=x["added"], shortcut_norm=m.norm),
        ("current", "added"),
    ),
    "with spikes": (
        lambda m, x: m.layer(x["current"], T, identity=x["identity"]),
        ("current", "identity"),
    ),
}


def inputs_of(names):
    made = {
        "current": draw(0, T, 3, 5, 3, 4),
        "still": draw(1, 1, 3, 5, 3, 4),
        "added": draw(2, T, 3, 5, 3, 4),
        "identity": (draw(3, T, 3, 5, 3, 4) > 0).double(),
    }
    return {name: made[name].requires_grad_() for name in names}


# Every variant of each kind in one mode; interpreted ones take a second each.
FORMS_ON = {
    "native": [*zip(FORMS, itertools.cycle((True, False)), strict=False)],
    "triton": [("one for all timesteps", False), ("with a normalised shortcut", True)],
}


@pytest.mark.parametrize(
    ("implementation", "kind", "form", "training"),
    [(where, kind, *form) for where, forms in FORMS_ON.items() for kind in KINDS for form in forms],
)
def test_against_the_definition(implementation, kind, form, training):
    call, names = FORMS[form]
    module, inputs = Whole(kind, form).train(training), inputs_of(names)
    results = fused_and_defined(module, lambda m: call(m, inputs), inputs, implementation)
    assert results["output"].std() > 0.1


@each_kind
@each_implementation
def test_neurons_without_a_norm(implementation, kind):
    torch.manual_seed(0)
    module = Neuron(make(KINDS[kind]), 7).double()
    # With quarters, some membranes and sums are exactly at one or four thresholds.
    with torch.no_grad():
        for value in module.learned.values():
            value.mul_(4).round_().div_(4)
    inputs = {"current": draw(0, T, 3, 5, 7).mul(4).round().div(4).requires_grad_()}
    fused_and_defined(module, lambda m: m(inputs["current"]), inputs, implementation)


# A rectangle has slope 0 there.
@pytest.mark.parametrize(
    "neuron",
    [{"surrogate": "triangle"}, {"surrogate": "atan"}, {"surrogate": "sigmoid"}, {"kind": "ilif"}],
)
@each_implementation
def test_nan_is_as_in_the_definition(implementation, neuron):
    current = draw(0, T, 3, 5, 7)
    current[0, 1, 2, 3] = torch.nan
    current.requires_grad_()
    module, inputs = Neuron(make(neuron), 7).double(), {"current": current}
    found = fused_and_defined(module, lambda m: m(current), inputs, implementation, equal_nan=True)
    assert any(one.isnan().any() for one in found.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if make(KINDS[kind]).segments])
@each_implementation
def test_membranes_carried_over_segments(implementation, kind):
    """Outputs and gradients of the second segment, which starts where the first ended; in another
    layout of a single sample."""
    module = layer(kind).eval()
    stacked = module.neuron.sample_axis
    start = 0.5 * draw(4, *([module.neuron.order - 1] if stacked else []), 1, 5, 3, 4)
    start.requires_grad_()
    inputs = {"current": draw(0, T, 1, 5, 3, 4).requires_grad_(), "start": start}

    def call(m):
        with carrying_membranes([m], [inputs["start"]]) as ends:
            spikes = m(inputs["current"], T)
            return torch.cat([spikes, ends()[0] if stacked else ends()[0][None]])

    fused_and_defined(module, call, inputs, implementation)


@each_kind
@each_implementation
def test_spikes_in_bytes(implementation, kind):
    """The next layer keeps what this layer sends, including the added spikes."""
    dtype = torch.bfloat16
    module = layer(kind).float().train()
    current = draw(0, T, 3, 5, 3, 4).to(dtype).requires_grad_()
    with IMPLEMENTATIONS[implementation]():
        first = module(current, T)
        both = module(current, T, identity=first)
        both.float().sum().backward()
        with torch.no_grad():
            assert carried(module(current, T)) is None
        assert carried(module.eval()(current, T)) is None
    levels = KINDS[kind].get("most_spikes", 1) if kind == "nilif" else 1
    for spikes, most in ((first, 1), (both, 2)):
        packed = carried(spikes)
        assert packed.levels == levels
        assert torch.equal(packed.unpack(dtype), spikes)
        assert 0 <= spikes.min() <= spikes.max() <= most * module.neuron.highest
    assert torch.equal(both, 2 * first)
    assert (len(first.unique()) > 2) == ("ilif" in kind)
    assert first.dtype == dtype
    assert current.grad.abs().max() > 0
