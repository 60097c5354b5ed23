"""Kinds of neurons other than LIF: each against its equations, written out again, and by hand."""

import math

import pytest
import torch

from tetdist.nn import neurons
from tetdist.nn.neurons import make
from tetdist.nn.norm_neuron import Neuron, learned_of

DOUBLE = torch.float64


def fires(x, smooth):
    """A step at 0 (included) with the derivative of ``smooth``."""
    soft = smooth(x)
    return (x.detach() >= 0).to(x.dtype) + soft - soft.detach()


def sigmoid_of(alpha):
    return lambda x: torch.sigmoid(alpha * x)


def atan_of(alpha):
    return lambda x: (math.pi / 2 * alpha * x).atan() / math.pi


def plif(x, p, *, soft, scaled, cut):
    """spikingjelly's form: a membrane v and a threshold of 1."""
    v, spikes = torch.zeros_like(x[0]), []
    share = 1 / (1 + (-p["w"]).exp())
    for x_t in x:
        v = v + (x_t - v) * share if scaled else v - v * share + x_t
        s = fires(v - 1, sigmoid_of(4.0))
        spikes.append(s)
        again = s.detach() if cut else s
        v = v - again if soft else (1 - again) * v
    return torch.stack(spikes)


def weighted(x, allowed, bias):
    rows = []
    for t in range(len(x)):
        h = bias(t) + sum(allowed(t, s) * x[s] for s in range(len(x)))
        rows.append(fires(h, atan_of(2.0)))
    return torch.stack(rows)


def psn(x, p):
    return weighted(x, lambda t, s: p["weight"][t, s], lambda t: p["bias"][t])


def masked_psn(x, p, *, order):
    bias = p["bias"]
    return weighted(x, lambda t, s: p["weight"][t, s] * (t - order < s <= t), lambda t: bias[t])


def sliding_psn(x, p, *, order):
    def share(t, s):
        return (
            p["weight"][order - 1 - (t - s)]
            if 0 <= t - s < order
            else torch.zeros((), dtype=DOUBLE)
        )

    return weighted(x, share, lambda _: p["bias"])


def ilif(x, p, *, decay, threshold, most, cut, over):
    assert not p
    u, counts = torch.zeros_like(x[0]), []
    for x_t in x:
        u = decay * u + x_t
        clipped = (u / threshold).clamp(0, most)
        count = clipped + (clipped.round() - clipped).detach()
        counts.append(count)
        u = u - threshold * (count.detach() if cut else count)
    return torch.stack(counts) / over


CASES = {
    "plif": ({"kind": "plif"}, plif, {"soft": False, "scaled": True, "cut": False}),
    "plif, soft": (
        {
            "kind": "plif",
            "decay": 0.75,
            "reset": "soft",
            "detach_reset": True,
            "decay_input": False,
        },
        plif,
        {"soft": True, "scaled": False, "cut": True},
    ),
    "psn": ({"kind": "psn", "timesteps": 5}, psn, {}),
    "masked_psn": ({"kind": "masked_psn", "timesteps": 5}, masked_psn, {"order": 2}),
    "sliding_psn": ({"kind": "sliding_psn", "order": 3}, sliding_psn, {"order": 3}),
    "ilif": (
        {"kind": "ilif"},
        ilif,
        {"decay": 0.25, "threshold": 1.0, "most": 4, "cut": False, "over": 1},
    ),
    "ilif, other numbers": (
        {"kind": "ilif", "decay": 0.5, "threshold": 0.7, "most_spikes": 3, "detach_reset": True},
        ilif,
        {"decay": 0.5, "threshold": 0.7, "most": 3, "cut": True, "over": 1},
    ),
    "nilif": (
        {"kind": "nilif", "most_spikes": 8},
        ilif,
        {"decay": 0.25, "threshold": 1.0, "most": 8, "cut": False, "over": 8},
    ),
}


