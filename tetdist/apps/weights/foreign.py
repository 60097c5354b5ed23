"""Weights from elsewhere: the same networks under other libraries' names.

Five layouts of ResNets' names are known. All but the last are first put into the one of
torchvision's ResNet (`conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`), from which `convert` takes what
a model of ours needs:

    torchvision     torchvision's and timm's ResNets (ReLU), spikingjelly's sew_resnet* and
                    spiking_resnet*; the PreAct-ResNets of two repositories of distillation,
                    Intelli-Chip-Lab/snn_temporal_decoupling_distillation and KaiSUN1/SeAl
    decoupling, seal    these two's ResNets for CIFAR and events
    sew             the original repository of SEW-ResNet, for both families
    tet             the original repository of TET: its VGGSNN and ResNet-19
    ms              the original repository of MS-ResNet
    psn             that of the parallel spiking neurons: its SEW-ResNets for ImageNet

Transformers have names of their own, of which `convert` takes what it needs:

    qkformer        the original repository of QKFormer: its networks for ImageNet, CIFAR and DVS
    sdt             the original repository of the Spike-driven Transformer, V1
    espikeformer    that of its V3: the small networks, Efficient_Spiking_Transformer_t, s, m and l
    maxformer       the original repository of Max-Former: its networks for ImageNet

A state dict holds weights and running statistics, but not the neuron, which decides about the
result as much: it is the model's own, unless `NEURONS` has what the source trains with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn

from tetdist.apps.weights import transformer_names
from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.ms_resnet import MSResNet
from tetdist.models.preact_resnet import PreActResNet
from tetdist.models.psn_sew_resnet import PSNSEWResNet
from tetdist.models.qkformer import QKFormer
from tetdist.models.sew_resnet import Bottleneck, SEWResNet
from tetdist.models.spike_driven_transformer import SpikeDrivenTransformer
from tetdist.models.spiking_resnet import SpikingResNet
from tetdist.models.vggsnn import VGGSNN
from tetdist.nn.batch_norm import BatchNorm
from tetdist.wording import and_more

Source = Literal[
    "spikingjelly",
    "sew",
    "tet",
    "torchvision",
    "timm",
    "decoupling",
    "seal",
    "ms",
    "psn",
    "qkformer",
    "sdt",
    "espikeformer",
    "maxformer",
]

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
# What differs from the `default_neuron` of the networks that a source has. ReLU networks have none:
# theirs is that of the recipe that goes on from them. spikingjelly's is whatever its user asked
# for; this is the one of its ImageNet networks.
NEURONS: dict[Source, dict[str, Any]] = {
    "spikingjelly": _SEW_NEURON,
    "sew": _SEW_NEURON,
    "decoupling": _DISTILLED_NEURON,
    "seal": _DISTILLED_NEURON,
}
_PREACT_NEURONS: dict[Source, dict[str, Any]] = {"seal": {"reset": "hard"}}

_CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
# How images are scaled, where a source's network of so many classes does it otherwise than timm's
# description of the model says: the code of three sources for CIFAR-100.
SCALES: dict[tuple[Source, int], dict[str, tuple[float, float, float]]] = {
    ("tet", 100): _CIFAR100,
    ("decoupling", 100): _CIFAR100,
    ("seal", 100): _CIFAR100,
}

_COUNTER = "num_batches_tracked"

# Regular expressions to torchvision's names, applied one after the other.
_SEW_NAMES = (
    (r"(^|\.)conv(\d)\.module\.0\.", r"\1conv\2."),
    (r"(^|\.)conv(\d)\.module\.1\.", r"\1bn\2."),
    (r"downsample\.(0\.)?module\.([01])\.", r"downsample.\2."),
)
_TET_NAMES = (
    # A layer is registered by itself and within the wrappers that run it over time.
    (r"_s\.layer\.module\.", "."),
    (r"(^|\.)conv(\d)_s\.bn\.", r"\1bn\2."),
    (r"downsample\.layer\.module\.", "downsample.0."),
    (r"downsample\.bn\.", "downsample.1."),
    (r"\.(bn|seqbn\.module)\.", "."),
    (r"\.fwd\.module\.0\.", ".conv."),
    (r"\.fwd\.module\.1\.", ".bn."),
    (r"^classifier\.module\.", "fc."),
    (r"^fc2\.", "fc."),
)

# Neurons' weights are those of a linear layer over time.
_PSN_NAMES = ((r"(^|\.)(sn\d|downsample_sn)\.fc\.", r"\1\2."),)

# Sources of transformers, and the classifier of each.
_TRANSFORMERS: tuple[Source, ...] = ("qkformer", "sdt", "espikeformer", "maxformer")
_HEAD_NAMES = ((r"^head\.", "fc."),)

# Weights that a network makes and does not compute with: those of the Spike-driven Transformer.
_UNUSED = {
    "sdt": re.compile(r"^block\.\d+\.attn\.talking_heads\.weight$"),
    # Of a masked PSN, whose mask is a number of the configuration here.
    "spikingjelly": re.compile(r".*\.(mask[01]|_lambda_)$"),
}

_DISTILLED_NAMES = (
    (r"^conv0\.0\.", "conv1."),
    (r"^conv0\.1\.", "bn1."),
    (r"\.shortcut\.", ".downsample."),
)

# Names of a block of ours to torchvision's; LAST is the number of the block's last convolution.
_BLOCK_NAMES = (
    (r"conv(\d)\.conv\.", r"conv\1."),
    (r"conv(\d)\.neuron\.norm\.", r"bn\1."),
    (r"merge\.conv\.", "convLAST."),
    (r"merge\.neuron\.norm\.", "bnLAST."),
    (r"(merge\.downsample|downsample\.conv)\.", "downsample.0."),
    (r"(merge\.downsample_norm|downsample\.neuron\.norm)\.", "downsample.1."),
    # What neurons learn, of which torchvision has nothing: as spikingjelly's ResNets have it.
    (r"conv(\d)\.neuron\.learned\.", r"sn\1."),
    (r"merge\.neuron\.learned\.", "snLAST."),
    (r"downsample\.neuron\.learned\.", "downsample_sn."),
)
_PREACT_BLOCK_NAMES = (
    (r"conv1\.conv\.", "conv1."),
    (r"conv1\.neuron\.norm\.", "bn1."),
    (r"conv2\.", "conv2."),
    (r"add\.norm\.", "bn2."),
    (r"downsample\.", "downsample.0."),
    (r"downsample_norm\.", "downsample.1."),
)
# Likewise to MS-ResNet's; pooled is 1 where its projection begins with a pooling, else 0.
_MS_BLOCK_NAMES = (
    (r"conv1\.conv\.", "residual_function.1."),
    (r"conv1\.neuron\.norm\.", "residual_function.2.bn."),
    (r"conv2\.", "residual_function.4."),
    (r"add\.norm\.", "residual_function.5.bn."),
    (r"downsample\.", "shortcut.{pooled}."),
    (r"downsample_norm\.", "shortcut.{after_pooled}.bn."),
)


@dataclass(frozen=True)
class Converted:
    """A model's weights from elsewhere, and what did not go through.

    Attributes:
        weights: Every entry of the model's state dict; those that are missing are as they were.
        missing: Sentences, one for each entry of the model without a fitting one in the source.
        unexpected: Names in the source that the model has no place for.
        counters: How many counts of batches the source has. They have no effect on running
            statistics of a fixed momentum, as all of these are, and are left out.
        unused: Names in the source of weights with which its network does not compute.
        initialised: Entries of the model that no network of the source has: what neurons learn, and
            PSN-SEW-ResNet's offsets, beside a ReLU network.
    """

    weights: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    counters: int
    unused: list[str]
    initialised: list[str]


def source_of(state: Mapping[str, Tensor], path: Path) -> Source:
    """The source that a state dict is from, by its names.

    Raises:
        UserError: They do not tell.
    """
    if any(".fwd.module." in key or "_s.layer.module." in key for key in state):
        return "tet"
    if "layer1.0.conv1.module.0.weight" in state:
        return "sew"
    if "patch_embed1.proj_res_conv.weight" in state:
        return "qkformer"
    if "block.0.attn.talking_heads.weight" in state:
        return "sdt"
    if "downsample1_1.encode_conv.weight" in state:
        return "espikeformer"
    if "stage1.0.mixer.conv5.weight" in state:
        return "maxformer"
    if "sn1.fc.weight" in state:
        return "psn"
    if "conv2_x.0.residual_function.1.weight" in state:
        return "ms"
    if "conv0.0.weight" in state or "layer1.0.conv1.bias" in state:
        raise UserError(
            f"{path} has the names of two repositories of distillation, whose neurons are not the "
            "same; say which of them with --from: decoupling or seal"
        )
    if "layer1.0.conv1.weight" in state:
        raise UserError(
            f"{path} has the names of torchvision's ResNets, which timm and spikingjelly use, too; "
            "say which of them with --from, because their neurons are not the same"
        )
    raise UserError(
        f"{path} has the names of none of the known sources (its first is {next(iter(state))!r})"
    )


def convert(state: Mapping[str, Tensor], source: Source, model: SpikingNetwork) -> Converted:
    """The weights and running statistics of ``model`` from those of the same network elsewhere.

    The converted network's normalised currents are those of the source, whatever the scale of our
    batch norms: weights of a batch norm are divided by it.

    Args:
        state: What `read` returns.
        source: The library that it is from.
        model: The model as it will be used; it is neither changed nor referred to by the result.

    Raises:
        UserError: The file contradicts itself, or is of a network that ``model`` is only alike to.
    """
    _refuse_look_alikes(state, source, model)
    unused = [key for key in state if source in _UNUSED and _UNUSED[source].match(key)]
    state = {key: value for key, value in state.items() if key not in unused}
    theirs, original, counters = _in_known_names(state, source)
    scales = {
        f"{name}.weight": module.scale
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    }
    names = _names(model)
    weights: dict[str, Tensor] = {}
    missing: list[str] = []
    initialised: list[str] = []
    for key, own in model.state_dict().items():
        value = theirs.pop(names[key], None)
        over_time = key == "offsets" or ".learned." in key
        if value is not None and over_time and value.numel() == own.numel():
            value = value.reshape(own.shape)  # (T, 1) there is (T,) here
        if value is not None and value.shape == own.shape:
            # Divided in the source's precision, so that a float64 file is not rounded twice.
            weights[key] = (value / scales.get(key, 1.0)).to(own.dtype)
            continue
        weights[key] = own.clone()
        if source in _RELU_SOURCES and over_time:
            initialised.append(key)
            continue
        wanted = f"{key} (there {names[key]})"
        if value is None:
            missing.append(f"{wanted} is missing")
        else:
            shapes = f"{tuple(value.shape)} instead of {tuple(own.shape)}"
            missing.append(f"{wanted} has shape {shapes}")
    unexpected = [original[name] for name in theirs]
    return Converted(weights, missing, unexpected, counters, unused, initialised)


def neuron_of(source: Source, model: str) -> dict[str, Any]:
    """The neuron that a source trains a model with, as far as it differs from the model's own."""
    known = _PREACT_NEURONS if model.startswith("preact_resnet") else NEURONS
    return known.get(source, {})


