"""The fused path against its definition, in value and in gradient: in C++, and in Triton.

Triton's kernels are interpreted; test_triton.py has the tests for them alone. Layers, their inputs
and what is compared are those by which a GPU is checked, with other neurons and in float64.
"""

import copy
import dataclasses
import functools
import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import (
    IMPLEMENTATIONS,
    assert_same,
    draw,
    each_implementation,
    fused_and_defined,
    interpreted,
    kept_tensors,
    native_kernels,
    randomize,
    results_of,
)
from torch import nn

from tetdist.apps.check_gpu import numerics
from tetdist.apps.check_gpu.numerics import GIVEN, MODES, NORM_ADD, NORM_POOL, Case
from tetdist.losses import tet_loss
from tetdist.nn import neurons, norm_neuron
from tetdist.nn.batch_norm import BatchNorm, defer_running_statistics, recomputing, synchronize
from tetdist.nn.fast import build, dispatch, native, native_pool
from tetdist.nn.neurons import LIF, make
from tetdist.nn.norm_neuron import (
    Neuron,
    NormAdd,
    NormNeuron,
    carrying_membranes,
    spiking_layers,
)
from tetdist.nn.packed import packed_of

pytestmark = pytest.mark.usefixtures("one_thread")

# The first four have every surrogate, every reset, and both rules at the threshold. A library is
# built for each of these, not for each of their numbers.
NEURONS = {
    "hard": LIF(decay=0.9, threshold=0.7),
    "atan": LIF(
        decay=1.0,
        detach_reset=True,
        surrogate="atan",
        surrogate_width=2.0,
        fires_at_threshold=True,
    ),
    "sigmoid": LIF(threshold=0.7, reset="soft", surrogate="sigmoid", fires_at_threshold=True),
    "rectangle": LIF(reset="soft", detach_reset=True, surrogate="rectangle", surrogate_width=0.5),
    "plif": make("plif"),
    "plif, soft": make(
        {
            "kind": "plif",
            "decay": 0.75,
            "threshold": 0.7,
            "reset": "soft",
            "decay_input": False,
            "surrogate": "atan",
            "surrogate_width": 2.0,
        }
    ),
    "ilif": make({"kind": "ilif", "threshold": 0.5}),
    "nilif": make({"kind": "nilif", "threshold": 0.4, "most_spikes": 8, "detach_reset": True}),
    "psn": make({"kind": "psn"}),
    "masked_psn": make({"kind": "masked_psn", "surrogate": "sigmoid"}),
    "sliding_psn": make({"kind": "sliding_psn", "surrogate": "triangle"}),
}
LAYERS = {**NEURONS, NORM_ADD: None, NORM_POOL: None}
each_neuron = pytest.mark.parametrize("kind", NEURONS)
CPU = torch.device("cpu")


