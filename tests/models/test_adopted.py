"""Adopted spikingjelly networks: equal to its own training step, and the trainer's requirements."""

import copy

import pytest
import tiny
import torch
from adopted_networks import Small
from spikingjelly.activation_based import encoding, functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from tiny import expect
from torch import nn

from tetdist import order
from tetdist.data.loader import Batch
from tetdist.distributed.world import join
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import evaluate
from tetdist.evaluation.operations import OperationCounts
from tetdist.losses import tet_loss
from tetdist.models.adopted import Adopted, AdoptedBatchNorm, adopt
from tetdist.models.separate import check_network
from tetdist.nn import batch_norm

T, TARGET = 2, torch.tensor([1, 3])
LIF = {
    "spiking_neuron": neuron.LIFNode,
    # So that the untrained last layers fire, too.
    "v_threshold": 0.3,
    "surrogate_function": surrogate.ATan(),
    "detach_reset": True,
}


def multi_step(net):
    functional.set_step_mode(net, "m")
    return net


def sew18():
    block = sew_resnet.BasicBlock
    return multi_step(sew_resnet.SEWResNet(block, [1] * 4, num_classes=4, cnf="ADD", **LIF))


def resnet18():
    """Its blocks add in place to what a batch norm returns."""
    block = spiking_resnet.BasicBlock
    return multi_step(spiking_resnet.SpikingResNet(block, [1] * 4, num_classes=4, **LIF))


NETWORKS = {"small": Small, "sew": sew18, "resnet": resnet18}
SIZES = {"small": 16, "sew": 64, "resnet": 32}


def images(size, samples=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, size, size, dtype=torch.float64, generator=generator)


def built(make, seed=0):
    torch.manual_seed(seed)
    return make().double()


def adopted(make, timesteps=T, seed=0):
    return adopt(built(make, seed), timesteps=timesteps, num_classes=4)


def step(logits):
    """Backward pass of TET; the logits."""
    tet_loss(logits, TARGET, lambda_=0.05).backward()
    return logits.detach()


def library_step(net, x):
    """Train as the library's examples do, with a fixed seed."""
    net.train()
    torch.manual_seed(5)
    logits = step(net(x[None].repeat(T, 1, 1, 1, 1)))
    functional.reset_net(net)
    return logits


def own_step(model, x):
    """The same through tetdist, with its running statistics at the end of the step."""
    model.train()
    batch_norm.defer_running_statistics(model)
    torch.manual_seed(5)
    logits = step(model(x, per_timestep=True))
    batch_norm.update_running_statistics(model, lambda flat: flat)
    return logits


