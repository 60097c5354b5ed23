"""Gradient clipping, in place and without synchronising with the device."""

from typing import assert_never

import torch
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from tetdist.config.schema import RunConfig
from tetdist.errors import UserError


class Clipping:
    """Gradient clipping by ``gradient_clipping`` and ``clip_mode``."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        self._limit, self._mode = config.gradient_clipping, config.clip_mode
        self._parameters: list[nn.Parameter] = []
        if self._limit is not None and self._mode == "agc":
            self._parameters = _below_classifier(model)

    def __call__(self, grads: list[Tensor], norm: Tensor) -> None:
        """Clip the gradients of all parameters; ``norm``, (), is their joint norm."""
        limit = self._limit
        if limit is None:
            return
        match self._mode:
            case "norm":
                torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
            case "value":
                torch._foreach_clamp_min_(grads, -limit)
                torch._foreach_clamp_max_(grads, limit)
            case "agc":
                # Section 4 of https://arxiv.org/abs/2102.06171: per output channel of a weight, and
                # as a whole for one-dimensional parameters.
                adaptive_clip_grad(self._parameters, limit)
            case other:
                assert_never(other)


def _below_classifier(model: nn.Module) -> list[nn.Parameter]:
    """Return all parameters except the classifier's, which the paper does not clip."""
    try:
        classifier: nn.Module = model.get_classifier()  # type: ignore[operator]  # timm's method
    except (AttributeError, UserError) as error:
        raise UserError(
            f"clip_mode: agc leaves out the classifier, but {type(model).__name__} has no "
            "get_classifier(); add it, as timm's networks have, or set clip_mode to norm or value"
        ) from error
    spared = {id(parameter) for parameter in classifier.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in spared]
