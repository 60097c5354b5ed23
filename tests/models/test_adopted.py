"""Adopted spikingjelly networks: equal to its own training step, and the trainer's requirements."""

import copy
import itertools
import signal

import pytest
import tiny
import torch
from adopted_networks import Small
from graph_stand_ins import taped
from kernel_runs import kept_tensors
from spikingjelly.activation_based import encoding, functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spikformer, spiking_resnet, spiking_vgg
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from tetdist.data.loader import Batch
from tetdist.distributed.world import join
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import evaluate
from tetdist.evaluation.operations import counting_operations
from tetdist.losses import tet_loss
from tetdist.models.adopted import Adopted, AdoptedBatchNorm, adopt
from tetdist.nn import batch_norm
from tetdist.training import graphs, prepared
from tetdist.training.trainer import Trainer

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


def small():
    return Small()


def sew18():
    block = sew_resnet.BasicBlock
    return multi_step(sew_resnet.SEWResNet(block, [1] * 4, num_classes=4, cnf="ADD", **LIF))


def resnet18():
    """Its blocks add in place to what a batch norm returns."""
    block = spiking_resnet.BasicBlock
    return multi_step(spiking_resnet.SpikingResNet(block, [1] * 4, num_classes=4, **LIF))


def vgg11():
    return multi_step(spiking_vgg.spiking_vgg11_bn(num_classes=4, **LIF))


class TimeOfSpikformer(nn.Module):
    """One-dimensional batch norms in the library's containers, as in its transformers."""

    def __init__(self):
        super().__init__()
        self.stem = layer.SeqToANNContainer(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8))
        self.lif = neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan())
        self.block = spikformer.SpikformerBlock(8, 2)
        self.flat = layer.BatchNorm1d(8, step_mode="m")
        self.head = layer.Linear(8, 4, step_mode="m")

    def forward(self, x):
        x = self.block(self.lif(self.stem(x)))
        return self.head(self.flat(x.mean((3, 4))))


NETWORKS = {"small": small, "sew": sew18, "resnet": resnet18, "transformer": TimeOfSpikformer}
SIZES = {"small": 16, "sew": 64, "resnet": 32, "transformer": 32}


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


def assert_is_the_librarys_step(make, size):
    net = built(make)
    before = {key: value.clone() for key, value in net.state_dict().items() if "running" in key}
    x = images(size)
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


# ------------------------------------------------------------------------- the library's own step


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_librarys_training_step(name):
    """Dropout masks also come from the same seed."""
    assert_is_the_librarys_step(NETWORKS[name], SIZES[name])


@pytest.mark.long
def test_is_the_librarys_training_step_of_its_vgg():
    """130 million parameters: a gigabyte, and its gradients twice that."""
    assert_is_the_librarys_step(vgg11, 32)


