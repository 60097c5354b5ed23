"""The libraries and repositories that weights are taken over from, and what their files look like.

Networks of all but the transformers are first put into the names of torchvision's ResNet (`conv1`,
`bn1`, `layer1.0.conv1`, ..., `fc`), from which `foreign.convert` takes what a model of ours needs.

A state dict holds weights and running statistics, but not the neuron, which decides about the
result as much: it is the model's own, unless its source says what that trains with.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Rules = Sequence[tuple[str | re.Pattern[str], str]]

_SEW_NEURON = {
    "decay": 1.0,
    "reset": "hard",
    "detach_reset": True,
    "surrogate": "atan",
    "surrogate_width": 2.0,
}
_DISTILLED_NEURON = {
    "decay": 0.5,
    "reset": "hard",
    "detach_reset": False,
    "surrogate": "sigmoid",
    "surrogate_width": 4.0,
}
_DISTILLED_NAMES = (
    (r"^conv0\.0\.", "conv1."),
    (r"^conv0\.1\.", "bn1."),
    (r"\.shortcut\.", ".downsample."),
    # With a hidden layer its classifier is the third of three.
    (r"^classifier\.2\.", "fc."),
    (r"^classifier\.0\.", "fc."),
)
_DISTILLED = ("PreActResNet", "SpikingResNet")
_HEAD_NAMES = ((r"^head\.", "fc."),)


@dataclass(frozen=True)
class Source:
    """A library or repository, and what its state dicts do not say.

    Attributes:
        mark: Pattern of a name by which a state dict is known to be from here; None where others
            have the same names.
        names: Regular expressions to the known names, applied one after the other.
        neuron: What its networks' neurons have other than the `default_neuron` of ours.
        preact_neuron: The same of its PreAct-ResNets.
        only_for: Families of ours that its weights are of; empty: of any that `foreign` names.
        is_relu: Whether its networks are without spikes.
        is_transformer: Whether its convolutions over positions in a row, (C, C, 1), are ours over
            an image.
        unused: Pattern of weights that a network makes and does not compute with.
        cifar100: Mean and standard deviation by which its code scales CIFAR-100's images, where
            timm's description of the model says others.
    """

    mark: str | None = None
    names: Rules = ()
    neuron: dict[str, Any] = field(default_factory=dict)
    preact_neuron: dict[str, Any] = field(default_factory=dict)
    only_for: tuple[str, ...] = ()
    is_relu: bool = False
    is_transformer: bool = False
    unused: str | None = None
    cifar100: bool = False


SOURCES = {
    # Its sew_resnet* and spiking_resnet*. The neuron is whatever its user asked for; this is the
    # one of its ImageNet networks. A masked PSN's mask is a number of the configuration here.
    "spikingjelly": Source(neuron=_SEW_NEURON, unused=r".*\.(mask[01]|_lambda_)$"),
    # The original repository of SEW-ResNet, for both families.
    "sew": Source(
        mark=r"^layer1\.0\.conv1\.module\.0\.weight$",
        names=(
            (r"(^|\.)conv(\d)\.module\.0\.", r"\1conv\2."),
            (r"(^|\.)conv(\d)\.module\.1\.", r"\1bn\2."),
            (r"downsample\.(0\.)?module\.([01])\.", r"downsample.\2."),
        ),
        neuron=_SEW_NEURON,
    ),
    # The original repository of TET: its VGGSNN and ResNet-19. A layer is registered by itself and
    # within the wrappers that run it over time.
    "tet": Source(
        mark=r"\.fwd\.module\.|_s\.layer\.module\.",
        names=(
            (r"_s\.layer\.module\.", "."),
            (r"(^|\.)conv(\d)_s\.bn\.", r"\1bn\2."),
            (r"downsample\.layer\.module\.", "downsample.0."),
            (r"downsample\.bn\.", "downsample.1."),
            (r"\.(bn|seqbn\.module)\.", "."),
            (r"\.fwd\.module\.0\.", ".conv."),
            (r"\.fwd\.module\.1\.", ".bn."),
            (r"^classifier\.module\.", "fc."),
            (r"^fc2\.", "fc."),
        ),
        cifar100=True,
    ),
    # ReLU networks have no neuron: theirs is that of the recipe that goes on from them.
    "torchvision": Source(is_relu=True),
    "timm": Source(is_relu=True),
    # The original repositories of transformers: QKFormer, for ImageNet, CIFAR and DVS; the
    # Spike-driven Transformer, V1; the small networks of its V3, Efficient_Spiking_Transformer_*;
    # Max-Former's networks for ImageNet.
    "qkformer": Source(
        mark=r"^patch_embed1\.proj_res_conv\.weight$", names=_HEAD_NAMES, is_transformer=True
    ),
    "sdt": Source(
        mark=r"^block\.0\.attn\.talking_heads\.weight$",
        names=_HEAD_NAMES,
        is_transformer=True,
        unused=r"^block\.\d+\.attn\.talking_heads\.weight$",
    ),
    "espikeformer": Source(
        mark=r"^downsample1_1\.encode_conv\.weight$", names=_HEAD_NAMES, is_transformer=True
    ),
    "maxformer": Source(
        mark=r"^stage1\.0\.mixer\.conv5\.weight$", names=_HEAD_NAMES, is_transformer=True
    ),
    # Two repositories of distillation, Intelli-Chip-Lab/snn_temporal_decoupling_distillation and
    # KaiSUN1/SeAl: ResNets for CIFAR and events, PreAct-ResNets under torchvision's names.
    "decoupling": Source(
        names=_DISTILLED_NAMES, neuron=_DISTILLED_NEURON, only_for=_DISTILLED, cifar100=True
    ),
    "seal": Source(
        names=_DISTILLED_NAMES,
        neuron=_DISTILLED_NEURON,
        preact_neuron={"reset": "hard"},
        only_for=_DISTILLED,
        cifar100=True,
    ),
    # The original repository of MS-ResNet.
    "ms": Source(mark=r"^conv2_x\.0\.residual_function\.1\.weight$", only_for=("MSResNet",)),
    # That of the parallel spiking neurons: its SEW-ResNets for ImageNet. Neurons' weights are those
    # of a linear layer over time.
    "psn": Source(
        mark=r"^sn1\.fc\.weight$",
        names=((r"(^|\.)(sn\d|downsample_sn)\.fc\.", r"\1\2."),),
        only_for=("PSNSEWResNet",),
    ),
}
# Families whose weights come from nowhere else.
ONLY_FROM = {
    "PreActResNet": ("decoupling", "seal"),
    "MSResNet": ("ms",),
    "PSNSEWResNet": ("psn", "torchvision", "timm"),
}
