"""Conversion of weights of the same networks from other libraries."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetdist.apps.weights import transformer_names
from tetdist.apps.weights.sources import ONLY_FROM, OWN, SOURCES, Rules
from tetdist.errors import UserError
from tetdist.models.base import SpikingNetwork
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.ms_qkformer import MSQKFormer
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

# Our names of a block to torchvision's; LAST is the number of the block's last convolution.
_BLOCK_NAMES = (
    (r"conv(\d)\.(conv\.)?(?=weight|bias)", r"conv\1."),
    (r"conv(\d)\.neuron\.norm\.", r"bn\1."),
    (r"merge\.conv\.", "convLAST."),
    (r"(merge\.neuron|add)\.norm\.", "bnLAST."),
    (r"((merge\.)?downsample|downsample\.conv)\.(?=weight|bias)", "downsample.0."),
    (r"((merge\.)?downsample_norm|downsample\.neuron\.norm)\.", "downsample.1."),
    # Learnt neuron parameters, which torchvision lacks: as in spikingjelly's ResNets.
    (r"conv(\d)\.neuron\.learned\.", r"sn\1."),
    (r"merge\.neuron\.learned\.", "snLAST."),
    (r"downsample\.neuron\.learned\.", "downsample_sn."),
)
# The same to MS-ResNet's; pooled is 1 if its projection begins with a pooling, else 0.
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
    """Converted weights of a model, and what could not be converted.

    Attributes:
        weights: Every entry of the model's state dict; missing ones keep the model's values.
        missing: A text for each entry of the model without a matching one in the source.
        unexpected: Names in the source that the model does not have.
        unused: Names in the source of weights that its own network does not use.
        initialised: Entries of the model that a ReLU network lacks: learnt neuron parameters, and
            PSN-SEW-ResNet's offsets.
    """

    weights: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    unused: list[str]
    initialised: list[str]


def source_of(state: Mapping[str, Tensor], path: Path) -> str:
    """Return the source of a state dict, recognised by its names."""
    for name, source in SOURCES.items():
        if source.mark is not None and any(re.search(source.mark, key) for key in state):
            return name
    if "conv0.0.weight" in state or "layer1.0.conv1.bias" in state:
        names, sources = "names of several sources with different neurons", ["decoupling", "seal"]
    elif "layer1.0.conv1.weight" in state:
        names = "names of several sources with different neurons"
        sources = ["torchvision", "timm", "spikingjelly"]
    else:
        names, sources = f"unknown names (the first is {next(iter(state))!r})", [*SOURCES]
    raise UserError(f"{path} has {names}; name its source with --from: {', '.join(sources)}")


def convert(state: Mapping[str, Tensor], source: str, model: SpikingNetwork) -> Converted:
    """Convert the weights and running statistics of another library's network to ``model``.

    The converted network has the same normalised currents as the source: the weights of a batch
    norm are divided by the scale that ours applies.

    Args:
        model: The model as it will be used; it is not changed and shares no memory with the result.
    """
    if source != OWN:
        _refuse_look_alikes(state, source, model)
    pattern = SOURCES[source].unused
    unused = [key for key in state if pattern is not None and re.match(pattern, key)]
    state = {key: value for key, value in state.items() if key not in unused}
    renamed, original = _in_known_names(state, source)
    scales = {
        f"{name}.weight": module.scale
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and source != OWN
    }
    names = {key: key for key in model.state_dict()} if source == OWN else _names(model)
    weights: dict[str, Tensor] = {}
    missing: list[str] = []
    initialised: list[str] = []
    for key, own in model.state_dict().items():
        value = renamed.pop(names[key], None)
        over_time = key == "offsets" or ".learned." in key
        if value is not None and over_time and value.numel() == own.numel():
            value = value.reshape(own.shape)  # the source's (T, 1) is our (T,)
        if value is not None and value.shape == own.shape:
            # Divide in the source's precision, so that a float64 file is rounded only once.
            weights[key] = (value / scales.get(key, 1.0)).to(own.dtype)
            continue
        weights[key] = own.clone()
        if SOURCES[source].is_relu and over_time:
            initialised.append(key)
            continue
        place = f"{key} ({names[key]} in the file)"
        if value is None:
            missing.append(f"{place} is missing")
        else:
            shapes = f"{tuple(value.shape)} instead of {tuple(own.shape)}"
            missing.append(f"{place} has shape {shapes}")
    unexpected = [original[name] for name in renamed]
    return Converted(weights, missing, unexpected, unused, initialised)


def neuron_of(source: str, model: str) -> dict[str, Any]:
    """Return the neuron settings of a source that differ from the model's own."""
    origin = SOURCES[source]
    return dict(origin.preact_neuron if model.startswith("preact_resnet") else origin.neuron)


def scale_of(source: str, num_classes: int) -> dict[str, tuple[float, float, float]]:
    """Return the mean and standard deviation of a source, if they differ from timm's."""
    return _CIFAR100 if SOURCES[source].cifar100 and num_classes == 100 else {}


def arguments_of(source: str, model: str) -> dict[str, Any]:
    """Return the arguments that make our model equal to the source's network of that name."""
    if source in ("spikingjelly", "sew") and model.startswith("spiking_resnet"):
        return {"norm": "bn"}
    if source in ("decoupling", "seal") and model == "spiking_resnet19":
        return {"stem_width": 128}
    return {}


def num_classes(state: Mapping[str, Tensor], source: str) -> int | None:
    """Return the number of classes of a state dict's classifier, if it has one."""
    weight = _in_known_names(state, source)[0].get("fc.weight")
    return None if weight is None or weight.ndim == 0 else len(weight)


