"""Convolutions that skip the zeros of spikes: right values, the same bits, and only by rule.

The kernels are forced, so that nothing here depends on the processor.
"""

import copy
import functools
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from kernel_runs import needs_compiler
from torch import nn

from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import build, native_zeros
from tetdist.nn.norm_neuron import NormNeuron
from tetdist.nn.packed import AvgPool, Conv2d, MaxPool, is_marked, marked
from tetdist.nn.precision import autocast

TYPES = frozenset({torch.float32, torch.bfloat16, torch.int8})


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    needs_compiler(native_zeros.library())
    monkeypatch.setattr(native_zeros, "_agreed", TYPES)


@pytest.fixture
def calls(monkeypatch):
    """The convolutions that skip; each is compared with torch's of the same input, since one
    flipped spike would change everything behind it."""
    calls = []

    def convolve(x, layer, dtype, convolve=native_zeros.convolve):
        calls.append(layer)
        y = convolve(x, layer, dtype)
        weight, bias = (None if one is None else one.detach().to(dtype) for one in layer[1:3])
        dense = F.conv2d(x.to(dtype), weight, bias, layer.stride, 1)
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y, dense, rtol=rtol, atol=1e-5)
        return y

    def weight_gradient(x, grad, layer, gradient=native_zeros.weight_gradient):
        total, shape = gradient(x, grad, layer), layer.weight.shape
        dense = nn.grad.conv2d_weight(x.double(), shape, grad.double(), layer.stride, 1)
        assert (total - dense).norm() <= 1e-5 * dense.norm()
        return total

    monkeypatch.setattr(native_zeros, "convolve", convolve)
    monkeypatch.setattr(native_zeros, "weight_gradient", weight_gradient)
    return calls


@pytest.fixture(params=["native", "AVX2"])
def _build(request, monkeypatch):
    """Kernels built for this processor, and for one without AVX-512."""
    if request.param == "AVX2":
        if "avx2" not in build.processor().split():
            pytest.skip("needs an x86-64 processor with AVX2")
        load = build.load_library
        with monkeypatch.context() as patch:
            patch.setattr(build, "load_library", lambda name: load(name, "-march=x86-64-v3"))
            library = native_zeros.library.__wrapped__()
        monkeypatch.setattr(native_zeros, "library", lambda: library)
    return request.param


def spikes(*shape, density, seed=0):
    """Spikes (..., C, H, W), channels last."""
    generator = torch.Generator().manual_seed(seed)
    flat = (torch.rand(shape, generator=generator) < density).float()
    flat = flat.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    return flat.view(shape)


