"""Both engines make the same steps, and a step whose gradient is not finite makes none."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.config.sections.phase import OptimizerSection
from tetdist.distributed.world import World, join
from tetdist.errors import UserError
from tetdist.nn import batch_norm
from tetdist.nn.batch_norm import BatchNorm
from tetdist.optimizers import make_optimizer
from tetdist.training.engines import base, create, deepspeed_engines
from tetdist.training.engines.clipping import Clipping
from tetdist.training.engines.deepspeed_engines import DeepSpeedEngine, ZeroEngine
from tetdist.training.engines.torch_engine import TorchEngine

MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone; once, since DeepSpeed keeps what it finds at its first start."""
    patch = pytest.MonkeyPatch()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        patch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with join("cpu") as alone:
        yield alone
    torch.set_num_threads(threads)
    patch.undo()


def config(changes: dict[str, Any]) -> RunConfig:
    return parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"} | changes), "x")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=2
    )
    model.set_execution("reference")
    batch_norm.defer_running_statistics(model)
    return model


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    return images, torch.randint(4, (2,), generator=generator)


def step(
    engine: Any, model: nn.Module, number: int, lr: float = 0.05, poison: float | None = None
) -> base.Update:
    model.train()
    for i in range(MICRO_BATCHES):
        images, labels = batch(MICRO_BATCHES * number + i)
        loss = F.cross_entropy(engine.forward(images).float().mean(0), labels)
        if poison is not None and i == 1:
            loss = loss * poison
        engine.backward(loss)
    update = engine.update(lr)
    batch_norm.update_running_statistics(model, lambda t: t, update.applied)
    return update


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{key}"] = value.clone()
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"kind": "adam", "lr": 0.01, "weight_decay": 0.01, "decay_norms": False},
    "adamw": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "layers": {"kind": "adamw", "lr": 0.01, "decay_norms": False, "layer_decay": 0.5},
}


