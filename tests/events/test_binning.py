"""Binning: which event counts where, and what becomes of it."""

import cameras
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tetdist.apps.events.binning import Binning, bin_events, resize_weights, window_frames
from tetdist.apps.events.recording import BadRecording, Events, Sensor

SENSOR = Sensor(12, 9)


def recording(number=500, sensor=SENSOR, seed=0):
    made = cameras.events(number, sensor.width, sensor.height, seed=seed)
    return Events(*made, sensor)


def binned(events, timesteps=5, make=bin_events, **changes):
    options = {"size": None, "bins": "count", "values": "count", "resize": "area"}
    return make(events, Binning(timesteps, **options | {"dtype": "float16"} | changes))


def one_by_one(events, bins, timesteps):
    frames = np.zeros((timesteps, 2, events.sensor.height, events.sensor.width))
    for k, i in enumerate(bins):
        if i < timesteps:
            frames[i, events.p[k], events.y[k], events.x[k]] += 1
    return frames


def drawn(*highest):
    """Fifty combinations of integers from 1 to each of the highest, these among them."""
    draws = np.random.default_rng(0).integers(1, np.array(highest) + 1, (49, len(highest)))
    return [highest, *draws.tolist()]


def test_bins_of_equal_count_hold_equally_many_and_leave_out_the_tail():
    for more, timesteps in drawn(200, 12):
        number = more + timesteps
        events, each = recording(number), number // timesteps
        frames = binned(events, timesteps).tensor
        assert frames.sum(axis=(1, 2, 3)).tolist() == [each] * timesteps
        expected = one_by_one(events, [k // each for k in range(number)], timesteps)
        assert np.array_equal(frames, expected)


def test_bins_of_equal_time_hold_every_event_once():
    for more, timesteps in drawn(200, 7):
        events = recording(more + 6)
        start, length = events.t[0], events.t[-1] - events.t[0] + 1
        bins = [int((t - start) * timesteps // length) for t in events.t]
        frames = binned(events, timesteps, bins="time").tensor
        assert np.array_equal(frames, one_by_one(events, bins, timesteps))
        assert frames.sum() == len(events)


@pytest.mark.parametrize("bins", ["3ms", "700us", "9events"])
def test_windows_of_a_fixed_size_depend_on_no_later_event(bins):
    microseconds = {"3ms": 3000, "700us": 700}.get(bins)
    for number, timesteps in drawn(200, 7):
        events = recording(number)
        elapsed = [int(t - events.t[0]) for t in events.t]
        passed = [t // microseconds if microseconds else k // 9 for k, t in enumerate(elapsed)]
        frames = binned(events, timesteps, bins=bins).tensor
        assert np.array_equal(frames, one_by_one(events, passed, timesteps))
        # A recording that goes on has the same first windows.
        longer = binned(events, timesteps + 2, bins=bins).tensor
        assert np.array_equal(longer[:timesteps], frames)
        windows = [*binned(events, make=window_frames, bins=bins)]
        frames = binned(events, passed[-1] + 1, bins=bins).tensor
        assert np.array_equal([frame for _, frame in windows], frames)
        for i, (end, _) in enumerate(windows):
            last = events.t[min(9 * i + 8, number - 1)]
            assert end == (microseconds * (i + 1) if microseconds else last - events.t[0])


def test_events_of_one_moment_have_a_bin():
    events = recording(10)
    still = Events(events.x, events.y, np.full(10, 3), events.p, SENSOR)
    assert binned(still, 4, bins="time").tensor[0].sum() == 10


def test_values_are_of_the_counts():
    events = recording()
    counts = binned(events).tensor.astype(np.float64)
    assert np.array_equal(binned(events, values="occupancy").tensor, counts > 0)
    normalised = binned(events, values="normalised").tensor
    expected = counts / counts.max(axis=(2, 3), keepdims=True)
    assert np.array_equal(normalised, expected.astype(np.float16))
    # An 8-bit picture of the same.
    small = binned(events, values="normalised", dtype="uint8").tensor
    assert np.array_equal(small, np.rint(255 * expected).astype(np.uint8))


@pytest.mark.parametrize("size", [None, Sensor(8, 7), Sensor(15, 15)])
def test_published_frames_are_those_of_torchvisions_transforms_on_the_published_arrays(size):
    events = recording(200)
    each = len(events) // 5
    loader = [v2.ToPILImage()]
    if size is not None:
        loader.append(v2.Resize((size.height, size.width)))
    loader.append(v2.PILToTensor())
    expected = []
    for t in range(5):
        frame = np.zeros((2, SENSOR.width, SENSOR.height))
        part = slice(t * each, (t + 1) * each)
        # As the published preprocessing does: numpy counts a repeated pixel once, y is from below.
        frame[events.p[part], events.x[part], SENSOR.height - 1 - events.y[part]] += 1
        picture = torch.from_numpy((frame / frame.max()).astype(np.float32))
        expected.append(v2.Compose(loader)(picture).numpy())
    options = {"size": size, "resize": "bilinear", "values": "published"}
    assert np.array_equal(binned(events, dtype="uint8", **options).tensor, expected)
    small = np.array(expected) / 255
    assert np.array_equal(binned(events, **options).tensor, small.astype(np.float16))
    # ON is what resizing makes of it; OFF is not.
    if size is not None:
        plain = size._replace(width=size.height, height=size.width)
        options |= {"size": plain, "values": "occupancy"}
        ours = binned(events, **options).tensor[:, :, ::-1].transpose(0, 1, 3, 2)
        off, on = np.abs(small - ours).max(axis=(0, 2, 3))
        assert on < 2 / 255 < 0.2 < off


def test_a_frame_without_events_stays_empty_and_is_counted():
    made = cameras.events(100, 12, 9)
    events = Events(made.x, made.y, made.t, np.zeros(100, np.int64), SENSOR)
    frames = binned(events, values="normalised")
    assert frames.empty == 5
    assert frames.tensor[:, 1].max() == 0
    assert binned(recording(), 5).empty == 0


@pytest.mark.parametrize("resize", ["area", "bilinear"])
@pytest.mark.parametrize("size", [Sensor(5, 4), Sensor(12, 9), Sensor(31, 20)])
def test_resizing_keeps_the_sum_of_counts_and_the_range_of_shares(resize, size):
    events = recording()
    counts = binned(events, size=size, resize=resize).tensor.astype(np.float64)
    assert counts.shape == (5, 2, size.height, size.width)
    if resize == "area":
        assert counts.sum() == pytest.approx(500, rel=1e-3)
    else:  # Whose weights at the border are not those of the middle.
        assert counts.sum() == pytest.approx(500, rel=0.05)
    for values in ("occupancy", "normalised"):
        shares = binned(events, size=size, resize=resize, values=values).tensor
        assert shares.min() >= 0
        assert 0 < shares.max() <= 1


@pytest.mark.parametrize(
    ("resize", "filter_", "sizes"),
    [
        # PIL's box takes a pixel whole or not at all where this divides it.
        ("area", Image.Resampling.BOX, [(128, 64), (128, 32), (48, 12)]),
        ("bilinear", Image.Resampling.BILINEAR, [(128, 48), (128, 64), (34, 48), (34, 20)]),
    ],
)
def test_weights_are_those_of_pil(resize, filter_, sizes):
    rng = np.random.default_rng(0)
    for source, target in sizes:
        picture = rng.uniform(0, 1, (source, source)).astype(np.float32)
        weights = resize_weights(source, target, resize)
        expected = np.asarray(Image.fromarray(picture).resize((target, target), filter_))
        assert np.abs(weights @ picture @ weights.T - expected).max() < 1e-5


def test_area_divides_a_pixel_between_those_that_it_falls_on():
    assert np.allclose(resize_weights(3, 2, "area"), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_saturation_is_counted():
    number = 600
    x, t = np.zeros(number, np.int64), np.arange(number)
    events = Events(x, x, t, np.ones(number, np.int64), SENSOR)
    frames = binned(events, 2, dtype="uint8")
    assert frames.saturated == 2
    assert frames.tensor[:, 1, 0, 0].tolist() == [255, 255]
    assert binned(events, 3, dtype="uint8").saturated == 0
    assert binned(events, 2).saturated == 0
    x, t = np.zeros(65_600, np.int64), np.arange(65_600)
    frames = binned(Events(x, x, t, x, SENSOR), 1)
    assert (frames.saturated, frames.tensor[0, 0, 0, 0]) == (1, 65_504)


def test_too_few_events_are_refused():
    with pytest.raises(BadRecording, match="4 events are too few for 5 bins"):
        binned(recording(4), 5)
