"""Crop windows, regions and rolls, against torchvision and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from tetdist.data import transforms
from tetdist.data.order import uniforms
from tetdist.errors import UserError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def windows(height, width, n, scale=SCALE, ratio=RATIO, seed=0):
    draws = uniforms(seed, 0, np.arange(n), transforms.RANDOM_RESIZED_CROP_DRAWS)
    size = np.full(n, height, np.int32), np.full(n, width, np.int32)
    return transforms.random_resized_crop(*size, draws, scale, ratio)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(0, 2**32),
)
def test_windows_lie_inside(height, width, scale_1, scale_2, ratio_1, ratio_2, seed):
    scale, ratio = sorted([scale_1, scale_2]), sorted([ratio_1, ratio_2])
    top, left, rows, columns = windows(height, width, 16, scale, ratio, seed).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (rows >= 1).all()
    assert (columns >= 1).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, SCALE, RATIO),
        (500, 333, SCALE, RATIO),
        (75, 56, SCALE, RATIO),
        (32, 32, (0.5, 1.0), RATIO),
        # Wide images refuse most tries, and some fall back to the centre.
        (100, 300, (0.4, 1.0), RATIO),
        (300, 400, SCALE, (0.5, 0.9)),
    ],
)
def test_windows_are_distributed_as_torchvisions(height, width, scale, ratio):
    n = 4000
    ours = windows(height, width, n, scale, ratio)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])

    def statistics(window):
        top, left, rows, columns = window.T.astype(float)
        area = rows * columns / (height * width)
        # Where the free space allows none, there is no position to compare.
        down = top / np.maximum(height - rows, 1)
        right = left / np.maximum(width - columns, 1)
        whole = (rows == height) | (columns == width)
        values = np.array([area, np.log(columns / rows), down, right, area * down, whole])
        return np.concatenate([values, values**2])

    a, b = statistics(ours), statistics(theirs)
    error = np.sqrt((a.var(1) + b.var(1)) / n) + 1e-9
    assert (np.abs(a.mean(1) - b.mean(1)) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(400, 100, (133, 0, 133, 100)), (100, 400, (0, 133, 100, 133)), (9, 3, (2, 0, 4, 3))],
)
def test_an_image_that_no_window_fits_is_cropped_at_its_centre(height, width, expected):
    # Three times the image's area never fits.
    assert windows(height, width, 2, (3.0, 3.0)).tolist() == [list(expected)] * 2
    torch_image = torch.empty(3, height, width)
    assert RandomResizedCrop.get_params(torch_image, (3.0, 3.0), RATIO) == expected


def test_the_first_try_that_fits_counts():
    draws = np.full((1, transforms.RANDOM_RESIZED_CROP_DRAWS), 0.5)
    draws[0, :10] = 0.999  # areas that a wide image refuses ...
    draws[0, 4] = 0.2  # ... except for the fifth and the eighth
    draws[0, 7] = 0.1
    size = np.array([100], np.int32), np.array([400], np.int32)
    top, left, rows, columns = transforms.random_resized_crop(*size, draws, (0, 1), (1, 1))[0]
    assert rows == columns == round((0.2 * 100 * 400) ** 0.5)
    assert top == (100 - rows + 1) // 2
    assert left == (400 - columns + 1) // 2


@given(st.integers(1, 2500), st.integers(1, 2500), st.sampled_from([28, 32, 224, 232, 256]))
def test_resized_sizes_are_torchvisions(height, width, resize):
    # Resizing a view of one stored number costs nothing on the meta device.
    image = torch.empty(1, height, width, device="meta")
    ours = transforms.resized_size(np.array([height]), np.array([width]), resize)[0]
    assert tuple(ours) == tuple(tv.resize(image, resize).shape[1:])


@pytest.mark.parametrize("size", [(40, 57), (41, 41), (57, 40), (300, 31), (33, 32)])
@pytest.mark.parametrize("crop", [32, 31, 28])
def test_the_centre_region_is_what_torchvision_crops(size, crop):
    # In an image whose pixels hold their own coordinate, the crop shows where it comes from.
    rows = np.repeat(np.arange(size[0], dtype=np.float32)[:, None], size[1], axis=1)
    columns = np.repeat(np.arange(size[1], dtype=np.float32)[None, :], size[0], axis=0)
    heights, widths = np.array([size[0]], np.int32), np.array([size[1]], np.int32)
    top, left, bottom, right = transforms.centre_region(heights, widths, 32, crop)[0]
    for plane, start, end, along in ((rows, top, bottom, 0), (columns, left, right, 1)):
        resized = tv.center_crop(tv.resize(Image.fromarray(plane), 32), crop)
        seen = np.asarray(resized).mean(axis=1 - along)
        # Pixel i of the crop is centred at start + (i + 0.5) * step; pixel j's value is j.
        step = (end - start) / crop
        expected = start + (np.arange(crop) + 0.5) * step - 0.5
        inner = (expected > step) & (expected < size[along] - 1 - step)
        assert inner.sum() > crop / 2
        # The filter bends the ramp by less than a tenth; a size or an offset wrong by one does
        # more at one end at least.
        assert np.abs(seen - expected)[inner].max() < 0.1
        assert np.abs((seen - expected)[inner].mean()) < 0.01


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(UserError, match="cannot crop 33 pixels"):
        transforms.centre_region(np.array([40]), np.array([40]), 32, 33)


def test_flips_happen_as_often_as_asked():
    draws = uniforms(0, 0, np.arange(20_000), 1)[:, 0]
    assert abs(transforms.flips(draws, 0.3).mean() - 0.3) < 0.015
    assert not transforms.flips(draws, 0.0).any()
    assert transforms.flips(draws, 1.0).all()


def test_shifts_are_equally_likely_from_end_to_end():
    values = transforms.shifts(uniforms(0, 0, np.arange(22_000), 1)[:, 0], 5)
    found, counts = np.unique(values, return_counts=True)
    assert found.tolist() == list(range(-5, 6))
    assert np.abs(counts - 2000).max() < 200
    assert transforms.shifts(np.array([0.0, 0.99]), 0).tolist() == [0, 0]


def test_flip_and_roll_treat_all_timesteps_alike_and_lose_nothing():
    frames = np.arange(3 * 2 * 4 * 5, dtype=np.uint8).reshape(3, 2, 4, 5)
    assert np.array_equal(transforms.flip_and_roll(frames, False, 0, 0), frames)
    moved = transforms.flip_and_roll(frames, True, 1, -2)
    for t in range(3):
        for polarity in range(2):
            for row in range(4):
                for column in range(5):
                    # Mirrored first, then down by one and left by two.
                    source = frames[t, polarity, row, 4 - column]
                    assert moved[t, polarity, (row + 1) % 4, (column - 2) % 5] == source
