"""Networks are the published ones: transformers, and ResNets whose shortcuts carry currents."""

import copy
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published_formers as formers
import published_transformers as published
import pytest
import timm
import torch
from kernel_runs import assert_same
from published_networks import (
    DECOUPLING,
    MS,
    SEAL,
    Definition,
    ms_shapes,
    preact_shapes,
    psn_sew_shapes,
    random_state,
)
from published_transformers import Published, QKFormerSize, SDTSize
from torch import Tensor, nn

import tetdist
from tetdist.apps.weights import foreign
from tetdist.models import QKFormer
from tetdist.models.attention import StreamAttention, attention_neuron
from tetdist.models.ms_qkformer import StreamTokenAttention
from tetdist.models.preact_resnet import Block
from tetdist.nn.batch_norm import BatchNorm, defer_running_statistics, update_running_statistics
from tetdist.nn.neurons import LIF, ReLU, make
from tetdist.nn.norm_neuron import NeuronLayer

assert tetdist.__doc__  # registers the models

T, BATCH = 3, 3


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
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_number_of_parameters(name):
    there, unused = PARAMETERS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == there - unused


# ------------------------------------------------------------------------- the published networks


# Source of a family's weights, by the prefix of its networks' names; a longer one is nearer.
SOURCES = {one: one for one in ("qkformer", "sdt", "espikeformer", "maxformer", "ms", "psn")}
SOURCES |= {"preact": "decoupling", "ms_qkformer": "maxformer"}


def source_of(name):
    return SOURCES[max((one for one in SOURCES if name.startswith(one)), key=len)]


@dataclass(frozen=True)
class Case:
    """A network in a small size, and the same typed anew.

    Attributes:
        name: Of the registered network.
        arguments: That make it small.
        shapes: Of the published state dict in that size.
        forward: Frames (T, B, C, H, W) to logits (T, B, K).
        input: Of one sample: (C, H, W), or (T, C, H, W) of events.
        timesteps: T.
        seed, gain: Of the weights: such that samples and timesteps come out different.
        of: Where the weights are from, where that is not in `SOURCES`.
        is_resnet: Weights are random as is right for ResNets.
    """

    name: str
    arguments: dict[str, Any]
    shapes: published.Shapes
    forward: Callable[[Published, Tensor], Tensor]
    input: tuple[int, ...]
    timesteps: int = T
    seed: int = 0
    gain: float = 1.0
    of: str = ""
    is_resnet: bool = False

    @property
    def source(self):
        return self.of or source_of(self.name)

    def state(self):
        if self.is_resnet:
            return random_state(self.shapes)
        return published.random_state(self.shapes, self.seed, gain=self.gain)

    def model(self):
        return timm.create_model(
            self.name, num_classes=5, timesteps=self.timesteps, **self.arguments
        ).double()

    def loaded(self):
        """The model with the weights of `state`."""
        model = self.model()
        found = foreign.convert(self.state(), self.source, model)
        assert (found.missing, found.unexpected) == ([], [])
        model.load_state_dict(found.weights)
        return model

    def batch(self, size=BATCH):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn((size, *self.input), generator=generator, dtype=torch.float64)
        return x if len(self.input) == 3 else x.abs().round()

    def frames(self, x):
        """The batch at all timesteps, (T, B, C, H, W)."""
        return x.expand(self.timesteps, *x.shape) if x.ndim == 4 else x.transpose(0, 1)


def qkformer_case(name, size, image, *, mixes=False):
    arguments = {"widths": size.widths, "depths": size.depths, "heads": size.heads}
    return Case(
        name,
        arguments | ({"mixes_samples": True} if mixes else {}),
        published.qkformer_shapes(size),
        lambda net, x: published.qkformer(net, x, size, mixes_samples=mixes),
        image,
    )


def sdt_case(name, size, image):
    return Case(
        name,
        {"channels": size.channels, "depth": size.depth, "heads": size.heads},
        published.sdt_shapes(size),
        lambda net, x: published.sdt(net, x, size),
        image,
    )


