"""Models: timm's interface, and agreement with the papers' networks."""

import copy
import functools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.task
import torch
import torch.nn.functional as F
from kernel_runs import randomize
from torch import Tensor, nn

import tetdist
from tetdist import models
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork, sew_resnet, spiking_resnet
from tetdist.nn import dropout, neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import NormNeuron

pytestmark = pytest.mark.usefixtures("one_thread")


SEW = ["sew_resnet18", "sew_resnet34", "sew_resnet50", "sew_resnet101", "sew_resnet152"]
SPIKING = ["spiking_resnet18", "spiking_resnet34", "spiking_resnet50"]
EVENTS = ["vggsnn", "spiking_resnet19_dvs"]

# One of each family and kind of block, small enough to run often. Thresholds are low, so that
# random networks of this size fire up to the last layer.
NEURON = LIF(threshold=0.5, surrogate="atan", surrogate_width=2.0)
SMALL: dict[str, dict[str, Any]] = {
    "sew_resnet18": {"width": 4},
    "sew_resnet50": {"width": 2, "connect_function": "iand"},
    "spiking_resnet18": {"width": 4, "stem_width": 4},
    "spiking_resnet50": {"width": 2, "stem_width": 4},
    "spiking_resnet19": {"width": 4, "stem_width": 3, "hidden_features": 6},
    "spiking_resnet19_dvs": {"width": 4, "stem_width": 3, "hidden_features": 16, "input_size": 16},
    "preact_resnet18": {"width": 4},
    "ms_resnet18": {"width": 4, "stem": "deep", "pooled_projections": True},
    "vggsnn": {"input_size": 16},
    "spiking_convnet": {"channels": (4, 6, 8), "input_size": 12},
    "qkformer_4_384_cifar": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "sdt_2_256_cifar": {"channels": 16, "depth": 1},
    "espikeformer_t": {"widths": (8, 8, 8, 16), "depths": (1, 1), "heads": 2},
    "maxformer_10_384": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
}
each_family = pytest.mark.parametrize("name", SMALL)
# Networks whose stem ends in neurons, followed only by pooling. (Others: test_published.py.)
each_image_family_with_spikes = pytest.mark.parametrize(
    "name", [name for name in SMALL if name.startswith(("sew", "spiking")) and name not in EVENTS]
)


def create(name: str) -> SpikingNetwork:
    """A small float64 model with 5 classes, T = 3 and randomised norms."""
    return copy.deepcopy(_created(name))


@functools.cache
def _created(name: str) -> SpikingNetwork:
    torch.manual_seed(0)
    options = SMALL[name] | {"num_classes": 5, "timesteps": 3, "neuron": NEURON}
    model = timm.create_model(name, **options).double()
    randomize(model)
    if name.startswith("spiking_resnet19"):
        with torch.no_grad():
            model.hidden[0].weight.mul_(4)  # means over positions are weak currents
    return model


