"""Models: timm's interface, and agreement with the papers' networks."""

import contextlib
import copy
import functools
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from kernel_runs import randomize
from timm.models import group_parameters
from torch import nn

from tetdist import models
from tetdist.errors import UserError
from tetdist.nn import dropout
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF

pytestmark = pytest.mark.usefixtures("one_thread")


EVENTS = ["vggsnn", "spiking_resnet19_dvs", "i2e_msnet18"]

# One of each family and kind of block, small enough to run often. Thresholds are low, so that
# random networks of this size fire up to the last layer.
NEURON = LIF(threshold=0.5, surrogate="atan", surrogate_width=2.0)
SMALL = {
    "sew_resnet18": {"width": 4},
    "sew_resnet50": {"width": 2, "connect_function": "iand"},
    "spiking_resnet18": {"width": 4, "stem_width": 4},
    "spiking_resnet50": {"width": 2, "stem_width": 4},
    "spiking_resnet19": {"width": 4, "stem_width": 3, "hidden_features": 6},
    "spiking_resnet19_dvs": {"width": 4, "stem_width": 3, "hidden_features": 16, "input_size": 16},
    "preact_resnet18": {"width": 4},
    "i2e_msnet18": {"width": 4},
    "ms_resnet18": {"width": 4, "stem": "deep", "pooled_projections": True},
    "vggsnn": {"input_size": 16},
    "spiking_convnet": {"channels": (4, 6, 8), "input_size": 12},
    "qkformer_4_384_cifar": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "sdt_2_256_cifar": {"channels": 16, "depth": 1},
    "espikeformer_t": {"widths": (8, 8, 8, 16), "depths": (1, 1), "heads": 2},
    "maxformer_10_384": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "ms_qkformer_4_384_cifar": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
}
# VGGSNN has no width: 9 million parameters.
each_family = pytest.mark.parametrize("name", [name for name in SMALL if name != "vggsnn"])
some_families = pytest.mark.parametrize(
    "name", ["sew_resnet18", "spiking_convnet", "spiking_resnet19_dvs", "qkformer_4_384_cifar"]
)


def create(name):
    """A small float64 model with 5 classes, T = 3 and randomised norms."""
    return copy.deepcopy(_created(name))


@functools.cache
def _created(name):
    torch.manual_seed(0)
    options = SMALL[name] | {"num_classes": 5, "timesteps": 3, "neuron": NEURON}
    model = timm.create_model(name, **options).double()
    randomize(model)
    if name.startswith("spiking_resnet19"):
        with torch.no_grad():
            model.hidden[0].weight.mul_(4)  # means over positions are weak currents
    return model


def first_convolution(model):
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def inputs_for(name, batch=2, bins=3):
    generator = torch.Generator().manual_seed(1)
    shapes = {"spiking_convnet": (batch, 3, 12, 12)}
    shapes |= dict.fromkeys(EVENTS, (batch, bins, 2, 16, 16))
    shape = shapes.get(name, (batch, 3, 32, 32))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- registry


