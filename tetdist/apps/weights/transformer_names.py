"""Rules for foreign.py from our names of transformers' weights to those of their authors' code.

A rule is a pattern of our names and its replacement.
"""

from collections.abc import Iterator

from torch import nn

from tetdist.models import espikeformer, qkformer
from tetdist.models.attention import StreamAttention, StreamEmbedding
from tetdist.models.base import SpikingNetwork
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.ms_qkformer import MSQKFormer
from tetdist.models.qkformer import QKFormer
from tetdist.models.spike_driven_transformer import SpikeDrivenTransformer

Names = list[tuple[str, str]]


def _layer(own: str, source: str, conv: str = "_conv.", norm: str = "_bn.") -> Names:
    """Return rules for a layer's convolution and its norm, wherever the norm is."""
    of_norm = r"\.(?:neuron|norm|add)\.norm\."
    return [(rf"^{own}\.conv\.", source + conv), (f"^{own}{of_norm}", source + norm)]


def _added(own: str, name: str, source: str, conv: str = "_conv.", norm: str = "_bn.") -> Names:
    """Return rules for a convolution of this name, and for the norm before its sum."""
    return [(rf"^{own}\.{name}\.", source + conv), (rf"^{own}\.add\.norm\.", source + norm)]


def _stream_embedding(own: str, embedding: nn.Module, source: str, names: list[str]) -> Names:
    """Return rules for a `StreamEmbedding`: its layers, its last convolution, its shortcut.

    Args:
        names: Their names of these convolutions and norms, for which `{}` is conv or bn.
    """
    assert isinstance(embedding, StreamEmbedding)
    *layers, last, shortcut = (
        [f"{source}.{name.format(one)}." for one in ("conv", "bn")] for name in names
    )
    rules = []
    for i, (conv, norm) in enumerate(layers):
        rules += _layer(rf"{own}\.layers\.{i}", "", conv, norm)
    added, other = (shortcut, last) if embedding.pools_last else (last, shortcut)
    return [
        *rules,
        (rf"^{own}\.conv\.", last[0]),
        (rf"^{own}\.shortcut\.", shortcut[0]),
        (rf"^{own}\.add\.norm\.", added[1]),
        (rf"^{own}\.other_norm\.(?:norm\.)?", other[1]),
    ]


def _places(model: SpikingNetwork) -> Iterator[tuple[str, int, int, nn.Module]]:
    """Yield each block with its name, its stage and its position therein, -1 of an embedding."""
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        begins = isinstance(block, (qkformer.Embedding, StreamEmbedding))
        stage, position = (stage + 1, -1) if begins else (stage, position + 1)
        yield rf"blocks\.{i}", stage, position, block


def _attention(own: str, source: str, conv: str, norm: str) -> Names:
    """Return rules for attention to a stream, the ``attention`` or ``mixer`` of its block."""
    own = rf"{own}\.(?:attention|mixer)"
    return [
        *_layer(rf"{own}\.([qkv])", rf"{source}.\1", conv, norm),
        *_added(own, "proj", f"{source}.proj", conv, norm),
    ]


def _mlp(own: str, source: str) -> Names:
    """Return rules for an MLP of a real-valued stream."""
    return [
        *_layer(rf"{own}\.mlp\.fc([12])", rf"{source}.fc\1"),
        *_added(rf"{own}\.mlp", "fc2", f"{source}.fc2"),
    ]


def qkformer_names(model: QKFormer) -> Names:
    """Return rules to the authors' names, which differ between ImageNet and other data."""
    on_imagenet = model.embedding == "imagenet"
    last_attention, mlp = ("attn", "fc") if on_imagenet else ("ssa", "mlp")
    later = ["proj", "proj4"] if model.embedding == "dvs" else ["proj3", "proj4"]

    def embedding(own: str, source: str, layers: list[str]) -> Names:
        rules = _layer(rf"{own}\.shortcut", f"{source}.proj_res")
        for i, layer in enumerate(layers):
            rules += _layer(rf"{own}\.layers\.{i}", f"{source}.{layer}")
        return rules

    rules = embedding("stem", "patch_embed1", ["proj", "proj1", "proj2", "proj3"])
    for own, stage, position, block in _places(model):
        if position < 0:
            rules += embedding(own, f"patch_embed{stage}", later)
            continue
        source = f"stage{stage}.{position}"
        is_token = isinstance(block.attention, qkformer.TokenAttention)
        attention = f"{source}.{'tssa' if is_token else last_attention}"
        rules += _layer(rf"{own}\.attention\.(q|k|v|proj)", rf"{attention}.\1")
        rules += _layer(rf"{own}\.mlp\.fc(1|2)", rf"{source}.mlp.{mlp}\1")
    return rules