def gradients(model):
    prefix = "net." if isinstance(model, Adopted) else ""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name.removeprefix(prefix)] = parameter.grad
    return found


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def assert_close(ours, theirs, scale=0):
    """Within 1e-8 of the largest element, and of ``scale`` where that is larger."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        largest = max(float(value.abs().max()), scale)
        assert (ours[key] - value).abs().max() <= 1e-8 * largest, key


# ------------------------------------------------------------------------- the library's own step


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_librarys_training_step(name):
    """Dropout masks also come from the same seed."""
    net, x = built(NETWORKS[name]), images(SIZES[name])
    before = statistics(net)
    theirs = library_step(net, x)
    of_theirs, moved = gradients(net), statistics(net)
    assert theirs.std() > 0
    net.load_state_dict(before, strict=False)
    net.zero_grad(set_to_none=True)
    ours = own_step(model := adopt(net, timesteps=T, num_classes=4), x)
    assert_close({"logits": ours}, {"logits": theirs})
    # A bias before a batch norm has no gradient but rounding.
    scale = 1e-3 * max(float(g.abs().max()) for g in of_theirs.values())
    assert_close(gradients(model), of_theirs, scale)
    assert moved
    assert all(not torch.equal(moved[key], before[key]) for key in moved)
    assert_close(statistics(model), moved)


SEQUENCE, FOLDED = (2, 3, 5), (6, 5)  # and positions after them


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (layer.BatchNorm1d(5, step_mode="m"), SEQUENCE),
        (layer.BatchNorm1d(5, step_mode="m"), (*SEQUENCE, 4)),
        (layer.BatchNorm2d(5, step_mode="m", momentum=0.3, eps=1e-3), (*SEQUENCE, 4, 4)),
        (layer.BatchNorm3d(5, step_mode="m"), (*SEQUENCE, 2, 3, 4)),
        (layer.ThresholdDependentBatchNorm1d(0.7, 0.5, 5), (*SEQUENCE, 4)),
        (layer.ThresholdDependentBatchNorm2d(0.7, 0.5, 5), (*SEQUENCE, 4, 4)),
        (nn.BatchNorm1d(5), FOLDED),
        (nn.BatchNorm2d(5), (*FOLDED, 4, 4)),
        (nn.BatchNorm3d(5), (*FOLDED, 2, 3, 4)),
    ],
)
def test_batch_norms_are_the_librarys(norm, shape):
    theirs = copy.deepcopy(norm).double()
    ours = AdoptedBatchNorm(copy.deepcopy(theirs))
    generator = torch.Generator().manual_seed(0)
    x = 2 + torch.randn(shape, dtype=torch.float64, generator=generator)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-12)
    expected = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    assert_close(dict(ours.state_dict()), expected)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-12)
    with pytest.raises((ValueError, AssertionError)):  # as the library's norm raises
        ours(x[None, None])


def test_weights_go_to_the_library_and_back():
    model = adopted(Small)
    own_step(model, images(16))
    weights = dict(model.state_dict())
    net = built(Small, seed=7)
    assert weights.keys() == {k for k in net.state_dict() if "num_batches_tracked" not in k}
    net.load_state_dict(weights)
    other = adopt(net, timesteps=T, num_classes=4).eval()
    model.eval()
    assert torch.equal(other(images(16)), model(images(16)))
    third = adopted(Small, seed=8).eval()
    third.load_state_dict(weights)
    assert torch.equal(third(images(16)), model(images(16)))
    outer = nn.ModuleDict({"student": third})
    assert {key.removeprefix("student.") for key in outer.state_dict()} == weights.keys()
    outer.load_state_dict(outer.state_dict())


# ---------------------------------------------------------------------------- as our trainer wants


def test_evaluation_is_the_librarys_at_any_t_and_leaves_no_state():
    net, model, x = built(Small), adopted(Small), images(16)
    library_step(net, x)
    own_step(model, x)
    net.eval()
    model.eval()
    with torch.no_grad():
        theirs = net(x[None].repeat(4, 1, 1, 1, 1))
        assert not torch.equal(theirs[0], theirs[3])
        for t in (4, 1, 3):
            model.set_timesteps(t)
            found = model(x, per_timestep=True)
            torch.testing.assert_close(found, theirs[:t], rtol=1e-9, atol=0)
            assert torch.equal(model(x), found.mean(0))
            model(images(16, samples=3, seed=2))  # of another size


def test_events_are_the_first_bins():
    net = built(lambda: Small(in_channels=2)).eval()
    model = adopt(copy.deepcopy(net), timesteps=T, num_classes=4, input_kind="events").eval()
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 2, 16, 16, dtype=torch.float64)
    expected = net(frames[:, :T].transpose(0, 1))
    torch.testing.assert_close(model(frames, per_timestep=True), expected)
    with pytest.raises(ValueError, match="runs 2 timesteps, but the input has 1 bins"):
        model(frames[:, :1])
    with pytest.raises(ValueError, match="an event batch must be"):
        model(frames[:, 0])
    with pytest.raises(ValueError, match="an image batch must be"):
        adopted(Small)(frames.flatten())


def test_first_step_in_low_precision_has_all_gradients():
    """Weights cast during the examination are not cached without a gradient."""
    model = adopt(built(Small).float(), timesteps=T, num_classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(16).float(), per_timestep=True)
    step(logits.float())
    assert all(float(g.abs().max()) > 0 for g in gradients(model).values())


def test_firing_rates_and_operations_of_the_librarys_layers():
    model, x = adopted(Small), images(16, samples=6)
    own_step(model, x[:2])
    batch = Batch(images=x, labels=torch.tensor([0, 1, 2, 3, 0, 1]), ids=torch.arange(6), mix=None)
    with join("cpu") as world, OperationCounts(model) as counts:
        found = evaluate(model, [batch], 6, world, precision="fp64")
        operations = counts.total(world, 6)
    assert list(found.firing_rate) == ["net.features.2", "net.features.6", "net.classifier.1"]
    spikes, reached = [], []
    model.net.features[2].register_forward_hook(lambda _m, _x, y: spikes.append(y.mean()))
    model.net.features[4].register_forward_hook(
        lambda _m, x, _y: reached.append(x[0].flatten(0, 1))
    )
    model.eval()(x)
    assert found.firing_rate["net.features.2"] == pytest.approx(spikes[0].item())
    assert 0 < found.firing_rate["net.features.2"] < 1
    assert len(found.per_timestep_top1) == T
    # Each spike is added to 16 channels at up to nine places.
    window = torch.ones(1, 8, 3, 3, dtype=torch.float64)
    places = nn.functional.conv2d(reached[0], window, padding=1).sum().item()
    assert places > 0
    assert operations.layers["net.features.4"].accumulates == pytest.approx(16 * places / 6)


# ------------------------------------------------------------------------------- what is refused


def with_module(module):
    net = Small()
    net.features[3] = module
    return net


def masked(lambda_init):
    return neuron.MaskedPSN(k=2, T=T, lambda_init=lambda_init, step_mode="m")


def norm(**options):
    return layer.BatchNorm2d(8, step_mode="m", **options)


# Modules by what is said of them, after their name.
REFUSED = {
    r"inputs after t.*; take neuron.SlidingPSN": lambda: neuron.PSN(T),
    r"inputs after t.*; set its lambda_ to 1": lambda: masked(0.5),
    r"inputs after t.*; leave it out": lambda: layer.TemporalWiseAttention(T, reduction=1),
    r"inputs after t.*bidirectional=False": lambda: nn.LSTM(8, 8, bidirectional=True),
    r'single-step mode; call functional.set_step_mode\(net, "m"\)': lambda: neuron.LIFNode(),
    r"set track_running_stats=True": lambda: norm(track_running_stats=False),
    r"average over all steps; set momentum=0.1": lambda: norm(momentum=None),
    r"set affine=True": lambda: norm(affine=False),
    r".*set batch_norm.sync=true": lambda: nn.SyncBatchNorm(8),
    r"a factor for each timestep of one T": lambda: layer.TemporalEffectiveBatchNorm2d(T, 8),
    r"norm of its own for every": lambda: layer.BatchNormThroughTime2d(T, 8, step_mode="m"),
    r"MultiStepC.* once a timestep": lambda: layer.MultiStepContainer(nn.BatchNorm2d(8)),
    r"detaches the membrane": lambda: neuron.SLTTLIFNode(),
    r"in evaluation, too.*without noise": lambda: encoding.PoissonEncoder(),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_cannot_be_adopted_is_refused_by_name(complaint):
    module = REFUSED[complaint]()
    kind = "BatchNorm2d" if "MultiStepC" in complaint else type(module).__name__
    words = rf"features\.3\S* \({kind}\) cannot be adopted: .*{complaint}"
    with pytest.raises(UserError, match=words) as error:
        adopt(with_module(module), timesteps=T, num_classes=4)
    assert "\n" not in str(error.value)


def pooled(*modules):
    return nn.Sequential(layer.MaxPool2d(2, 2, step_mode="m"), *modules)


def test_what_a_network_of_the_library_cannot_do_is_refused():
    model = adopted(Small)
    model.set_grad_checkpointing(False)
    with pytest.raises(UserError, match="cannot recompute; set it to none"):
        model.set_grad_checkpointing()
    with pytest.raises(UserError, match="keeps its membranes in its own modules"):
        model.stream()
    net = with_module(pooled(masked(1.0)))
    with pytest.raises(UserError, match=r"features.3.1 \(MaskedPSN\) is built for T=2"):
        adopt(net, timesteps=3, num_classes=4)
    model = adopt(net, timesteps=2, num_classes=4)
    with pytest.raises(ValueError, match="cannot run 4"):
        model.set_timesteps(4)


class Mean(Small):
    def forward(self, x):
        return super().forward(x).mean(0)


class Looping(Small):
    """Runs its timesteps itself, as the library's SNASNet."""

    def forward(self, x):
        return self.classifier(self.features(x[0])[None].flatten(2))