def random_case(seed):
    """A convolution and its input: odd sizes, few and many channels, empty and full rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    torch.manual_seed(seed)
    kernel, stride = 3 if seed % 4 else 1, draw(1, 2)
    conv = Conv2d(draw(1, 70), draw(1, 140), kernel, stride, kernel // 2, bias=seed % 3 == 0)
    density = (0, 0.02, 0.1, 0.5, 1)[seed % 5]
    x = spikes(draw(1, 5), conv.in_channels, draw(1, 13), draw(1, 13), density=density, seed=seed)
    if seed % 2:
        x[:, :, ::2] = 0
    return conv, x


def layer_of(conv):
    return native_zeros.Layer(conv, conv.weight, conv.bias, conv.stride[0])


@pytest.mark.usefixtures("_build")
@pytest.mark.parametrize("seed", range(60))
def test_values_and_gradients(seed, monkeypatch):
    conv, x = random_case(seed)
    if seed % 6 == 0:
        monkeypatch.setattr(native_zeros, "POSITIONS", 1)  # image after image
    wide = copy.deepcopy(conv).double()
    right = wide(x.double()[None])[0]
    y = native_zeros.convolve(x, layer_of(conv), torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    # bfloat16 weights are added up in float32.
    halves = copy.deepcopy(conv).bfloat16().double()(x.double()[None])[0]
    y = native_zeros.convolve(x.to(torch.uint8), layer_of(conv), torch.bfloat16)
    torch.testing.assert_close(y.double(), halves, rtol=2**-8, atol=1e-5)
    whole = torch.randint(-127, 128, conv.weight.shape).to(torch.int8)
    layer = native_zeros.Layer(conv, whole, None, conv.stride[0])
    sums = F.conv2d(x.double(), whole.double(), None, conv.stride, conv.padding)
    assert torch.equal(native_zeros.convolve(x, layer, torch.int8), sums.int())
    grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(seed))
    right.backward(grad.double())
    gradient = native_zeros.weight_gradient(x.to(torch.uint8), grad, layer_of(conv))
    torch.testing.assert_close(gradient.double(), wide.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_build")
def test_no_bit_depends_on_batch_or_threads():
    conv = Conv2d(70, 130, 3, padding=1)
    x = spikes(32, 70, 11, 9, density=0.2)
    grad = torch.randn(32, 130, 11, 9)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = native_zeros.convolve(x, layer_of(conv), torch.float32)
            each = [native_zeros.convolve(one[None], layer_of(conv), torch.float32) for one in x]
            assert torch.equal(torch.cat(each), whole)
            results.append((whole, native_zeros.weight_gradient(x, grad, layer_of(conv))))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("frozen", ["nothing", "input", "weight", "bias"])
def test_a_layers_gradients_are_those_of_torch(frozen, calls):
    torch.manual_seed(0)
    conv = Conv2d(33, 67, 3, stride=2, padding=1)
    x = spikes(2, 3, 33, 9, 8, density=0.3)
    gradients = []
    for layer, own in ((conv, x.clone()), (copy.deepcopy(conv).double(), x.double())):
        leaves = {"input": own, "weight": layer.weight, "bias": layer.bias}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        layer(marked(own))[0].square().sum().backward()  # of one timestep
        gradients.append({name: leaf.grad for name, leaf in leaves.items() if name != frozen})
    assert len(calls) == 1
    single, double = gradients
    torch.testing.assert_close(single, double, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_other_weights_never_take_the_place_of_those_laid_out():
    conv, x = Conv2d(64, 64, 3, padding=1), spikes(1, 64, 8, 8, density=0.2)
    with native_zeros.keeping_weights():
        native_zeros.convolve(x, layer_of(conv), torch.float32)
        first, size = conv.weight.data_ptr(), conv.weight.nbytes
        conv.weight = nn.Parameter(torch.randn(64, 64, 3, 3))
        others = [torch.empty(64, 64, 3) for _ in range(1000)]
        assert not any(first <= one.data_ptr() < first + size for one in others)
        y = native_zeros.convolve(x, layer_of(conv), torch.float32)
    torch.testing.assert_close(y, F.conv2d(x, conv.weight, conv.bias, 1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_no_images_are_no_error(dtype):
    conv = Conv2d(32, 64, 3, padding=1)
    layer = native_zeros.Layer(conv, conv.weight.to(dtype), None, 1)
    y = native_zeros.convolve(torch.zeros(0, 32, 8, 8, dtype=torch.uint8), layer, dtype)
    assert y.shape == (0, 64, 8, 8)


@functools.cache
def trained(name):
    """A network whose neurons fire: with the statistics of one batch."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, timesteps=3)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    model(torch.randn(4, 3, 32, 32) * 2)
    return model


def step_of(model, x, precision="fp32"):
    model = copy.deepcopy(model).train()
    with autocast(torch.device("cpu"), precision):
        y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("name", "skipping"),
    [("spiking_resnet18", 16), ("sew_resnet18", 9), ("ms_resnet18", 16), ("preact_resnet18", 16)],
)
def test_networks_skip_where_spikes_are_0_and_1(name, skipping, calls):
    model, x = trained(name), torch.randn(2, 3, 32, 32) * 2
    calls.clear()
    step_of(model, x)
    assert len(calls) == skipping
    with torch.inference_mode():
        copy.deepcopy(model).eval()(x)
    assert len(calls) == 2 * skipping


# Without segments the two blocks of the last stage are not recomputed. With them the backward pass
# first finds the membranes that the second and third segment start from.
@pytest.mark.parametrize(
    ("segment", "forward", "backward"), [(None, 16, 12), (1, 3 * 16, 2 * 16 + 3 * 16)]
)
def test_recomputation_takes_the_same_path(segment, forward, backward, calls):
    model, x = copy.deepcopy(trained("spiking_resnet18")), torch.randn(2, 3, 32, 32)
    model.set_segment(segment)
    straight = step_of(model, x)
    calls.clear()
    model.set_grad_checkpointing(True)
    assert all(map(torch.equal, step_of(model, x), straight))
    assert len(calls) == forward + backward
    calls.clear()
    model.set_execution("reference")
    step_of(model, x)
    assert not calls


def test_bfloat16_skips_in_evaluation_alone(calls):
    model, x = copy.deepcopy(trained("spiking_resnet18")), torch.randn(2, 3, 32, 32)
    calls.clear()
    step_of(model, x, "bf16")
    assert not calls
    with autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        model.eval()(x)
    assert len(calls) == 13  # three have one pixel, which is computed in float32
    model.double()(x.double())
    assert len(calls) == 13


