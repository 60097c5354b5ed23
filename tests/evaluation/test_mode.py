"""An evaluation leaves the network as it was: its mode, its statistics, no hooks."""

import numpy as np
import pytest
import timm
import torch

import tetdist.models  # registers them
from tetdist.data.loader import Batch
from tetdist.evaluation.evaluate import Interrupted, evaluate

assert tetdist.models


def network():
    torch.manual_seed(0)
    return timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=2
    )


def batches():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 3, 16, 16, generator=generator) for _ in range(2)]
    return [Batch(one, torch.tensor([0, 1, 2]), np.arange(3)) for one in images]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ends", [False, True])
def test_network_is_left_as_it_was(training, ends, alone):
    model = network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if ends:
        with pytest.raises(Interrupted):
            evaluate(model, batches(), 6, alone, precision="fp32", stop=lambda: True)
    else:
        assert evaluate(model, batches(), 6, alone, precision="fp32").samples == 6
    assert {module.training for module in model.modules()} == {training}
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_running_statistics_decide_and_not_the_batch(alone):
    """So that a network in training mode gets the same result as its checkpoint."""
    training, evaluating = network().train(), network().eval()
    found = [evaluate(m, batches(), 6, alone, precision="fp32") for m in (training, evaluating)]
    assert found[0] == found[1]
