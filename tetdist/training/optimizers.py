"""Optimisers by name."""

from typing import Any

import torch
from torch import nn

from tetdist.config.schema import OptimizerSection
from tetdist.nn.batch_norm import BatchNorm


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The phase's optimiser over all parameters, one fused kernel for all."""
    norms_and_biases: set[int] = set()
    if not section.decay_norms:
        for module in model.modules():
            if isinstance(module, (BatchNorm, nn.GroupNorm, nn.LayerNorm)):
                norms_and_biases |= {id(p) for p in module.parameters()}
            elif getattr(module, "bias", None) is not None:
                norms_and_biases.add(id(module.bias))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if id(p) not in norms_and_biases],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p in parameters if id(p) in norms_and_biases], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # fused: the kernels that can leave everything untouched when told on the device (found_inf).
    if section.kind == "sgd":
        return torch.optim.SGD(
            groups,
            lr=section.lr,
            momentum=section.momentum,
            nesterov=section.nesterov,
            fused=True,
        )
    cls = torch.optim.Adam if section.kind == "adam" else torch.optim.AdamW
    return cls(groups, lr=section.lr, betas=section.betas, fused=True)
