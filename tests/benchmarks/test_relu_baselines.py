"""The ReLU networks that ours are timed against have the same convolutions."""

import pytest
import timm
import torch
from torch import nn

from tetdist import models
from tetdist.apps.benchmarks.relu_baselines import relu_baseline


def convolutions(model):
    return sorted(
        (tuple(module.weight.shape), module.stride, module.padding, module.bias is not None)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


@pytest.mark.parametrize("name", models.names())
def test_a_baseline_has_the_same_convolutions(name):
    with torch.device("meta"):
        baseline, model = relu_baseline(name), timm.create_model(name)
        if "resnet" not in name and name != "vggsnn":
            assert baseline is None
            return
        assert baseline is not None
        assert convolutions(baseline) == convolutions(model)
        if name.startswith(("preact_", "ms_")):
            sizes = [sum(p.numel() for p in one.parameters()) for one in (baseline, model)]
            assert sizes[0] == sizes[1]
        *_, channels, height, width = model.default_cfg["input_size"]
        logits = baseline(torch.empty(2, channels, height, width))
    assert logits.shape == (2, model.num_classes)
