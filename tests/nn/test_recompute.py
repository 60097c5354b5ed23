"""Recomputed blocks and segments of timesteps: the same gradients, in less memory."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tetdist.losses import tet_loss
from tetdist.nn import batch_norm
from tetdist.nn.norm_neuron import NormNeuron
from tetdist.nn.precision import autocast
from tetdist.nn.recompute import Block

# One of each family and kind of block, small. Of eight channels at least: with fewer, on processors
# with AVX2 alone, oneDNN writes past its memory in strided 1x1 convolutions' backward pass.
MODELS: dict[str, dict[str, Any]] = {
    "sew_resnet18": {"width": 8},
    "sew_resnet50": {"width": 8, "connect_function": "iand"},
    "spiking_resnet18": {"width": 8, "stem_width": 8},
    "spiking_resnet19": {"width": 8, "stem_width": 8, "hidden_features": 8},
    "preact_resnet18": {"width": 8},
    "ms_resnet18": {"width": 8},
    "spiking_convnet": {"channels": (4, 8, 8), "input_size": 16},
    "vggsnn": {"input_size": 16},
    "qkformer_4_384_cifar": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
}
# What their blocks exchange are currents.
REAL = ("preact_resnet18", "ms_resnet18")
TIMESTEPS = 5
BOTH_EXECUTIONS = list(itertools.product(MODELS, ("reference", "fused")))
KEEP_ALL = {"recompute": False, "segment": None}


def network(name: str, *, recompute: bool, segment: int | None, execution: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, timesteps=TIMESTEPS, num_classes=3, **MODELS[name])
    model.set_execution(execution)
    model.set_grad_checkpointing(recompute)
    model.set_segment(segment)
    batch_norm.defer_running_statistics(model)
    return model.train()


def images(name: str, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, TIMESTEPS, 2, size, size) if name == "vggsnn" else (2, 3, size, size)
    return torch.rand(shape, generator=generator) * 3


def model_size(name: str) -> int | None:
    """Pixels that a network is built for, if any."""
    size: int | None = MODELS[name].get("input_size")
    return size


def step(model: nn.Module, x: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Loss, gradients and running statistics of one step."""
    with autocast(x.device, precision):
        logits = model(x, per_timestep=True)
    loss = tet_loss(logits, torch.tensor([0, 2]), lambda_=0.1)
    loss.backward()
    batch_norm.update_running_statistics(model, lambda t: t)
    result = {name: p.grad for name, p in model.named_parameters()}
    return result | dict(model.named_buffers()) | {"loss": loss.detach()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.mark.parametrize(
    ("name", "execution", "precision"),
    list(itertools.product(MODELS, ("reference", "fused"), ("fp32", "bf16"))),
)
def test_recomputed_blocks_are_the_same_to_the_bit(
    name: str, execution: str, precision: str
) -> None:
    # Not 16 pixels: bfloat16 convolutions that end in one pixel do not repeat themselves to the bit
    # on every CPU.
    x = images(name, 16 if model_size(name) else 32)
    kept = step(network(name, execution=execution, **KEEP_ALL), x, precision)
    again = network(name, recompute=True, segment=None, execution=execution)
    assert differing(kept, step(again, x, precision)) == []
    # Few spikes come as far as the last blocks of an untrained network; but the stem learns.
    assert next(again.stem.parameters()).grad.any()


@pytest.mark.parametrize(
    "segment",
    [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(5, marks=pytest.mark.long)],
)
@pytest.mark.parametrize(("name", "execution"), BOTH_EXECUTIONS)
def test_recomputed_segments_are_the_segmented_network(
    name: str, execution: str, segment: int
) -> None:
    x = images(name).double()
    kept, again = (
        step(network(name, recompute=on, segment=segment, execution=execution).double(), x)
        for on in (False, True)
    )
    for key, value in kept.items():
        # Gradients of several segments are added in another order. Of a bias before a norm they are
        # 0, and what rounding leaves of them is small beside those of the weights only.
        scale = kept[key.replace("bias", "weight")].abs().max().clamp(min=1).item()
        atol = 1e-6 * (scale if key.endswith("conv.bias") else 1)
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=atol, msg=key)
    if segment == TIMESTEPS:
        assert differing(kept, again) == []


