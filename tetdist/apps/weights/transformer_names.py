"""Names of transformers' weights in their authors' code, by those in ours: rules for foreign.py.

A rule is a pattern of our names and what replaces it.
"""

from tetdist.models import espikeformer, max_former, qkformer
from tetdist.models.attention import StreamAttention
from tetdist.models.espikeformer import ESpikeFormer
from tetdist.models.max_former import MaxFormer
from tetdist.models.qkformer import QKFormer


def qkformer_names(model: QKFormer) -> list[tuple[str, str]]:
    """The names of the authors' networks, of which that for ImageNet differs from the others."""
    on_imagenet = model.embedding == "imagenet"
    last_attention, mlp = ("attn", "fc") if on_imagenet else ("ssa", "mlp")
    rules = list(_embedding_names(r"^stem", "patch_embed1", ["proj", "proj1", "proj2", "proj3"]))
    later = ["proj", "proj4"] if model.embedding == "dvs" else ["proj3", "proj4"]
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        own = rf"^blocks\.{i}"
        if isinstance(block, qkformer.Embedding):
            stage, position = stage + 1, -1
            rules += _embedding_names(own, f"patch_embed{stage}", later)
            continue
        position += 1
        theirs = f"stage{stage}.{position}"
        is_token = isinstance(block.attention, qkformer.TokenAttention)
        attention = f"{theirs}.{'tssa' if is_token else last_attention}"
        rules += _layer_names(rf"{own}\.attention\.(q|k|v|proj)", rf"{attention}.\1")
        rules += _layer_names(rf"{own}\.mlp\.fc(1|2)", rf"{theirs}.mlp.{mlp}\1")
    return rules


def _embedding_names(own: str, theirs: str, layers: list[str]) -> list[tuple[str, str]]:
    rules = _layer_names(rf"{own}\.shortcut", f"{theirs}.proj_res")
    for i, layer in enumerate(layers):
        rules += _layer_names(rf"{own}\.layers\.{i}", f"{theirs}.{layer}")
    return rules


def _layer_names(own: str, theirs: str) -> list[tuple[str, str]]:
    """Rules for the convolution of a layer, and for its norm with or without a pooling."""
    norm = r"\.(?:neuron|norm)\.norm\."
    return [(rf"{own}\.conv\.", f"{theirs}_conv."), (own + norm, f"{theirs}_bn.")]


SDT_NAMES = (
    (r"^stem\.layers\.0\.conv\.", "patch_embed.proj_conv."),
    (r"^stem\.layers\.0\.neuron\.norm\.", "patch_embed.proj_bn."),
    (r"^stem\.layers\.(\d)\.conv\.", r"patch_embed.proj_conv\1."),
    (r"^stem\.layers\.(\d)\.neuron\.norm\.", r"patch_embed.proj_bn\1."),
    (r"^stem\.conv\.", "patch_embed.proj_conv3."),
    (r"^stem\.norm\.(norm\.)?", "patch_embed.proj_bn3."),
    (r"^stem\.position\.", "patch_embed.rpe_conv."),
    (r"^stem\.add\.norm\.", "patch_embed.rpe_bn."),
    (r"^blocks\.(\d+)\.attention\.([qkv])\.conv\.", r"block.\1.attn.\2_conv."),
    (r"^blocks\.(\d+)\.attention\.([qkv])\.neuron\.norm\.", r"block.\1.attn.\2_bn."),
    (r"^blocks\.(\d+)\.attention\.proj\.", r"block.\1.attn.proj_conv."),
    (r"^blocks\.(\d+)\.attention\.add\.norm\.", r"block.\1.attn.proj_bn."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.conv\.", r"block.\1.mlp.fc1_conv."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.neuron\.norm\.", r"block.\1.mlp.fc1_bn."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"block.\1.mlp.fc2_conv."),
    (r"^blocks\.(\d+)\.mlp\.add\.norm\.", r"block.\1.mlp.fc2_bn."),
)


def espikeformer_names(model: ESpikeFormer) -> list[tuple[str, str]]:
    rules = _down_names("stem", "downsample1_1")
    convolutional = iter(("1_1", "1_2", "2_1", "2_2"))
    down = iter(("1_2", "2", "3", "4"))
    stage, position = 3, -1
    for i, block in enumerate(model.blocks):
        own = rf"blocks\.{i}"
        match block:
            case espikeformer.Downsampling():
                number = next(down)
                rules += _down_names(own, f"downsample{number}")
                if number == "4":
                    stage, position = 4, -1
                continue
            case espikeformer.ConvBlock():
                theirs = f"ConvBlock{next(convolutional)}.0"
                rules += _separable_names(own, f"{theirs}.Conv")
                rules += [
                    (rf"^{own}\.mlp\.conv1\.conv\.", f"{theirs}.conv1."),
                    (rf"^{own}\.mlp\.conv1\.neuron\.norm\.", f"{theirs}.bn1."),
                    (rf"^{own}\.mlp\.conv2\.", f"{theirs}.conv2."),
                    (rf"^{own}\.mlp\.add\.norm\.", f"{theirs}.bn2."),
                ]
            case espikeformer.TransformerBlock():
                position += 1
                theirs = f"block{stage}.{position}"
                rules += _separable_names(own, f"{theirs}.conv")
                rules += _attention_names(own, f"{theirs}.attn", "_conv.0.", "_conv.1.")
                rules += _mlp_names(own, f"{theirs}.mlp")
            case _:
                raise AssertionError(f"no names for {type(block).__name__}")
    return rules


