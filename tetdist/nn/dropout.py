"""Dropout and stochastic depth with masks that are set in advance.

A mask drawn from torch's generator depends on earlier draws, hence on how a batch is divided among
micro-batches and processes. Here a network gets the masks of a forward pass before it begins
(`set_factors`): tetdist's trainer computes them from the seed, the step, the sample's position in
the global batch and the layer (`order.drop_uniforms`). So a run is the same on any number of
processes, and a recomputed block sees the same mask. In a training loop that sets no masks, a
network draws them from torch's generator, once per forward pass (`draw_paths`).

A sample has one mask for all timesteps, so that logits at t still depend only on the input up to t,
and segments of timesteps are parts of one pass.

A batch norm within a dropped branch sees its current as usual; only the branch's sum is dropped.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tetdist.nn.packed import pack, packed_of, with_packed
from tetdist.nn.precision import wide_type


class Dropout(nn.Module):
    """Drop features of (T, B, C, ...) in training, different ones for each sample.

    Kept features are divided by ``1 - rate``, so that the mean stays.

    Args:
        rate: Probability of dropping each feature; 0: do nothing.
        size: C; 1 for one decision per sample.

    Attributes:
        factors: Factor of each feature in this forward pass, (B, size).

    Raises:
        ValueError: The rate is no probability below 1.
    """

    def __init__(self, rate: float, size: int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a drop rate must be at least 0 and below 1, not {rate}")
        self.rate, self.size = rate, size
        self.factors: Tensor | None = None
        self.is_set = False

    @property
    def is_active(self) -> bool:
        return self.training and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_active:
            return x
        if not self.is_set:
            self.draw(x)
        return x * self.factors_for(x)

    def draw(self, x: Tensor) -> None:
        """Draw the dropped features of (T, B, C, ...) from torch's generator."""
        dtype = wide_type(x)
        self.factors = self.factors_of(
            torch.rand(x.shape[1], self.size, dtype=dtype, device=x.device)
        )

    def factors_of(self, uniforms: Tensor) -> Tensor:
        """Return the factors, (B, size), from as many random numbers in [0, 1)."""
        kept = (uniforms >= self.rate).to(uniforms.dtype)
        return kept / (1 - self.rate)

    def factors_for(self, x: Tensor) -> Tensor:
        """Return the factors as (B, size, 1, ...), in the type of ``x``."""
        assert self.factors is not None, "a forward pass begins with set_factors() or draw_paths()"
        assert len(self.factors) == x.shape[1], (self.factors.shape, x.shape)
        return self.factors.to(x.dtype).reshape(*self.factors.shape, *[1] * (x.ndim - 3))

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}, size={self.size}"


class DropPath(Dropout):
    """Stochastic depth (Huang et al., ECCV 2016): drop a block's branch and pass on its input."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate, 1)

    def added(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Return the sum of the branch's currents, (T, B, C, H, W), and the shortcut's."""
        if not self.is_active:
            return branch + shortcut
        return torch.addcmul(shortcut, branch, self.factors_for(branch))

    def chosen(self, joined: Tensor, identity: Tensor) -> Tensor:
        """Return the joined spikes, unscaled, or the shortcut's if the branch is dropped."""
        if not self.is_active:
            return joined
        packed = packed_of(joined)
        y = torch.where(self.factors_for(joined) > 0, joined, identity)
        return y if packed is None else with_packed(y, pack(y.detach(), packed.levels))


def rising_rates(rate: float, num_blocks: int) -> list[float]:
    """Return drop rates of a network's blocks, rising linearly from 0 to ``rate``, as in timm.

    Raises:
        ValueError: The rate is outside [0, 1), or above 0 with a single block.
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
    """Return a model's layers that drop something in training, in module order."""
    return [m for m in model.modules() if isinstance(m, Dropout) and m.rate > 0]


def num_factors(layers: Sequence[Dropout]) -> int:
    """Return the number of random numbers that the layers need per sample."""
    return sum(layer.size for layer in layers)


def factors(layers: Sequence[Dropout], uniforms: Tensor) -> Tensor:
    """Return all layers' factors, (B, `num_factors`), from as many random numbers in [0, 1)."""
    parts = uniforms.split([layer.size for layer in layers], dim=1)
    return torch.cat(
        [layer.factors_of(part) for layer, part in zip(layers, parts, strict=True)], dim=1
    )


def set_factors(layers: Sequence[Dropout], factors: Tensor) -> None:
    """Set the factors that the layers use from now on."""
    sizes = [layer.size for layer in layers]
    for layer, part in zip(layers, factors.split(sizes, dim=1), strict=True):
        layer.factors, layer.is_set = part, True


def draw_paths(blocks: nn.Module, x: Tensor) -> None:
    """Draw the branches that a forward pass of (T, B, C, ...) drops, unless factors are set.

    This draws all at once before the first block runs: a block may run in segments, and again.
    """
    for layer in dropping(blocks):
        if not layer.is_set:
            layer.draw(x)


@contextlib.contextmanager
def using(layers: Sequence[Dropout], factors: Sequence[Tensor | None]) -> Iterator[None]:
    """Make the layers use these factors within this context."""
    outer = [layer.factors for layer in layers]
    for layer, own in zip(layers, factors, strict=True):
        layer.factors = own
    try:
        yield
    finally:
        for layer, own in zip(layers, outer, strict=True):
            layer.factors = own
