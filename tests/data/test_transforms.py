"""Crop windows, regions and rolls, against torchvision and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import picture
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from tetdist.data import transforms
from tetdist.errors import UserError
from tetdist.order import uniforms

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def windows(height, width, n, scale=SCALE, ratio=RATIO):
    draws = uniforms(0, 0, np.arange(n), transforms.RANDOM_RESIZED_CROP_DRAWS)
    size = np.full(n, height, np.int32), np.full(n, width, np.int32)
    return transforms.random_resized_crop(*size, draws, scale, ratio)


@given(*[st.integers(1, 3000)] * 2, *[st.floats(0.01, 1)] * 2, *[st.floats(0.1, 10)] * 2)
def test_windows_lie_inside(height, width, scale_1, scale_2, ratio_1, ratio_2):
    scale, ratio = sorted([scale_1, scale_2]), sorted([ratio_1, ratio_2])
    found = windows(height, width, 16, scale, ratio)
    assert (found >= [0, 0, 1, 1]).all()
    assert (found[:, :2] + found[:, 2:] <= [height, width]).all()


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (500, 333, SCALE, RATIO),
        (32, 32, (0.5, 1.0), RATIO),
        # Wide images refuse most tries, and some fall back to the centre.
        (100, 300, (0.4, 1.0), RATIO),
        (300, 400, SCALE, (0.5, 0.9)),
        # Three times the image's area never fits.
        (400, 100, (3.0, 3.0), RATIO),
        (9, 3, (3.0, 3.0), RATIO),
        (30, 4, (3.0, 3.0), (0.6, 0.9)),
        (4, 30, (3.0, 3.0), (0.6, 0.9)),
    ],
)
def test_windows_are_torchvisions_with_the_same_draws(monkeypatch, height, width, scale, ratio):
    left = {}

    def uniform(tensor, low, high):
        return tensor.double().fill_(low + (high - low) * next(left["tries"]))

    def integer(low, high, **_):
        return torch.tensor(int(low + (high - low) * next(left["corner"])))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", integer)
    image = torch.empty(3, height, width)
    draws = uniforms(0, 0, np.arange(300), transforms.RANDOM_RESIZED_CROP_DRAWS)
    for row, ours in zip(draws, windows(height, width, 300, scale, ratio), strict=True):
        # An area and a ratio in turn, of which ours has ten in a row; then row and column.
        left |= {"tries": iter(row[:20].reshape(2, 10).T.ravel()), "corner": iter(row[20:])}
        assert tuple(ours) == RandomResizedCrop.get_params(image, scale, ratio)


@given(st.integers(1, 2500), st.integers(1, 2500), st.sampled_from([28, 32, 224, 232, 256]))
def test_resized_sizes_are_torchvisions(height, width, resize):
    # Resizing a view of one stored number costs nothing on the meta device.
    image = torch.empty(1, height, width, device="meta")
    ours, _ = transforms.centre_crop(np.array([height]), np.array([width]), resize, resize)
    assert tuple(ours[0]) == tuple(tv.resize(image, resize).shape[1:])


@pytest.mark.parametrize(
    ("size", "crop"), [((40, 57), 32), ((41, 41), 31), ((57, 40), 28), ((300, 31), 31)]
)
def test_the_centre_crop_is_torchvisions(size, crop):
    image = picture(*size)
    heights, widths = np.array([size[0]], np.int32), np.array([size[1]], np.int32)
    resized, start = transforms.centre_crop(heights, widths, 32, crop)
    whole = tv.resize(image, resized[0].tolist())
    expected = tv.center_crop(tv.resize(image, 32), crop)
    assert tv.crop(whole, *start[0].tolist(), crop, crop).tobytes() == expected.tobytes()


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(UserError, match="cannot crop 33 pixels"):
        transforms.centre_crop(np.array([40]), np.array([40]), 32, 33)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 7), st.integers(0, 2**32))
def test_padded_crops_show_a_window_of_the_padded_image(height, width, padding, seed):
    size = max(padding + 1, min(height, width) + 2 * padding - 3, 1)
    if size > min(height, width) + 2 * padding:
        return
    draws = uniforms(seed, 0, np.arange(8), 2)
    sizes = np.full(8, height), np.full(8, width)
    windows, corners = transforms.padded_crop(*sizes, draws, padding, size)
    image = np.arange(1, height * width + 1).reshape(height, width)
    padded = np.pad(image, padding)
    for (top, left, rows, columns), (row, column) in zip(windows, corners, strict=True):
        assert min(rows, columns) >= 1
        crop = np.zeros((size, size), int)
        part = image[top : top + rows, left : left + columns]
        crop[row : row + rows, column : column + columns] = part
        where = padding + top - row, padding + left - column
        expected = padded[where[0] : where[0] + size, where[1] : where[1] + size]
        assert np.array_equal(crop, expected)


def test_colour_jitter_is_drawn_as_torchvisions():
    n, names = 4000, ("brightness", "contrast", "saturation", "hue")
    ours = transforms.color_jitter(uniforms(0, 0, np.arange(n), 8), (0.4, 1.5, 0.2, 0.1))
    torch.manual_seed(0)
    factors = {name: [dict(sample)[name] for sample in ours] for name in names}
    first = [sample[0].name for sample in ours]
    expected = {"brightness": (0.6, 1.4), "contrast": (0, 2.5), "saturation": (0.8, 1.2)}
    for name, (low, high) in {**expected, "hue": (-0.1, 0.1)}.items():
        values = np.array(factors[name])
        assert low <= values.min()
        assert values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
        assert abs(first.count(name) / n - 0.25) < 0.03
    only = transforms.color_jitter(uniforms(0, 0, np.arange(3), 8), (0, 0, 0, 0.1))
    assert [[name for name, _ in sample] for sample in only] == [["hue"]] * 3


def test_cutout_squares_are_centred_anywhere_and_cut_off_at_the_edges():
    boxes = transforms.cutout_boxes(uniforms(0, 0, np.arange(5000), 2), 8, 6, 4)
    top, left, bottom, right = boxes.T
    assert set(top) == set(range(6))
    assert set(bottom) == {2, 3, 4, 5, 6, 7, 8}
    assert (bottom - top).max() == (right - left).max() == 4
    assert (bottom - top).min() == (right - left).min() == 2
    odd = transforms.cutout_boxes(np.array([[0.5, 0.5]]), 8, 8, 3)
    assert odd.tolist() == [[3, 3, 6, 6]]


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 1.0, 4.0])
def test_lambda_is_drawn_from_the_symmetric_beta_distribution(alpha):
    draws = uniforms(0, 0, np.arange(20_000), 2)
    values = transforms.symmetric_beta(draws[:, 0], draws[:, 1], np.full(20_000, alpha))
    reference = np.sort(np.random.default_rng(0).beta(alpha, alpha, 20_000))
    assert np.abs(np.sort(values) - reference).mean() < 0.01
    assert abs(values.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    ends = transforms.symmetric_beta(np.zeros(2), np.array([0.25, 0.6]), np.full(2, alpha))
    assert np.isfinite(ends).all()


def test_new_random_numbers_come_behind_the_old_ones():
    """So that a run of before cutout, AutoAugment and the colours is the same today."""
    positions = np.arange(5)
    images = transforms.image_draws(1, 2, positions)
    assert np.array_equal(np.hstack([images.crop, images.flip]), uniforms(1, 2, positions, 23))
    events = transforms.event_draws(1, 2, positions)
    assert np.array_equal(np.hstack([events.flip, events.roll]), uniforms(1, 2, positions, 3))
