"""Both engines take the same steps, and skip a step whose gradient is not finite."""

import copy
import re
from operator import attrgetter
from pathlib import Path

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.config.loading import parse
from tetdist.distributed.world import join
from tetdist.errors import UserError, pip_install
from tetdist.nn import batch_norm
from tetdist.optimizers import make_optimizer
from tetdist.training.engines import base, deepspeed_engines, make_engine

MICRO_BATCHES = 4

TORCH, DEEPSPEED, ZERO_1, ZERO_2 = (
    ("torch", 0),
    ("deepspeed", 0),
    ("deepspeed", 1),
    ("deepspeed", 2),
)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def world():
    """This process alone; once, since DeepSpeed keeps what it finds at its first start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with join("cpu") as alone:
        yield alone
    torch.set_num_threads(threads)


def config(changes):
    return parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"} | changes), "x")


def made(engine, model, world, changes):
    """An engine for a network, and the optimiser that it was given."""
    cfg = config(changes | {"engine": engine[0], "zero_stage": engine[1]})
    optimizer = make_optimizer(model, cfg.phases[0].optimizer)
    parts = base.EngineParts(cfg, model, optimizer, MICRO_BATCHES, world)
    return make_engine(parts), optimizer


def network():
    torch.manual_seed(0)
    model = timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=2
    )
    model.set_execution("reference")
    batch_norm.defer_running_statistics(model)
    return model


class Decaying(nn.Module):
    """A parameter without a dimension, as the step of Adam's state is, between two others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3 * 16 * 16, 8)
        self.neuron = nn.ParameterDict({"decay": nn.Parameter(torch.tensor(0.5))})
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, per_timestep: bool = True) -> Tensor:  # noqa: ARG002  # all networks have it
        return self.last(torch.tanh(self.neuron["decay"].sigmoid() * self.first(x.flatten(1))))[
            None
        ]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    return images, torch.randint(4, (2,), generator=generator)


def step(engine, model, number, lr=0.05, poison=1.0):
    model.train()
    for i in range(MICRO_BATCHES):
        images, labels = batch(MICRO_BATCHES * number + i)
        loss = F.cross_entropy(engine.forward(images).float().mean(0), labels)
        engine.backward(loss * poison if i == 1 else loss)
    update = engine.update(lr)
    batch_norm.update_running_statistics(model, lambda t: t, update.applied)
    return update


def state(model, optimizer_state):
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for i, values in optimizer_state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{key}"] = value.clone()
    return tensors


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


OPTIMIZERS = {
    "sgd": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"kind": "adam", "lr": 0.01, "weight_decay": 0.01, "decay_norms": False},
    "adamw": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "layers": {"kind": "adamw", "lr": 0.01, "decay_norms": False, "layer_decay": 0.5},
}


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("sgd", {}),
        ("nesterov", {"precision": "bf16", "gradient_clipping": 0.5}),
        ("adam", {"gradient_clipping": 0.5}),
        ("adamw", {"precision": "bf16", "gradient_clipping": 1000.0}),
        ("layers", {"gradient_clipping": 0.05}),
    ],
)
def test_engines_agree_bitwise(optimizer, changes, world):
    """Gradients here have a norm of 2 or so."""
    states, norms = [], []
    for engine in (TORCH, DEEPSPEED):
        model = network()
        eng, opt = made(
            engine, model, world, changes | {"phases.0.optimizer": OPTIMIZERS[optimizer]}
        )
        updates = [step(eng, model, i, lr=0.05 / (i + 1)) for i in range(4)]
        assert all(update.applied for update in updates)
        norms.append([float(update.grad_norm) for update in updates])
        states.append(state(model, opt.state_dict()))
        eng.close()
    assert norms[0][0] > 1.0
    assert differing(*states) == []
    assert norms[0] == norms[1]


