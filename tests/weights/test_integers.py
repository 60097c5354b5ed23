"""A network in integers: its definition, its files, and what other programs make of them."""

import itertools
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import torch
from kernel_runs import needs_compiler
from safetensors.numpy import load_file
from test_export import T, save
from torch import nn

from tetdist.apps.weights import export, integer_network, integers
from tetdist.apps.weights.integers import convert
from tetdist.apps.weights.trained import Trained, load
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import native_integers, native_zeros
from tetdist.nn.integer_neurons import ILIF
from tetdist.nn.neurons import LIF
from tetdist.nn.precision import autocast

pytestmark = pytest.mark.usefixtures("one_thread")
Array = np.ndarray[Any, Any]
HALF = {"decay": 0.5, "threshold": 0.4567}
# Each kind of layer, neuron, reset and input.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sew, add": ("sew, add", {"threshold": 0.4567}),
    "sew, of parts": ("sew, add", {"kind": "nilif"}),
    "shortcut of spikes": ("resnet19", {}),
    "two branches": ("spiking bottleneck", {}),
    "stream": ("ms", {}),
    "stream, deep": ("ms, deep", {}),
    "events": ("events", {"decay": 0.5}),
    "learned decay": ("plif", {}),
    "soft": ("convnet", {"reset": "soft", "decay": 0.3}),
    "several spikes": ("convnet", {"kind": "ilif"}),
}


def trained_network(network: str, folder: Path, **neuron: Any) -> Trained:
    return load(save(network, folder, **neuron))


def by_numpy(folder: Path, frames: Array) -> Array:
    """Logits of each timestep, (T, B, K), of an exported folder: nothing of tetdist, nor torch."""
    whole = load_file(folder / "model.safetensors")
    described = json.loads((folder / "integers.json").read_text())
    states: dict[str, Array] = {}
    logits = []

    def windows(x: Array, kernel: int, stride: int, padding: int) -> Array:
        sides = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
        found = np.lib.stride_tricks.sliding_window_view(np.pad(x, sides), (kernel, kernel), (2, 3))
        return found[:, :, ::stride, ::stride]

    for t in range(described["timesteps"]):
        found = {"frame": frames[min(t, len(frames) - 1)].astype(np.int64)}
        for layer in described["layers"]:
            name = layer["name"]
            x, *more = (found[one] for one in layer["inputs"])
            values = {
                key: whole[f"{name}.{key}"].astype(np.int64)
                for key in ("zero", "weight", "gain", "gains", "bias", "thresholds", "step")
                if f"{name}.{key}" in whole
            }
            over = [-1] + [1] * (x.ndim - 2)
            match layer["op"]:
                case "offset":
                    y = x - values["zero"].reshape(over)
                case "conv":
                    kernel = values["weight"].shape[-1]
                    parts = windows(x, kernel, layer["stride"], layer["padding"])
                    y = np.einsum("bchwij,ocij->bohw", parts, values["weight"])
                case "linear":
                    y = x.reshape(len(x), -1) @ values["weight"].T
                case "scale":
                    y = x * values["gain"].reshape(over)
                case "neurons":
                    factor, bits = layer["decay"]
                    v = (factor * states.get(name, np.zeros_like(x)) >> bits) + sum(
                        one << shift for one, shift in zip([x, *more], layer["shifts"], strict=True)
                    )
                    v = v + values["bias"].reshape(over)
                    y = sum((v > one.reshape(over)).astype(int) for one in values["thresholds"])
                    steps = values.get("step")
                    states[name] = v * (y == 0) if steps is None else v - y * steps.reshape(over)
                    assert np.abs(states[name]).max() < 2**31
                case "stream":
                    gained = zip(values["gains"], [x, *more], strict=True)
                    y = sum(gain.reshape(over) * one for gain, one in gained)
                    y = (y + values["bias"].reshape(over)) >> 24
                case "add":
                    y = x + more[0]
                case "max_pool":
                    parts = windows(x, layer["kernel"], layer["stride"], layer["padding"])
                    y = parts.max((-2, -1))
                case "sum_pool":
                    y = windows(x, layer["kernel"], layer["kernel"], 0).sum((-2, -1))
                case "logits":
                    y = x + values["bias"]
            low, high = {8: (0, 255), 16: (-(2**15), 2**15 - 1)}.get(
                layer["bits"], (-(2**31), 2**31 - 1)
            )
            assert low <= y.min(), name
            assert y.max() <= high, name
            found[name] = y
        logits.append(y)
    return np.stack(logits)