@pytest.mark.parametrize(
    "name",
    [
        "sew_resnet18",
        "preact_resnet18",
        pytest.param("spiking_resnet19", marks=pytest.mark.long),
        pytest.param("vggsnn", marks=pytest.mark.long),
    ],
)
def test_segments_in_float64(name: str) -> None:
    """Fused and recomputed against the plain definition in segments, without rounding."""
    x = images(name).double()
    plain = network(name, recompute=False, segment=2, execution="reference").double()
    fused = network(name, recompute=True, segment=2, execution="fused").double()
    expected, found = step(plain, x), step(fused, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("spiking_resnet18", "reference"),
        ("vggsnn", "reference"),
        ("preact_resnet18", "fused"),
        pytest.param("spiking_resnet18", "fused", marks=pytest.mark.long),
        pytest.param("vggsnn", "fused", marks=pytest.mark.long),
    ],
)
def test_membranes_are_carried_across_segments(name: str, execution: str) -> None:
    """With fixed statistics segments make no difference at all: the membranes lose nothing."""
    x = images(name).double()
    results = []
    for recompute, segment in ((False, None), (False, 2), (True, 2), (True, 1)):
        model = network(name, recompute=recompute, segment=segment, execution=execution).double()
        for module in model.modules():
            if isinstance(module, batch_norm.BatchNorm):
                module.eval()
        logits = model(x, per_timestep=True)
        logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | {"logits": logits})
    for found in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_networks_without_membranes_run_in_segments() -> None:
    x, neuron = images("preact_resnet18"), {"kind": "relu"}
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(
            "preact_resnet18", timesteps=4, num_classes=3, neuron=neuron, width=8
        )
        model.set_segment(2)
        model.set_grad_checkpointing(recompute)
        batch_norm.defer_running_statistics(model)
        results.append(step(model.train(), x))
    kept, again = results
    for key, value in kept.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_segments_normalise_by_themselves() -> None:
    """As documented: in training a segmented network is another one."""
    whole = step(network("vggsnn", execution="reference", **KEEP_ALL), images("vggsnn"))
    parts = network("vggsnn", recompute=False, segment=2, execution="reference")
    assert "stem.neuron.norm.weight" in differing(whole, step(parts, images("vggsnn")))


def test_evaluation_knows_no_segments() -> None:
    for recompute in (False, True):
        whole = network("vggsnn", execution="fused", **KEEP_ALL).eval()
        parts = network("vggsnn", recompute=recompute, segment=2, execution="fused").eval()
        with torch.no_grad():
            assert torch.equal(whole(images("vggsnn")), parts(images("vggsnn")))


def test_input_gradient_of_a_static_image() -> None:
    """The stem's input serves all segments."""
    gradients = []
    for recompute in (False, True):
        model = network("spiking_convnet", recompute=recompute, segment=2, execution="reference")
        x = images("spiking_convnet").requires_grad_()
        model.double()(x.double()).square().mean().backward()
        gradients.append(x.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["lif", "plif"])
def test_what_is_no_spike_is_not_packed(kind: str) -> None:
    """The sigmoid control's outputs do not fit a byte, and its fused path is the definition."""
    neuron = {"kind": kind, "spike": "sigmoid", "surrogate": "sigmoid", "surrogate_width": 5.0}
    neuron |= {"fires_at_threshold": False}
    results = []
    for execution, recompute in (("reference", False), ("fused", True)):
        torch.manual_seed(0)
        model = timm.create_model(
            "spiking_convnet", timesteps=3, neuron=neuron, **MODELS["spiking_convnet"]
        )
        model.set_execution(execution)
        model.set_grad_checkpointing(recompute)
        batch_norm.defer_running_statistics(model)
        results.append(step(model.train(), images("spiking_convnet")))
    assert differing(*results) == []


def test_every_block_runs_in_segments() -> None:
    model = network("sew_resnet18", recompute=True, segment=2, execution="reference")
    lengths: dict[nn.Module, list[int]] = {block: [] for block in model.blocks}
    for block, seen in lengths.items():
        block.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
    model(images("sew_resnet18"))
    assert list(lengths.values()) == [[2, 2, 1]] * len(model.blocks)