def first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def inputs_for(name: str, batch: int = 2, bins: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {"spiking_convnet": (batch, 3, 12, 12)}
    shapes |= dict.fromkeys(EVENTS, (batch, bins, 2, 16, 16))
    shape = shapes.get(name, (batch, 3, 32, 32))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("name", models.names())
def test_registered_model_and_its_default_cfg(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    channels, height, width = cfg["input_size"]
    assert channels == len(cfg["mean"]) == len(cfg["std"])
    assert model.input_kind == ("events" if channels == 2 else "images")
    is_cifars = name.endswith("_cifar") or name == "spiking_resnet19"
    usual = 32 if is_cifars else 224 if channels == 3 else height
    assert height == width == (model.input_size or usual)
    assert (cfg["num_classes"] == 1000) == (height == 224)
    first = model.get_submodule(cfg["first_conv"])
    assert first is first_convolution(model)
    assert first.in_channels == channels == model.in_chans
    classifier = model.get_submodule(cfg["classifier"])
    assert classifier is model.get_classifier()
    assert classifier.out_features == cfg["num_classes"] == model.num_classes
    assert classifier.in_features == model.num_features == model.head_hidden_size
    for promised in timm.list_pretrained(name):
        assert Path(timm.get_pretrained_cfg(promised).file).is_file()


# Of each class the first network.
ONE_OF_EACH = {models.class_of(name): name for name in reversed(models.names())}.values()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timms_arguments_are_heeded(name: str) -> None:
    rates = dict.fromkeys(("drop_rate", "drop_path_rate"), 0.1)
    heeded = rates.keys() & (models.arguments_of(name) or ())
    for rate in rates.keys() - heeded:
        with pytest.raises(UserError, match=f"{rate}: {name} drops nothing in training; remove it"):
            timm.create_model(name, **{rate: rates.pop(rate)})
    with torch.device("meta"):
        dropping = dropout.dropping(model := timm.create_model(name, **rates))
        found = {"drop_rate": model.head_drop in dropping, "drop_path_rate": len(dropping) > 1}
        assert {rate for rate in found if found[rate]} == heeded
        options = {"num_classes": 0, "global_pool": "", "in_chans": 5, "scriptable": False}
        model = timm.create_model(name, **options, drop_rate=0.0, drop_path_rate=0.0).eval()
        assert not dropout.dropping(model)
        model.set_execution("reference")
        side, bins = model.input_size or 32, [model.timesteps] * (model.input_kind == "events")
        x = torch.empty(2, *bins, 5, side, side)
        maps = model(x, per_timestep=True)
        assert maps.shape == model.forward_features(x).shape
        assert maps.ndim == 5
        model.reset_classifier(0, type(model).global_pool)
        assert model.forward_head(maps).shape == (model.timesteps, 2, model.num_features)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"global_pool": "max"}, "global_pool must be 'flatten', or '' with num_classes=0, not 'm"),
        ({"global_pool": ""}, "global_pool must be 'flatten', or '' with num_classes=0, not ''"),
        ({"features_only": True}, "features_only: vggsnn has features (T, B, C, H, W), which timm"),
        ({"pretrained": True}, "No pretrained weights exist for vggsnn. Use `pretrained=False`"),
        ({"img_size": 64}, "unexpected keyword argument 'img_size'"),
    ],
)
def test_timms_other_arguments_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match=re.escape(complaint)):
        timm.create_model("vggsnn", **options)