class Layer(numerics.Layer):
    """A layer whose norms have a scale, and its own random numbers."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numerics, "kinds", lambda: LAYERS)
            super().__init__(case, torch.Generator().manual_seed(seed))
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.scale = 0.7
        self.to(torch.promote_types(case.dtype, torch.float32))

    @property
    def inputs(self):
        inputs = self.draw(CPU, torch.Generator().manual_seed(1))
        return {name: x.to(self.case.dtype) for name, x in inputs.items()}


def assert_fused_is_the_definition(case, implementation, seed=0):
    layer, found = Layer(case, seed), []
    for execution in ("fused", "reference"):
        layer.layer.execution = execution
        with IMPLEMENTATIONS[implementation]():
            found.append(numerics.results(copy.deepcopy(layer), layer.inputs, seed))
    assert_same(*found)
    return found[1]


# ----------------------------------------------------------------- the definition, once by hand


# -------------------------------------------------------------------- kernels: the whole of options


def any_case(kinds, timesteps, channels):
    return st.builds(
        Case,
        kind=st.sampled_from(kinds),
        timesteps=st.sampled_from(timesteps),
        channels=st.sampled_from(channels),
        dtype=st.just(torch.float64),
        mode=st.sampled_from(MODES),
        given=st.sampled_from(GIVEN),
        batch=st.integers(1, 3),
        side=st.integers(1, 4),
    )


any_seed = st.integers(0, 2**31)


# As many channels as are processed at a time, fewer, and more.
@settings(max_examples=120)
@given(any_case([*LAYERS], [1, 2, 4, 16], [1, 3, 8, 64, 65, 200]), any_seed)
def test_any_combination_native(case, seed):
    assert_fused_is_the_definition(case, "native", seed)


# Weights over time take the interpreter seconds.
QUICK = [kind for kind in LAYERS if "psn" not in kind]


@settings(max_examples=5)
@given(any_case(QUICK, [1, 2, 5], [1, 3, 65]), any_seed)
def test_any_combination_triton(case, seed):
    assert_fused_is_the_definition(case, "triton", seed)


@pytest.mark.parametrize("kind", LAYERS)
@each_implementation
def test_each_kind(implementation, kind):
    """In each mode, on rows and channels of several tiles, of which the last ones are not full."""
    forms = zip(GIVEN, itertools.cycle(MODES), strict=False)
    if implementation == "triton":
        forms = [("normalised shortcut", "carried")]
        if kind == "hard":
            forms += [("shared", "training")]
        if kind in ("hard", "psn", "nilif", NORM_ADD):
            forms += [("no norm", "carried"), ("shared", "evaluation")]
    for what, mode in forms:
        # Sums of parallel neurons' weights are divided among several programs.
        timesteps = 5 if kind == "sliding_psn" else 3
        # Segments carry the membranes of a single sample in another layout.
        case = Case(kind, timesteps, 17, torch.float64, mode, what, batch=1, side=5)
        assert assert_fused_is_the_definition(case, implementation)["spikes"].std() > 0.01


def test_programs_of_rows_and_of_channels_sum_apart(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", functools.partial(interpreted, 8))
    layer, x = NormNeuron(65, NEURONS["plif"]).double(), draw(0, 2, 1, 65, 4, 5)
    assert fused_and_defined(layer, lambda m: m(x, 2), {}, "triton")["output"].std() > 0.1


@each_neuron
@each_implementation
def test_membranes_at_the_threshold(implementation, kind):
    """With quarters, some membranes and sums are exactly at one or four thresholds, or where a
    surrogate ends; sums of spikes, which attention's neurons get, often are."""
    config = NEURONS[kind]
    if isinstance(config, LIF):
        config = dataclasses.replace(config, threshold=1.0, decay=0.5)
    module = Neuron(config, 7).double()
    with torch.no_grad():
        for value in module.learned.values():
            value.mul_(4).round_().div_(4)
    timesteps = getattr(config, "timesteps", 3)
    inputs = {"current": draw(0, timesteps, 3, 5, 7).mul(4).round().div(4).requires_grad_()}
    found = fused_and_defined(module, lambda m: m(inputs["current"]), inputs, implementation)
    if type(config) is LIF:
        first = inputs["current"][0] == 1
        assert first.any()
        assert (found["output"][0][first] == config.fires_at_threshold).all()


@each_implementation
def test_membranes_are_divided_by_the_threshold(implementation):
    """A product with its reciprocal is on the other side of half a spike here and there."""
    halves = torch.arange(1, 30, 2) / 2 * torch.tensor(0.85)
    above, below = (halves.nextafter(torch.tensor(end)) for end in (torch.inf, 0.0))
    current = torch.stack([halves, above, below])[None].requires_grad_()
    assert not torch.equal((current / 0.85).round(), (current * (1 / 0.85)).round())
    module = Neuron(make({"kind": "ilif", "threshold": 0.85, "most_spikes": 15}))
    inputs = {"current": current}
    fused_and_defined(module, lambda m: m(current), inputs, implementation, rtol=1e-6)


# A rectangle has slope 0 there.
@pytest.mark.parametrize("kind", ["hard", "atan", "sigmoid", "ilif"])
@each_implementation
def test_nan_is_as_in_the_definition(implementation, kind):
    current = draw(0, 3, 3, 5, 7)
    current[0, 1, 2, 3] = torch.nan
    current.requires_grad_()
    module, inputs = Neuron(NEURONS[kind], 7).double(), {"current": current}
    found = fused_and_defined(module, lambda m: m(current), inputs, implementation, equal_nan=True)
    assert any(one.isnan().any() for one in found.values())


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [
        *(("native", kind) for kind in NEURONS),
        *itertools.product(["triton"], ("hard", "nilif", "sliding_psn")),
    ],
)
def test_spikes_in_bytes(implementation, kind):
    """The next layer keeps what this layer sends, including the added spikes."""
    dtype, config = torch.bfloat16, NEURONS[kind]
    layer = Layer(Case(kind, 3, 5, dtype, "training", "current", batch=3, side=4))
    module, current = layer.layer, layer.inputs["current"].requires_grad_()
    with IMPLEMENTATIONS[implementation]():
        first = module(current, 3)
        both = module(current, 3, identity=first)
        both.float().sum().backward()
        with torch.no_grad():
            assert packed_of(module(current, 3)) is None
        assert packed_of(module.eval()(current, 3)) is None
    for spikes, most in ((first, 1), (both, 2)):
        packed = packed_of(spikes)
        assert packed.levels == config.levels
        assert torch.equal(packed.unpack(dtype), spikes)
        assert 0 <= spikes.min() <= spikes.max() <= most * config.highest
    assert torch.equal(both, 2 * first)
    assert (len(first.unique()) > 2) == ("ilif" in kind)
    assert first.dtype == dtype
    assert current.grad.abs().max() > 0