def test_other_inputs_and_layers_are_dense(calls, monkeypatch):
    x = marked(spikes(2, 3, 32, 8, 8, density=0.5))
    layers = {
        "grouped": Conv2d(32, 64, 3, padding=1, groups=2),
        "dilated": Conv2d(32, 64, 3, padding=2, dilation=2),
        "unpadded": Conv2d(32, 64, 3),
        "reflecting": Conv2d(32, 64, 3, padding=1, padding_mode="reflect"),
        "5x5": Conv2d(32, 64, 5, padding=2),
        "1x1": Conv2d(32, 64, 1),
        "narrow": Conv2d(32, 63, 3, padding=1),
    }
    for layer in layers.values():
        layer(x)
    Conv2d(31, 64, 3, padding=1)(marked(spikes(2, 3, 31, 8, 8, density=0.5)))
    conv = Conv2d(32, 64, 3, padding=1)
    conv(AvgPool(2)(x))
    conv(x * 1)
    neuron = NormNeuron(32, neurons.LIF())
    conv(neuron(x, 2, identity=x))
    monkeypatch.setattr(native_zeros, "_agreed", None)
    with monkeypatch.context() as patch:  # a processor without the extension
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        native_zeros.types_here.cache_clear()
        conv(x)
    native_zeros.types_here.cache_clear()
    with monkeypatch.context() as patch:  # or compiler
        patch.setattr(native_zeros, "library", lambda: None)
        conv(x)
    native_zeros.types_here.cache_clear()
    assert not calls
    monkeypatch.setattr(native_zeros, "_agreed", TYPES)
    conv(x)
    conv(MaxPool(3, 2, 1)(x))
    conv(neuron(x, 2))
    assert len(calls) == 3
    # A row's positions must fit 16 bits.
    for width, skips in ((2**11 - 1, 1), (2**11, 0)):
        calls.clear()
        conv(marked(spikes(1, 1, 32, 1, width, density=0.1)))
        assert len(calls) == skips


def test_bfloat16_is_dense_where_the_processor_multiplies_it_fast(monkeypatch):
    monkeypatch.setattr(native_zeros, "_agreed", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for flags, types in (("flags: avx512f", TYPES), ("flags: amx_bf16", TYPES - {torch.bfloat16})):
        monkeypatch.setattr(build, "processor", lambda flags=flags: flags)
        native_zeros.types_here.cache_clear()
        assert native_zeros.types() == types
    native_zeros.types_here.cache_clear()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_tensor_that_was_written_to_is_read_anew(mode):
    conv = Conv2d(32, 64, 3, padding=1)
    with mode():
        for value in (0.5, 0):
            x = marked(spikes(1, 2, 32, 8, 8, density=0.3))
            x[0, 0, :, 3] = value
            y = nn.Conv2d.forward(conv, x[0])
            torch.testing.assert_close(conv(x)[0], y, rtol=1e-5, atol=1e-6)
        x.fill_(1)
        assert is_marked(x) == (mode is torch.inference_mode)


def test_streams_lay_out_weights_once(monkeypatch):
    model = copy.deepcopy(trained("spiking_resnet18")).eval()
    x = torch.randn(2, 3, 32, 32)
    laid, lay_out = [], native_zeros.library().lay_out_float32

    def count(*arguments):
        laid.append(arguments)
        return lay_out(*arguments)

    monkeypatch.setattr(native_zeros.library(), "lay_out_float32", count)

    def run():
        stream = model.stream()
        for _ in range(3):
            y = stream.step(x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        return y

    with torch.no_grad():
        run()
    assert len(laid) == 32  # 16 in the stream
    first = next(
        m.weight for n, m in model.named_modules() if isinstance(m, Conv2d) and n != "stem.conv"
    )
    before = run()
    assert len(laid) == 48
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)  # keeps versions
    first.grad = torch.ones_like(first)
    optimizer.step()
    after = run()
    assert len(laid) == 80
    assert not torch.equal(before, after)
    state = {key: value.clone() for key, value in trained("spiking_resnet18").state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(run(), before)
    # A thread without a stream lays out its own, as before.
    laid.clear()
    with native_zeros.keeping_weights():
        (thread := threading.Thread(target=model, args=(x,))).start()
        thread.join(60)
    assert len(laid) == 16
    # A stream of its own in each thread, of the same weights.
    results = []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert all(torch.equal(result, before) for result in results)