def _in_known_names(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by the names of `_names`, and their original names."""
    rules = SOURCES[source].names
    if source in ("decoupling", "seal") and "classifier.2.weight" in state:
        rules = [*rules[:-1], (r"^classifier\.0\.", "fc1.")]
    renamed: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    for key, value in state.items():
        if key.endswith(_COUNTER):  # without effect on statistics of a fixed momentum, as all are
            continue
        if SOURCES[source].is_transformer and key.endswith("_conv.weight") and value.ndim == 3:
            # A 1D convolution over flattened positions, (C, C, 1), equals our 2D one.
            value = value.unsqueeze(-1)
        name = _substitute(key, rules)
        if name in renamed and not torch.equal(renamed[name], value):
            raise UserError(
                f"the file contradicts itself: {original[name]} and {key} are the same layer but "
                "differ; take another copy of it"
            )
        renamed[name] = value
        original.setdefault(name, key)
    return renamed, original


def _names(model: SpikingNetwork) -> dict[str, str]:
    """Return the source's name for each entry of a model's state dict."""
    match model:
        case QKFormer():
            rules = transformer_names.qkformer_names(model)
        case SpikeDrivenTransformer():
            rules = transformer_names.sdt_names(model)
        case ESpikeFormer():
            rules = transformer_names.espikeformer_names(model)
        case MaxFormer():
            rules = transformer_names.maxformer_names(model)
        case MSQKFormer():
            rules = transformer_names.ms_qkformer_names(model)
        case VGGSNN():
            rules = _vgg_names(model)
        case MSResNet():
            rules = _ms_names(model)
        case SEWResNet() | SpikingResNet() | PreActResNet():
            rules = _resnet_names(model)
        case _:
            raise UserError(
                f"--model: {model.default_cfg['architecture']} has no counterpart in other "
                "projects; choose from sew_resnet*, psn_sew_resnet*, spiking_resnet*, "
                "preact_resnet*, ms_resnet*, i2e_msnet*, vggsnn, qkformer_*, ms_qkformer_*, sdt_*, "
                "espikeformer_* and maxformer_*"
            )
    # A deep network has more rules than re's cache has places.
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
            source_name = f"layer{stage}.{position}.{name.replace('LAST', last)}"
            rules.append((rf"^blocks\.{i}\.{pattern}", source_name))
    return rules


def _ms_names(model: MSResNet) -> list[tuple[str, str]]:
    conv, norm = ("", "3.") if isinstance(model.stem.conv, nn.Sequential) else ("0.", "1.")
    rules = [(r"^stem\.conv\.", f"conv1.{conv}"), (r"^stem\.add\.norm\.", f"conv1.{norm}bn.")]
    for i, stage, position in _places_of_blocks(model):
        pooled = int(not isinstance(model.blocks[i].pool, nn.Identity))
        for pattern, name in _MS_BLOCK_NAMES:
            # In the source every stage begins with a stride, and the first is conv2_x.
            source_name = f"conv{stage}_x.{position}." + name.format(
                pooled=pooled, after_pooled=pooled + 1
            )
            rules.append((rf"^blocks\.{i}\.{pattern}", source_name))
    return rules


def _places_of_blocks(model: SpikingNetwork) -> list[tuple[int, int, int]]:
    """Return each block's index, its stage (which a stride begins) and its position therein."""
    places = []
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        strided = any(isinstance(m, nn.Conv2d) and m.stride[0] == 2 for m in block.modules())
        stage, position = (stage + 1, 0) if strided else (stage, position + 1)
        places.append((i, stage, position))
    return places


def _vgg_names(model: VGGSNN) -> list[tuple[str, str]]:
    """Return rules for the convolutions in order; a pooling follows each of our blocks."""
    convs = [
        name.removesuffix(".conv")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    rules = []
    for i, name in enumerate(convs):
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        feature, own = f"features.{i + block}", re.escape(name)
        rules += [(rf"^{own}\.conv\.", f"{feature}.conv.")]
        rules += [(rf"^{own}\.neuron\.norm\.", f"{feature}.bn.")]
    return rules


def _refuse_look_alikes(state: Mapping[str, Tensor], source: str, model: SpikingNetwork) -> None:
    family, only_for = type(model).__name__, SOURCES[source].only_for
    if source not in ONLY_FROM.get(family, (source,)) or family not in (only_for or (family,)):
        raise UserError(
            f"weights of {source} do not belong to {model.default_cfg['architecture']}, even if "
            "their shapes match: shortcuts and neurons are at other places; docs/weights.md lists "
            "the matching pairs"
        )
    if source == "sew" and not any(".module." in key for key in state):
        raise UserError(
            "the file has torchvision's names, not those of the SEW-ResNet repository; give --from "
            "spikingjelly, torchvision or timm"
        )
    if whole := [k for k, v in state.items() if not (v.is_floating_point() or _COUNTER in k)]:
        raise UserError(
            f"{whole[0]}{and_more(whole)} has type {state[whole[0]].dtype}, but quantised weights "
            "cannot be converted; take the file before its quantisation"
        )
    if "features.2.fwd.module.0.weight" in state:
        raise UserError(
            "the file is of TET's VGGSNNwoAP, which has strides instead of poolings; tetdist only "
            "has the paper's VGGSNN"
        )
    if (
        source == "spikingjelly"
        and isinstance(model, SEWResNet)
        and isinstance(model.blocks[0], Bottleneck)
        and model.blocks[0].function == "iand"
    ):
        raise UserError(
            "spikingjelly's bottleneck blocks have the opposite IAND, residual * (1 - identity), "
            "so its weights do not fit this network; only ADD and AND can be converted"
        )


def _substitute(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