@pytest.mark.parametrize("clipping", [None, 0.5, 1000.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_engines_agree_to_the_bit(
    optimizer: dict[str, Any], precision: str, clipping: float | None, world: World
) -> None:
    """Gradients here have a norm of 2 or so."""
    cfg = config(
        {
            "phases.0.optimizer": optimizer,
            "precision": precision,
            "gradient_clipping": clipping,
        }
    )
    states, norms = [], []
    for cls in (TorchEngine, DeepSpeedEngine):
        model = network()
        opt = make_optimizer(model, cfg.phases[0].optimizer)
        eng = cls(cfg, model, opt, MICRO_BATCHES, world)
        updates = [step(eng, model, i, lr=0.05 / (i + 1)) for i in range(4)]
        assert all(update.applied for update in updates)
        norms.append([float(update.grad_norm) for update in updates])
        states.append(state(model, opt))
        eng.close()
    assert norms[0][0] > 1.0
    assert differing(*states) == []
    assert norms[0] == norms[1]


def test_torch_engine_is_the_plain_loop(world: World) -> None:
    """Against a model that sees the step's micro-batches and plain SGD, written out."""
    cfg = config({})
    model = network()
    plain = copy.deepcopy(model)
    eng = TorchEngine(
        cfg, model, make_optimizer(model, cfg.phases[0].optimizer), MICRO_BATCHES, world
    )
    velocity: list[Tensor] = []
    for number in range(3):
        step(eng, model, number)
        plain.train()
        plain.zero_grad()
        losses = []
        for i in range(MICRO_BATCHES):
            images, labels = batch(MICRO_BATCHES * number + i)
            losses.append(F.cross_entropy(plain(images), labels))
        torch.stack(losses).mean().backward()
        grads = [p.grad for p in plain.parameters()]
        old = velocity or [torch.zeros_like(g) for g in grads]
        velocity = [0.9 * v + g for v, g in zip(old, grads, strict=True)]
        with torch.no_grad():
            for p, v in zip(plain.parameters(), velocity, strict=True):
                p -= 0.05 * v
        batch_norm.update_running_statistics(plain, lambda t: t)
        for (key, ours), theirs in zip(
            model.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("cls", [TorchEngine, DeepSpeedEngine])
def test_clipping_is_to_the_given_norm(cls: type[Any], world: World) -> None:
    """Without momentum a step is as long as the clipped gradient times the learning rate."""
    lengths = {}
    for clipping in (None, 0.5, 1.5, 1000.0):
        sgd = {"kind": "sgd", "lr": 0.05, "momentum": 0.0}
        cfg = config({"gradient_clipping": clipping, "phases.0.optimizer": sgd})
        model = network()
        before = vector(model)
        eng = cls(cfg, model, make_optimizer(model, cfg.phases[0].optimizer), MICRO_BATCHES, world)
        update = step(eng, model, 0, lr=0.05)
        eng.close()
        lengths[clipping] = float((vector(model) - before).norm()) / 0.05
        full = float(update.grad_norm)
    assert full > 1.5
    expected = {None: full, 0.5: 0.5, 1.5: 1.5, 1000.0: full}
    assert lengths == pytest.approx(expected, rel=1e-4)


def _by_filter(gradient: Tensor, weight: Tensor, limit: float) -> Tensor:
    dims = list(range(1, weight.ndim)) or [0]
    ours, its = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (weight, gradient))
    return gradient * (limit * ours.clamp(min=1e-3) / its).clamp(max=1.0)


@pytest.mark.parametrize("cls", [TorchEngine, DeepSpeedEngine])
def test_clipping_of_numbers_and_of_filters(cls: type[Any], world: World) -> None:
    """Against the formulas; the norm that is told is that before clipping."""
    limits = {"norm": None, "value": 0.02, "agc": 0.05}
    moved, told = {}, set()
    for mode, limit in limits.items():
        sgd = {"kind": "sgd", "lr": 0.5, "momentum": 0.0}
        changes: dict[str, Any] = {"phases.0.optimizer": sgd}
        changes |= {} if limit is None else {"gradient_clipping": limit, "clip_mode": mode}
        cfg = config(changes)
        model = network()
        before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
        eng = cls(cfg, model, make_optimizer(model, cfg.phases[0].optimizer), MICRO_BATCHES, world)
        told.add(float(step(eng, model, 0, lr=0.5).grad_norm))
        eng.close()
        moved[mode] = {
            name: (before[name] - p.detach()) / 0.5 for name, p in model.named_parameters()
        }
    assert len(told) == 1
    limited = set()
    for name, gradient in moved["norm"].items():
        by_number = gradient.clamp(-0.02, 0.02)
        by_filter = _by_filter(gradient, before[name], 0.05)
        expected = {"value": by_number, "agc": gradient if name.startswith("fc.") else by_filter}
        for mode, wanted in expected.items():
            torch.testing.assert_close(moved[mode][name], wanted, rtol=1e-3, atol=1e-6, msg=name)
            limited |= {mode} if (wanted - gradient).abs().max() > 1e-3 else set()
    assert limited == {"value", "agc"}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("clipping", [None, 0.5])
@pytest.mark.parametrize("cls", [TorchEngine, DeepSpeedEngine])
def test_non_finite_gradient_changes_nothing(
    cls: type[Any], clipping: float | None, kind: str, poison: float, world: World
) -> None:
    cfg = config({"phases.0.optimizer": OPTIMIZERS[kind], "gradient_clipping": clipping})
    model = network()
    opt = make_optimizer(model, cfg.phases[0].optimizer)
    eng = cls(cfg, model, opt, MICRO_BATCHES, world)
    assert step(eng, model, 0).applied
    before = state(model, opt)
    update = step(eng, model, 1, poison=poison)
    assert not update.applied
    assert not torch.isfinite(update.grad_norm)
    assert differing(before, state(model, opt)) == []
    # Nor does it linger: the next step is as if it had not been.
    assert step(eng, model, 2).applied
    after = state(model, opt)
    eng.close()
    again = network()
    opt = make_optimizer(again, cfg.phases[0].optimizer)
    eng = cls(cfg, again, opt, MICRO_BATCHES, world)
    for number in (0, 2):
        step(eng, again, number)
    eng.close()
    assert differing(after, state(again, opt)) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize(
    ("cls", "stage"), [(TorchEngine, 0), (DeepSpeedEngine, 0), (ZeroEngine, 1)]
)
def test_non_finite_first_step(
    cls: type[Any], stage: int, optimizer: dict[str, Any], world: World
) -> None:
    """Where the optimiser has no state yet."""
    cfg = config({"phases.0.optimizer": optimizer, "zero_stage": stage})
    vectors = []
    for numbers in ((0, 1, 2), (1, 2)):
        model = network()
        eng = cls(cfg, model, make_optimizer(model, cfg.phases[0].optimizer), MICRO_BATCHES, world)
        for number in numbers:
            step(eng, model, number, poison=float("nan") if number == 0 else None)
        vectors.append(vector(model))
        eng.close()
    assert torch.isfinite(vectors[0]).all()
    assert torch.equal(*vectors)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_decay_norms_spares_norms_and_biases(kind: str) -> None:
    model = network()
    section = {"kind": kind, "lr": 0.1, "weight_decay": 0.3}
    (group,) = make_optimizer(model, OptimizerSection(**section)).param_groups
    assert group["weight_decay"] == 0.3
    assert len(group["params"]) == len(list(model.parameters()))

    decayed, spared = make_optimizer(
        model, OptimizerSection(**section, decay_norms=False)
    ).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    norms = {id(p) for m in model.modules() if isinstance(m, BatchNorm) for p in m.parameters()}
    expected = {names[i] for i in norms} | {n for n in names.values() if n.endswith("bias")}
    assert {names[id(p)] for p in spared["params"]} == expected
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - expected
    assert "fc.bias" in expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("clipping", [None, 0.5])
def test_stages_are_the_torch_engine(
    stage: int, optimizer: dict[str, Any], clipping: float | None, world: World
) -> None:
    """Weights are laid out differently, so that rounding differs."""
    changes = {"phases.0.optimizer": optimizer, "gradient_clipping": clipping}
    results = []
    for zero_stage, cls in ((0, TorchEngine), (stage, ZeroEngine)):
        cfg = config(changes | {"zero_stage": zero_stage})
        model = network()
        opt = make_optimizer(model, cfg.phases[0].optimizer)
        eng = cls(cfg, model, opt, MICRO_BATCHES, world)
        updates = [step(eng, model, i, lr=0.05 / (i + 1)) for i in range(3)]
        assert all(update.applied for update in updates)
        results.append(
            (vector(model), [float(u.grad_norm) for u in updates], eng.optimizer_state())
        )
        eng.close()
    (ours, norms, state_0), (theirs, other_norms, state_1) = results
    assert norms == pytest.approx(other_norms, rel=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert state_0["param_groups"] == state_1["param_groups"]
    for number, values in state_0["state"].items():
        for key, value in values.items():
            other = state_1["state"][number][key]
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=f"{number}.{key}")


ENGINES = [(TorchEngine, 0), (DeepSpeedEngine, 0), (ZeroEngine, 1), (ZeroEngine, 2)]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("source", ENGINES, ids=lambda pair: f"{pair[0].__name__}{pair[1]}")
@pytest.mark.parametrize("target", ENGINES, ids=lambda pair: f"{pair[0].__name__}{pair[1]}")
def test_optimizer_state_moves_between_engines(
    source: tuple[type[Any], int], target: tuple[type[Any], int], kind: str, world: World
) -> None:
    """Given out and taken over unchanged, before and after the next step."""
    model = network()
    section = config({"phases.0.optimizer": OPTIMIZERS[kind]}).phases[0].optimizer

    def engine_of(pair: tuple[type[Any], int]) -> Any:
        cls, stage = pair
        cfg = config({"phases.0.optimizer": OPTIMIZERS[kind], "zero_stage": stage})
        return cls(cfg, model, make_optimizer(model, section), MICRO_BATCHES, world)

    eng = engine_of(source)
    step(eng, model, 0)
    given = copy.deepcopy(eng.optimizer_state())
    eng.close()
    eng = engine_of(target)
    eng.load_optimizer_state(copy.deepcopy(given))
    taken = eng.optimizer_state()
    assert taken["param_groups"] == given["param_groups"]
    for number, values in given["state"].items():
        for key, value in values.items():
            assert torch.equal(value, taken["state"][number][key]), (number, key)
    # The next step uses it, element by element: the same as where it came from.
    before = vector(model)
    step(eng, model, 1)
    moved = vector(model) - before
    eng.close()
    again = network()
    model = again
    eng = engine_of(source)
    step(eng, again, 0)
    before = vector(again)
    step(eng, again, 1)
    torch.testing.assert_close(moved, vector(again) - before, rtol=1e-2, atol=1e-5)
    eng.close()


class Decaying(nn.Module):
    """A parameter without a dimension, as the step of Adam's state is, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16 * 16, 8)
        self.neuron = nn.ParameterDict({"decay": nn.Parameter(torch.tensor(0.5))})
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, per_timestep: bool = True) -> Tensor:  # noqa: ARG002  # all networks have it
        return self.last(torch.tanh(self.neuron["decay"].sigmoid() * self.first(x.flatten(1))))[
            None
        ]


@pytest.mark.parametrize("source", ENGINES, ids=lambda pair: f"{pair[0].__name__}{pair[1]}")
@pytest.mark.parametrize("target", ENGINES, ids=lambda pair: f"{pair[0].__name__}{pair[1]}")
def test_optimizer_state_of_a_parameter_without_a_dimension(
    source: tuple[type[Any], int], target: tuple[type[Any], int], world: World
) -> None:
    torch.manual_seed(0)
    model = Decaying()
    changes = {"phases.0.optimizer": OPTIMIZERS["adamw"]}
    section = config(changes).phases[0].optimizer

    def engine_of(pair: tuple[type[Any], int]) -> Any:
        cls, stage = pair
        cfg = config(changes | {"zero_stage": stage})
        return cls(cfg, model, make_optimizer(model, section), MICRO_BATCHES, world)

    eng = engine_of(source)
    step(eng, model, 0)
    given = copy.deepcopy(eng.optimizer_state())
    eng.close()
    eng = engine_of(target)
    eng.load_optimizer_state(copy.deepcopy(given))
    taken = eng.optimizer_state()
    for number, values in given["state"].items():
        for key, value in values.items():
            assert torch.equal(value, taken["state"][number][key]), (number, key)
    step(eng, model, 1)
    eng.close()
    continued = vector(model)
    torch.manual_seed(0)
    model = Decaying()
    eng = engine_of((TorchEngine, 0))
    step(eng, model, 0)
    step(eng, model, 1)
    torch.testing.assert_close(continued, vector(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("stage", [1, 2])
def test_non_finite_gradient_changes_nothing_at_higher_stages(
    stage: int, kind: str, world: World
) -> None:
    cfg = config({"phases.0.optimizer": OPTIMIZERS[kind], "zero_stage": stage})
    model = network()
    eng = ZeroEngine(
        cfg, model, make_optimizer(model, cfg.phases[0].optimizer), MICRO_BATCHES, world
    )
    assert step(eng, model, 0).applied
    before, held = vector(model), copy.deepcopy(eng.optimizer_state())
    update = step(eng, model, 1, poison=float("nan"))
    assert not update.applied
    assert not torch.isfinite(update.grad_norm)
    assert torch.equal(before, vector(model))
    for number, values in eng.optimizer_state()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, held["state"][number][key])
    assert step(eng, model, 2).applied
    eng.close()


@pytest.mark.parametrize("cls", [TorchEngine, DeepSpeedEngine])
def test_loss_scale_cancels_out(cls: type[Any], world: World) -> None:
    """A power of two: to the bit, for gradients that it lets neither overflow nor vanish."""
    states = []
    for start in (1.0, 2.0**10):
        # float32, so that the scale is all that differs.
        cfg = config({"gradient_clipping": 0.5})
        model = network()
        opt = make_optimizer(model, cfg.phases[0].optimizer)
        eng = cls(cfg, model, opt, MICRO_BATCHES, world)
        eng.loss_scale = base.LossScale()
        eng.loss_scale.value = start
        for number in range(3):
            assert step(eng, model, number).applied
        states.append(state(model, opt))
        eng.close()
    assert differing(*states) == []


def test_loss_scale_moves() -> None:
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


def test_missing_deepspeed_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    find = deepspeed_engines.importlib.util.find_spec
    monkeypatch.setattr(
        deepspeed_engines.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "deepspeed" else find(name, *rest),
    )
    cfg, model = config({}), network()
    opt = make_optimizer(model, cfg.phases[0].optimizer)
    with pytest.raises(deepspeed_engines.UserError, match=r"tetdist\[train\]"):
        create.make_engine(cfg, model, opt, 1, world)


def test_clipping_by_filters_has_to_know_the_classifier() -> None:
    cfg = config({"gradient_clipping": 0.01, "clip_mode": "agc"})
    with pytest.raises(UserError, match=r"clip_mode: agc .* Decaying .*get_classifier"):
        Clipping(cfg, Decaying())
