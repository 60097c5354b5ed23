"""Images as events: bit by bit as their definition, in every part of the loader."""

import numpy as np
import pytest
import torch
from PIL import Image
from samples import picture

from tetdist.apps.reports.run_plots import rgb_events
from tetdist.config.sections.data import DataSection, ImagesAsEventsSection
from tetdist.data import transforms
from tetdist.data.batches import Share, eval_batches, train_batches
from tetdist.data.dali import Workers
from tetdist.data.delivery import DeviceBatches
from tetdist.data.images_as_events import as_events, frames, places
from tetdist.datasets.index import build_index
from tetdist.plugins import Registry

CPU = torch.device("cpu")
# The two places of each frame in evaluation, from the pixel itself, as the paper's table has them.
EVALUATED = (
    ((1, 1), (0, -1)),
    ((0, -1), (-1, 1)),
    ((-1, 1), (1, 0)),
    ((1, 0), (-1, -1)),
    ((0, 0), (0, 1)),
    ((0, 0), (-1, 0)),
    ((0, 0), (-1, 1)),
    ((0, 0), (-1, -1)),
)


def defined(image, ratio, pairs=EVALUATED):
    """Frames (8, 2, H, W) of an image (H, W, 3), each number in float32."""
    values = image.numpy().max(-1).astype(np.float32) * np.float32(1 / 255)
    around, (height, width) = np.pad(values, 1, mode="edge"), values.shape
    threshold = np.float32(ratio) * (values.max() - values.min())
    found = []
    for first, second in pairs:
        here, there = (
            around[1 + row : 1 + row + height, 1 + column : 1 + column + width]
            for row, column in (first, second)
        )
        found.append([there - here >= threshold, here - there >= threshold])
    return torch.from_numpy(np.array(found))


def noise(least, most, seed=0):
    """An image of levels from the least to the most, both there."""
    levels = np.random.default_rng(seed).integers(least, most + 1, (12, 9, 3), np.uint8)
    levels[0, 0], levels[0, 1] = most, least
    return torch.from_numpy(levels)


# With 0.12 a range of 25 levels, or twice as many, makes differences of whole levels that are
# exactly at the threshold, where rounding decides.
RANGES = [(0, 255), (3, 28), (100, 150), (7, 207), (2, 252), (5, 6)]


@pytest.mark.parametrize("ratio", [0.12, 0.07, 0.5])
def test_frames_are_the_definitions(ratio, monkeypatch):
    images = torch.stack([noise(*levels) for levels in RANGES])
    found = frames(as_events(images, ratio, None))
    assert found.dtype == torch.uint8
    for image, ours in zip(images, found, strict=True):
        assert torch.equal(ours.bool(), defined(image, ratio))
    drawn = places(3, 1, np.arange(len(images)))
    found = frames(as_events(images, ratio, drawn))
    for image, ours, chosen in zip(images, found, drawn.tolist(), strict=True):
        evaluated = zip(EVALUATED, chosen, strict=True)
        pairs = [np.array(pair) - pair[0] + place - 1 for pair, place in evaluated]
        assert torch.equal(ours.bool(), defined(image, ratio, pairs))
    # A GPU takes the windows of all images at once.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert torch.equal(frames(as_events(images, ratio, drawn)), found)


def test_an_edge_has_the_colour_of_its_polarity():
    rising = torch.arange(0, 200, 20, dtype=torch.uint8)[:, None].repeat(1, 6, 1, 3)
    events = frames(as_events(rising, 0.1, None))[0, 4:5]  # of a pixel and its right neighbour
    section = DataSection(root=".", images_as_events=ImagesAsEventsSection())
    assert all((image[:, :-1, 2] > image[:, :-1, 0]).all() for image in rgb_events(events, section))


def test_an_image_of_one_level_has_no_events():
    assert not as_events(torch.full((1, 5, 4, 3), 77, dtype=torch.uint8), 0.12, None).any()


def test_every_place_is_drawn_for_each_sample_alone():
    drawn = places(0, 0, np.arange(3000))
    counts = [6, 6, 4, 4, 2, 2, 2, 2]
    for t, count in zip((4, 5, 6, 7, 0, 1, 2, 3), counts, strict=True):
        found = np.unique(drawn[:, t], axis=0, return_counts=True)[1]
        assert len(found) == count
        assert found.min() > 0.8 * 3000 / count
    assert np.array_equal(places(0, 0, np.arange(7, 9)), drawn[7:9])
    assert len(np.unique(drawn[:100].reshape(100, -1), axis=0)) > 95
    for other in ((1, 0), (0, 1)):
        assert not np.array_equal(places(*other, np.arange(9)), drawn[:9])


@pytest.fixture
def root(tmp_path):
    for k in range(6):
        file = tmp_path / "train" / ("one", "two")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(36, 36, k).save(file)
    return tmp_path


def test_what_a_loader_gives(root, monkeypatch):
    """In training and evaluation, finished in the loader or on the device."""
    index, _ = build_index(root, "train", workers=1)
    values = {"root": str(root), "image_size": 32, "resize": 36, "crop": "padded", "padding": 2}
    values |= {"flip": 0.0, "cutout": 6}
    section = DataSection.model_validate(values | {"images_as_events": {"ratio": 0.2}})
    share = Share(
        seed=5, global_batch=3, micro_batch=3, rank=0, world_size=1, epoch=0, step_in_epoch=0
    )

    def loaders(raw):
        workers = Workers(device="cpu", device_id=None, threads=1, prefetch=1, raw=raw)
        made = [
            train_batches(section, index, share, 32, workers),
            eval_batches(section, index, [np.arange(6), np.arange(0)], workers),
        ]
        return [DeviceBatches(one, CPU) for one in made] if raw else made

    for here, there in zip(loaders(False), loaders(True), strict=True):
        with here, there:
            one, other = next(here), next(there)
        assert one.images.shape == (len(one.ids), 2, 32, 32)
        assert one.images.dtype == torch.uint8
        assert torch.equal(one.images, other.images)
        inputs = one.inputs(CPU, torch.float64)
        assert inputs.dtype == torch.float64
        assert set(inputs.unique().tolist()) == {0.0, 1.0}
    # The last batch is the evaluation's.
    for i, found in zip(one.ids, inputs, strict=True):
        image = torch.from_numpy(np.array(Image.open(root / index.path(i))))[2:34, 2:34]
        assert torch.equal(found.bool(), defined(image, 0.2))
    with loaders(raw=False)[0] as loader:
        frames_seen = next(loader).inputs(CPU, torch.float32)
    drawn = transforms.image_draws(5, 0, np.arange(3)).cutout
    for sample, box in zip(frames_seen, transforms.cutout_boxes(drawn, 32, 32, 6), strict=True):
        top, left, bottom, right = box.tolist()
        assert not sample[..., top:bottom, left:right].any()
    # A user's transform gets the frames.
    monkeypatch.setattr(transforms, "TRANSFORMS", Registry("transform", "data.transforms"))
    transforms.register_transform("halved")(lambda sample, _draws: sample / 2)
    section = section.model_copy(update={"transforms": ("halved",)})
    with loaders(raw=False)[0] as loader:
        assert torch.equal(next(loader).inputs(CPU, torch.float32), frames_seen / 2)
