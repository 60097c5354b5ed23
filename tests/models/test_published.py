"""Networks are the published ones: transformers, and ResNets whose shortcuts carry currents."""

import dataclasses
import hashlib
import logging
from pathlib import Path

import published
import pytest
import timm
import torch
from published import Published, uniform
from torch import nn

from tetdist.apps.weights import foreign
from tetdist.models import QKFormer
from tetdist.models.attention import StreamAttention, attention_neuron
from tetdist.models.ms_qkformer import StreamTokenAttention
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF, ReLU, make
from tetdist.nn.norm_neuron import NeuronLayer

T = 3

pytestmark = pytest.mark.usefixtures("one_thread")

# Parameters as published (for QKFormer and the Spike-driven Transformer those that the authors'
# programs count), and what of them nothing computes with: the latter's talking_heads, 64 a block.
PARAMETERS = {
    "qkformer_10_384": (16_473_688, 0),
    "qkformer_10_512": (29_079_336, 0),
    "qkformer_10_768": (64_962_760, 0),
    "qkformer_4_384_cifar": (6_706_234, 0),
    "qkformer_2_256_dvs": (1_504_138, 0),
    "qkformer_2_256_gesture": (1_999_371, 0),
    "sdt_8_384": (16_816_536, 8 * 64),
    "sdt_6_512": (23_373_736, 6 * 64),
    "sdt_8_512": (29_689_896, 8 * 64),
    "sdt_10_512": (36_006_056, 10 * 64),
    "sdt_8_768": (66_339_144, 8 * 64),
    "sdt_2_512_cifar": (10_233_546, 2 * 64),
    "sdt_2_256_cifar": (2_567_082, 2 * 64),
    "sdt_2_256_dvs": (2_566_794, 2 * 64),
    "sdt_2_256_gesture": (2_567_051, 2 * 64),
    "espikeformer_t": (2_702_048, 0),
    "espikeformer_s": (5_105_608, 0),
    "espikeformer_m": (10_023_112, 0),
    "espikeformer_l": (18_987_504, 0),
    "maxformer_10_384": (16_237_240, 0),
    "maxformer_10_512": (28_653_480, 0),
    "maxformer_10_768": (63_992_200, 0),
    "ms_qkformer_10_384": (16_473_688, 0),
    "ms_qkformer_10_512": (29_079_336, 0),
    "ms_qkformer_10_768": (64_962_760, 0),
    "ms_qkformer_4_384_cifar": (6_706_234, 0),
    "ms_qkformer_2_256_dvs": (1_504_138, 0),
    "preact_resnet18": (11_694_312, 0),
    "preact_resnet34": (21_806_184, 0),
    "i2e_msnet18": (11_686_376, 0),
    "i2e_msnet34": (21_794_536, 0),
    "ms_resnet18": (11_693_736, 0),
    "ms_resnet34": (21_801_896, 0),
    "ms_resnet104": (77_350_504, 0),
    "psn_sew_resnet18": (11_689_916, 0),
    "psn_sew_resnet34": (21_798_396, 0),
    "sew_resnet34": (21_797_672, 0),
    "spiking_resnet19": (12_630_858, 0),
    "spiking_resnet18_cifar": (11_173_962, 0),
    "spiking_resnet19_dvs": (12_696_842, 0),
    "vggsnn": (9_271_498, 0),
    **{f"{kind}_resnet18": (11_689_512, 0) for kind in ("sew", "spiking")},  # as ResNets
    **{f"{kind}_resnet50": (25_557_032, 0) for kind in ("sew", "spiking")},
    "spiking_resnet34": (21_797_672, 0),
    "sew_resnet101": (44_549_160, 0),
    "sew_resnet152": (60_192_808, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_number_of_parameters(name):
    there, unused = PARAMETERS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == there - unused


# ------------------------------------------------------------------------- the published networks

# One of each family, for what does not depend on the embedding.
FAMILIES = ("qkformer", "sdt", "sdt_dvs", "espikeformer_over_time", "maxformer", "ms_qkformer")
each_family = pytest.mark.parametrize("case", [Published(name) for name in FAMILIES], ids=FAMILIES)


# test_kinds_in_networks.py compares the two ways.
WAYS = [(name, "fused") for name in published.NAMES]
WAYS += [(name, "reference") for name in (*FAMILIES, "preact_decoupling", "ms_resnet_deep")]


@pytest.mark.parametrize(("name", "execution"), WAYS)
def test_is_the_published_network(name, execution):
    """Logits at every timestep, all gradients and running statistics, from published weights."""
    case = Published(name)
    state = case.state()
    if case.source not in ("decoupling", "seal"):  # which have names in common
        assert foreign.source_of(state, Path("file")) == case.source
    assert foreign.num_classes(state, case.source) == 4
    for number, (mode, logits) in enumerate(case.logits.items()):
        model = case.loaded().train(mode == "train")
        model.set_execution(execution)
        ours = model(case.batch(), per_timestep=True)
        theirs = torch.tensor(logits, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
        if not case.gradients:  # The definition's surrogate was another.
            return
        (ours * uniform("weight of logits", ours.shape)).sum().backward()
        keys = case.keys(model)
        gradients = {keys[own]: one.grad for own, one in model.named_parameters()}
        assert mode == "train" or all(one.any() for one in gradients.values())
        # The gradient of a bias before a norm is 0 in training, up to rounding.
        rounding = 1e-9 * max(abs(values[number]) for values in case.gradients.values())
        assert published.projected(gradients) == {
            key: pytest.approx(values[number], rel=1e-8, abs=rounding)
            for key, values in case.gradients.items()
        }
    running = {keys[own]: one for own, one in model.named_buffers() if "running" in own}
    assert published.projected(running) == {
        f"{norm}.running_{one}": pytest.approx(value, rel=1e-9, abs=1e-10)
        for norm, values in case.statistics.items()
        for one, value in zip(("mean", "var"), values, strict=True)
    }


# Tensors in the published size, besides counters, and a digest of their names and sizes.
FULL_SIZE = {
    "qkformer_10_384": (367, "93b248af7f77c849"),
    "qkformer_4_384_cifar": (169, "7c6b2c0ab7b32611"),
    "sdt_8_384": (291, "ec6b18d113de9230"),
    "espikeformer_s": (508, "495b75eebfbbebe0"),
    "maxformer_10_384": (337, "e390351203151f54"),
    "ms_qkformer_10_384": (367, "0dd07a7226574692"),
    "preact_resnet18": (122, "83a55ac47d27cedc"),
    "preact_resnet34": (218, "6663ea3917fa1eb5"),
    "i2e_msnet18": (102, "968a57437e03e30a"),
    "ms_resnet34": (187, "e759ead6a3c3e3f1"),
    "ms_resnet104": (542, "e8e534c9ccf3bced"),
    "psn_sew_resnet34": (255, "ac78a2432b7a652e"),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_state_dicts_have_these_tensors(name):
    """Under the names that sources of ResNets have in common, torchvision's."""
    with torch.device("meta"):
        model = timm.create_model(name)
    names = foreign._names(model)
    lines = sorted(f"{names[key]} {one.numel()}" for key, one in model.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest[:16]) == FULL_SIZE[name]


# --------------------------------------------------------------------------------- sample by sample


def test_mixing_of_samples_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        Published("qkformer").built()
        assert not caplog.records
        Published("qkformer_mixing").built()
    (record,) = caplog.records
    assert "a sample's logits depend on the samples before it" in record.getMessage()


# ------------------------------------------------------------------------------------- the neurons


def neurons_of(model):
    return {
        name: module.neuron
        for name, module in model.named_modules()
        if isinstance(module, NeuronLayer)
    }


@each_family
def test_attentions_neurons_have_a_threshold_of_their_own(case):
    own = LIF(threshold=3.0, decay=0.25, reset="soft", surrogate="atan", surrogate_width=5.0)
    model = timm.create_model(
        case.model, neuron=own, **case.arguments | {"attention_threshold": 2.0}
    )
    of_attention = dataclasses.replace(own, threshold=2.0, fires_at_threshold=True)
    found = neurons_of(model)
    # SDT's attention begins with ordinary neurons of this name.
    names = {"qkformer": "attention.neuron", "sdt": "attention.mask"}
    last = names.get(case.source, ("attended", "attention.mask"))
    in_attention = {name for name in found if name.endswith(last)}
    depth = case.arguments.get("depth") or sum(case.arguments["depths"])
    if case.model.startswith("maxformer"):  # Its first stages have none.
        depth = case.arguments["depths"][-1]
    assert len(in_attention) == depth
    for name, config in found.items():
        assert config == (of_attention if name in in_attention else own), name


def test_neurons_without_a_threshold_of_whole_spikes():
    assert attention_neuron(ReLU(), 1.0) == ReLU()
    control = make({"spike": "sigmoid", "surrogate": "sigmoid"})
    assert attention_neuron(control, 0.5) == dataclasses.replace(control, threshold=0.5)
    for scales, threshold in ((True, 0.5), (False, 2.0)):
        learned = make({"kind": "plif", "decay": 0.75, "decay_input": scales})
        assert attention_neuron(learned, 2.0).threshold == threshold


# ---------------------------------------------------------------------------- all networks


@each_family
def test_weights_begin_as_in_the_authors_code(case):
    """With a deviation of 0.02 and without biases, or as torch begins them."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, **case.arguments)
    kinds = StreamAttention, StreamTokenAttention
    attention = [m for m in model.modules() if isinstance(m, kinds)]
    as_torch = {layer for module in attention for layer in module.modules()}
    for layer in model.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.weight.numel() < 100:
            continue
        match case.model.partition("_")[0]:
            case "maxformer" | "ms":
                as_published = isinstance(layer, nn.Conv2d) and layer not in as_torch
            case "sdt":
                as_published = isinstance(layer, nn.Conv2d)
            case _:
                as_published = layer is model.fc
        deviation = 0.02 if as_published else (3 * layer.weight[0].numel()) ** -0.5
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.3)
        assert layer.bias is None or layer.bias.any() != as_published


def test_sums_of_spikes_are_as_high_as_documented():
    """recompute.py keeps what blocks exchange in half a byte; neurons that always fire reach it."""
    model = timm.create_model(
        "qkformer_10_384", widths=(8, 8, 8), heads=2, neuron=LIF(threshold=0.01), num_classes=2
    )
    assert isinstance(model, QKFormer)
    seen = []
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.constant_(module.weight, 0)
            nn.init.constant_(module.bias, 1)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].max().item()))
    model.eval()(torch.rand(1, 3, 32, 32))
    assert tuple(seen) == model.highest_inputs
    assert max(seen) < 16


def test_how_ms_resnets_begin():
    torch.manual_seed(0)
    model = timm.create_model("ms_resnet18", width=8, neuron=LIF(threshold=0.5))
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            # A residual branch starts at 0.
            expected = 0.0 if name.startswith("blocks") and name.endswith("add.norm") else 0.5
            assert module.weight.eq(expected).all(), name
            assert module.scale == 1.0
    conv = model.blocks[1].conv2
    bound = (9 * conv.in_channels) ** -0.5  # torch's own initial values
    assert 0.9 * bound < conv.weight.abs().max() <= bound
