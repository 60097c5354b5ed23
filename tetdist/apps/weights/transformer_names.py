"""Rules for foreign.py from our names of transformers' weights to those of their authors' code.

A rule is a pattern of our names and its replacement.
"""

from torch import nn

from tetdist.models import espikeformer, qkformer
from tetdist.models.attention import StreamAttention, StreamEmbedding
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.qkformer import QKFormer
from tetdist.models.spike_driven_transformer import SpikeDrivenTransformer

Names = list[tuple[str, str]]


def _layer(own: str, theirs: str, conv: str = "_conv.", norm: str = "_bn.") -> Names:
    """Return rules for a layer's convolution and its norm, wherever the norm is."""
    of_norm = r"\.(?:neuron|norm|add)\.norm\."
    return [(rf"^{own}\.conv\.", theirs + conv), (f"^{own}{of_norm}", theirs + norm)]


def _added(own: str, name: str, theirs: str, conv: str = "_conv.", norm: str = "_bn.") -> Names:
    """Return rules for a convolution of this name, and for the norm before its sum."""
    return [(rf"^{own}\.{name}\.", theirs + conv), (rf"^{own}\.add\.norm\.", theirs + norm)]


def _stream_embedding(own: str, embedding: StreamEmbedding, theirs: list[str]) -> Names:
    """Return rules for the layers, the last convolution and the shortcut, in this order."""
    *layers, last, shortcut = theirs
    rules = []
    for i, name in enumerate(layers):
        rules += _layer(rf"{own}\.layers\.{i}", name)
    rules += [(rf"^{own}\.conv\.", f"{last}_conv."), (rf"^{own}\.shortcut\.", f"{shortcut}_conv.")]
    added, other = (shortcut, last) if embedding.pools_last else (last, shortcut)
    rules += [(rf"^{own}\.add\.norm\.", f"{added}_bn.")]
    return [*rules, (rf"^{own}\.other_norm\.(?:norm\.)?", f"{other}_bn.")]


def _attention(own: str, theirs: str, conv: str, norm: str) -> Names:
    """Return rules for a `StreamAttention`, the ``attention`` or ``mixer`` of its block."""
    own = rf"{own}\.(?:attention|mixer)"
    return [
        *_layer(rf"{own}\.([qkv])", rf"{theirs}.\1", conv, norm),
        *_added(own, "proj", f"{theirs}.proj", conv, norm),
    ]


def _mlp(own: str, theirs: str) -> Names:
    """Return rules for an MLP of a real-valued stream."""
    return [
        *_layer(rf"{own}\.mlp\.fc1", f"{theirs}.fc1"),
        *_added(rf"{own}\.mlp", "fc2", f"{theirs}.fc2"),
    ]


def qkformer_names(model: QKFormer) -> Names:
    """Return rules to the authors' names, which differ between ImageNet and other data."""
    on_imagenet = model.embedding == "imagenet"
    last_attention, mlp = ("attn", "fc") if on_imagenet else ("ssa", "mlp")
    later = ["proj", "proj4"] if model.embedding == "dvs" else ["proj3", "proj4"]

    def embedding(own: str, theirs: str, layers: list[str]) -> Names:
        rules = _layer(rf"{own}\.shortcut", f"{theirs}.proj_res")
        for i, layer in enumerate(layers):
            rules += _layer(rf"{own}\.layers\.{i}", f"{theirs}.{layer}")
        return rules

    rules = embedding("stem", "patch_embed1", ["proj", "proj1", "proj2", "proj3"])
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        own = rf"blocks\.{i}"
        if isinstance(block, qkformer.Embedding):
            stage, position = stage + 1, -1
            rules += embedding(own, f"patch_embed{stage}", later)
            continue
        position += 1
        theirs = f"stage{stage}.{position}"
        is_token = isinstance(block.attention, qkformer.TokenAttention)
        attention = f"{theirs}.{'tssa' if is_token else last_attention}"
        rules += _layer(rf"{own}\.attention\.(q|k|v|proj)", rf"{attention}.\1")
        rules += _layer(rf"{own}\.mlp\.fc(1|2)", rf"{theirs}.mlp.{mlp}\1")
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

    def separable(own: str, theirs: str) -> Names:
        own = rf"{own}\.separable"
        return [
            *_layer(rf"{own}\.widen", f"{theirs}.pwconv1", ".0.", ".1."),
            *_layer(rf"{own}\.depthwise", f"{theirs}.dwconv", ".0.", ".1."),
            *_added(own, "narrow", f"{theirs}.pwconv2", ".0.", ".1."),
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
                theirs = f"ConvBlock{next(convolutional)}.0"
                rules += separable(own, f"{theirs}.Conv")
                rules += _layer(rf"{own}\.mlp\.conv1", theirs, ".conv1.", ".bn1.")
                rules += _added(rf"{own}\.mlp", "conv2", theirs, ".conv2.", ".bn2.")
            case espikeformer.TransformerBlock():
                position += 1
                theirs = f"block{stage}.{position}"
                rules += separable(own, f"{theirs}.conv")
                rules += _attention(own, f"{theirs}.attn", "_conv.0.", "_conv.1.")
                rules += _mlp(own, f"{theirs}.mlp")
            case _:
                raise AssertionError(f"no names for {type(block).__name__}")
    return rules


def maxformer_names(model: MaxFormer) -> Names:
    def embedding(own: str, ours: nn.Module, theirs: str, names: list[str]) -> Names:
        assert isinstance(ours, StreamEmbedding)
        return _stream_embedding(own, ours, [f"{theirs}.{name}.embed" for name in names])

    rules = embedding("stem", model.stem, "patch_embed1", [f"embed{i}" for i in (1, 2, 3, 4)])
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        own = rf"blocks\.{i}"
        if isinstance(block, StreamEmbedding):
            stage, position = stage + 1, -1
            names = ["max_embed1", "embed1", "max_embed2"]
            rules += embedding(own, block, f"patch_embed{stage}", names)
            continue
        position += 1
        theirs = f"stage{stage}.{position}"
        if isinstance(block.mixer, StreamAttention):
            rules += _attention(own, f"{theirs}.attn", "_conv.", "_bn.")
        else:
            # The first stage's convolution has this name although its size is 7x7.
            name = "conv5" if stage == 1 else "conv"
            rules += _layer(rf"{own}\.mixer", f"{theirs}.mixer.{name}", ".", "_bn.")
        rules += _mlp(own, f"{theirs}.mlp")
    return rules