def steps_of(session: Any, frames: Array, states: dict[str, Array]) -> tuple[Array, list[Array]]:
    """Logits of each timestep of an ONNX step, and the states at the end, channels first."""
    logits = []
    for t in range(T):
        frame = np.ascontiguousarray(frames[min(t, len(frames) - 1)])
        one, *after = session.run(None, {"frame": frame, **states})
        states = dict(zip(states, after, strict=True))
        logits.append(one)
    return np.stack(logits), [np.moveaxis(one, -1, 1) for one in states.values()]


@pytest.mark.parametrize("case", CASES)
def test_exported_integers_are_the_definition_for_every_reader(
    case, output_of, tmp_path, monkeypatch
):
    network, neuron = CASES[case]
    file = save(network, tmp_path, **neuron)
    folder, step = tmp_path / "whole", tmp_path / "step.onnx"
    for form, path in (("safetensors", folder), ("onnx-step", step)):
        output_of("export", file, "--int8", "--format", form, "--output", path)
    trained = load(file)
    defined = convert(trained, T)
    x = trained.examples(3)
    needs_compiler(native_zeros.library())
    monkeypatch.setattr(native_zeros, "_agreed", frozenset({torch.int8}))
    monkeypatch.setattr(native_zeros, "FEWEST_CHANNELS", (1, 1))
    skipping = Mock(wraps=native_zeros.convolve)
    monkeypatch.setattr(native_zeros, "convolve", skipping)
    with torch.no_grad():
        real = defined(x, per_timestep=True).numpy()
        stream = defined.stream()
        for t in range(T):
            is_new = t == 0 or defined.input_kind == "events"
            mean = stream.step(
                (x[:, t] if defined.input_kind == "events" else x) if is_new else None
            )
            np.testing.assert_array_equal(mean.numpy(), real[: t + 1].sum(0) / (t + 1))
        stream = defined.stream()
        stream.step(x[:, 0] if defined.input_kind == "events" else x)
        stream.keep(torch.tensor([True, False, True]))
        mean = stream.step(x[[0, 2], 1] if defined.input_kind == "events" else None)
        np.testing.assert_array_equal(mean.numpy(), real[:2, [0, 2]].sum(0) / 2)
        stream.keep(torch.tensor([False, False]))
        mean = stream.step(x[:0, 2] if defined.input_kind == "events" else None)
        assert mean.shape == (0, defined.num_classes)
        with pytest.raises(UserError, match=f"ranges are proven for {T} timesteps"):
            stream.step()
        if defined.input_kind == "events":
            with pytest.raises(ValueError, match=f"runs {T} timesteps, but the input has 2 bins"):
                defined(x[:, :2])
        # In plain torch, without any kernel, and under autocast.
        monkeypatch.setattr(native_zeros, "_agreed", frozenset())
        monkeypatch.setattr(native_integers, "library", lambda: None)
        with autocast(x.device, "bf16"):
            plain = defined(x, per_timestep=True).numpy()
    assert skipping.called != ("kind" in neuron)  # neurons of several spikes never skip
    np.testing.assert_array_equal(plain, real)
    expected = np.rint(real / defined.description["logit"]).astype(np.int64)
    assert len(np.unique(expected)) > 3
    frames = defined.frames(x).numpy()
    np.testing.assert_array_equal(by_numpy(folder, frames), expected)
    graph = export.OnnxStep(step)
    membranes: dict[str, torch.Tensor] = {}
    for t in range(T):
        frame = torch.from_numpy(frames[min(t, len(frames) - 1)])
        membranes = defined.step(frame, membranes)[1]
    actual, states = steps_of(graph._session, frames, graph.at_rest(3))
    np.testing.assert_array_equal(actual, expected)
    for state, membrane in zip(states, membranes.values(), strict=True):
        np.testing.assert_array_equal(state, membrane.numpy())
    assert {node.op_type for node in onnx.load(step).graph.node}.isdisjoint({"Conv", "Gemm"})


