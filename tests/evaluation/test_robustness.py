"""The requested fraction is dropped, the same parts of a sample in any batch."""

import numpy as np
import timm
import torch

import tetdist
from tetdist.data.loader import Batch
from tetdist.evaluation.robustness import taking_frames, without_events, without_timesteps

assert tetdist.__doc__  # registers the models


def batches(images, size):
    ids = np.arange(len(images))
    return [
        Batch(images[i : i + size], torch.zeros(len(images[i : i + size])), ids[i : i + size])
        for i in range(0, len(images), size)
    ]


def together(found):
    return torch.cat([batch.images for batch in found])


def test_timesteps_of_images_and_of_events():
    images = torch.rand(300, 3, 2, 2) + 1
    frames = together(list(without_timesteps(batches(images, 7), 0.3, 4, seed=1)))
    assert frames.shape == (300, 4, 3, 2, 2)
    kept = frames.flatten(2).ne(0).all(-1)
    assert torch.equal(frames, images[:, None] * kept[:, :, None, None, None])
    assert 0.65 < kept.double().mean() < 0.75
    assert torch.equal(
        frames, together(list(without_timesteps(batches(images, 100), 0.3, 4, seed=1)))
    )
    other = together(list(without_timesteps(batches(images, 7), 0.3, 4, seed=2)))
    assert not torch.equal(frames, other)
    assert torch.equal(
        together(list(without_timesteps(batches(images, 50), 0.0, 2, seed=1))),
        images[:, None].expand(-1, 2, -1, -1, -1),
    )
    events = torch.rand(20, 6, 2, 3, 3) + 1
    dropped = together(list(without_timesteps(batches(events, 6), 0.5, 4, seed=1)))
    assert dropped.shape == (20, 4, 2, 3, 3)
    kept = dropped.flatten(2).ne(0).all(-1)
    assert torch.equal(dropped, events[:, :4] * kept[:, :, None, None, None])
    assert not torch.equal(kept, kept[:1].expand_as(kept))
    assert not without_timesteps_of_none().any()


def without_timesteps_of_none():
    return together(list(without_timesteps(batches(torch.ones(5, 3, 2, 2), 5), 1.0, 3, seed=1)))


def test_events():
    torch.manual_seed(0)
    counts = torch.randint(0, 9, (40, 3, 2, 6, 6)).float()
    dropped = together(list(without_events(batches(counts, 7), 0.25, seed=3)))
    assert ((dropped >= 0) & (dropped <= counts) & (dropped == dropped.round())).all()
    assert 0.73 < dropped.sum() / counts.sum() < 0.77
    assert torch.equal(dropped, together(list(without_events(batches(counts, 40), 0.25, seed=3))))
    assert torch.equal(counts, together(list(without_events(batches(counts, 40), 0.0, seed=3))))
    assert not together(list(without_events(batches(counts, 40), 1.0, seed=3))).any()
    empty = Batch(torch.empty(0, 3, 2, 6, 6), torch.empty(0), np.empty(0, np.int64))
    assert next(without_events([empty], 0.5, seed=3)).images.shape == (0, 3, 2, 6, 6)


def test_a_network_of_images_takes_frames():
    torch.manual_seed(0)
    model = timm.create_model("spiking_convnet", channels=(4, 8), input_size=8, timesteps=3).eval()
    model.set_execution("reference")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        as_image = model(images, per_timestep=True)
        with taking_frames(model):
            as_frames = model(images[:, None].expand(-1, 3, -1, -1, -1), per_timestep=True)
    assert torch.allclose(as_image, as_frames, atol=1e-5)
    assert model.input_kind == "images"