def _down_names(own: str, theirs: str) -> list[tuple[str, str]]:
    return [
        (rf"^{own}\.conv\.", f"{theirs}.encode_conv."),
        (rf"^{own}\.norm\.norm\.", f"{theirs}.encode_bn."),
    ]


def _separable_names(own: str, theirs: str) -> list[tuple[str, str]]:
    rules = []
    for layer, name in (("widen", "pwconv1"), ("depthwise", "dwconv")):
        rules += [
            (rf"^{own}\.separable\.{layer}\.conv\.", f"{theirs}.{name}.0."),
            (rf"^{own}\.separable\.{layer}\.neuron\.norm\.", f"{theirs}.{name}.1."),
        ]
    return [
        *rules,
        (rf"^{own}\.separable\.narrow\.", f"{theirs}.pwconv2.0."),
        (rf"^{own}\.separable\.add\.norm\.", f"{theirs}.pwconv2.1."),
    ]


def _attention_names(own: str, theirs: str, conv: str, norm: str) -> list[tuple[str, str]]:
    """Names of a `StreamAttention`, whose place in its block is ``attention`` or ``mixer``."""
    own = rf"^{own}\.(?:attention|mixer)"
    return [
        (rf"{own}\.([qkv])\.conv\.", rf"{theirs}.\1{conv}"),
        (rf"{own}\.([qkv])\.neuron\.norm\.", rf"{theirs}.\1{norm}"),
        (rf"{own}\.proj\.", f"{theirs}.proj{conv}"),
        (rf"{own}\.add\.norm\.", f"{theirs}.proj{norm}"),
    ]


def _mlp_names(own: str, theirs: str) -> list[tuple[str, str]]:
    """Names of an MLP of a real-valued stream."""
    return [
        *_layer_names(rf"^{own}\.mlp\.fc1", f"{theirs}.fc1"),
        (rf"^{own}\.mlp\.fc2\.", f"{theirs}.fc2_conv."),
        (rf"^{own}\.mlp\.add\.norm\.", f"{theirs}.fc2_bn."),
    ]


def maxformer_names(model: MaxFormer) -> list[tuple[str, str]]:
    rules = [
        *_layer_names(r"^stem\.layers\.0", "patch_embed1.embed1.embed"),
        *_layer_names(r"^stem\.layers\.1", "patch_embed1.embed2.embed"),
        *_added_names("stem", "patch_embed1.embed3.embed"),
        (r"^stem\.shortcut\.", "patch_embed1.embed4.embed_conv."),
        (r"^stem\.shortcut_norm\.", "patch_embed1.embed4.embed_bn."),
    ]
    stage, position = 1, -1
    for i, block in enumerate(model.blocks):
        own = rf"blocks\.{i}"
        if isinstance(block, max_former.Embedding):
            stage, position = stage + 1, -1
            theirs = f"patch_embed{stage}"
            rules += _layer_names(rf"^{own}\.layer", f"{theirs}.max_embed1.embed")
            rules += _added_names(own, f"{theirs}.embed1.embed")
            rules += [
                (rf"^{own}\.shortcut\.", f"{theirs}.max_embed2.embed_conv."),
                (rf"^{own}\.shortcut_norm\.norm\.", f"{theirs}.max_embed2.embed_bn."),
            ]
            continue
        position += 1
        theirs = f"stage{stage}.{position}"
        if isinstance(block.mixer, StreamAttention):
            rules += _attention_names(own, f"{theirs}.attn", "_conv.", "_bn.")
        else:
            # The first stage's is called so whatever its size, which is 7x7.
            mixer = f"{theirs}.mixer.{'conv5' if stage == 1 else 'conv'}"
            rules += [
                (rf"^{own}\.mixer\.conv\.", f"{mixer}."),
                (rf"^{own}\.mixer\.add\.norm\.", f"{mixer}_bn."),
            ]
        rules += _mlp_names(own, f"{theirs}.mlp")
    return rules


def _added_names(own: str, theirs: str) -> list[tuple[str, str]]:
    """Names of a convolution whose norm is in a `NormAdd`."""
    return [(rf"^{own}\.conv\.", f"{theirs}_conv."), (rf"^{own}\.add\.norm\.", f"{theirs}_bn.")]
