"""Evaluation batches with missing input: whole timesteps, or single events.

The missing part is a function of (seed, sample), so it depends neither on the batch size nor on the
number of processes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tetdist import order
from tetdist.data.loader import Batch
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork


def without_timesteps(
    batches: Iterable[Batch], fraction: float, timesteps: int, seed: int
) -> Iterator[Batch]:
    """Blank each timestep's input with probability ``fraction``.

    Blank means a frame without events or, for an image, which is shown T times, an image of the
    mean colour (0 after normalisation).

    Args:
        batches: Images (B, C, H, W), or event frames (B, T or more, C, H, W).

    Yields:
        Batches of frames (B, T, C, H, W); see `taking_frames`.
    """
    for batch in batches:
        draws = order.uniforms(seed, 0, batch.ids, timesteps)
        kept = torch.from_numpy(draws >= fraction).to(batch.images)  # (B, T)
        images = batch.images
        frames = images[:, None] if images.ndim == 4 else images[:, :timesteps]
        yield batch._replace(images=frames * kept[:, :, None, None, None])


def without_events(batches: Iterable[Batch], fraction: float, seed: int) -> Iterator[Batch]:
    """Drop each event independently with probability ``fraction``.

    Args:
        batches: Numbers of events, (B, T, 2, H, W).
    """
    for batch in batches:
        frames = [
            _thinned(frame, fraction, seed, int(sample))
            for frame, sample in zip(batch.images, batch.ids, strict=True)
        ]
        yield batch._replace(images=torch.stack(frames) if frames else batch.images)


def _thinned(counts: Tensor, fraction: float, seed: int, sample: int) -> Tensor:
    generator = np.random.default_rng([seed, sample])
    left = generator.binomial(counts.cpu().numpy().astype(np.int64), 1 - fraction)
    return torch.from_numpy(left).to(counts)


def check_takes_frames(model: SpikingNetwork) -> None:
    """Check that a network can take frames; see `taking_frames`."""
    if model.input_kind != "events" and not isinstance(model, SpikingNetwork):
        raise UserError(
            "--drop-timesteps shows an image network a different image at each timestep, which "
            f"only tetdist's own networks accept, not {type(model).__name__}; remove the option"
        )


@contextmanager
def taking_frames(model: SpikingNetwork) -> Iterator[None]:
    """Let an image network take frames (B, T, C, H, W) within this context."""
    kind, model.input_kind = model.input_kind, "events"
    try:
        yield
    finally:
        model.input_kind = kind