def espikeformer_case(timesteps):
    # Sums of attention are multiples of 1/64 where it has 4 channels a head, and some are halves,
    # which are rounded to even; with 6 channels they are irrational.
    size = formers.ESpikeFormerSize((8, 8, 8, 12), (1, 1), heads=2, mlp_ratio=2)
    return Case(
        "espikeformer_t",
        {"widths": size.widths, "depths": size.depths, "heads": 2, "mlp_ratio": 2},
        formers.espikeformer_shapes(size),
        lambda net, x: formers.espikeformer(net, x, size),
        (3, 48, 32),
        timesteps,
        seed=1,
        gain=4.0,  # Neurons that round hide small differences.
    )


def maxformer_case():
    size = formers.MaxFormerSize((8, 16, 24), (1, 1, 2), heads=2, mlp_ratio=2)
    return Case(
        "maxformer_10_384",
        {"widths": size.widths, "depths": size.depths, "heads": 2, "mlp_ratio": 2},
        formers.maxformer_shapes(size),
        lambda net, x: formers.maxformer(net, x, size),
        (3, 48, 32),
        seed=3,
    )


def ms_qkformer_case(name, size, image, seed=0):
    arguments = {"widths": size.widths, "depths": size.depths, "heads": size.heads}
    return Case(
        name,
        arguments | {"mlp_ratio": size.mlp_ratio},
        formers.ms_qkformer_shapes(size),
        lambda net, x: formers.ms_qkformer(net, x, size),
        image,
        seed=seed,
    )


def resnet_case(method, source, shapes, neurons, **arguments):
    def forward(net, frames):
        state = {key: x.clone() if "running" in key else x for key, x in net.state.items()}
        definition = Definition(state, neurons, len(frames), net.training)
        logits = getattr(definition, method)(frames[0])
        net.moved.update({key: x for key, x in state.items() if "running" in key})
        return logits

    name = {"preact": "preact_resnet18", "ms": "ms_resnet18", "psn_sew": "psn_sew_resnet18"}[method]
    neuron = {"timesteps": T} if method == "psn_sew" else foreign.neuron_of(source, name)
    arguments |= {"width": 8, "neuron": neuron}
    return Case(name, arguments, shapes, forward, (3, 64, 64), of=source, is_resnet=True)


