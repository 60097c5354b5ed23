"""Dropout and stochastic depth whose masks are given, and not drawn where they are used.

A mask drawn from torch's generator depends on what was drawn before it, so on how a batch is
divided among micro-batches and processes. Here a network is given the masks of a forward pass
before it begins (`give`): tetdist's trainer makes them of the seed, the step, the sample's position
in the global batch and the layer (`order.drop_uniforms`). So a run is the same on any number of
processes, and a block that is computed again sees the mask that it saw before. In a training loop
that gives none, a network draws them from torch's generator, once a forward pass (`draw_paths`).

A sample has one mask for all timesteps: what is dropped is dropped for the whole sequence, so that
logits at t still depend on the input up to t alone, and segments of timesteps are parts of one
pass.

A batch norm within a dropped branch sees its current as any other: what is dropped is what it adds.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tetdist.nn.packed import carried, carry, pack


class Dropout(nn.Module):
    """Drop features of (T, B, C, ...), of each sample other ones, in training.

    What is kept is divided by ``1 - rate``, so that the mean stays.

    Args:
        rate: Probability of each to be dropped; at 0 nothing is computed.
        size: C; 1 for one decision a sample.

    Attributes:
        factors: What each feature is multiplied with in this forward pass, (B, size).

    Raises:
        ValueError: The rate is no probability below 1.
    """

    def __init__(self, rate: float, size: int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a drop rate must be at least 0 and below 1, not {rate}")
        self.rate, self.size = rate, size
        self.factors: Tensor | None = None
        self.is_given = False

    @property
    def is_active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        if not self.is_given:
            self.draw(x)
        return x * self.factors_for(x)

    def draw(self, x: Tensor) -> None:
        """Draw what is dropped of (T, B, C, ...), from torch's generator."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.factors = self.factors_of(
            torch.rand(x.shape[1], self.size, dtype=dtype, device=x.device)
        )

    def factors_of(self, uniforms: Tensor) -> Tensor:
        """The factors, (B, size), from as many random numbers in [0, 1)."""
        kept = (uniforms >= self.rate).to(uniforms.dtype)
        return kept / (1 - self.rate)

    def factors_for(self, x: Tensor) -> Tensor:
        """The factors as (B, size, 1, ...), of the type of ``x``."""
        assert self.factors is not None, "a forward pass begins with give() or draw_paths()"
        assert len(self.factors) == x.shape[1], (self.factors.shape, x.shape)
        return self.factors.to(x.dtype).reshape(*self.factors.shape, *[1] * (x.ndim - 3))

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}, size={self.size}"


class DropPath(Dropout):
    """Stochastic depth (Huang et al., ECCV 2016): drop a block's branch, and pass its input on."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate, 1)

    def added(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """The branch's currents, (T, B, C, H, W), plus the shortcut's."""
        if not self.is_active:
            return branch + shortcut
        return torch.addcmul(shortcut, branch, self.factors_for(branch))

    def chosen(self, joined: Tensor, identity: Tensor) -> Tensor:
        """Spikes of both together, unscaled; where the branch is dropped, the shortcut's."""
        if not self.is_active:
            return joined
        packed = carried(joined)
        y = torch.where(self.factors_for(joined) > 0, joined, identity)
        return y if packed is None else carry(y, pack(y.detach(), packed.levels))


def rising_rates(rate: float, num_blocks: int) -> list[float]:
    """Drop rates of a network's blocks: from 0 on linearly to ``rate``, as timm's.

    Raises:
        ValueError: The rate is no probability below 1, or there is but one block, whose own is 0.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, not {rate}")
    if rate and num_blocks < 2:
        raise ValueError(
            f"drop_path_rate={rate} has no effect: rates rise from 0 at the first block to {rate} "
            "at the last, and the network has only one block; set it to 0"
        )
    return [rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]


def dropping(model: nn.Module) -> list[Dropout]:
    """A model's layers that drop something in training, in its own order."""
    return [m for m in model.modules() if isinstance(m, Dropout) and m.rate > 0]


def num_factors(layers: Sequence[Dropout]) -> int:
    """Return the count of random numbers that a sample needs for the layers."""
    return sum(layer.size for layer in layers)


def factors(layers: Sequence[Dropout], uniforms: Tensor) -> Tensor:
    """The factors of all layers, (B, `num_factors`), from as many random numbers in [0, 1)."""
    parts = uniforms.split([layer.size for layer in layers], dim=1)
    return torch.cat(
        [layer.factors_of(part) for layer, part in zip(layers, parts, strict=True)], dim=1
    )


def give(layers: Sequence[Dropout], factors: Tensor) -> None:
    """Have the layers use these factors from now on."""
    sizes = [layer.size for layer in layers]
    for layer, part in zip(layers, factors.split(sizes, dim=1), strict=True):
        layer.factors, layer.is_given = part, True


def draw_paths(blocks: nn.Module, x: Tensor) -> None:
    """Draw which branches of blocks a forward pass of (T, B, C, ...) drops, unless it was given.

    All at once, and before the first one runs: a block may run in segments, and again.
    """
    for layer in dropping(blocks):
        if not layer.is_given:
            layer.draw(x)


@contextlib.contextmanager
def using(layers: Sequence[Dropout], factors: Sequence[Tensor | None]) -> Iterator[None]:
    """Have the layers drop, within this context, what they did when they had these factors."""
    outer = [layer.factors for layer in layers]
    for layer, own in zip(layers, factors, strict=True):
        layer.factors = own
    try:
        yield
    finally:
        for layer, own in zip(layers, outer, strict=True):
            layer.factors = own