def test_unknown_neuron_option_is_refused_by_name():
    with pytest.raises(TypeError, match="tau"):
        timm.create_model("sew_resnet18", neuron={"tau": 2.0})


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("sew_resnet18", {"connect_function": "or"}, "connect_function must be .*'or'"),
        ("sew_resnet18", {"neuron": {"decay": 2.0}}, "decay must be at most 1, not 2"),
        ("spiking_resnet18", {"norm": "ln"}, "norm must be 'bn' or 'tdbn', not 'ln'"),
        ("vggsnn", {"input_size": 15}, "input_size must be at least 16"),
        ("vggsnn", {"global_pool": ""}, "global_pool must be 'flatten', or '' with num_classes=0,"),
        ("qkformer_10_384", {"widths": (96, 192)}, "must have one entry per stage"),
        ("qkformer_10_384", {"heads": 5}, "96 channels cannot be divided among 5 heads"),
        ("sdt_8_384", {"pools": (True,)}, "pools must be four"),
        ("ms_resnet18", {"drop_rate": 1.0}, "a drop rate must be at least 0 and below 1, not 1.0"),
        ("sdt_8_384", {"channels": 12}, "channels=12 must be a multiple of 8 and of heads"),
    ],
)
def test_bad_option_is_named(name, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        timm.create_model(name, **options)


# ----------------------------------------------------------------------------- timm's conventions


@contextlib.contextmanager
def refused(words):
    """Check that what is asked is refused with these words, in one sentence."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        yield
    assert ". " not in str(caught.value)


# Others of a class are deeper or wider.
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in models.names()
        if not re.search("34|101|104|152|_512|_768|_gesture|espikeformer_[sml]", name)
    ],
)
def test_a_network_is_described_as_timm_describes_its_own(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        if model.input_kind == "images" and not name.startswith("psn_"):
            model.set_timesteps(1)  # which takes less time
        cfg, ends = model.default_cfg, [info["blocks"] for info in model.feature_info]
        x = torch.empty(2, *cfg["input_size"])
        with torch.no_grad():
            features, outputs = model.forward_intermediates(x)
    assert cfg["architecture"] == name
    *bins, channels, height, width = cfg["input_size"]
    assert cfg["input_size"] == timm.get_pretrained_cfg_value(name, "input_size")
    assert bins == ([model.timesteps] if model.input_kind == "events" else [])
    assert channels == len(cfg["mean"]) == len(cfg["std"]) == (2 if bins else 3)
    is_cifars = name.endswith("_cifar") or name == "spiking_resnet19"
    usual = 32 if is_cifars else height if bins else 224
    assert height == width == (model.input_size or usual)
    assert cfg.get("fixed_input_size", False) == (model.input_size is not None)
    assert (cfg["num_classes"] == 1000) == (height == 224)
    first = model.get_submodule(cfg["first_conv"])
    assert first is first_convolution(model)
    assert first.in_channels == channels == model.in_chans
    classifier = model.get_submodule(cfg["classifier"])
    assert classifier is model.get_classifier()
    assert classifier.out_features == cfg["num_classes"] == model.num_classes
    assert classifier.in_features == model.head_hidden_size
    for promised in timm.list_pretrained(name):
        assert Path(timm.get_pretrained_cfg(promised).file).is_file()

    assert features.shape == (model.timesteps, 2, model.num_features, *cfg["pool_size"])
    assert len(outputs) >= 3
    for info, output in zip(model.feature_info, outputs, strict=True):
        sides = [math.ceil(side / info["reduction"]) for side in (height, width)]
        assert output.shape == (2, info["num_chs"], *sides)
        module = f"blocks.{info['blocks'] - 1}" if info["blocks"] else "stem"
        assert info["module"] == module

    of_blocks, of_stages = (
        group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        for coarse in (False, True)
    )
    assert of_blocks.keys() == of_stages.keys() == dict(model.named_parameters()).keys()
    for parameter in of_blocks:
        layers = {"stem": (0, 0)}.get(parameter.split(".")[0], (1 + ends[-1], len(ends)))
        if (block := re.match(r"blocks\.(\d+)", parameter)) is not None:
            layers = 1 + int(block[1]), sum(end <= int(block[1]) for end in ends)
        assert (of_blocks[parameter], of_stages[parameter]) == layers
    assert all(parameter in of_blocks for parameter in model.no_weight_decay())


# Of each class the first network.
ONE_OF_EACH = {models.class_of(name): name for name in reversed(models.names())}.values()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timms_arguments_are_heeded_or_refused(name):
    def make(**options):
        return timm.create_model(name, device="meta", **options)

    own, rates = models.arguments_of(name) or (), {"drop_rate": 0.1, "drop_path_rate": 0.1}
    heeded = rates.keys() & own
    for rate in rates.keys() - heeded:
        with refused(f"{rate}: {name} drops nothing in training; remove it"):
            make(**{rate: rates.pop(rate)})
    model = make(**rates, bn_eps=0.5, bn_momentum=0.25, dtype=torch.float64)
    dropping = dropout.dropping(model)
    found = {"drop_rate": model.head_drop in dropping, "drop_path_rate": len(dropping) > 1}
    assert {rate for rate in found if found[rate]} == heeded
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}
    values = [*model.parameters(), *model.buffers()]
    assert {(value.device.type, value.dtype) for value in values} == {("meta", torch.float64)}

    if "input_size" in own:
        assert make(img_size=32).input_size == make(img_size=(32, 32)).input_size == 32
        with refused(f"img_size: {name} takes square images; remove (32, 48)"):
            make(img_size=(32, 48))
    else:
        with refused(f"img_size: {name} takes images of any size; remove 32"):
            make(img_size=32)
    with refused(f"feature_cls: {name} needs timm's getter, not 'hook'; remove it"):
        make(features_only=True, feature_cls="hook")
    with pytest.raises(TypeError, match="no_such_option"):
        make(no_such_option=1)
    options = {"num_classes": 0, "global_pool": "", "in_chans": 5, "scriptable": False}
    model = make(**options, drop_rate=0.0, drop_path_rate=0.0).eval()
    assert not dropout.dropping(model)
    assert first_convolution(model).in_channels == model.in_chans == 5


def test_a_configuration_may_set_what_it_can_name():
    """All but what it sets elsewhere, and classes."""
    own = models.arguments_of("sew_resnet18")
    assert own == ["layers", "connect_function", "width", "drop_rate", "drop_path_rate"]
    assert len(timm.create_model("sew_resnet18", device="meta", layers=[1, 2, 1]).blocks) == 4


@pytest.mark.parametrize("name", SMALL)
def test_features_and_head_make_up_the_network(name):
    model, x = create(name).eval(), inputs_for(name)
    own, fc = model.global_pool, model.get_classifier()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:3] == (3, 2, model.num_features)
        logits = model(x, per_timestep=True)
        assert torch.equal(model.forward_head(features, per_timestep=True), logits)
        assert torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model(x), logits.mean(0))
        assert len(logits.flatten(1).unique(dim=0)) > 1  # time makes a difference
        inputs = model.forward_head(features, pre_logits=True, per_timestep=True)
        assert inputs.shape == (3, 2, model.head_hidden_size)
        assert inputs.any()
        assert torch.equal(fc(inputs), logits)
        model.reset_classifier(7)
        assert model.get_classifier() is not fc
        assert {module.training for module in model.modules()} == {False}
        assert model(x).shape == (2, 7)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), features.mean(0))
        model.reset_classifier(0, own)
        assert torch.equal(model(x), inputs.mean(0))
        if own == "avg":
            maps = torch.rand(3, 2, model.num_features, 2, 2).double().round()
            flat = maps.amax((3, 4), keepdim=True).expand_as(maps)
            averages = [model.forward_head(one) for one in (maps, flat)]
            model.reset_classifier(0, "max")
            largest = [model.forward_head(one) for one in (maps, flat)]
            assert torch.equal(*largest)
            assert torch.equal(largest[1], averages[1])
            assert not torch.equal(largest[0], averages[0])
    pools = "'avg' or 'max'" if own == "avg" else f"'{own}'"
    for pool in ("token", ""):
        with refused(f"global_pool must be {pools}, or '' with num_classes=0, not '{pool}'"):
            model.reset_classifier(7, pool)
    assert model.num_classes == 0


@each_family
def test_features_are_the_outputs_of_the_stem_and_the_stages(name):
    model, x = create(name).eval(), inputs_for(name)
    seen = []
    for info in model.feature_info[1:]:
        block = model.get_submodule(info["module"])
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        features, spikes = model.forward_intermediates(x, per_timestep=True)
        stem = model.forward_stem(model.time_first(x), 3)
        for one, expected in zip(spikes, [stem, *seen], strict=True):
            assert torch.equal(one, expected.expand_as(one))
        assert torch.equal(features, spikes[-1])
        rates = [one.mean(0) for one in spikes]
        for indices, expected in ((2, rates[-2:]), ([0, -1], rates[:: len(rates) - 1])):
            found = model.forward_intermediates(x, indices, intermediates_only=True)
            assert all(map(torch.allclose, found, expected))
            assert len(found) == 2
    with refused("output_fmt must be NCHW, not NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    del model.feature_info[:]
    with refused("names no stages; call set_stages() in it"):
        model.forward_intermediates(x)


@some_families
def test_a_backbone_of_features_trains_all_that_it_has(name):
    whole, x = create(name), inputs_for(name)
    options = SMALL[name] | {"num_classes": 5, "timesteps": 3, "neuron": NEURON}
    net = timm.create_model(name, features_only=True, out_indices=(0, 1), **options).double()
    net.model.load_state_dict(whole.state_dict(), strict=False)
    assert net.default_cfg["pool_size"] == whole.default_cfg["pool_size"]
    assert len(net.model.blocks) == whole.feature_info[1]["blocks"]
    assert net.feature_info.channels() == [whole.feature_info[i]["num_chs"] for i in (0, 1)]
    expected = whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    gradients = []
    for recompute in (False, True):
        net.model.set_grad_checkpointing(recompute)
        net.zero_grad()
        outputs = net(x)
        for one, other in zip(outputs, expected, strict=True):
            torch.testing.assert_close(one, other)
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@some_families
def test_the_segmenter_of_the_docs_trains_with_frozen_parts(name):
    page = (Path(__file__).parents[2] / "docs/guides/backbones.md").read_text()
    (code,) = re.findall(r"```python\n# my_segmenter.py\n(.*?)```", page, re.DOTALL)
    exec(code, found := {})
    torch.manual_seed(0)
    options = SMALL[name] | {"timesteps": 3, "neuron": NEURON}
    segmenter, x = found["Segmenter"](name, 3, **options).double(), inputs_for(name)
    randomize(segmenter)
    backbone = segmenter.backbone.model
    loaded = backbone.load_state_dict(create(name).state_dict(), strict=False)
    assert not loaded.missing_keys
    with refused("has no part 'block.0'; it has stem, blocks (blocks.N)"):
        models.freeze(backbone, ["block.0"])
    parts = ["stem", "blocks.0"][: len(backbone.blocks)]
    models.freeze(backbone, parts)
    frozen = tuple(f"{part}." for part in parts)
    before = copy.deepcopy(backbone.state_dict())
    logits = segmenter.train()(x)
    assert logits.shape == (len(x), 3, *x.shape[-2:])
    logits.square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == key.startswith(frozen), key
    changed = {k for k, value in backbone.state_dict().items() if not torch.equal(value, before[k])}
    assert changed
    assert all("running" in key and not key.startswith(frozen) for key in changed)


@each_family
def test_set_timesteps_changes_nothing_but_t(name):
    """Later input does not influence earlier output."""
    model, x = create(name).eval(), inputs_for(name, bins=5)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        three = model(x, per_timestep=True)
        for timesteps in (5, 1, 3):
            model.set_timesteps(timesteps)
            assert model.timesteps == timesteps
            logits = model(x, per_timestep=True)
            assert logits.shape == (timesteps, 2, 5)
            torch.testing.assert_close(logits[:3], three[:timesteps])
    assert torch.equal(logits, three)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="timesteps must be an integer and at least 1, not 0"):
        model.set_timesteps(0)


# ----------------------------------------------------------------- as torch and timm take models


@pytest.mark.parametrize("name", [name for name in SMALL if models.takes_both(name)])
def test_frames_that_are_all_an_image_are_the_image(name):
    """A network for images takes event frames, by default of two channels."""
    arguments = SMALL[name] | {"num_classes": 5, "timesteps": 3, "neuron": NEURON}
    arguments["input_kind"] = "events"
    assert timm.create_model(name, device="meta", **arguments).in_chans == 2
    model, x = create(name).eval(), inputs_for(name)
    of_frames = timm.create_model(name, in_chans=3, **arguments).double().eval()
    of_frames.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(x, per_timestep=True)
        frames = x[:, None].expand(-1, 3, -1, -1, -1)
        torch.testing.assert_close(of_frames(frames, per_timestep=True), expected)
        others = of_frames.time_first(frames * torch.tensor([1, -1, 1]).view(-1, 1, 1, 1))
        stems = [of_frames.forward_stem(one, 3) for one in (of_frames.time_first(frames), others)]
        assert torch.equal(stems[0][0], stems[1][0])
        assert not torch.equal(stems[0][1], stems[1][1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of what comes before the refusal
def test_a_trace_is_refused():
    with pytest.raises(UserError, match=r"use torch\.export instead of torch\.jit\.trace"):
        torch.jit.trace(create("spiking_convnet").eval(), inputs_for("spiking_convnet"))


# ------------------------------------------------------------------------ scales, initial weights


@pytest.mark.parametrize(
    ("name", "stem", "chain", "merged"),
    [
        ("spiking_resnet34", 0.5, 0.5, 0.5 * (1 / math.sqrt(2))),
        ("spiking_resnet19", 1.0, 1.0, 1.0),
        ("sew_resnet34", 1.0, 1.0, None),
    ],
)
def test_scales_of_the_batch_norms(name, stem, chain, merged):
    with torch.device("meta"):
        model = timm.create_model(name, neuron=NEURON)
    scales = {}
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            kind = "merge" if ".merge." in path else path.split(".")[0]
            scales.setdefault(kind, set()).add(module.scale)
    assert scales.pop("stem") == {stem}
    assert scales.pop("blocks") == {chain}
    assert scales == ({} if merged is None else {"merge": {merged}})


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("vggsnn", "kaiming"),
        ("i2e_msnet18", "fan_in"),
        ("spiking_resnet19", "kaiming"),
        ("spiking_resnet19", "torch"),
    ],
)
def test_convolutions_start_as_in_the_papers_code(name, init):
    torch.manual_seed(0)
    own = {"width": 32, "init": init} if name == "spiking_resnet19" else {}
    model = timm.create_model(name, **own)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        area = math.prod(conv.kernel_size)
        variance = {
            "kaiming": 2 / (area * conv.out_channels),
            "fan_in": 2 / (area * conv.in_channels),
            "torch": 1 / (3 * area * conv.in_channels),
        }[init]
        assert conv.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.1)
        normal = conv.weight.abs().max() > math.sqrt(3.1 * variance)  # beyond a uniform one's ends
        assert normal == (init != "torch")
        assert conv.bias is None or not conv.bias.any()