# ------------------------------------------------------------------------------ types and layouts


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@each_implementation
def test_types(implementation, dtype):
    """Membranes are float32, also in the definition, so the spikes are equal; a sum is rounded
    once, so at most as far from the exact one as the definition."""
    results, leaf = [], (2 * draw(0, 4, 2, 48)).to(dtype).requires_grad_()
    neuron = Neuron(NEURONS["atan"])
    for execution in ("fused", "reference"):
        neuron.execution = execution
        with IMPLEMENTATIONS[implementation]():
            results.append(results_of(neuron, lambda m: m(leaf), {"current": leaf}))
            with carrying_membranes([neuron], None) as ends, torch.no_grad():
                neuron(leaf)
                (end,) = ends()
        assert end.dtype == torch.promote_types(dtype, torch.float32)
    assert results[0]["output"].dtype == dtype
    assert torch.equal(results[0]["output"], results[1]["output"])
    ours, theirs = (result["gradient of current"].double() for result in results)
    assert (ours - theirs).norm() / theirs.norm() < 4 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        return
    for what in ("shortcut", "normalised shortcut"):
        layer = Layer(Case(NORM_ADD, 2, 24, dtype, "training", what, batch=2, side=6))
        exact = copy.deepcopy(layer).double()
        exact.layer.execution = "reference"
        with IMPLEMENTATIONS[implementation]():
            assert copy.deepcopy(layer)(layer.inputs)["spikes"].dtype == dtype
            found = numerics.results(layer, layer.inputs, 0)
        wide = {name: x.double() for name, x in layer.inputs.items()}
        for name, value in numerics.results(exact, wide, 0).items():
            error = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
            assert error < 3 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("hard", torch.float16),
        ("plif, soft", torch.float32),
        ("nilif", torch.float16),
        ("psn", torch.float32),
    ],
)
def test_triton_in_short_types(kind, dtype):
    """As near to float64 as a GPU has to be; the interpreter rounds float16, and cuts bfloat16."""
    for what, mode in (("normalised shortcut", "carried"), ("spikes", "training")):
        case = Case(kind, 3, 20, dtype, mode, what, batch=2, side=5)
        with pytest.MonkeyPatch.context() as patch, IMPLEMENTATIONS["triton"]():
            patch.setattr(numerics, "kinds", lambda: LAYERS)
            assert max(numerics.differences(case, CPU, 0).values()) <= 1, case


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