def with_whole_weights(trained: Trained) -> None:
    """Replace weights by those that integers express, in float64."""
    torch.manual_seed(1)
    for name, module in trained.model.double().named_modules():
        if isinstance(module, BatchNorm):
            nn.init.constant_(module.weight, 1 / module.scale)
            nn.init.constant_(module.running_var, 1 - module.eps)
            for one in (module.bias, module.running_mean):
                nn.init.zeros_(one)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            most = 63 if name.startswith("stem") else 127
            weight = torch.randint(-most, most + 1, module.weight.shape).double()
            weight.flatten(1)[:, 0] = most
            # A bell curve would have few large weights; here few are not 0.
            weight.flatten(1)[:, 1:] *= torch.rand_like(weight.flatten(1)[:, 1:]) < 0.2
            module.weight.data = weight / 2**5
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@pytest.mark.parametrize(
    ("network", "neuron", "tolerance"),
    [
        ("convnet", HALF | {"reset": "soft", "threshold": 0.5, "fires_at_threshold": True}, 0),
        ("convnet", {"kind": "ilif", "decay": 0.5, "threshold": 0.75}, 0),
        ("sew, add", HALF, 0),
        ("sew bottleneck, IF", {"decay": 1.0, "threshold": 0.4567}, 0),
        ("resnet19", HALF, 0),
        ("ms", HALF, 0.02),  # the stream is rounded
    ],
)
def test_networks_that_whole_numbers_express_are_unchanged(network, neuron, tolerance, tmp_path):
    trained = trained_network(network, tmp_path, **neuron)
    for key in ("mean", "std"):
        object.__setattr__(trained.config.data, key, (128 / 255,) * 3)
    with_whole_weights(trained)
    defined = convert(trained, T)
    bytes_of = defined.frames(trained.examples(4))
    x = bytes_of.double().transpose(0, 1)
    if trained.config.data.kind == "images":
        x = (bytes_of[0].double() / 255 - 128 / 255) / (128 / 255)
    with torch.no_grad():
        expected = trained.model(x, per_timestep=True)
        actual = defined(x, per_timestep=True)
    assert len(expected.unique()) > 2
    if tolerance:
        distance = (actual - expected).norm(dim=2) / expected.norm(dim=2)
        assert distance.median() <= tolerance
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reached", [False, True])
def test_thresholds_have_no_error(reached):
    per_real = torch.tensor([0.3, 1.0, 2.0, 7.7, 1000.0], dtype=torch.float64)
    v = torch.arange(-3, 5000).view(-1, 1)
    config = LIF(threshold=2.0, fires_at_threshold=reached)
    (threshold,) = integers._thresholds(config, per_real)["thresholds"]
    real = v / per_real
    assert torch.equal(v > threshold, real >= 2 if reached else real > 2)
    levels = integers._thresholds(ILIF(threshold=2.0), per_real)["thresholds"]
    counts = (real / 2).clamp(0, 4).round()
    assert torch.equal((v[:, None] > levels).sum(1), counts.long())


def test_weights_of_a_byte_do_not_saturate_16_bits(tmp_path):
    defined = convert(trained_network("convnet", tmp_path), T)
    most = {
        layer["name"]: abs(defined.numbers(layer["name"])["weight"].astype(int)).max()
        for layer in defined.layers
        if layer["op"] in ("conv", "linear")
    }
    assert most["stem_conv"] == 63
    assert 2 * 255 * most.pop("stem_conv") < 2**15
    assert set(most.values()) == {127}