def doubled(config, seed=0):
    """The neuron's parameters in float64, away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            value.detach().double()
            + 0.2 * torch.randn(value.shape, generator=generator, dtype=DOUBLE)
        ).requires_grad_()
        for name, value in learned_of(config, 3).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_against_the_equations(case):
    values, equations, numbers = CASES[case]
    config = make(values)
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(5, 40, 3, generator=generator, dtype=DOUBLE) * 1.2 + 0.4
    weight = torch.randn(5, 40, 3, generator=generator, dtype=DOUBLE)
    current.requires_grad_()
    parameters = doubled(config)
    leaves = [current, *parameters.values()]

    own, _ = config.run(current, None, **parameters)
    typed = equations(current, parameters, **numbers)
    assert 0 < own.mean() < (config.highest if config.levels else 1)
    torch.testing.assert_close(own, typed, rtol=0, atol=1e-12)
    for got, right in zip(
        torch.autograd.grad((own * weight).sum(), leaves),
        torch.autograd.grad((typed * weight).sum(), leaves),
        strict=True,
    ):
        assert right.abs().max() > 0
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


def test_integer_spikes_by_hand():
    # Halves round to even: 0.5 is silent, 1.5 and 2.5 are two spikes. The excess above 4 remains.
    config = make({"kind": "ilif", "decay": 0.5})
    current = torch.tensor([[0.5, 1.5, 2.5, 5.0, -1.0], [0.0, 0.0, 0.0, 0.0, 3.5]])
    counts, u = config.run(current, None)
    assert counts.tolist() == [[0, 2, 2, 4, 0], [0, 0, 0, 0, 3]]
    assert u.tolist() == [0.25, -0.25, 0.25, 0.5, 0.0]
    assert config.run(current, None)[0].dtype == torch.float32
    shares, _ = make({"kind": "nilif", "decay": 0.5}).run(current, None)
    assert torch.equal(shares, counts / 4)
    ends = torch.tensor([[-0.5, 0.0, 4.0, 4.5]], requires_grad=True)
    config.run(ends, None)[0].sum().backward()
    assert ends.grad.tolist() == [[0, 1, 1, 0]]


def test_plif_begins_as_lif_of_its_decay():
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(6, 50, generator=generator, dtype=DOUBLE) + 0.5
    surrogate = {"surrogate": "sigmoid", "surrogate_width": 4.0}
    config = make({"kind": "plif", "decay": 0.75, "decay_input": False})
    (w,) = config.parameters(3).values()
    assert w.item() == pytest.approx(math.log(0.25 / 0.75))
    assert make({"kind": "plif"}).parameters(3)["w"].item() == 0
    as_lif = make({"decay": 0.75, **surrogate})
    exact = {"w": torch.tensor(math.log(0.25 / 0.75), dtype=DOUBLE)}
    assert torch.equal(config.run(current, None, **exact)[0], as_lif.run(current, None)[0])


@pytest.mark.parametrize("kind", ["psn", "masked_psn", "sliding_psn"])
def test_first_weights_of_psn(kind):
    torch.manual_seed(0)
    numbers = {"sliding_psn": {"order": 100, "init": "uniform"}}
    config = make({"kind": kind, **numbers.get(kind, {"timesteps": 100})})
    parameters = config.parameters(7)
    weight = parameters["weight"]
    assert weight.shape == ((100,) if kind == "sliding_psn" else (100, 100))
    assert 0.09 < weight.abs().max() <= 0.1  # 1 / sqrt(100)
    assert weight.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.15)
    assert (parameters["bias"] == -1).all()
    leaky = make({"kind": "sliding_psn", "order": 5}).parameters(1)
    assert leaky["weight"].tolist() == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]


@pytest.mark.parametrize(("length", "order"), [(1, 4), (2, 4), (4, 4), (2, 1)])
def test_sliding_psn_over_segments_equals_one_run(length, order):
    config = make({"kind": "sliding_psn", "order": order})
    parameters = doubled(config)
    current = torch.randn(6, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    current.requires_grad_()
    whole, _ = config.run(current, None, **parameters)
    parts, membrane = [], None
    for part in current.split(length):
        spikes, membrane = config.run(part, membrane, **parameters)
        parts.append(spikes)
    together = torch.cat(parts)
    assert torch.equal(together, whole)
    leaves = [current, *parameters.values()]
    weight = torch.randn(6, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    for got, right in zip(
        torch.autograd.grad((together * weight).sum(), leaves),
        torch.autograd.grad((whole * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_which_kinds_are_causal_and_what_they_run():
    """A causal neuron gives at T = t what it gives at t of a longer run; others are marked."""
    current = torch.randn(4, 200, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) + 0.5
    found = {}
    of_three = ({"kind": kind, "order": 3} for kind in ("sliding_psn", "masked_psn"))
    for config in map(make, ("plif", "ilif", "nilif", "psn", *of_three)):
        parameters, name = doubled(config), neurons.kind_of(config)
        found[name] = (config.causal, [t for t in range(1, 7) if config.refusal(t) is None])
        if config.causal:
            whole, _ = config.run(current, None, **parameters)
            for t in range(1, 4):
                assert torch.equal(config.run(current[:t], None, **parameters)[0], whole[:t]), name
    everything = (True, [1, 2, 3, 4, 5, 6])
    assert found == {
        "plif": everything,
        "ilif": everything,
        "nilif": everything,
        "sliding_psn": everything,
        "masked_psn": (True, [1, 2, 3, 4]),
        "psn": (False, [4]),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_membranes_are_wide_and_spikes_are_as_the_current(case, dtype):
    config = make(CASES[case][0])
    current = torch.randn(5, 60, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameters = learned_of(config, 3)
    spikes, _ = config.run(current, None, **parameters)
    assert spikes.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(config.run(current, None, **parameters)[0], spikes)
    # Computed in float32 for any type of current; only the current's rounding matters.
    wide, _ = config.run(current.float(), None, **parameters)
    assert torch.equal(spikes.float(), wide.to(dtype).float())


BAD = {
    "decay must be below 1, not 1": {"kind": "plif", "decay": 1.0},
    "decay must be at least 0, not -0.5": {"kind": "ilif", "decay": -0.5},
    "most_spikes must be at most 15, not 16": {"kind": "ilif", "most_spikes": 16},
    "most_spikes must be a power of 2": {"kind": "nilif", "most_spikes": 3},
    "order must be at least 1, not 0": {"kind": "sliding_psn", "order": 0},
    "init must be one of exponential, uniform, not 'zero'": {"kind": "sliding_psn", "init": "zero"},
}


@pytest.mark.parametrize("message", BAD)
def test_numbers_outside_their_range_are_refused(message):
    with pytest.raises(ValueError, match=message):
        make(BAD[message])


def test_neurons_that_learn_a_value_per_channel_need_the_channels():
    class Own(neurons.LIF):
        def parameters(self, num_channels):
            return {"gain": torch.ones(num_channels)}

    with pytest.raises(ValueError, match=r"Own learns a value per channel; make it by Neuron\("):
        Neuron(Own())
    assert Neuron(Own(), 3).learned["gain"].shape == (3,)
