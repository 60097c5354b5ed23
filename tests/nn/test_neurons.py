"""Neurons: their dynamics by hand, their surrogates, and the gradient through time."""

import math

import pytest
import torch

from tetdist.nn.neurons import LIF, as_dict, completed, run
from tetdist.nn.surrogates import SURROGATES

# Currents, spikes and the last membrane, worked out by hand in binary fractions: float arithmetic
# is exact on them, so every comparison is for equality.
BY_HAND = {
    "lif-hard": (LIF(), [0.5, 0.5, 0.5, 1.0, 0.5], [0, 0, 0, 1, 0], 0.5),
    # 1.5 fires and leaves 0.5; 2.1875 fires once and leaves 1.1875, above the threshold.
    "lif-soft": (LIF(reset="soft"), [1.5, 0.5, 0.5, 1.75, 0.5], [1, 0, 0, 1, 1], 0.09375),
    "lif-slow-leak": (LIF(decay=0.75), [1.0, 0.5, 0.5, -1.0], [0, 1, 0, 0], -0.625),
    "if-hard": (LIF(decay=1.0), [0.5, 0.5, 0.25, 0.75, -0.5], [0, 0, 1, 0, 0], 0.25),
    "if-soft": (LIF(decay=1.0, reset="soft"), [0.75, 0.5, 0.75, 2.5, 0.0], [0, 1, 0, 1, 1], 1.5),
    "low-threshold-hard": (LIF(threshold=0.5), [0.75, 0.5, 0.5, 0.25], [1, 0, 1, 0], 0.25),
    "high-threshold-soft": (
        LIF(threshold=2.0, reset="soft"),
        [3.0, 2.0, 1.0, 0.0],
        [1, 1, 0, 0],
        0.625,
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_sequence_by_hand(case):
    config, current, spikes, membrane = BY_HAND[case]
    fired, u = run(torch.tensor(current), config)
    assert fired.tolist() == spikes
    assert u.item() == membrane


@pytest.mark.parametrize("threshold", [0.25, 3.0])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_membrane_exactly_at_the_threshold(threshold, reset):
    """It is silent, or fires if configured to."""
    below, above = math.nextafter(threshold, 0), math.nextafter(threshold, math.inf)
    current = torch.tensor([[below, threshold, above]], dtype=torch.float64, requires_grad=True)
    for fires in (False, True):
        config = LIF(threshold=threshold, reset=reset, fires_at_threshold=fires)
        fired, u = run(current, config)
        assert fired.tolist() == [[0, fires, 1]]
        assert u[:2].tolist() == [below, 0 if fires else threshold]
        # The surrogate is centred on the threshold in either case.
        (gradient,) = torch.autograd.grad(fired[0, 1], current)
        assert gradient.tolist() == [[0, 1, 0]]


def test_given_membrane_is_where_the_neuron_starts():
    fired, u = run(torch.tensor([[0.5, 0.5]]), LIF(), torch.tensor([1.0, 1.5]))
    assert fired.tolist() == [[0, 1]]  # 0.5 + 0.5 is at the threshold, 0.75 + 0.5 above it
    assert u.tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------ surrogates


def _triangle_integral(x, width):
    if x <= 0:
        return max(0.0, x + width) ** 2 / (2 * width**2)
    return 1 - max(0.0, width - x) ** 2 / (2 * width**2)


# Smooth steps from 0 to 1 that replace the spike; the surrogates are their derivatives.
ANTIDERIVATIVES = {
    "triangle": _triangle_integral,
    "atan": lambda x, alpha: math.atan(math.pi / 2 * alpha * x) / math.pi + 0.5,
    "sigmoid": lambda x, alpha: 0.5 * (1 + math.tanh(alpha * x / 2)),
    "rectangle": lambda x, width: min(1.0, max(0.0, (x + width) / (2 * width))),
}

each_surrogate = pytest.mark.parametrize("surrogate", SURROGATES)
each_width = pytest.mark.parametrize("width", [0.5, 1.0, 2.0, 4.0])


@each_width
@each_surrogate
def test_surrogate_is_the_derivative_of_a_step(surrogate, width):
    step = ANTIDERIVATIVES[surrogate]
    assert step(-1e9, width) == pytest.approx(0, abs=1e-8)
    assert step(1e9, width) == pytest.approx(1, abs=1e-8)
    assert step(0, width) == 0.5
    # An irregular grid that misses the kinks at 0 and at +-width by more than h.
    xs = [-5.1 + 0.0937 * i for i in range(110)]
    h = 1e-5
    differences = [(step(x + h, width) - step(x - h, width)) / (2 * h) for x in xs]
    slopes = SURROGATES[surrogate](torch.tensor(xs, dtype=torch.float64), width)
    assert slopes.tolist() == pytest.approx(differences, rel=1e-6, abs=1e-8)


def test_surrogates_at_values_from_the_papers():
    x = torch.tensor([-2.0, -0.25, 0.0, 0.5, 1.0], dtype=torch.float64)
    # TET: gamma = 1; SEW-ResNet: 1 / (1 + (pi x)^2) at alpha = 2; STBP: a window of height 1/(2a).
    assert SURROGATES["triangle"](x, 1.0).tolist() == [0, 0.75, 1, 0.5, 0]
    torch.testing.assert_close(SURROGATES["atan"](x, 2.0), 1 / (1 + (math.pi * x) ** 2))
    assert SURROGATES["rectangle"](x, 0.5).tolist() == [0, 1, 1, 0, 0]
    assert SURROGATES["sigmoid"](x, 4.0)[2] == 1


# ------------------------------------------------------------------------ gradient through time


def _gradient_by_sensitivities(current, rest, config, spike_weights):
    """Gradient of ``sum_t weight[t] s[t] + membrane`` in plain numbers, forwards in time.

    Carries d(everything)/d(input) along with the neuron, one input at a time; autograd goes
    backwards, so the two share nothing. The last input is the membrane at the start.
    """
    num_inputs = len(current) + 1
    slope_of = SURROGATES[config.surrogate]
    u, du = rest, [0.0] * len(current) + [1.0]
    gradient = [0.0] * num_inputs
    for t, (current_t, weight) in enumerate(zip(current, spike_weights, strict=True)):
        u = config.decay * u + current_t
        du = [config.decay * d + (i == t) for i, d in enumerate(du)]
        s = float(u > config.threshold)
        x = torch.tensor(u - config.threshold, dtype=torch.float64)
        ds = [slope_of(x, config.surrogate_width).item() * d for d in du]
        gradient = [g + weight * d for g, d in zip(gradient, ds, strict=True)]
        ds_reset = [0.0] * num_inputs if config.detach_reset else ds
        if config.reset == "hard":
            du = [d * (1 - s) - u * r for d, r in zip(du, ds_reset, strict=True)]
            u = u * (1 - s)
        else:
            du = [d - config.threshold * r for d, r in zip(du, ds_reset, strict=True)]
            u = u - config.threshold * s
    gradient = [g + d for g, d in zip(gradient, du, strict=True)]
    return gradient[:-1], gradient[-1]


@pytest.mark.parametrize("decay", [0.5, 1.0], ids=["lif", "if"])
@pytest.mark.parametrize("detach_reset", [False, True], ids=["through-reset", "detached"])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@each_surrogate
def test_gradient_through_time(surrogate, reset, detach_reset, decay):
    config = LIF(
        decay=decay,
        threshold=0.75,
        reset=reset,
        detach_reset=detach_reset,
        surrogate=surrogate,
        surrogate_width=1.25,
    )
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 0.6 + 0.4
    rest = torch.rand(4, generator=generator, dtype=torch.float64) - 0.5
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    current.requires_grad_()
    rest.requires_grad_()
    spikes, membrane = run(current, config, rest)
    assert 0 < spikes.mean() < 1  # both branches of the reset are taken
    ((spikes * weight).sum() + membrane.sum()).backward()

    assert current.grad is not None
    assert rest.grad is not None
    for n in range(4):
        by_current, by_rest = _gradient_by_sensitivities(
            current[:, n].tolist(), rest[n].item(), config, weight[:, n].tolist()
        )
        assert current.grad[:, n].tolist() == pytest.approx(by_current, rel=1e-10, abs=1e-12)
        assert rest.grad[n].item() == pytest.approx(by_rest, rel=1e-10, abs=1e-12)


def test_sigmoid_control_has_its_own_gradient():
    config = LIF(spike="sigmoid", surrogate="sigmoid", surrogate_width=5.0)
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    out, membrane = run(current, config)
    first = torch.sigmoid(5 * (current[0] - 1))
    assert torch.equal(out[0], first)
    # A hard reset with a number between 0 and 1 removes that fraction.
    assert torch.allclose(
        out[1], torch.sigmoid(5 * (current[0] * (1 - first) / 2 + current[1] - 1))
    )
    # Against finite differences: through time, and through the resets.
    assert torch.autograd.gradcheck(lambda i: run(i, config), current)
    # With a step, the same check fails: that is the mismatch.
    step = LIF(surrogate="sigmoid", surrogate_width=5.0)
    assert not torch.autograd.gradcheck(lambda i: run(i, step), current, raise_exception=False)
    assert membrane.shape == (6,)


def test_sigmoid_control_asks_for_its_derivative():
    with pytest.raises(ValueError, match="spike needs surrogate=sigmoid, not triangle; set that"):
        LIF(spike="sigmoid")
    with pytest.raises(ValueError, match="spike must be one of step, sigmoid, not 'stop'"):
        LIF(spike="stop")
    with pytest.raises(ValueError, match="fires_at_threshold needs spike=step"):
        LIF(spike="sigmoid", surrogate="sigmoid", fires_at_threshold=True)


# ------------------------------------------------------------------------------------- precision


def test_bfloat16_current_keeps_a_float32_membrane():
    # 1 + 2^-10 is above the threshold, but is 1 in bfloat16: such a membrane would never fire.
    current = torch.tensor([1.0, 2**-10, 0.5], dtype=torch.bfloat16, requires_grad=True)
    spikes, membrane = run(current, LIF(decay=1.0))
    assert spikes.dtype == torch.bfloat16
    assert membrane.dtype == torch.float32
    assert spikes.tolist() == [0, 1, 0]
    spikes.sum().backward()
    assert current.grad.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------- errors


def test_defaults_are_the_papers_neuron():
    assert LIF() == LIF(
        decay=0.5,
        threshold=1.0,
        reset="hard",
        detach_reset=False,
        surrogate="triangle",
        surrogate_width=1.0,
        fires_at_threshold=False,
    )


def test_numbers_of_an_earlier_version_are_completed():
    earlier = {"decay": 0.75, "reset": "soft"}
    assert completed(earlier) == as_dict(LIF(decay=0.75, reset="soft"))
    assert completed({"kind": "somebodys", "a": 1}) == {"kind": "somebodys", "a": 1}