def test_sums_beyond_those_of_float32_are_exact():
    x, weight = torch.full((1, 1023), 255, dtype=torch.uint8), torch.full((1, 1023), 127).char()
    exact = 255 * 127 * 1023  # odd, and above 2^24
    assert integer_network._linear({}, {"weight": weight}, x) == exact
    layer, image = {"stride": 1, "padding": 0}, (1, 1023, 1, 1)
    values = {"weight": weight.view(image)}
    assert integer_network._convolution(layer, values, x.view(image)) == exact


@pytest.mark.parametrize("reset", ["hard", "soft", "several"])
def test_no_inputs_exceed_the_proven_range(reset):
    generator = torch.Generator().manual_seed(0)
    for decay in ((1, 0), (1, 1), (205, 10)):
        drawn = torch.randint(1, 50, (4, 64), generator=generator)
        thresholds = torch.stack([drawn[0] // 2, drawn[0] // 2 + drawn[0], drawn[0] * 3])
        values = {
            "bias": drawn[1] - 25,
            "thresholds": thresholds if reset == "several" else drawn[:1],
        }
        if reset != "hard":
            values["step"] = drawn[0]
        low, high = -3 * drawn[2], 2 * drawn[3]
        reach = integers._reach(values, [[low, high]], decay, 5)
        whole = {key: one.int() for key, one in values.items()}
        layer = {"decay": decay, "shifts": [0]}
        highest = torch.zeros(64, dtype=torch.int32)
        for inputs in itertools.product((low, 0 * low, high), repeat=5):
            u = None
            for x in inputs:
                _, u = integer_network._fire(layer, whole, [x.int()[None, None]], u, 1)
                highest = torch.maximum(highest, u.abs()[0])
        assert (highest <= reach).all()
        assert (highest > reach // 4).any()  # The proof is not idle.


def test_a_sum_that_could_overflow_is_refused_with_its_layer(tmp_path):
    trained = trained_network("convnet", tmp_path)
    with torch.no_grad():
        trained.model.fc.bias.fill_(1e9)
    with pytest.raises(UserError, match=r"could overflow: logits has sums .* at T=3"):
        convert(trained, T)


def test_sums_and_spikes_are_proven_and_streams_are_rounded():
    def signal(most):
        high, one = torch.full((2,), most), torch.ones(2, dtype=torch.float64)
        return integers._Signal(name="x", shape=(2, 1, 1), unit=one, low=0 * high, high=high)

    builder = integers._Builder(nn.Module(), T)
    with pytest.raises(UserError, match="b has spikes of up to 256 at T=3, and at most 255 fits"):
        builder.plus("b", signal(128), signal(128))
    term = integers._Term("linear", "fc", torch.ones(2, 2).double(), signal(2**26), {})
    with pytest.raises(UserError, match=r"could overflow: fc has sums of up to 8,455,716,864 at"):
        builder.weighted(term, term.scale, (2,))
    by_channel = torch.tensor([1.0, 0.3], dtype=torch.float64)
    term = integers._Term("identity", "x", by_channel, signal(255), {})
    current = integers._Current([term], torch.tensor([0.7, -9.1]).double(), (2, 1, 1))
    unit = builder.stream("y", current).unit.view(-1, 1, 1)
    values = {key: builder.tensors[f"y.{key}"] for key in ("gains", "bias")}
    x = torch.arange(256).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    real = (x * by_channel.view(-1, 1, 1) + current.bias.view(-1, 1, 1)) / unit
    assert (integer_network._stream({}, values, x) - real).abs().max() <= 0.501


@pytest.mark.parametrize(
    ("network", "neuron", "words"),
    [
        ("convnet", {"kind": "psn", "timesteps": T}, "has psn neurons without integers"),
        ("convnet", {"spike": "sigmoid", "surrogate": "sigmoid"}, "lif neurons without integers"),
        ("sew, iand", {}, "joins spikes by iand, and --int8 takes connect_function add"),
    ],
)
def test_what_integers_cannot_express_is_refused(network, neuron, words, output_of, tmp_path):
    file, path = save(network, tmp_path, **neuron), tmp_path / "whole"
    output = output_of(
        "export", file, "--int8", "--format", "safetensors", "--output", path, status=2
    )
    assert words in output
    assert not path.exists()