def test_zero_averages_in_float32(farm):
    """The gradients of two processes, each with its own images."""
    code = """
from test_engine import *
with join("cpu") as world:
    changes = []
    for engine in (TORCH, ZERO_1, ZERO_2):
        model = network()
        eng, _ = made(engine, model, world, {"precision": "bf16"})
        step(eng, model, world.rank)
        changes.append(vector(model) - vector(network()))
        eng.close()
    apart = [float((one - changes[0]).norm() / changes[0].norm()) for one in changes]
    assert max(apart) < 1e-6, apart
"""
    for status, output in farm.side_by_side(2, tiny.python("-c", code), Path(__file__).parent):
        assert status == 0, output


def test_clipping_is_by_its_formula(world):
    """Without momentum a step is the clipped gradient times the learning rate; the reported norm is
    that before clipping."""
    sgd = {"phases.0.optimizer": {"kind": "sgd", "lr": 0.5, "momentum": 0.0}}
    moved, norms = [], set()
    for limit in (None, 0.5):
        model = network()
        before = [p.detach().clone().double() for p in model.parameters()]
        eng, _ = made(TORCH, model, world, sgd | {"gradient_clipping": limit})
        norms.add(float(step(eng, model, 0, lr=0.5).grad_norm))
        moved.append(
            [(b - p.detach()) / 0.5 for b, p in zip(before, model.parameters(), strict=True)]
        )
    (norm,) = norms
    assert norm > 1.0
    for gradient, clipped in zip(*moved, strict=True):
        torch.testing.assert_close(clipped, gradient * 0.5 / norm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("engine", "optimizer", "clipping", "poison", "bad"),
    [
        (TORCH, "sgd", None, NAN, 0),  # the optimiser has no state yet
        (TORCH, "adam", 0.5, INF, 1),
        (DEEPSPEED, "sgd", 0.5, NAN, 1),
        (ZERO_1, "adamw", 0.5, NAN, 1),
        (ZERO_2, "nesterov", 0.5, INF, 1),
    ],
)
def test_non_finite_gradient_changes_nothing(engine, optimizer, clipping, poison, bad, world):
    """It has no after-effect: the next steps are as if it had not happened."""
    changes = {"phases.0.optimizer": OPTIMIZERS[optimizer], "gradient_clipping": clipping}
    after = []
    for numbers in ((0, 1, 2), tuple({0, 1, 2} - {bad})):
        model = network()
        eng, _ = made(engine, model, world, changes)
        for number in numbers:
            is_bad = number == bad
            before = state(model, copy.deepcopy(eng.optimizer_state()))
            update = step(eng, model, number, poison=poison if is_bad else 1.0)
            assert bool(update.applied) != is_bad
            assert bool(torch.isfinite(update.grad_norm)) != is_bad
            if is_bad and bad:
                assert differing(before, state(model, eng.optimizer_state())) == []
        after.append(state(model, eng.optimizer_state()))
        eng.close()
    assert differing(*after) == []


@pytest.mark.parametrize(
    ("make", "source", "target", "optimizer"),
    [
        (network, DEEPSPEED, ZERO_1, "adam"),
        (network, ZERO_1, TORCH, "layers"),
        (network, TORCH, ZERO_2, "nesterov"),
        (Decaying, DEEPSPEED, ZERO_1, "adam"),
        (Decaying, ZERO_1, ZERO_2, "adamw"),
    ],
)
def test_optimizer_state_moves_between_engines(make, source, target, optimizer, world):
    """Exported and imported unchanged, and the next step is the same on each engine."""
    changes = {"phases.0.optimizer": OPTIMIZERS[optimizer], "gradient_clipping": 0.5}
    model = make()
    eng, _ = made(source, model, world, changes)
    step(eng, model, 0)
    given = eng.optimizer_state()
    eng.close()
    eng, _ = made(target, model, world, changes)
    eng.load_optimizer_state(copy.deepcopy(given))
    taken = eng.optimizer_state()
    # The next step changes neither, and uses it element by element: the same as where it came from.
    step(eng, model, 1)
    assert taken["param_groups"] == given["param_groups"]
    for number, values in given["state"].items():
        for key, value in values.items():
            assert torch.equal(value, taken["state"][number][key]), (number, key)
    eng.close()
    straight = make()
    eng, _ = made(source, straight, world, changes)
    step(eng, straight, 0)
    step(eng, straight, 1)
    eng.close()
    torch.testing.assert_close(vector(model), vector(straight), rtol=1e-4, atol=1e-5)