def arguments_of(source: Source, model: str) -> dict[str, Any]:
    """Arguments with which a model of ours is the source's network of that name."""
    if source in ("spikingjelly", "sew") and model.startswith("spiking_resnet"):
        return {"norm": "bn"}
    if source in ("decoupling", "seal") and model == "spiking_resnet19":
        return {"stem_width": 128}
    return {}


def num_classes(state: Mapping[str, Tensor], source: Source) -> int | None:
    """The number of classes of a state dict's classifier, if it has one."""
    weight = _in_known_names(state, source)[0].get("fc.weight")
    return None if weight is None or weight.ndim == 0 else len(weight)


def _in_known_names(
    state: Mapping[str, Tensor], source: Source
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors by the names that `_names` has, the originals of these, the number of counters."""
    rules: tuple[tuple[str, str], ...] = ()
    match source:
        case "sew":
            rules = _SEW_NAMES
        case "tet":
            rules = _TET_NAMES
        case "decoupling" | "seal":
            hidden = [(r"^classifier\.0\.", "fc1."), (r"^classifier\.2\.", "fc.")]
            plain = [(r"^classifier\.0\.", "fc.")]
            rules = (*_DISTILLED_NAMES, *(hidden if "classifier.2.weight" in state else plain))
        case "psn":
            rules = _PSN_NAMES
        case "qkformer" | "sdt" | "espikeformer" | "maxformer":
            rules = _HEAD_NAMES
        case "spikingjelly" | "torchvision" | "timm" | "ms":
            pass
        case _:
            assert_never(source)
    renamed: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    counters = 0
    for key, value in state.items():
        if key.endswith(_COUNTER):
            counters += 1
            continue
        if source in _TRANSFORMERS and key.endswith("_conv.weight") and value.ndim == 3:
            # Of a convolution over the positions in a row, (C, C, 1), which is one over an image.
            value = value.unsqueeze(-1)
        name = _substitute(key, rules)
        if name in renamed and not torch.equal(renamed[name], value):
            raise UserError(
                f"the file contradicts itself: {original[name]} and {key} are the same layer and "
                "differ"
            )
        renamed[name] = value
        original.setdefault(name, key)
    return renamed, original, counters


def _names(model: SpikingNetwork) -> dict[str, str]:
    """The known name for each entry of a model's state dict."""
    rules: tuple[tuple[str, str], ...]
    if isinstance(model, QKFormer):
        rules = tuple(transformer_names.qkformer_names(model))
    elif isinstance(model, SpikeDrivenTransformer):
        rules = transformer_names.SDT_NAMES
    elif isinstance(model, ESpikeFormer):
        rules = tuple(transformer_names.espikeformer_names(model))
    elif isinstance(model, MaxFormer):
        rules = tuple(transformer_names.maxformer_names(model))
    elif isinstance(model, VGGSNN):
        rules = tuple(_vgg_names(model))
    elif isinstance(model, MSResNet):
        rules = tuple(_ms_names(model))
    elif isinstance(model, (SEWResNet, SpikingResNet, PreActResNet)):
        rules = tuple(_resnet_names(model))
    else:
        raise UserError(
            f"{model.default_cfg['architecture']} has no counterpart elsewhere to take weights "
            "from; there are those of sew_resnet*, psn_sew_resnet*, spiking_resnet*, "
            "preact_resnet*, ms_resnet*, vggsnn, qkformer_*, sdt_*, espikeformer_* and maxformer_*"
        )
    # A deep network has more rules than re remembers patterns.
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    return {key: _substitute(key, compiled) for key in model.state_dict()}


def _resnet_names(model: SEWResNet | SpikingResNet | PreActResNet) -> list[tuple[str, str]]:
    rules = [(r"^stem\.conv\.", "conv1."), (r"^stem\.(neuron|add)\.norm\.", "bn1.")]
    rules += [(r"^stem\.neuron\.learned\.", "sn1.")]
    rules += [(r"^hidden\.0\.", "fc1."), (r"^offsets$", "pe")]
    names = _PREACT_BLOCK_NAMES if isinstance(model, PreActResNet) else _BLOCK_NAMES
    for i, stage, position in _places_of_blocks(model):
        last = "3" if type(model.blocks[i]).__name__ == "Bottleneck" else "2"
        for pattern, name in names:
            theirs = f"layer{stage}.{position}.{name.replace('LAST', last)}"
            rules.append((rf"^blocks\.{i}\.{pattern}", theirs))
    return rules


def _ms_names(model: MSResNet) -> list[tuple[str, str]]:
    deep = isinstance(model.stem.conv, nn.Sequential)
    rules = [(r"^stem\.conv\.", "conv1." if deep else "conv1.0.")]
    rules += [(r"^stem\.add\.norm\.", "conv1.3.bn." if deep else "conv1.1.bn.")]
    for i, stage, position in _places_of_blocks(model):
        pooled = int(not isinstance(model.blocks[i].pool, nn.Identity))
        for pattern, name in _MS_BLOCK_NAMES:
            # Every stage begins with a stride there, and the first is conv2_x.
            theirs = f"conv{stage}_x.{position}." + name.format(
                pooled=pooled, after_pooled=pooled + 1
            )
            rules.append((rf"^blocks\.{i}\.{pattern}", theirs))
    return rules


def _places_of_blocks(model: SpikingNetwork) -> list[tuple[int, int, int]]:
    """Number of each block, of its stage (one more wherever there is a stride) and within that."""
    places = []
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        strided = any(isinstance(m, nn.Conv2d) and m.stride[0] == 2 for m in block.modules())
        stage, position = (stage + 1, 0) if strided else (stage, position + 1)
        places.append((i, stage, position))
    return places


def _vgg_names(model: VGGSNN) -> list[tuple[str, str]]:
    """The names of the convolutions in order; a pooling layer comes after each of our blocks."""
    convs = [
        name.removesuffix(".conv")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    rules = []
    for i, name in enumerate(convs):
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        theirs, own = f"features.{i + block}", re.escape(name)
        rules += [(rf"^{own}\.conv\.", f"{theirs}.conv.")]
        rules += [(rf"^{own}\.neuron\.norm\.", f"{theirs}.bn.")]
    return rules


_RELU_SOURCES: tuple[Source, ...] = ("torchvision", "timm")

# Families whose weights come from nowhere else, and what else has weights for no other.
_ONLY_FROM: dict[type[SpikingNetwork], tuple[Source, ...]] = {
    PreActResNet: ("decoupling", "seal"),
    MSResNet: ("ms",),
    PSNSEWResNet: ("psn", *_RELU_SOURCES),
}
_ONLY_FOR: dict[Source, tuple[type[SpikingNetwork], ...]] = {
    "decoupling": (PreActResNet, SpikingResNet),
    "seal": (PreActResNet, SpikingResNet),
    "ms": (MSResNet,),
    "psn": (PSNSEWResNet,),
}


def _refuse_look_alikes(state: Mapping[str, Tensor], source: Source, model: SpikingNetwork) -> None:
    sources = _ONLY_FROM.get(type(model), (source,))
    if source not in sources or not isinstance(model, _ONLY_FOR.get(source, (SpikingNetwork,))):
        raise UserError(
            f"weights of {source} are of other networks than {model.default_cfg['architecture']}: "
            "their shapes may agree, but shortcuts and neurons are at other places "
            "(docs/weights.md says which belong together)"
        )
    if source == "sew" and not any(".module." in key for key in state):
        raise UserError(
            "the file has torchvision's names, not those of the SEW-ResNet repository: give --from "
            "spikingjelly, torchvision or timm"
        )
    if whole := [k for k, v in state.items() if not (v.is_floating_point() or _COUNTER in k)]:
        raise UserError(
            f"{whole[0]}{and_more(whole)} is of {state[whole[0]].dtype}: weights of a quantised "
            "network are not taken over"
        )
    if "features.2.fwd.module.0.weight" in state:
        raise UserError(
            "the file is of TET's VGGSNNwoAP, which has strides in place of poolings; tetdist has "
            "the VGGSNN of the paper only"
        )
    if (
        source == "spikingjelly"
        and isinstance(model, SEWResNet)
        and isinstance(model.blocks[0], Bottleneck)
        and model.blocks[0].function == "iand"
    ):
        raise UserError(
            "spikingjelly's bottleneck blocks have IAND the other way round, residual * (1 - "
            "identity), so that its weights are not of this network; ADD and AND are the same"
        )


def _substitute(name: str, rules: Sequence[tuple[str | re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