@pytest.mark.parametrize("name", [*SEW, *SPIKING])
def test_as_many_parameters_as_the_resnet_of_that_depth(name: str) -> None:
    with torch.device("meta"):
        spiking = timm.create_model(name)
        ann = timm.create_model("resnet" + name.partition("resnet")[2])
    assert _num_parameters(spiking) == _num_parameters(ann)


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model("sew_resnet18", no_such_option=1)
    with pytest.raises(TypeError, match="tau"):
        timm.create_model("sew_resnet18", neuron={"tau": 2.0})


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("sew_resnet18", {"connect_function": "or"}, "connect_function must be .*'or'"),
        (
            "sew_resnet18",
            {"timesteps": 0},
            "timesteps must be a whole number and at least 1, not 0",
        ),
        ("sew_resnet18", {"neuron": {"decay": 2.0}}, "decay must be at most 1, not 2.0"),
        ("spiking_resnet18", {"norm": "ln"}, "norm must be 'bn' or 'tdbn', not 'ln'"),
        ("spiking_resnet18", {"init": "he"}, "init must be 'kaiming' or 'torch', not 'he'"),
        ("vggsnn", {"input_size": 15}, "input_size must be at least 16"),
    ],
)
def test_bad_option_is_named(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        timm.create_model(name, **options)


def test_neuron_may_be_a_mapping() -> None:
    mapping = {"decay": 1.0, "reset": "soft"}
    model = timm.create_model("spiking_convnet", neuron=mapping)
    found = {module.neuron for module in model.modules() if isinstance(module, NormNeuron)}
    assert found == {LIF(decay=1.0, reset="soft")}


# -------------------------------------------------------------------------------- timm's methods


@each_family
def test_classifier_can_be_replaced(name: str) -> None:
    model, x = create(name).eval(), inputs_for(name)
    pool = model.global_pool
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert features.shape == (3, 2, model.num_features)
        assert features.any()
        fc = model.get_classifier()
        assert torch.equal(model(x, per_timestep=True), fc(features))
        model.reset_classifier(7)
        assert model.get_classifier() is not fc
        assert model.num_classes == 7
        assert model(x).shape == (2, 7)
        model.reset_classifier(0, "")
        assert torch.equal(model(x, per_timestep=True), model.forward_features(x))
        model.reset_classifier(0, pool)
        assert torch.equal(model(x, per_timestep=True), features)
    for refused in ("max", ""):
        with pytest.raises(ValueError, match=f"global_pool must be '{pool}', .* not '{refused}'"):
            model.reset_classifier(7, refused)
    assert model.num_classes == 0


@each_family
def test_output_is_the_mean_over_time(name: str) -> None:
    model, x = create(name), inputs_for(name)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            logits = model(x, per_timestep=True)
            assert logits.shape == (3, 2, 5)
            assert torch.equal(model(x), logits.mean(0))
    assert len(logits.flatten(1).unique(dim=0)) > 1  # time makes a difference


@each_family
def test_set_timesteps_changes_nothing_but_t(name: str) -> None:
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
    with pytest.raises(ValueError, match="timesteps must be a whole number and at least 1, not 0"):
        model.set_timesteps(0)


@each_family
def test_a_sample_is_not_influenced_by_its_batch_in_evaluation(name: str) -> None:
    model, x = create(name).eval(), inputs_for(name, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_unknown_execution_is_refused() -> None:
    with pytest.raises(ValueError, match="execution must be 'fused' or 'reference', not 'eager'"):
        create("spiking_convnet").set_execution("eager")


# ----------------------------------------------------------------- as torch and timm take models


@pytest.mark.parametrize("name", ["sew_resnet18", "sdt_2_256_cifar"])
def test_models_of_a_low_type(name: str) -> None:
    """Also if a convolution sees one pixel, and if attention's sums are float32."""
    size = {"width": 4} if name == "sew_resnet18" else {"channels": 16, "depth": 1}
    model = timm.create_model(name, num_classes=5, timesteps=2, **size).bfloat16()
    logits = model(torch.rand(2, 3, 32, 32).bfloat16())
    assert logits.dtype == torch.bfloat16
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_export_takes_the_definition_and_trace_is_refused() -> None:
    model, x = create("spiking_convnet").eval(), inputs_for("spiking_convnet")
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(0.5 * x), model(0.5 * x))
    with pytest.raises(UserError, match=r"use torch\.export instead of torch\.jit\.trace"):
        torch.jit.trace(model, x)


def test_timms_distillation_takes_ours_as_student_and_teacher() -> None:
    model, other = (create("spiking_convnet").float() for _ in range(2))
    task = timm.task.LogitDistillationTask(model, other, nn.CrossEntropyLoss(), verbose=False)
    found = task.train()(inputs_for("spiking_convnet").float(), torch.tensor([1, 4]))
    assert 0 < found["kd_loss"] < 1
    found["loss"].backward()
    assert first_convolution(model).weight.grad.any()


# ------------------------------------------------------------------------------------ the stem


@each_image_family_with_spikes
def test_stem_of_a_static_image_is_convolved_once_as_if_it_were_repeated(name: str) -> None:
    model, x = create(name), inputs_for(name)
    naive = copy.deepcopy(model)
    seen: list[tuple[int, ...]] = []
    model.stem.conv.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    spikes = model.forward_stem(model.time_first(x), model.timesteps)
    assert seen == [(1, 2)]  # the batch, not T times the batch

    conv, norm, repeated = naive.stem.conv, naive.stem.neuron.norm, x.repeat(3, 1, 1, 1)
    current = F.batch_norm(
        F.conv2d(repeated, conv.weight, conv.bias, conv.stride, conv.padding),
        norm.running_mean,
        norm.running_var,
        norm.scale * norm.weight,
        norm.bias,
        True,
        norm.momentum,
        norm.eps,
    )
    moved = model.stem.neuron.norm
    torch.testing.assert_close(moved.running_mean, norm.running_mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved.running_var, norm.running_var, rtol=1e-9, atol=1e-12)
    expected = neurons.run(current.unflatten(0, (3, 2)), NEURON)[0]
    if hasattr(naive, "pool"):
        expected = naive.pool(expected)
    assert torch.equal(spikes, expected)

    weight = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(3)).double()
    (spikes * weight).sum().backward()
    (expected * weight).sum().backward()
    for parameter, other in zip(model.stem.parameters(), naive.stem.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_events_are_convolved_bin_by_bin_and_surplus_bins_ignored() -> None:
    model, x = create("vggsnn").eval(), inputs_for("vggsnn", bins=5)
    with torch.no_grad():
        assert torch.equal(model.time_first(x), x[:, :3].transpose(0, 1))
        assert torch.equal(model(x), model(x[:, :3]))
        assert not torch.equal(model(x), model(x.flip(1)))


# ------------------------------------------------------------------------------- blocks by hand


def _normalized(conv: nn.Conv2d, norm: BatchNorm, scale: float, x: Tensor) -> Tensor:
    """conv-BN of (T, B, C, H, W) with batch norm's own formula."""
    y = F.conv2d(x.flatten(0, 1), conv.weight, conv.bias, conv.stride, conv.padding)
    y = F.batch_norm(y, None, None, scale * norm.weight, norm.bias, True, 0, norm.eps)
    return y.unflatten(0, x.shape[:2])


def _fire(current: Tensor) -> Tensor:
    return neurons.run(current, NEURON)[0]


def _spikes_in(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(3, 2, channels, 8, 8, generator=generator) < 0.3).double()


def _block(factory: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    block = factory().double()
    randomize(block)
    return block


@pytest.mark.parametrize("function", ["add", "and", "iand"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_sew_block_joins_spikes(kind: str, stride: int, function: sew_resnet.Connect) -> None:
    cls = getattr(sew_resnet, kind)
    width = 6 if kind == "BasicBlock" else 3
    channels = width * cls.expansion if stride == 1 else 4
    block = _block(lambda: cls(channels, width, stride, function, NEURON))
    x = residual = _spikes_in(channels)
    for layer in ("conv1", "conv2", "conv3")[: 2 if kind == "BasicBlock" else 3]:
        part = getattr(block, layer)
        residual = _fire(_normalized(part.conv, part.neuron.norm, 1.0, residual))
    if stride == 1:
        identity = x
    else:
        part = block.downsample
        identity = _fire(_normalized(part.conv, part.neuron.norm, 1.0, x))
    expected = {
        "add": residual + identity,
        "and": residual * identity,
        "iand": (1 - residual) * identity,
    }[function]
    assert 0 < expected.mean() < 1
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("norm", ["bn", "tdbn"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_spiking_block_adds_the_shortcut_to_the_current(
    kind: str, stride: int, norm: spiking_resnet.Norm
) -> None:
    cls = getattr(spiking_resnet, kind)
    width = 6 if kind == "BasicBlock" else 3
    channels = width * cls.expansion if stride == 1 else 4
    block = _block(lambda: cls(channels, width, stride, NEURON, norm))
    chain = NEURON.threshold if norm == "tdbn" else 1.0
    merged = NEURON.threshold / math.sqrt(2) if norm == "tdbn" else 1.0
    x = residual = _spikes_in(channels)
    for layer in ("conv1", "conv2")[: 1 if kind == "BasicBlock" else 2]:
        part = getattr(block, layer)
        residual = _fire(_normalized(part.conv, part.neuron.norm, chain, residual))
    merge = block.merge
    current = _normalized(merge.conv, merge.neuron.norm, merged, residual)
    if stride == 1:
        shortcut = x
    else:
        shortcut = _normalized(merge.downsample, merge.downsample_norm, merged, x)
    expected = _fire(current + shortcut)
    assert 0 < expected.mean() < 1
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize(
    ("name", "stem", "chain", "merged"),
    [
        ("spiking_resnet34", 0.5, 0.5, 0.5 * (1 / math.sqrt(2))),
        ("spiking_resnet19", 1.0, 1.0, 1.0),
        ("sew_resnet34", 1.0, 1.0, None),
    ],
)
def test_scales_of_the_batch_norms(
    name: str, stem: float, chain: float, merged: float | None
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, neuron=NEURON)
    scales: dict[str, set[float]] = {}
    for path, module in model.named_modules():
        if isinstance(module, BatchNorm):
            kind = "merge" if ".merge." in path else path.split(".")[0]
            scales.setdefault(kind, set()).add(module.scale)
    assert scales.pop("stem") == {stem}
    assert scales.pop("blocks") == {chain}
    assert scales == ({} if merged is None else {"merge": {merged}})


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("sew_resnet34", 64, [(64, 16)] * 3 + [(128, 8)] * 4 + [(256, 4)] * 6 + [(512, 2)] * 3),
        ("spiking_resnet18", 64, [(64, 16)] * 2 + [(128, 8)] * 2 + [(256, 4)] * 2 + [(512, 2)] * 2),
        ("spiking_resnet19", 32, [(128, 32)] * 3 + [(256, 16)] * 3 + [(512, 8)] * 2),
        ("ms_resnet14_cifar", 32, [(64, 16)] * 2 + [(128, 8)] * 2 + [(256, 4)] * 2),
        ("vggsnn", 48, [(128, 24), (256, 12), (512, 6), (512, 3)]),
    ],
)
def test_shapes_from_block_to_block(name: str, size: int, shapes: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = timm.create_model(name, timesteps=2).eval()
        model.set_execution("reference")
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
        images = (
            torch.empty(1, 2, 2, size, size) if name == "vggsnn" else torch.empty(1, 3, size, size)
        )
        model(images)
    assert seen == [(2, 1, channels, side, side) for channels, side in shapes]


def test_resnet19_has_a_hidden_layer_of_spikes_in_its_head() -> None:
    model, x = create("spiking_resnet19").eval(), inputs_for("spiking_resnet19")
    with torch.no_grad():
        maps = model.forward_features(x)
        linear = model.hidden[0]
        spikes = _fire(maps.mean((3, 4)) @ linear.weight.T + linear.bias)
        assert 0 < spikes.mean() < 1
        torch.testing.assert_close(
            model(x, per_timestep=True), spikes @ model.fc.weight.T + model.fc.bias
        )


@pytest.mark.parametrize(
    ("name", "init"),
    [("vggsnn", "kaiming"), ("spiking_resnet19", "kaiming"), ("spiking_resnet19", "torch")],
)
def test_convolutions_start_as_in_the_papers_code(name: str, init: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **({} if name == "vggsnn" else {"width": 32, "init": init}))
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        area = math.prod(conv.kernel_size)
        variance = {
            "kaiming": 2 / (area * conv.out_channels),
            "torch": 1 / (3 * area * conv.in_channels),
        }[init]
        assert conv.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.1)
        normal = conv.weight.abs().max() > math.sqrt(3.1 * variance)  # beyond a uniform one's ends
        assert normal == (init == "kaiming")
        assert conv.bias is None or not conv.bias.any()


# ------------------------------------------------------------------------------------ wrong input


def test_events_with_too_few_bins() -> None:
    with pytest.raises(ValueError, match="the model runs 3 timesteps, but the input has 2 bins"):
        create("vggsnn")(inputs_for("vggsnn", bins=2))


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("vggsnn", (2, 2, 16, 16), r"event batch must be \(B, T, C, H, W\), not \(2, 2, 16, 16\)"),
        (
            "sew_resnet18",
            (1, 2, 3, 8, 8),
            r"image batch must be \(B, C, H, W\), not \(1, 2, 3, 8, 8\)",
        ),
        ("spiking_convnet", (3, 12, 12), r"image batch must be \(B, C, H, W\), not \(3, 12, 12\)"),
    ],
)
def test_wrong_number_of_dimensions(name: str, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        create(name)(torch.zeros(shape, dtype=torch.float64))


# ----------------------------------------------------------------------------- import on its own

IMPORT_ALONE = """
import importlib.abc, sys
BLOCKED = {"deepspeed", "nvidia.dali", "mlflow", "submitit", "pydantic", "matplotlib"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
import tetdist, timm
print(",".join(timm.list_models("sew_resnet*")))
print(timm.create_model("spiking_convnet").num_classes, tetdist.losses.tet_loss.__name__)
"""


def test_import_needs_torch_and_timm_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(tetdist.__file__).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names, rest = done.stdout.splitlines()
    assert sorted(names.split(",")) == sorted(SEW)
    assert rest == "10 tet_loss"