# Shapes that networks have, and some unusual ones; each (T, B, ...).
LAYOUTS = {
    "image": lambda t: draw(0, t, 2, 3, 4, 5),
    "image, channels last": lambda t: channels_last(draw(0, t, 2, 8, 4, 4)),
    "image, batch first": lambda t: draw(0, 2, t, 3, 4, 5).transpose(0, 1),
    "tokens": lambda t: draw(0, t, 2, 5, 16),
    "tokens, transposed": lambda t: draw(0, t, 2, 16, 5).transpose(2, 3),
    "heads": lambda t: draw(0, t, 2, 4, 5, 8).transpose(2, 3),
    "a number": lambda t: draw(0, t),
    "with gaps": lambda t: draw(0, t, 2, 130)[:, :, ::2],
    "expanded": lambda t: draw(0, t, 1, 6).expand(t, 3, 6),
    "more than is worked on at a time": lambda t: draw(0, t, 3, 43),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_implementation
def test_any_layout(implementation, layout):
    """Neurons keep it; behind a norm channels are last, so that the next layer copies nothing."""
    current = (2 * LAYOUTS[layout](4)).detach().requires_grad_()
    modules = [Neuron(LIF())]
    if current.ndim == 5 and "heads" not in layout:
        modules += [
            NormNeuron(current.shape[2], LIF()).double(),
            NormAdd(current.shape[2]).double(),
        ]
    for module in modules:
        call = (lambda m: m(current, 4)) if spiking_layers(module) else (lambda m: m(current))
        fused_and_defined(module, call, {"current": current}, implementation)
        module.execution = "fused"
        with IMPLEMENTATIONS[implementation]():
            spikes = call(module)
        assert spikes.shape == current.shape
        if module is not modules[0]:
            assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        elif "last" in layout or layout in ("tokens, transposed", "heads"):
            assert spikes.stride() == current.stride()
    last = channels_last(draw(0, 4, 2, 8, 4, 4))
    assert norm_neuron.rows_of(last).data_ptr() == last.data_ptr()


# ------------------------------------------------------------------- sums, and what is left alone


@pytest.mark.parametrize("kind", ["hard", NORM_ADD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_sums_are_the_same_for_any_number_of_threads(dtype, kind):
    layer = Layer(Case(kind, 2, 40, dtype, "training", "normalised shortcut", batch=3, side=32))
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with native_kernels():
                results.append(numerics.results(copy.deepcopy(layer), layer.inputs, 0))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert [k for k, v in results[0].items() if not torch.equal(v, other[k])] == []


def test_native_statistics_do_not_cancel():
    # In float32 the mean square minus the squared mean cancels completely here.
    x = 1000 + torch.randn(2, 5000, 3, generator=torch.Generator().manual_seed(0))
    with native_kernels():
        mean, var = native.NormKernels(1).statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        var.double(), x.double().var((0, 1), correction=0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("processes", [1, 2])
@each_implementation
def test_statistics_are_recorded_as_by_the_definition(implementation, processes):
    """At once or once a step, on one process or several, and not when a block is recomputed."""
    norms = nn.ModuleDict({"add": NormAdd(3), "norm": BatchNorm(3, scale=1.1)}).double()
    randomize(norms)
    current = draw(0, 3, 2, 3, 5, 4).requires_grad_()
    if processes > 1:
        # Any linear function of one process's values serves.
        synchronize(norms, lambda x: x.mul_(0.75), processes)
    for deferred, timesteps in itertools.product((False, True), (1, 3)):
        shortcut, found = draw(1, timesteps, 2, 3, 5, 4).requires_grad_(), []
        inputs = {"current": current, "shortcut": shortcut}
        for execution in ("fused", "reference"):
            module = copy.deepcopy(norms)
            module.add.execution = execution
            if deferred:
                defer_running_statistics(module)

            def call(m):
                return m.add(inputs["current"], inputs["shortcut"], m.norm, copies=2)  # noqa: B023  # called at once

            with IMPLEMENTATIONS[implementation]():
                with recomputing():
                    call(module)
                found.append(results_of(module, call, inputs))
        assert_same(*found)
        changed = "add.norm.pending_mean" if deferred else "add.norm.running_mean"
        assert not torch.equal(found[0][changed], dict(norms.named_buffers())[changed])


@each_implementation
def test_gradients_are_those_that_are_asked_for(implementation):
    """Of a current or a shortcut alone, with frozen weights, in any layout, such as a pooling's."""
    for kind, frozen, without in itertools.product(
        ("hard", NORM_ADD), (False, True), ("current", "shortcut", "")
    ):
        found = []
        case = Case(kind, 3, 3, torch.float64, "training", "normalised shortcut", side=4)
        for execution in ("fused", "reference"):
            layer, inputs = Layer(case), Layer(case).inputs
            layer.layer.execution = execution
            layer.requires_grad_(not frozen)
            for name, x in inputs.items():
                x.requires_grad_(name != without)
            with IMPLEMENTATIONS[implementation]():
                output = layer(inputs)["spikes"].mean((0, 3, 4)).transpose(0, 1)[:2]
                output.square().sum().backward()
            named = {**inputs, **dict(layer.named_parameters())}
            found.append({name: x.grad for name, x in named.items() if x.grad is not None})
        assert_same(*found)


@each_implementation
def test_only_what_was_given_is_kept_for_the_backward_pass(implementation):
    """Neurons are cheap because nothing of the size of T membranes is kept between the kernels."""
    for kind, what, tensors in (
        ("hard", "no norm", {"current"}),
        ("hard", "current", {"current"}),
        (NORM_ADD, "shortcut", {"current"}),
        (NORM_ADD, "normalised shortcut", {"current", "shortcut"}),
    ):
        layer = Layer(Case(kind, 6, 16, torch.float64, "training", what, batch=2, side=8))
        inputs = {name: x.requires_grad_() for name, x in layer.inputs.items()}
        with IMPLEMENTATIONS[implementation](), kept_tensors() as kept:
            layer(inputs)
        large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 16}
        assert large == {inputs[name].data_ptr() for name in tensors}, what


# -------------------------------------------------------------------------------- layers of neurons


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


def test_without_a_compiler_a_model_trains_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "failures", {})
    libraries = (native.neuron_library, native.norm_library, native_pool.pool)
    kept = (*libraries, dispatch._neuron_kernels, dispatch._warn_of_missing_library)
    losses = {"fused": [], "reference": []}
    for one in kept:
        one.cache_clear()
    try:
        for execution, found in losses.items():
            torch.manual_seed(0)
            model = timm.create_model("spiking_convnet", channels=(4, 8), input_size=8)
            model.set_execution(execution)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
            for _ in range(2):
                loss = tet_loss(model(images, per_timestep=True), target, lambda_=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
    finally:
        for one in kept:
            one.cache_clear()
    (message,) = caplog.messages
    assert "the C++ kernels cannot be built or loaded here (there is no C++ compiler)" in message
    assert "apt-get install g++" in message
    assert losses["fused"] == losses["reference"]
    assert losses["fused"][1] < losses["fused"][0]
