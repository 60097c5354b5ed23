"""Recomputed blocks and segments of timesteps: the same gradients, in less memory."""

import pytest
import timm
import torch
from kernel_runs import SMALL, assert_same, kept_tensors, results_of, step
from torch import nn

from tetdist.nn import batch_norm
from tetdist.nn.recompute import Block

# Their blocks exchange currents.
REAL = (
    *("preact_resnet18", "ms_resnet18", "sdt_2_256_cifar", "espikeformer_t"),
    "ms_qkformer_4_384_cifar",
)
TIMESTEPS = 3
KEEP_ALL = {"recompute": False, "segment": None}


def network(name, *, recompute, segment, execution):
    torch.manual_seed(0)
    model = timm.create_model(name, timesteps=TIMESTEPS, num_classes=3, **SMALL[name])
    model.set_execution(execution)
    model.set_grad_checkpointing(recompute)
    model.set_segment(segment)
    batch_norm.defer_running_statistics(model)
    return model.train()


def images(name, size=16):
    generator = torch.Generator().manual_seed(1)
    shape = (2, TIMESTEPS, 2, size, size) if name == "vggsnn" else (2, 3, size, size)
    return torch.rand(shape, generator=generator) * 3


def model_size(name):
    """Image size that a network is built for, if any."""
    return SMALL[name].get("input_size")


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


# test_dropout.py has the other networks.
@pytest.mark.parametrize(
    ("name", "execution", "precision"),
    [
        ("spiking_resnet19", "fused", "bf16"),
        ("qkformer_10_384", "fused", "bf16"),
        ("spiking_convnet", "reference", "bf16"),
        ("preact_resnet18", "fused", "fp32"),
    ],
)
def test_recomputed_blocks_are_the_same_bitwise(name, execution, precision):
    # Not 16 pixels: bfloat16 convolutions with one output pixel are not bitwise reproducible on
    # every CPU.
    x = images(name, 16 if model_size(name) else 32)
    kept = step(network(name, execution=execution, **KEEP_ALL), x, precision)
    again = network(name, recompute=True, segment=None, execution=execution)
    assert differing(kept, step(again, x, precision)) == []
    # Few spikes reach the last blocks of an untrained network, but the stem learns.
    assert next(again.stem.parameters()).grad.any()


@pytest.mark.parametrize(
    "name", [name for name in SMALL if name not in ("qkformer_10_384", "vggsnn")]
)
def test_segments_in_float64(name):
    """Fused and recomputed against the plain definition in segments, without rounding."""
    x = images(name).double()
    plain = network(name, recompute=False, segment=2, execution="reference").double()
    fused = network(name, recompute=True, segment=2, execution="fused").double()
    assert_same(step(fused, x), step(plain, x))


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("spiking_resnet18", "reference"),
        ("preact_resnet18", "fused"),
        ("qkformer_4_384_cifar", "fused"),
    ],
)
def test_membranes_are_carried_across_segments(name, execution):
    """With fixed statistics segments change nothing: membranes are carried exactly."""
    x = images(name).double()
    results = []
    for recompute, segment in ((False, None), (False, 2), (True, 2), (True, 1)):
        model = network(name, recompute=recompute, segment=segment, execution=execution).double()
        for module in model.modules():
            if isinstance(module, batch_norm.BatchNorm):
                module.eval()
        results.append(results_of(model, lambda m: m(x, per_timestep=True), {}))
    for found in results[1:]:
        assert_same(found, results[0])


@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_what_is_no_spike_is_not_packed(kind):
    """The sigmoid control's outputs do not fit a byte, and its fused path is the definition."""
    neuron = {"kind": kind, "spike": "sigmoid", "surrogate": "sigmoid", "surrogate_width": 5.0}
    neuron |= {"fires_at_threshold": False}
    results = []
    for execution, recompute in (("reference", False), ("fused", True)):
        torch.manual_seed(0)
        model = timm.create_model(
            "spiking_convnet", timesteps=3, neuron=neuron, **SMALL["spiking_convnet"]
        )
        model.set_execution(execution)
        model.set_grad_checkpointing(recompute)
        batch_norm.defer_running_statistics(model)
        results.append(step(model.train(), images("spiking_convnet")))
    assert differing(*results) == []


@pytest.mark.parametrize(
    ("levels", "highest", "share"),
    [(1, 1, 0.5), (1, 15, 0.5), (4, 3, 0.5), (8, 2, 1.0), (4, 63, 1.0), (1, 255, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_is_exact(levels, highest, share, dtype):
    block = Block(lambda x, _: x, timesteps=3, segment=None, levels=levels, highest=highest)
    for shape in ((3, 2, 4, 5, 6), (3, 1, 3, 5, 7)):
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, highest * levels + 1, shape, generator=generator)
        x = (values / levels).to(dtype)
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        packed = block.pack(x)
        assert packed.values.dtype == torch.uint8
        assert packed.values.numel() == pytest.approx(share * x.numel(), abs=1)
        again = packed.numbers(dtype)
        assert torch.equal(again, x)
        assert again.stride() == x.stride()


def test_highest_sums_of_spikes():
    """(3, 4, 6, 3) blocks; the shortcut of a stage's first block is spikes again."""
    model = timm.create_model("sew_resnet34", width=4)
    assert model.highest_inputs == (1, 2, 3, 4, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 2, 3)
    assert set(
        timm.create_model("sew_resnet34", width=4, connect_function="and").highest_inputs
    ) == {1}


@pytest.mark.parametrize("name", SMALL)
def test_what_blocks_exchange_is_packed_where_it_can_be(name):
    """Currents do not fit into bytes."""
    model = network(name, execution="fused", **KEEP_ALL)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(name, 16))
    assert len(seen) == len(model.blocks)
    if name in REAL:
        assert model.spike_levels is None
        assert all(x.min() < 0 and not torch.equal(x, x.round()) for x in seen)
        return
    for x, highest in zip(seen, model.highest_inputs or [1] * len(seen), strict=True):
        levels = x * model.spike_levels
        assert torch.equal(levels, levels.round())
        assert 0 <= x.min() <= x.max() <= highest < 256 / model.spike_levels


def kept_bytes(timesteps, *, recompute, segment):
    """Bytes that are kept for the backward pass, and the number of outputs of convolutions."""
    model = timm.create_model("sew_resnet18", timesteps=timesteps, num_classes=4, width=16)
    model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(recompute)
    model.set_segment(segment)
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: outputs.append(output.numel()))

    with kept_tensors() as kept:
        model(torch.rand(2, 3, 64, 64))
    sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(sizes[pointer] for pointer in sizes.keys() - weights), sum(outputs)


def test_what_a_network_keeps_for_its_backward_pass():
    """Each convolution keeps its output and spikes in bytes; recomputed blocks keep a sixth."""
    kept, outputs = kept_bytes(4, recompute=False, segment=None)
    # Four bytes plus one, and little besides; spikes as numbers would make it eight.
    assert 5 * outputs < kept < 6 * outputs
    assert kept_bytes(4, recompute=True, segment=None)[0] < 1.2 * outputs
    parts = [kept_bytes(timesteps, recompute=True, segment=2)[0] for timesteps in (4, 8)]
    assert parts[1] - parts[0] < 0.15 * kept
