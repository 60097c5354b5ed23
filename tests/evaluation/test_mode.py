"""An evaluation leaves the network as it was: its mode, its statistics, no hooks."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tetdist.models  # registers them
from tetdist.data.loader import Batch
from tetdist.distributed.world import World
from tetdist.evaluation.evaluate import Interrupted, evaluate

assert tetdist.models


class Alone(World):
    """This process, without a group of others to ask."""

    def sum(self, values: list[float]) -> list[float]:
        return values


WORLD = Alone(0, 1, torch.device("cpu"), control=None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=2
    )


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = np.arange(3)
    return [
        Batch(torch.rand(3, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2]), ids)
        for _ in range(number)
    ]


def never() -> bool:
    return False


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stop", "ends"), [(never, False), (lambda: True, True)])
def test_network_is_left_as_it_was(training: bool, stop: Callable[[], bool], ends: bool) -> None:
    model = network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = batches(2)
    if ends:
        with pytest.raises(Interrupted):
            evaluate(model, given, 6, WORLD, precision="fp32", stop=stop)
    else:
        assert evaluate(model, given, 6, WORLD, precision="fp32", stop=stop).samples == 6
    assert {module.training for module in model.modules()} == {training}
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_running_statistics_decide_and_not_the_batch() -> None:
    """So that a network in training mode gets the answer that its checkpoint will get."""
    training, evaluating = network().train(), network().eval()
    found = [evaluate(m, batches(2), 6, WORLD, precision="fp32") for m in (training, evaluating)]
    assert found[0] == found[1]