def test_evaluation_is_the_librarys():
    net, model, x = built(small), adopted(small), images(16)
    library_step(net, x)
    own_step(model, x)
    net.eval()
    model.eval()
    with torch.no_grad():
        theirs = net(x[None].repeat(T, 1, 1, 1, 1)).mean(0)
        torch.testing.assert_close(model(x), theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (layer.BatchNorm1d(5, step_mode="m"), (2, 3, 5)),
        (layer.BatchNorm1d(5, step_mode="m"), (2, 3, 5, 4)),
        (layer.BatchNorm2d(5, step_mode="m", momentum=0.3, eps=1e-3), (2, 3, 5, 4, 4)),
        (layer.BatchNorm3d(5, step_mode="m"), (2, 3, 5, 2, 3, 4)),
        (layer.ThresholdDependentBatchNorm1d(0.7, 0.5, 5), (2, 3, 5, 4)),
        (layer.ThresholdDependentBatchNorm2d(0.7, 0.5, 5), (2, 3, 5, 4, 4)),
        (nn.BatchNorm1d(5), (6, 5)),
        (nn.BatchNorm1d(5), (6, 5, 4)),
        (nn.BatchNorm2d(5), (6, 5, 4, 4)),
        (nn.BatchNorm3d(5), (6, 5, 2, 3, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
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
    with pytest.raises(ValueError, match="cannot normalise"):
        ours(x[None, None])


def test_weights_go_to_the_library_and_back():
    model = adopted(small)
    own_step(model, images(16))
    weights = dict(model.state_dict())
    net = built(small, seed=7)
    assert weights.keys() == {k for k in net.state_dict() if "num_batches_tracked" not in k}
    net.load_state_dict(weights)
    other = adopt(net, timesteps=T, num_classes=4).eval()
    model.eval()
    assert torch.equal(other(images(16)), model(images(16)))
    third = adopted(small, seed=8).eval()
    third.load_state_dict(weights)
    assert torch.equal(third(images(16)), model(images(16)))
    outer = nn.ModuleDict({"student": third})
    assert {key.removeprefix("student.") for key in outer.state_dict()} == weights.keys()
    outer.load_state_dict(outer.state_dict())


# ---------------------------------------------------------------------------- as our trainer wants


def test_no_state_goes_from_one_pass_to_the_next():
    model, x = adopted(small), images(16)
    first = own_step(model, x)
    fresh = adopted(small)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        fresh.eval()
        expected = fresh(x)
        model(images(16, samples=3, seed=2))  # of another size
        model.eval()
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(own_step(adopted(small), x), first)


def test_logits_at_t_are_those_of_a_run_of_t_timesteps():
    model, x = adopted(small, timesteps=4), images(16)
    own_step(model, x)
    model.eval()
    whole = model(x, per_timestep=True)
    assert whole.shape == (4, 2, 4)
    for t in (1, 3):
        model.set_timesteps(t)
        torch.testing.assert_close(model(x, per_timestep=True), whole[:t])
    assert not torch.equal(whole[0], whole[3])


def test_events_are_the_first_bins():
    def make():
        return Small(in_channels=2)

    model = adopt(built(make), timesteps=T, num_classes=4, input_kind="events").eval()
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 2, 16, 16, dtype=torch.float64)
    net = built(make).eval()
    expected = net(frames[:, :T].transpose(0, 1))
    torch.testing.assert_close(model(frames, per_timestep=True), expected)
    with pytest.raises(ValueError, match="runs 2 timesteps, but the input has 1 bins"):
        model(frames[:, :1])
    with pytest.raises(ValueError, match="an event batch must be"):
        model(frames[:, 0])
    with pytest.raises(ValueError, match="an image batch must be"):
        adopted(small)(frames)


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_checkpointing_changes_no_bit(name):
    """Dropout masks are the same when a part is recomputed."""
    x = images(SIZES[name])
    plain, again = (adopted(NETWORKS[name]) for _ in range(2))
    again.set_grad_checkpointing()
    assert torch.equal(own_step(plain, x), own_step(again, x))
    theirs = gradients(again)
    assert [key for key, g in gradients(plain).items() if not torch.equal(g, theirs[key])] == []
    moved = statistics(again)
    assert all(torch.equal(value, moved[key]) for key, value in statistics(plain).items())
    assert "forward" not in vars(again.net)
    # And once more, with the second batch's state.
    assert torch.equal(own_step(plain, x), own_step(again, x))


def test_grad_checkpointing_keeps_less_and_can_be_switched_off():
    model, x = adopted(sew18), images(64)
    model(x)

    def kept():
        with kept_tensors() as tensors:
            model(x)
        return sum(tensor.numel() for tensor in tensors)

    everything = kept()
    model.set_grad_checkpointing(True)
    assert kept() < 0.5 * everything
    model.set_grad_checkpointing(False)
    assert kept() == everything


def test_hooks_are_called_of_parts_that_are_run_again():
    model, x, called = adopted(sew18), images(64), []
    model(x)  # the first batch is run more often, to be examined
    blocks = [part for cut in model._parts.cut.values() for part, twice in cut if twice]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: called.append(module))
    model.set_grad_checkpointing()
    model(x)
    assert called == blocks


def test_part_that_runs_twice_is_not_run_again():
    class Twice(Small):
        def forward(self, x):
            self.features(x)
            return super().forward(x)

    with pytest.raises(UserError, match="depends on inputs after t"):
        adopted(Twice)(images(16))  # its second run begins with the end of the first
    model, x = adopted(Twice, timesteps=1), images(16)
    model(x)
    model.set_grad_checkpointing()
    with pytest.raises(UserError, match="runs more than once in a forward pass"):
        model(x)
    model.set_grad_checkpointing(False)
    model(x)


def test_first_step_in_low_precision_has_all_gradients():
    """Weights cast during the examination are not cached without a gradient."""
    model = adopt(built(small).float(), timesteps=T, num_classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(16).float(), per_timestep=True)
    step(logits.float())
    assert all(float(g.abs().max()) > 0 for g in gradients(model).values())


def test_firing_rates_and_operations_of_the_librarys_layers():
    model, x = adopted(small), images(16, samples=6)
    own_step(model, x[:2])
    batch = Batch(images=x, labels=torch.tensor([0, 1, 2, 3, 0, 1]), ids=torch.arange(6), mix=None)
    with join("cpu") as world, counting_operations(model) as counts:
        found = evaluate(model, [batch], 6, world, precision="fp64")
        operations = counts.total(world, 6)
    assert list(found.firing_rate) == ["net.features.2", "net.features.6", "net.classifier.1"]
    spikes = []
    model.net.features[2].register_forward_hook(lambda _m, _x, y: spikes.append(y.mean()))
    model.eval()(x)
    assert found.firing_rate["net.features.2"] == pytest.approx(spikes[0].item())
    assert 0 < found.firing_rate["net.features.2"] < 1
    assert len(found.per_timestep_top1) == T
    assert operations.layers["net.features.4"].accumulates > 0


def test_execution_and_segments():
    model = adopted(small)
    model.set_execution("reference")
    model.set_segment(None)
    with pytest.raises(ValueError, match="execution must be"):
        model.set_execution("fast")
    with pytest.raises(UserError, match="segments of 2 timesteps; set recompute=blocks"):
        model.set_segment(2)


# ------------------------------------------------------------------------------- what is refused


def with_module(module):
    net = Small()
    net.features[3] = module
    return net


def masked(lambda_init):
    return neuron.MaskedPSN(k=2, T=T, lambda_init=lambda_init, step_mode="m")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: neuron.PSN(T), r"\(PSN\) .* depends on inputs after t.*; take neuron.SlidingPSN"),
        (lambda: masked(0.5), r"\(MaskedPSN\) .* inputs after t.*; set its lambda_ to 1"),
        (
            lambda: layer.TemporalWiseAttention(T, reduction=1),
            r"\(TemporalWiseAttention\) .* inputs after t",
        ),
        (
            lambda: layer.MultiDimensionalAttention(T, 8, 1, 2),
            r"\(MultiDimensionalAttention\) .* inputs after t",
        ),
        (
            lambda: neuron.LIFNode(),
            r'\(LIFNode\) .* single-step mode; call functional.set_step_mode\(net, "m"\)',
        ),
        (lambda: layer.BatchNorm2d(8), r"\(BatchNorm2d\) .* single-step mode"),
        (
            lambda: layer.BatchNorm2d(8, track_running_stats=False, step_mode="m"),
            "no running statistics to evaluate with; set track_running_stats=True",
        ),
        (
            lambda: layer.BatchNorm2d(8, momentum=None, step_mode="m"),
            "average over all steps; set momentum=0.1",
        ),
        (lambda: layer.BatchNorm2d(8, affine=False, step_mode="m"), "set affine=True"),
        (lambda: nn.SyncBatchNorm(8), r"\(SyncBatchNorm\) .*set batch_norm.sync=true"),
        (
            lambda: layer.TemporalEffectiveBatchNorm2d(T, 8),
            r"\(TemporalEffectiveBatchNorm2d\) .* a factor for every timestep of one T",
        ),
        (
            lambda: layer.BatchNormThroughTime2d(T, 8, step_mode="m"),
            r"\(BatchNormThroughTime2d\) .* for every timestep",
        ),
        (lambda: neuron.MPBNLIFNode(out_channels=8, step_mode="m"), r"\(MPBNLIFNode\)"),
        (lambda: nn.InstanceNorm2d(8, track_running_stats=True), "set track_running_stats=False"),
        (
            lambda: layer.MultiStepContainer(nn.BatchNorm2d(8)),
            r"features.3.0 \(BatchNorm2d\) .*MultiStepContainer runs it once a timestep",
        ),
        (lambda: neuron.SLTTLIFNode(), r"\(SLTTLIFNode\) .* detaches the membrane"),
        (lambda: layer.DropConnectLinear(8, 8), r"\(DropConnectLinear\) .* in evaluation, too"),
        (lambda: encoding.PoissonEncoder(), r"\(PoissonEncoder\) .* in evaluation, too"),
        (lambda: nn.LSTM(8, 8, bidirectional=True), "bidirectional=False"),
    ],
)
def test_what_cannot_be_adopted_is_refused_by_name(make, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        adopt(with_module(make()), timesteps=T, num_classes=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer.SeqToANNContainer(layer.BatchNorm2d(8), nn.MaxPool2d(2)),
        lambda: nn.Sequential(layer.MaxPool2d(2, 2, step_mode="m"), masked(1.0)),
        lambda: nn.Sequential(
            layer.MaxPool2d(2, 2, step_mode="m"), neuron.SlidingPSN(2, step_mode="m")
        ),
        lambda: layer.SeqToANNContainer(nn.InstanceNorm2d(8), nn.MaxPool2d(2)),
    ],
)
def test_what_looks_like_it_is_adopted(make):
    model = adopted(lambda: with_module(make()))
    own_step(model, images(16))
    model.eval()
    model(images(16))


