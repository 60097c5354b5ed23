"""Weights from elsewhere: the same networks under other libraries' names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.apps.weights import transformer_names
from tetdist.apps.weights.sources import ONLY_FROM, SOURCES, Rules
from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.ms_resnet import MSResNet
from tetdist.models.preact_resnet import PreActResNet
from tetdist.models.qkformer import QKFormer
from tetdist.models.sew_resnet import Bottleneck, SEWResNet
from tetdist.models.spike_driven_transformer import SpikeDrivenTransformer
from tetdist.models.spiking_resnet import SpikingResNet
from tetdist.models.vggsnn import VGGSNN
from tetdist.nn.batch_norm import BatchNorm
from tetdist.wording import and_more

_COUNTER = "num_batches_tracked"
_CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}

# Names of a block of ours to torchvision's; LAST is the number of the block's last convolution.
_BLOCK_NAMES = (
    (r"conv(\d)\.(conv\.)?(?=weight|bias)", r"conv\1."),
    (r"conv(\d)\.neuron\.norm\.", r"bn\1."),
    (r"merge\.conv\.", "convLAST."),
    (r"(merge\.neuron|add)\.norm\.", "bnLAST."),
    (r"((merge\.)?downsample|downsample\.conv)\.(?=weight|bias)", "downsample.0."),
    (r"((merge\.)?downsample_norm|downsample\.neuron\.norm)\.", "downsample.1."),
    # What neurons learn, of which torchvision has nothing: as spikingjelly's ResNets have it.
    (r"conv(\d)\.neuron\.learned\.", r"sn\1."),
    (r"merge\.neuron\.learned\.", "snLAST."),
    (r"downsample\.neuron\.learned\.", "downsample_sn."),
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


def source_of(state: Mapping[str, Tensor], path: Path) -> str:
    """The name of the source that a state dict is from, by its names.

    Raises:
        UserError: They do not tell.
    """
    for name, source in SOURCES.items():
        if source.mark is not None and any(re.search(source.mark, key) for key in state):
            return name
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


def convert(state: Mapping[str, Tensor], source: str, model: SpikingNetwork) -> Converted:
    """The weights and running statistics of ``model`` from those of the same network elsewhere.

    The converted network's normalised currents are those of the source, whatever the scale of our
    batch norms: weights of a batch norm are divided by it.

    Args:
        state: What `read` returns.
        source: Name of the source that it is from.
        model: The model as it will be used; it is neither changed nor referred to by the result.

    Raises:
        UserError: The file contradicts itself, or is of a network that ``model`` is only alike to.
    """
    _refuse_look_alikes(state, source, model)
    pattern = SOURCES[source].unused
    unused = [key for key in state if pattern is not None and re.match(pattern, key)]
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
        if SOURCES[source].is_relu and over_time:
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


def neuron_of(source: str, model: str) -> dict[str, Any]:
    """The neuron that a source trains a model with, as far as it differs from the model's own."""
    found = SOURCES[source]
    return dict(found.preact_neuron if model.startswith("preact_resnet") else found.neuron)


def scale_of(source: str, num_classes: int) -> dict[str, tuple[float, float, float]]:
    """Mean and standard deviation by which a source scales images, if not as timm describes it."""
    return _CIFAR100 if SOURCES[source].cifar100 and num_classes == 100 else {}


def arguments_of(source: str, model: str) -> dict[str, Any]:
    """Arguments with which a model of ours is the source's network of that name."""
    if source in ("spikingjelly", "sew") and model.startswith("spiking_resnet"):
        return {"norm": "bn"}
    if source in ("decoupling", "seal") and model == "spiking_resnet19":
        return {"stem_width": 128}
    return {}


def num_classes(state: Mapping[str, Tensor], source: str) -> int | None:
    """The number of classes of a state dict's classifier, if it has one."""
    weight = _in_known_names(state, source)[0].get("fc.weight")
    return None if weight is None or weight.ndim == 0 else len(weight)


def _in_known_names(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors by the names that `_names` has, the originals of these, the number of counters."""
    rules = SOURCES[source].names
    if source in ("decoupling", "seal") and "classifier.2.weight" in state:
        rules = [*rules[:-1], (r"^classifier\.0\.", "fc1.")]
    renamed: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    counters = 0
    for key, value in state.items():
        if key.endswith(_COUNTER):
            counters += 1
            continue
        if SOURCES[source].is_transformer and key.endswith("_conv.weight") and value.ndim == 3:
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
    match model:
        case QKFormer():
            rules = transformer_names.qkformer_names(model)
        case SpikeDrivenTransformer():
            rules = transformer_names.sdt_names(model)
        case ESpikeFormer():
            rules = transformer_names.espikeformer_names(model)
        case MaxFormer():
            rules = transformer_names.maxformer_names(model)
        case VGGSNN():
            rules = _vgg_names(model)
        case MSResNet():
            rules = _ms_names(model)
        case SEWResNet() | SpikingResNet() | PreActResNet():
            rules = _resnet_names(model)
        case _:
            raise UserError(
                f"{model.default_cfg['architecture']} has no counterpart elsewhere to take weights "
                "from; there are those of sew_resnet*, psn_sew_resnet*, spiking_resnet*, "
                "preact_resnet*, ms_resnet*, vggsnn, qkformer_*, sdt_*, espikeformer_* and "
                "maxformer_*"
            )
    # A deep network has more rules than re remembers patterns.
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    return {key: _substitute(key, compiled) for key in model.state_dict()}


def _resnet_names(model: SEWResNet | SpikingResNet | PreActResNet) -> list[tuple[str, str]]:
    rules = [
        (r"^stem\.conv\.", "conv1."),
        (r"^stem\.(neuron|add)\.norm\.", "bn1."),
        (r"^stem\.neuron\.learned\.", "sn1."),
        (r"^hidden\.0\.", "fc1."),
        (r"^offsets$", "pe"),
    ]
    for i, stage, position in _places_of_blocks(model):
        last = "3" if type(model.blocks[i]).__name__ == "Bottleneck" else "2"
        for pattern, name in _BLOCK_NAMES:
            theirs = f"layer{stage}.{position}.{name.replace('LAST', last)}"
            rules.append((rf"^blocks\.{i}\.{pattern}", theirs))
    return rules


def _ms_names(model: MSResNet) -> list[tuple[str, str]]:
    conv, norm = ("", "3.") if isinstance(model.stem.conv, nn.Sequential) else ("0.", "1.")
    rules = [(r"^stem\.conv\.", f"conv1.{conv}"), (r"^stem\.add\.norm\.", f"conv1.{norm}bn.")]
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


def _refuse_look_alikes(state: Mapping[str, Tensor], source: str, model: SpikingNetwork) -> None:
    family, only_for = type(model).__name__, SOURCES[source].only_for
    if source not in ONLY_FROM.get(family, (source,)) or family not in (only_for or (family,)):
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


def _substitute(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