def test_no_segment_below_one() -> None:
    with pytest.raises(ValueError, match="at least one timestep, not 0"):
        network("spiking_convnet", recompute=False, segment=0, execution="fused")


@pytest.mark.parametrize(
    ("levels", "highest", "share"),
    [(1, 1, 0.5), (1, 15, 0.5), (4, 3, 0.5), (8, 2, 1.0), (4, 63, 1.0), (1, 255, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_is_exact(levels: int, highest: int, share: float, dtype: torch.dtype) -> None:
    block = Block(lambda x, _: x, timesteps=3, segment=None, levels=levels, highest=highest)
    for shape in ((3, 2, 4, 5, 6), (3, 1, 3, 5, 7)):
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, highest * levels + 1, shape, generator=generator)
        x = (values / levels).to(dtype)
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        packed = block.pack(x)
        assert packed.values.dtype == torch.uint8
        assert packed.values.numel() == pytest.approx(share * x.numel(), abs=1)
        again = block.unpack(packed, dtype)
        assert torch.equal(again, x)
        assert again.stride() == x.stride()


def test_highest_sums_of_spikes() -> None:
    """(3, 4, 6, 3) blocks; the shortcut of a stage's first block is spikes again."""
    model = timm.create_model("sew_resnet34", width=4)
    assert model.highest_inputs == (1, 2, 3, 4, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 2, 3)
    assert set(
        timm.create_model("sew_resnet34", width=4, connect_function="and").highest_inputs
    ) == {1}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REAL])
def test_what_blocks_exchange_can_be_packed(name: str) -> None:
    model = network(name, execution="fused", **KEEP_ALL)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(name, 16))
    assert len(seen) == len(model.blocks)
    for x, highest in zip(seen, model.highest_inputs or [1] * len(seen), strict=True):
        levels = x * model.spike_levels
        assert torch.equal(levels, levels.round())
        assert 0 <= x.min() <= x.max() <= highest < 256 / model.spike_levels


@pytest.mark.parametrize("name", REAL)
def test_currents_are_not_packed(name: str) -> None:
    model = network(name, execution="fused", **KEEP_ALL)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(name, 16))
    assert model.spike_levels is None
    assert all(x.min() < 0 and not torch.equal(x, x.round()) for x in seen)


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[int, int]]:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def saved_bytes(timesteps: int, *, recompute: bool, segment: int | None) -> int:
    model = timm.create_model("sew_resnet18", width=8, timesteps=timesteps, num_classes=3).train()
    model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(recompute)
    model.set_segment(segment)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with counted_bytes() as kept:
        loss = model(torch.rand(2, 3, 64, 64), per_timestep=True).square().mean()
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_bytes_kept_for_the_backward_pass() -> None:
    none = {t: saved_bytes(t, recompute=False, segment=None) for t in (4, 8)}
    parts = {t: saved_bytes(t, recompute=True, segment=2) for t in (4, 8)}
    assert saved_bytes(4, recompute=True, segment=None) < 0.25 * none[4]
    assert parts[8] - parts[4] < 0.15 * (none[8] - none[4])


def test_copies_are_independent() -> None:
    """A block carries nothing over from one step to the next."""
    model = network("sew_resnet18", recompute=True, segment=2, execution="reference")
    other = copy.deepcopy(model)
    x = images("sew_resnet18")
    first = step(model, x)
    with torch.no_grad():
        other(torch.rand_like(x))
    for module in other.modules():
        if isinstance(module, batch_norm.BatchNorm):
            module.discard()
    assert differing(first, step(other, x)) == []
    assert all(
        module.membrane is None and not module.carries
        for module in itertools.chain(model.modules(), other.modules())
        if isinstance(module, NormNeuron)
    )


def test_what_a_network_keeps_for_its_backward_pass() -> None:
    """Of each convolution its output, and spikes in bytes; with recomputed blocks a sixth of it."""
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet18", timesteps=4, num_classes=4, width=16)
    images = torch.rand(2, 3, 64, 64)
    outputs = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()

    def kept() -> int:
        weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(images)
        return sum(sizes.values())

    # Four bytes and one, and a little beside the convolutions; as numbers spikes made it eight.
    assert 5 * outputs < kept() < 6 * outputs
    model.set_grad_checkpointing(True)
    assert kept() < 1.2 * outputs
