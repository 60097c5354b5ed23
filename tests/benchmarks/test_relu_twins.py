"""The ReLU networks that ours are timed against have the same convolutions."""

import pytest
import timm
import torch
from torch import nn

from tetdist import models
from tetdist.apps.benchmarks.relu_twins import relu_twin


def convolutions(model: nn.Module) -> list[tuple[object, ...]]:
    return sorted(
        (tuple(module.weight.shape), module.stride, module.padding, module.bias is not None)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


@pytest.mark.parametrize("name", models.names())
def test_a_twin_has_the_same_convolutions(name: str) -> None:
    with torch.device("meta"):
        twin, model = relu_twin(name), timm.create_model(name)
        if "resnet" not in name and name != "vggsnn":
            assert twin is None
            return
        assert twin is not None
        assert convolutions(twin) == convolutions(model)
        if name.startswith(("preact_", "ms_")):
            sizes = [sum(p.numel() for p in one.parameters()) for one in (twin, model)]
            assert sizes[0] == sizes[1]
        channels, height, width = model.default_cfg["input_size"]
        logits = twin(torch.empty(2, channels, height, width))
    assert logits.shape == (2, model.num_classes)
