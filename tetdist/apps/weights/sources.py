"""Libraries and repositories whose weights can be converted, and the names in their files.

All networks except the transformers are first mapped to the names of torchvision's ResNet (`conv1`,
`bn1`, `layer1.0.conv1`, ..., `fc`), from which `foreign.convert` maps to our models.

A state dict holds weights and running statistics, but not the neuron, which matters as much for the
result: it is our model's own, unless the source defines another.
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
    # With a hidden layer, the classifier is the third of three modules.
    (r"^classifier\.2\.", "fc."),
    (r"^classifier\.0\.", "fc."),
)
_DISTILLED = ("PreActResNet", "SpikingResNet")
OWN = "tetdist"
_HEAD_NAMES = ((r"^head\.", "fc."),)


@dataclass(frozen=True)
class Source:
    """Library or repository, and facts that its state dicts do not hold.

    Attributes:
        mark: Pattern of a name that identifies its state dicts; None if others have the same names.
        names: Regular expressions that map to the known names, applied in order.
        neuron: Settings of its neurons that differ from the `default_neuron` of our model.
        preact_neuron: The same for its PreAct-ResNets.
        only_for: Families of our models that its weights fit; empty: any that `foreign` names.
        is_relu: True if its networks have no spikes.
        is_transformer: True if its 1D convolutions over flattened positions, (C, C, 1), equal our
            2D ones.
        unused: Pattern of weights that its networks have but do not use.
        cifar100: True if it scales CIFAR-100's images differently from timm's description of the
            model.
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
    # A run or an export, for another configuration; it holds its own facts.
    OWN: Source(),
    # Its sew_resnet* and spiking_resnet*. Users choose the neuron; this is the one of its ImageNet
    # networks. The mask of a masked PSN is a key of our configuration.
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
    # The original repository of TET: its VGGSNN and ResNet-19. Each layer is registered twice: by
    # itself and in the wrapper that runs it over time.
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
    # ReLU networks have no neuron; the recipe that starts from them sets it.
    "torchvision": Source(is_relu=True),
    "timm": Source(is_relu=True),
    # The original repositories of transformers: QKFormer, for ImageNet, CIFAR and DVS; the
    # Spike-driven Transformer, V1; the small networks of its V3, Efficient_Spiking_Transformer_*;
    # Max-Former, for ImageNet, and MS-QKFormer, for ImageNet, CIFAR and DVS, of one repository.
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
        mark=r"^stage1\.0\.(mixer\.conv5|attn\.q_conv)\.weight$",
        names=_HEAD_NAMES,
        is_transformer=True,
        cifar100=True,
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
    # The repository of I2E, Ruichen0424/I2E; the projections begin with neurons.
    "i2e": Source(
        mark=r"^layer2\.0\.downsample\.2\.weight$",
        names=((r"\.downsample\.1\.", ".downsample.0."), (r"\.downsample\.2\.", ".downsample.1.")),
        only_for=("I2EMSNet",),
        unused=r"^i2e\.weight$",
    ),
    # The repository of the parallel spiking neurons: its SEW-ResNets for ImageNet. The neurons'
    # weights are those of a linear layer over time.
    "psn": Source(
        mark=r"^sn1\.fc\.weight$",
        names=((r"(^|\.)(sn\d|downsample_sn)\.fc\.", r"\1\2."),),
        only_for=("PSNSEWResNet",),
    ),
}
# Families whose weights come from these sources only.
ONLY_FROM = {
    "PreActResNet": ("decoupling", "seal"),
    "MSResNet": ("ms",),
    "I2EMSNet": ("i2e",),
    "PSNSEWResNet": ("psn", "torchvision", "timm"),
}