def sdt_names(model: SpikeDrivenTransformer) -> Names:
    rules = [
        *_layer(r"stem\.layers\.0", "patch_embed.proj"),
        *_layer(r"stem\.layers\.(\d)", "patch_embed.proj", r"_conv\1.", r"_bn\1."),
        (r"^stem\.conv\.", "patch_embed.proj_conv3."),
        (r"^stem\.norm\.(norm\.)?", "patch_embed.proj_bn3."),
        *_added("stem", "position", "patch_embed.rpe"),
    ]
    for i in range(len(model.blocks)):
        rules += _attention(rf"blocks\.{i}", f"block.{i}.attn", "_conv.", "_bn.")
        rules += _mlp(rf"blocks\.{i}", f"block.{i}.mlp")
    return rules


def espikeformer_names(model: ESpikeFormer) -> Names:
    rules = _layer("stem", "downsample1_1.encode")
    convolutional = iter(("1_1", "1_2", "2_1", "2_2"))
    down = iter(("1_2", "2", "3", "4"))
    stage, position = 3, -1

    def separable(own: str, source: str) -> Names:
        own = rf"{own}\.separable"
        return [
            *_layer(rf"{own}\.widen", f"{source}.pwconv1", ".0.", ".1."),
            *_layer(rf"{own}\.depthwise", f"{source}.dwconv", ".0.", ".1."),
            *_added(own, "narrow", f"{source}.pwconv2", ".0.", ".1."),
        ]

    for i, block in enumerate(model.blocks):
        own = rf"blocks\.{i}"
        match block:
            case espikeformer.Downsampling():
                number = next(down)
                rules += _layer(own, f"downsample{number}.encode")
                if number == "4":
                    stage, position = 4, -1
            case espikeformer.ConvBlock():
                source = f"ConvBlock{next(convolutional)}.0"
                rules += separable(own, f"{source}.Conv")
                rules += _layer(rf"{own}\.mlp\.conv1", source, ".conv1.", ".bn1.")
                rules += _added(rf"{own}\.mlp", "conv2", source, ".conv2.", ".bn2.")
            case espikeformer.TransformerBlock():
                position += 1
                source = f"block{stage}.{position}"
                rules += separable(own, f"{source}.conv")
                rules += _attention(own, f"{source}.attn", "_conv.0.", "_conv.1.")
                rules += _mlp(own, f"{source}.mlp")
            case _:
                raise AssertionError(f"no names for {type(block).__name__}")
    return rules


def maxformer_names(model: MaxFormer) -> Names:
    names = [f"embed{i}.embed_{{}}" for i in (1, 2, 3, 4)]
    rules = _stream_embedding("stem", model.stem, "patch_embed1", names)
    for own, stage, position, block in _places(model):
        if position < 0:
            names = ["max_embed1.embed_{}", "embed1.embed_{}", "max_embed2.embed_{}"]
            rules += _stream_embedding(own, block, f"patch_embed{stage}", names)
            continue
        source = f"stage{stage}.{position}"
        if isinstance(block.mixer, StreamAttention):
            rules += _attention(own, f"{source}.attn", "_conv.", "_bn.")
        else:
            # The first stage's convolution has this name although its size is 7x7.
            name = "conv5" if stage == 1 else "conv"
            rules += _layer(rf"{own}\.mixer", f"{source}.mixer.{name}", ".", "_bn.")
        rules += _mlp(own, f"{source}.mlp")
    return rules


def ms_qkformer_names(model: MSQKFormer) -> Names:
    """Return rules to the authors' names, which differ between ImageNet and other data."""
    later = ["embed1.embed_{}", "max_embed1.embed_{}", "embed2.embed_{}"]
    match model.embedding:
        case "imagenet":
            stem = ["proj_{}", "proj_{}1", "proj_{}2", "rpe_{}"]
            later = ["proj3_{}", "proj4_{}", "proj_res_{}"]
        case "cifar":
            stem = ["proj_{}", "embed1.embed_{}", "embed2.embed_{}"]
        case "dvs":
            stem = ["proj_{}", *(f"max_embed{i}.embed_{{}}" for i in (1, 2, 3)), "embed1.embed_{}"]
    rules = _stream_embedding("stem", model.stem, "patch_embed1", stem)
    for own, stage, position, block in _places(model):
        if position < 0:
            rules += _stream_embedding(own, block, f"patch_embed{stage}", later)
            continue
        source = f"stage{stage}.{position}"
        rules += _attention(own, f"{source}.attn", "_conv.", "_bn.")
        rules += _mlp(own, f"{source}.mlp")
    return rules