def test_a_state_of_other_shapes_is_refused(world):
    eng, _ = made(TORCH, network(), world, {"phases.0.optimizer": OPTIMIZERS["adam"]})
    state = eng.optimizer_state()
    wrong = {key: torch.zeros(1) for key in ("step", "exp_avg", "exp_avg_sq")}
    state["state"] = {0: wrong}
    with pytest.raises(ValueError, match=r"exp_avg is \(1,\), not"):
        eng.load_optimizer_state(state)
    eng.close()


@pytest.mark.parametrize("engine", [TORCH, DEEPSPEED])
def test_loss_scale_cancels_out(engine, world):
    """The scale is a power of two: bitwise equal if gradients neither overflow nor vanish."""
    states = []
    for start in (1.0, 2.0**10):
        model = network()
        # float32, so that the scale is all that differs.
        eng, opt = made(engine, model, world, {"gradient_clipping": 0.5})
        eng.loss_scale = base.LossScale()
        eng.loss_scale.value = start
        for number in range(3):
            assert step(eng, model, number).applied
        states.append(state(model, opt.state_dict()))
        eng.close()
    assert differing(*states) == []


def test_loss_scale_moves():
    scale = base.LossScale()
    assert scale.value == 2.0**16
    scale.succeeded()
    assert scale.overflowed()
    assert (scale.value, scale.overflows) == (2.0**15, 1)
    for _ in range(base.LossScale.GROWTH_INTERVAL):
        scale.succeeded()
    assert (scale.value, scale.good_steps) == (2.0**16, 0)
    other = base.LossScale()
    scale.succeeded()
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()
    scale.value = 1.0
    assert not scale.overflowed()
    assert scale.value == 1.0


def test_missing_deepspeed_is_named(world, monkeypatch):
    find = deepspeed_engines.importlib.util.find_spec
    monkeypatch.setattr(
        deepspeed_engines.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "deepspeed" else find(name, *rest),
    )
    message = f"DeepSpeed is not installed: {pip_install('train,cuda130')};"
    with pytest.raises(UserError, match=re.escape(message)):
        made(DEEPSPEED, network(), world, {})


@pytest.mark.parametrize(
    ("engine", "owner", "name"),
    [
        (DEEPSPEED, "ops", "__compatible_ops__"),
        (DEEPSPEED, "ops.__compatible_ops__", "deepspeed_shm_comm"),
        (DEEPSPEED, "utils.groups", "_WORLD_GROUP"),
        (DEEPSPEED, "DeepSpeedEngine", "_broadcast_model"),
        (DEEPSPEED, "DeepSpeedEngine", "no_sync"),
        (ZERO_1, "DeepSpeedEngine", "allreduce_gradients"),
        (ZERO_2, "DeepSpeedEngine", "get_global_grad_norm"),
        (ZERO_1, "DeepSpeedEngine", "was_step_applied"),
        (ZERO_2, "Parameter", "_hp_mapping"),
    ],
)
def test_a_renamed_name_of_deepspeed_is_refused(engine, owner, name, world, monkeypatch):
    deepspeed = deepspeed_engines._import_deepspeed(world.device)
    model = network()
    if name == "_hp_mapping":
        initialize = deepspeed_engines._initialize

        def renamed(*parts):
            made_engine = initialize(*parts)
            for parameter in model.parameters():
                del parameter._hp_mapping
            return made_engine

        monkeypatch.setattr(deepspeed_engines, "_initialize", renamed)
    elif owner == "ops.__compatible_ops__":
        monkeypatch.delitem(deepspeed.ops.__compatible_ops__, name)
    else:
        if owner == "ops":
            monkeypatch.delattr(deepspeed.ops, "__getattr__")  # makes it anew
        monkeypatch.delattr(attrgetter(owner)(deepspeed), name)
    with pytest.raises(UserError, match=rf"lacks {name}.*deepspeed==.*engine=torch"):
        made(engine, model, world, {})