def test_masked_neurons_have_one_t():
    net = with_module(nn.Sequential(layer.MaxPool2d(2, 2, step_mode="m"), masked(1.0)))
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


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (Mean, r"Mean returns \(2, 4\) instead of logits \(T, B, K\) = \(2, 2, 4\)"),
        (lambda: Small(num_classes=5), r"returns \(2, 2, 5\) instead of"),
        (
            Looping,
            r"Looping cannot run a sequence \(T, B, C, H, W\), here \(2, 1, 3, 16, 16\): .*; one "
            "that loops over time itself cannot be adopted",
        ),
        (
            lambda: with_module(nn.Sequential(layer.MaxPool2d(2, 2, step_mode="m"), Ahead())),
            r"features\.3\.1 \(Ahead\) cannot be adopted: its output at t depends on inputs",
        ),
        (
            lambda: with_module(nn.Sequential(layer.MaxPool2d(2, 2, step_mode="m"), Counter())),
            r"changes the buffer features\.3\.1\.count",
        ),
        (
            lambda: with_module(
                layer.SeqToANNContainer(
                    nn.MaxPool2d(2, 2), spectral_norm(nn.Conv2d(8, 8, 1, bias=False))
                )
            ),
            r"changes the buffer features\.3\.1\.parametrizations",
        ),
    ],
)
def test_what_only_a_run_shows_is_refused_in_the_first(make, complaint):
    model = adopted(make)
    with pytest.raises(UserError, match=complaint):
        model(images(16), per_timestep=True)


