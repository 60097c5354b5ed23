"""Which parameters an optimiser gets, what of them decays, and when it does not step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetdist.config.schema import OptimizerSection
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.optimizers import make_optimizer


class Neuron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.ParameterDict({"decay": nn.Parameter(torch.tensor(0.5))})


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), BatchNorm(2), Neuron(), nn.Linear(2, 2))
    model[3].bias.requires_grad_(False)
    return model


def section(**values: Any) -> OptimizerSection:
    return OptimizerSection(**{"kind": "sgd", "lr": 0.1, "weight_decay": 0.3} | values)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "timm:lamb"])
@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, {"2.learned.decay"}),
        ({"decay_norms": False}, {"0.bias", "1.weight", "1.bias", "2.learned.decay"}),
        ({"decay_neurons": True}, set()),
        ({"decay_norms": False, "decay_neurons": True}, {"0.bias", "1.weight", "1.bias"}),
    ],
)
def test_what_neurons_learn_decays_if_asked(
    kind: str, asked: dict[str, bool], kept: set[str]
) -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, section(kind=kind, **asked)).param_groups
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    # One that is frozen is none of the optimiser's.
    assert found.keys() == set(names.values()) - {"3.bias"}
    assert {name for name, decay in found.items() if decay == 0} == kept
    assert {decay for name, decay in found.items() if name not in kept} == {0.3}


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "timm:lamb", "timm:adamp"])
def test_a_step_that_is_told_of_what_is_not_finite_is_none(kind: str) -> None:
    model = network()
    optimizer = make_optimizer(model, section(kind=kind))

    def weights_after(found_inf: float | None) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        if found_inf is not None:
            optimizer.found_inf = torch.tensor(found_inf)
            optimizer.grad_scale = None
        optimizer.step()
        return model[0].weight.detach().clone()

    before = model[0].weight.detach().clone()
    assert torch.equal(weights_after(1.0), before)
    moved = weights_after(0.0)
    assert not torch.equal(moved, before)


def test_arguments_of_an_optimiser_that_has_none_such() -> None:
    with pytest.raises(UserError, match=r"timm:lamb cannot be made with arguments .*nonsense"):
        make_optimizer(network(), section(kind="timm:lamb", arguments={"nonsense": 1}))
