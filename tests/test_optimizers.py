"""Which parameters an optimiser gets, what of them decays, and when it does not step."""

import copy
import io
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tetdist import optimizers
from tetdist.config.sections.phase import OptimizerSection
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.optimizers import kind_of, make_optimizer
from tetdist.training.engines.base import set_lr


class Neuron(nn.Module):
    def __init__(self):
        super().__init__()
        self.learned = nn.ParameterDict({"decay": nn.Parameter(torch.full((2,), 0.5))})


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), BatchNorm(2), Neuron(), nn.Linear(2, 2))
    model[3].bias.requires_grad_(False)
    model.shift = nn.Parameter(torch.zeros(2))
    return model


def section(**values):
    return OptimizerSection(**{"kind": "sgd", "lr": 0.1, "weight_decay": 0.3} | values)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "timm:lamb"])
@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, {"2.learned.decay"}),
        ({"decay_norms": False}, {"0.bias", "1.weight", "1.bias", "2.learned.decay", "shift"}),
    ],
)
def test_what_neurons_learn_never_decays(kind, asked, kept):
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, section(kind=kind, **asked)).param_groups
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    # One that is frozen is none of the optimiser's.
    assert found.keys() == set(names.values()) - {"3.bias"}
    assert {name for name, decay in found.items() if decay == 0} == kept
    assert {decay for name, decay in found.items() if name not in kept} == {0.3}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("sgd", {"momentum": 0.7, "nesterov": True}),
        *((kind, {"betas": (0.8, 0.95)}) for kind in ("adam", "adamw", "timm:lamb")),
    ],
)
def test_what_the_section_says_reaches_every_group(kind, values):
    for group in make_optimizer(network(), section(kind=kind, **values)).param_groups:
        assert group.items() >= (values | {"lr": 0.1}).items()


@pytest.mark.parametrize("kind", ["sgd", "timm:lamb"])
@pytest.mark.parametrize("name", ["spiking_convnet", "qkformer_2_256_dvs", "spiking_resnet19"])
def test_layer_decay_is_that_of_timm(name, kind):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=4, timesteps=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def scales(groups):
        return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    optimizer = make_optimizer(model, section(kind=kind, layer_decay=0.7, decay_norms=False))
    expected = scales(param_groups_layer_decay(model, layer_decay=0.7))
    assert scales(optimizer.param_groups) == expected
    assert len(set(expected.values())) == len(model.blocks) + 2
    assert expected["fc.weight"] == 1
    set_lr(optimizer, 0.3)
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates == {name: 0.3 * scale for name, scale in expected.items()}
    # Weight decay is as without.
    decays = {
        wanted: {
            names[id(p)]: group["weight_decay"]
            for group in make_optimizer(model, section(**asked, decay_norms=False)).param_groups
            for p in group["params"]
        }
        for wanted, asked in ((True, {"layer_decay": 0.7}), (False, dict[str, Any]()))
    }
    assert decays[True] == decays[False]


def test_layer_decay_of_a_network_that_knows_no_layers():
    with pytest.raises(UserError, match=r"layer_decay: Sequential has no group_matcher"):
        make_optimizer(network(), section(layer_decay=0.5))


OF_TIMM = ("timm:muon", "timm:lion", "timm:adan", "timm:lamb")


@pytest.mark.parametrize(
    ("kind", "undoes"),
    [
        *((kind, False) for kind in ("sgd", "adam", "adamw", *OF_TIMM)),
        *((k, True) for k in OF_TIMM),
    ],
)
def test_optimisers_skip_and_continue(kind, undoes, monkeypatch):
    """Bitwise: a step that `found_inf` skips, and the continuation of a saved state.

    ``undoes``: it is taken and undone, as on a GPU.
    """
    if undoes:
        monkeypatch.setattr(optimizers, "_fetched", lambda flag: lambda: bool(flag))

    def model_of():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3), BatchNorm(8), nn.Linear(8, 4))

    def steps(model, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(abs(number))
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad *= torch.nan if number < 0 else 1
            optimizer.found_inf = torch.tensor(float(number < 0))
            optimizer.grad_scale = None
            optimizer.step()

    straight, asked = model_of(), section(kind=kind, lr=0.01)
    optimizer = make_optimizer(straight, asked)

    def everything():
        held = optimizer.state_dict()
        counts = [group.get("step") for group in held["param_groups"]]
        return copy.deepcopy((straight.state_dict(), held["state"], counts))

    if undoes:
        before = everything()
        steps(straight, optimizer, (-1,))
        torch.testing.assert_close(straight.state_dict(), before[0], rtol=0, atol=0)
        assert everything()[1:] == before[1:]
    steps(straight, optimizer, (1,))
    before = everything()
    steps(straight, optimizer, (-2,))
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save((straight.state_dict(), optimizer.state_dict()), file)
    steps(straight, optimizer, (3, -5, 4))
    assert not torch.equal(straight[0].weight, before[0]["0.weight"])

    file.seek(0)
    weights, held = torch.load(file, weights_only=True)
    continued = model_of()
    continued.load_state_dict(weights)
    optimizer_of_it = make_optimizer(continued, asked)
    optimizer_of_it.load_state_dict(held)
    steps(continued, optimizer_of_it, (3, 4))
    torch.testing.assert_close(continued.state_dict(), straight.state_dict(), rtol=0, atol=0)
    # What a plan takes for the size of a checkpoint.
    weight = straight[0].weight
    numbers = sum(one.numel() for one in optimizer.state[weight].values() if torch.is_tensor(one))
    assert numbers // weight.numel() == kind_of(kind).moments


def test_muon_takes_a_filter_for_a_row():
    """The update of a convolution is orthogonal as the matrix (out, in x height x width)."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last)
    arguments = {"ns_steps": 10, "eps": 1e-7}
    asked = section(kind="timm:muon", weight_decay=0, arguments=arguments)
    optimizer, before = make_optimizer(conv, asked), conv.weight.detach().clone()
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    found = torch.linalg.svdvals((conv.weight.detach() - before).flatten(1))
    # 0.1 is the learning rate, the rest the scaling by shape with which its steps match AdamW's.
    torch.testing.assert_close(found, torch.full((4,), 0.1 * 0.2 * 54**0.5), rtol=0.1, atol=0)


def test_what_does_not_continue_is_refused():
    with pytest.raises(ValueError, match="timm:kron does not resume exactly"):
        section(kind="timm:kron").check_arguments()