class Ahead(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Mean, r"Mean returns \(2, 4\) instead of logits \(T, B, K\) = \(2, 2, 4\)"),
        (lambda: Small(num_classes=5), r"returns \(2, 2, 5\) instead of"),
    ],
)
def test_what_only_a_run_shows_is_refused_in_the_first(make, complaint):
    model = adopted(make)
    with pytest.raises(UserError, match=complaint):
        model(images(16), per_timestep=True)


def test_what_loops_over_time_or_looks_ahead_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="expected x with shape") as error:
        check_network("toy", adopted(Looping), (3, 16, 16))
    assert "one that loops over time itself cannot be adopted" in str(error.value.__notes__)
    for module, verdict in ((Ahead(), True), (nn.Identity(), False)):
        check_network("toy", model := adopted(lambda m=module: with_module(pooled(m))), (3, 16, 16))
        assert model.looks_ahead is verdict


# ------------------------------------------------------------------------------- whole runs

# Until configurations name files with models in them.
IMPORTED = f"""
import sys
sys.path[:0] = [{str(tiny.PROJECT / "tests")!r}]
from adopted_networks import Small
from timm.models import register_model
from tetdist.models.adopted import adopt

@register_model
def sj_small(pretrained=False, *, num_classes, timesteps, **_):
    return adopt(Small(num_classes), timesteps=timesteps, num_classes=num_classes)
"""
RUN = {"model": {"name": "sj_small"}, "precision": "fp64", "engine": "torch"}


def test_run_with_dropout_on_two_processes(main, farm, tiny_config, tmp_path):
    """The small network, from an imported file: only such networks need a seed in every step."""
    expect(main(tiny_config(), "name=own", "max_steps=1"))
    assert torch.initial_seed() == 0  # the run's, of the initial weights
    (tmp_path / "sj_file.py").write_text(IMPORTED)
    file = tiny_config(RUN | {"imports": ["sj_file.py"]})
    expect(main(file, "name=one"))
    steps = tiny.metrics(tmp_path / "runs/one")[-1]["step"]
    assert torch.initial_seed() == order.forward_seed(0, steps - 1, 3)
    expect(farm(file, "name=two", world=2))
    one, two = (tiny.metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "top1", "per_timestep_top1", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), key