def test_examination_leaves_no_trace():
    """The examination changes nothing."""
    model, x = adopted(small), images(16)
    model.net.features[5].eval()  # as for a frozen layer
    before = dict(model.state_dict())
    torch.manual_seed(3)
    model(x)
    first = torch.rand(1)
    assert not model.net.features[5].training
    assert model.net.features[1].training
    torch.manual_seed(3)
    model(x)
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(before["features.5.running_mean"], torch.zeros(16, dtype=torch.float64))


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


@pytest.fixture
def file(tiny_root, tmp_path):
    """The configuration of a run of the small network, with dropout, from an imported file."""
    (tmp_path / "sj_file.py").write_text(IMPORTED)
    return tiny.write_config(tmp_path / "run.yaml", tiny_root, RUN | {"imports": ["sj_file.py"]})


@pytest.fixture
def train(main, file, tmp_path):
    """Trains it in this process: (name, *overrides) -> run."""

    def run(name, *overrides, status=0):
        outcome = main(file, f"name={name}", *overrides)
        assert outcome.status == status, outcome.text
        return tmp_path / "runs" / name

    return run


def test_run_with_dropout_on_two_processes(train, file, farm, tmp_path):
    one = train("one")
    outcome = farm(file, "name=two", world=2)
    assert outcome.status == 0, outcome.text
    for ours, theirs in zip(tiny.metrics(tmp_path / "runs/two"), tiny.metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "top1", "per_timestep_top1", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), key


def test_run_with_dropout_stopped_and_continued(train, monkeypatch):
    straight = train("straight")
    steps = itertools.count(1)
    original = Trainer._train_step

    def stopping(self):
        if next(steps) in (3, 9):
            signal.raise_signal(signal.SIGUSR1)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        train("cut", status=128 + signal.SIGUSR1)
        train("cut", status=128 + signal.SIGUSR1)
    tiny.assert_same_run(train("cut"), straight)


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_run_with_graphs(recompute, train, monkeypatch):
    """Neurons keep their membranes in Python, from one timestep to the next."""
    monkeypatch.setattr(prepared, "_check_device", lambda *_: None)
    monkeypatch.setattr(graphs, "capture", taped)
    changes = (f"recompute={recompute}", "phases.0.epochs=1")
    plain = train("plain", *changes)
    tiny.assert_same_run(plain, train("graphs", *changes, "cuda_graphs=true"))