LAYERS = (2, 2, 2, 2)
DEEP = {"stem": "deep", "pooled_projections": True}
IMAGENET = QKFormerSize("imagenet", (8, 16, 24), (1, 2, 2), 2)
CASES = {
    "qkformer": qkformer_case("qkformer_10_384", IMAGENET, (3, 48, 32)),
    "qkformer mixing": qkformer_case("qkformer_10_384", IMAGENET, (3, 32, 32), mixes=True),
    "qkformer cifar": qkformer_case(
        "qkformer_4_384_cifar", QKFormerSize("cifar", (8, 12, 16), (1, 1, 2), 2), (3, 16, 12)
    ),
    "qkformer dvs": qkformer_case(
        "qkformer_2_256_dvs",
        QKFormerSize("dvs", (16, 24), (1, 1), 2, mlp_ratio=1, in_chans=2),
        (T, 2, 32, 32),
    ),
    "qkformer gesture": qkformer_case(
        "qkformer_2_256_gesture",
        QKFormerSize("dvs", (16, 24), (1, 1), 2, in_chans=2),
        (T, 2, 32, 32),
    ),
    "sdt": sdt_case("sdt_8_384", SDTSize(32, 2), (3, 48, 32)),
    "sdt cifar": sdt_case("sdt_2_256_cifar", SDTSize(32, 2, "0011"), (3, 16, 12)),
    "sdt dvs": sdt_case(
        "sdt_2_256_dvs", SDTSize(32, 2, "0011", dilates=True, in_chans=2), (T, 2, 16, 16)
    ),
    "sdt gesture": sdt_case(
        "sdt_2_256_gesture", SDTSize(32, 2, "0111", in_chans=2), (T, 2, 24, 16)
    ),
    "espikeformer": espikeformer_case(1),  # as published
    "espikeformer over time": espikeformer_case(T),
    "maxformer": maxformer_case(),
    "ms_qkformer": ms_qkformer_case("ms_qkformer_10_384", IMAGENET, (3, 48, 32), seed=2),
    "ms_qkformer cifar": ms_qkformer_case(
        "ms_qkformer_4_384_cifar", QKFormerSize("cifar", (8, 12, 24), (1, 1, 2), 2), (3, 16, 12)
    ),
    "ms_qkformer dvs": ms_qkformer_case(
        "ms_qkformer_2_256_dvs",
        QKFormerSize("dvs", (16, 24), (1, 1), 2, mlp_ratio=1, in_chans=2),
        (T, 2, 32, 32),
    ),
    "preact, decoupling": resnet_case(
        "preact", "decoupling", preact_shapes(LAYERS, 8, 5), DECOUPLING
    ),
    "preact, seal": resnet_case("preact", "seal", preact_shapes(LAYERS, 8, 5), SEAL),
    "ms": resnet_case("ms", "ms", ms_shapes(LAYERS, 8, 5), MS),
    "ms, deep": resnet_case("ms", "ms", ms_shapes(LAYERS, 8, 5, deep=True), MS, **DEEP),
    "psn": resnet_case("psn_sew", "psn", psn_sew_shapes(LAYERS, 8, 5, T), None),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# One of each family, for what does not depend on the embedding.
FAMILIES = ("qkformer", "sdt", "sdt dvs", "espikeformer over time", "maxformer", "ms_qkformer")
each_family = pytest.mark.parametrize("case", [CASES[name] for name in FAMILIES], ids=FAMILIES)


@pytest.mark.parametrize("execution", ["fused", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_case
def test_is_the_published_network(case, training, execution):
    """Logits at every timestep, all gradients and running statistics, from published weights."""
    model = case.loaded().train(training)
    model.set_execution(execution)
    x = case.batch()
    state = {
        name: value.clone().requires_grad_(value.is_floating_point() and "running" not in name)
        for name, value in case.state().items()
    }
    net = Published(state, training)
    expected = case.forward(net, case.frames(x))
    logits = model(x, per_timestep=True)
    # Samples differ, and so do timesteps.
    assert len(expected.detach().transpose(0, 1).flatten(1).unique(dim=0)) == BATCH
    assert len(expected.detach().flatten(1).unique(dim=0)) == case.timesteps
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)

    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: value.grad for name, value in state.items() if value.grad is not None}
    there = foreign.convert(state | gradients, case.source, model).weights
    largest = max(value.abs().max() for value in gradients.values())
    for name, parameter in model.named_parameters():
        # The gradient of a bias before a norm is 0 in training, up to rounding.
        assert training or parameter.grad.any(), name
        torch.testing.assert_close(
            parameter.grad, there[name], rtol=1e-8, atol=1e-10 * largest, msg=name
        )
    if training:
        moved = foreign.convert(state | net.moved, case.source, model).weights
        for name, value in model.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(value, moved[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("name", "shapes", "tensors"),
    [
        (
            "qkformer_10_384",
            published.qkformer_shapes(
                QKFormerSize("imagenet", (96, 192, 384), (1, 2, 7), 6, classes=1000)
            ),
            434,
        ),
        (
            "qkformer_4_384_cifar",
            published.qkformer_shapes(
                QKFormerSize("cifar", (96, 192, 384), (1, 1, 2), 8, classes=10)
            ),
            None,
        ),
        ("sdt_8_384", published.sdt_shapes(SDTSize(384, 8, classes=1000)), 352),
        (
            "espikeformer_s",
            formers.espikeformer_shapes(formers.ESpikeFormerSize((32, 64, 128, 192), classes=1000)),
            605,
        ),
        (
            "maxformer_10_384",
            formers.maxformer_shapes(formers.MaxFormerSize((96, 192, 384), classes=1000)),
            398,
        ),
        (
            "ms_qkformer_10_384",
            formers.ms_qkformer_shapes(
                QKFormerSize("imagenet", (96, 192, 384), (1, 2, 7), 6, classes=1000)
            ),
            434,
        ),
        ("preact_resnet18", preact_shapes(LAYERS), 142),
        ("preact_resnet34", preact_shapes((3, 4, 6, 3)), 254),
        ("ms_resnet34", ms_shapes((3, 4, 6, 3)), 224),
        ("ms_resnet104", ms_shapes((3, 8, 32, 8), deep=True), 649),
        ("psn_sew_resnet34", psn_sew_shapes((3, 4, 6, 3)), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_state_dicts_have_these_tensors(name, shapes, tensors):
    """In the published size; so the small ones above are of the published form, too."""
    assert tensors is None or len(shapes) == tensors
    assert published.num_parameters(shapes) == PARAMETERS[name][0]
    with torch.device("meta"):
        model = timm.create_model(name)
        state = {one: torch.empty(shape) for one, shape in shapes.items()}
    source = source_of(name)
    if source != "decoupling":  # which another source has the names of
        assert foreign.source_of(state, Path("file")) == source
    found = foreign.convert(state, source, model)
    assert (found.missing, found.unexpected) == ([], [])
    assert len(found.unused) * 64 == PARAMETERS[name][1]


# --------------------------------------------------------------------------------- sample by sample


def test_mixing_makes_a_sample_depend_on_its_batch():
    case = CASES["qkformer mixing"]
    model, x = case.loaded().eval(), case.batch()
    with torch.no_grad():
        together = model(x, per_timestep=True)
        alone = torch.cat([model(one, per_timestep=True) for one in x.split(1)], dim=1)
        backwards = model(x.flip(0), per_timestep=True).flip(1)
    # Only the first one's first timestep begins at rest.
    torch.testing.assert_close(together[0, 0], alone[0, 0])
    assert not torch.allclose(together, alone)
    assert not torch.allclose(together, backwards)


def test_mixing_of_samples_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        CASES["qkformer"].model()
        assert not caplog.records
        CASES["qkformer mixing"].model()
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
        case.name, neuron=own, **case.arguments | {"attention_threshold": 2.0}
    )
    of_attention = dataclasses.replace(own, threshold=2.0, fires_at_threshold=True)
    found = neurons_of(model)
    # SDT's attention begins with ordinary neurons of this name.
    names = {"qkformer": "attention.neuron", "sdt": "attention.mask"}
    last = names.get(case.source, ("attended", "attention.mask"))
    in_attention = {name for name in found if name.endswith(last)}
    depth = case.arguments.get("depth") or sum(case.arguments["depths"])
    if case.name.startswith("maxformer"):  # Its first stages have none.
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


@pytest.mark.parametrize(
    "name",
    [
        "qkformer_4_384_cifar",
        pytest.param("maxformer_10_384", marks=pytest.mark.long),
        "sdt_2_256_cifar",
    ],
)
def test_a_learned_decay_begins_as_the_published_neuron(name):
    """Its input is halved as that of the published neurons is, also in attention."""
    small = {"sdt_2_256_cifar": {"channels": 16, "depth": 1}}.get(
        name, {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2}
    )
    logits = []
    for neuron in (None, {"kind": "plif", "detach_reset": True}):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, timesteps=3, neuron=neuron, **small)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.bias.data.fill_(1.0)
        with torch.no_grad():
            logits.append(model.double().eval()(torch.randn(2, 3, 32, 32).double()))
    assert logits[0].std() > 0
    torch.testing.assert_close(logits[0], logits[1])


# ---------------------------------------------------------------------------- all networks


@each_family
def test_relu_network_of_the_same_shape(case):
    channels = 2 if "dvs" in case.name else 3
    model = timm.create_model(
        case.name, neuron={"kind": "relu"}, timesteps=1, in_chans=channels, **case.arguments
    )
    # In float32 oneDNN writes past its memory on some processors, in the backward pass of a strided
    # 1x1 convolution of four channels.
    model.double()(case.batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@each_family
def test_weights_begin_as_in_the_authors_code(case):
    """With a deviation of 0.02 and without biases, or as torch begins them."""
    torch.manual_seed(0)
    model = timm.create_model(case.name, **case.arguments)
    kinds = StreamAttention, StreamTokenAttention
    attention = [m for m in model.modules() if isinstance(m, kinds)]
    as_torch = {layer for module in attention for layer in module.modules()}
    for layer in model.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.weight.numel() < 100:
            continue
        match case.name.partition("_")[0]:
            case "maxformer" | "ms":
                as_published = isinstance(layer, nn.Conv2d) and layer not in as_torch
            case "sdt":
                as_published = isinstance(layer, nn.Conv2d)
            case _:
                as_published = layer is model.fc
        deviation = 0.02 if as_published else (3 * layer.weight[0].numel()) ** -0.5
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.3)
        assert layer.bias is None or layer.bias.any() != as_published


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("qkformer_10_384", {"widths": (96, 192)}, "must have one entry per stage"),
        (
            "sdt_8_384",
            {"neuron": {"kind": "ilif", "most_spikes": 16}, "channels": 16},
            "most_spikes must be at most 15, not 16",
        ),
        ("qkformer_10_384", {"heads": 5}, "96 channels cannot be divided among 5 heads"),
        ("qkformer_10_384", {"embedding": "mnist"}, "embedding must be .* not 'mnist'"),
        ("sdt_8_384", {"pools": (True,)}, "pools must be four"),
        ("ms_resnet18", {"drop_rate": 1.0}, "a drop rate must be at least 0 and below 1, not 1.0"),
        (
            "ms_resnet18",
            {"stem": "imagenet"},
            "stem must be 'plain', 'deep' or 'cifar', not 'imagenet'",
        ),
        ("sdt_8_384", {"channels": 12}, "channels=12 must be a multiple of 8 and of heads"),
    ],
)
def test_bad_option_is_named(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        timm.create_model(name, **options)


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


def test_a_pooled_projection_has_the_stride_2():
    with pytest.raises(ValueError, match="needs stride 2, not 1"):
        Block(4, 8, 1, LIF(), pooled_projection=True)


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("case", ["preact, decoupling", "ms, deep"])
def test_an_image_is_as_its_copies_at_all_timesteps(case, segment):
    """Logits, gradients and running statistics, computed again or not."""
    model, x = CASES[case].loaded(), CASES[case].batch()
    repeated, again = copy.deepcopy(model), copy.deepcopy(model)
    seen = []
    stem = model.stem.conv[-1] if case.endswith("deep") else model.stem.conv
    stem.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    repeated.time_first = lambda x: x.expand(T, *x.shape)
    again.set_grad_checkpointing()
    logits = []
    for one in (model, repeated, again):
        one.set_segment(segment)
        defer_running_statistics(one)
        logits.append(one(x, per_timestep=True))
        logits[-1].square().sum().backward()
        update_running_statistics(one, lambda averages: averages)
    assert set(seen) == {1}  # the image is convolved once
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-11)
    found = [
        {key: p.grad for key, p in one.named_parameters()} | one.state_dict()
        for one in (model, repeated, again)
    ]
    assert_same(found[2], found[0], rtol=1e-8)
    # In segments of two and one the stem's values are counted otherwise.
    for key in [key for key in found[1] if segment and key.endswith("running_var")]:
        del found[0][key], found[1][key]
    assert_same(found[1], found[0], rtol=1e-8)
