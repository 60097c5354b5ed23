"""Recordings: every format as it is written, and what is refused."""

import io
from functools import partial

import cameras
import h5py
import lz4.frame
import numpy as np
import pytest
import zstandard
from cameras import Made

from tetdist.apps.events.formats import read_recording
from tetdist.apps.events.recording import BadRecording, Events, Sensor

MADE = cameras.events()


def read(tmp_path, name, data, sensor=None):
    file = tmp_path / name
    file.write_bytes(data)
    return read_recording(file, data, sensor)


def check(events, made, sensor):
    for name in "xytp":
        assert getattr(events, name).tolist() == getattr(made, name).tolist(), name
    assert events.sensor == sensor


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def hdf5(group="", attributes=(), **arrays):
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        where = file.require_group(group) if group else file
        where.attrs.update(dict(attributes))
        for name, values in arrays.items():
            where[name] = values
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "write", "sensor", "dropped"),
    [
        ("1.bin", cameras.nmnist, (34, 34), 0),
        ("1.aedat", cameras.dvs128, (128, 128), 0),
        ("3.aedat", partial(cameras.dvs128, chip=None), (128, 128), 0),
        ("1.AEDAT", cameras.davis240, (240, 180), 301),
        ("2.aedat", cameras.aedat31, (128, 128), 6),
        ("1.dat", cameras.dat, (304, 240), 0),
        ("1.raw", cameras.evt2, (640, 480), 1),
        ("2.raw", cameras.evt3, (1280, 720), 1),
        ("1.aedat4", cameras.aedat4, (64, 48), 0),
    ],
)
def test_cameras_formats_are_read_as_written(tmp_path, name, write, sensor, dropped):
    width, height = sensor
    made = cameras.events(width=width, height=height)
    events = read(tmp_path, name, write(made))
    check(events, made, sensor)
    assert events.dropped == dropped


@pytest.mark.parametrize(("module", "number"), [(lz4.frame, 1), (zstandard, 3)])
def test_compressed_aedat4_is_read_as_written(tmp_path, module, number):
    data = cameras.aedat4(MADE, compression=number, compress=module.compress)
    check(read(tmp_path, "1.aedat4", data), MADE, (64, 48))
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(BadRecording, match=r"cannot be decompressed|packet is truncated"):
            read(tmp_path, "1.aedat4", wrong)
    packets = data.index(b"</dv>") + 6
    damaged = data[: packets + 30] + b"damaged" + data[packets + 37 :]
    with pytest.raises(BadRecording, match=r"cannot be decompressed|truncated or damaged"):
        read(tmp_path, "1.aedat4", damaged)


# Vectors of each length, times that go beyond the counter twice, and rows that stay the same.
SIDE_BY_SIDE = Made(
    np.tile([100, 103, 111, 113, 119, 7], 8),
    np.full(48, 9),
    np.repeat(np.arange(8) * 5_000_000, 6),
    np.tile([1, 1, 1, 1, 1, 0], 8),
)
# A vector of 8 pixels with 4 unused bits, one of 12, a word of another kind that is continued, and
# an event after a word of the upper half of the time.
WORDS = [0x8001, 0x6005, 0x0009, 0x3864, 0x5F81, 0x4001, 0xE000, 0xF000, 0x8002, 0x2803]
EVT3 = b"% evt 3.0\n% geometry 1280x720\n% end\n" + np.array(WORDS, "<u2").tobytes()


def test_evt3_vectors_are_events_side_by_side(tmp_path):
    # Further apart than one vector word reaches.
    data = cameras.evt3(SIDE_BY_SIDE)
    assert len(data) < len(cameras.evt3(SIDE_BY_SIDE._replace(t=np.arange(48))))
    check(read(tmp_path, "1.raw", data), SIDE_BY_SIDE, (1280, 720))
    t, ones = np.array([0x1005, 0x1005, 0x1005, 0x2000]), np.ones(4, int)
    made = Made(np.array([100, 107, 108, 3]), 9 * ones, t, ones)
    check(read(tmp_path, "2.raw", EVT3), made, (1280, 720))


@pytest.mark.parametrize(
    ("write", "word", "sensor"),
    [
        (cameras.evt2, np.uint32(1 << 28 | 5 << 11 | 3), (640, 480)),
        (cameras.evt3, np.uint16(2 << 12 | 5), (1280, 720)),
    ],
)
def test_events_before_the_first_time_are_dropped(tmp_path, write, word, sensor):
    made = MADE._replace(t=MADE.t - MADE.t[0])  # The first time is 0.
    header, end, body = write(made).partition(b"% end\n")
    events = read(tmp_path, "1.raw", header + end + word.tobytes() + body)
    check(events, made, sensor)
    assert events.dropped == 2  # with the trigger


def test_a_piece_begins_with_its_start_and_ends_before_its_end():
    t = np.array([1, 2, 2, 3, 3])
    assert Events(t, t, t, t, Sensor(9, 9)).between(2, 3).t.tolist() == [2, 2]


def test_the_time_of_aedat_31_goes_on_when_its_counter_begins_again(tmp_path):
    events = read(tmp_path, "1.aedat", cameras.aedat31(MADE, overflow=1))
    assert events.t.tolist() == (MADE.t + 2**31).tolist()


def test_n_caltech101_marks_a_counter_that_begins_again(tmp_path):
    overflow, last = bytes([0, 240, 0, 0, 0]), bytes([3, 4, 0x80, 0, 7])
    data = bytes([1, 2, 0, 0, 5]) + overflow + last + overflow + last
    events = read(tmp_path, "1.bin", data, Sensor(240, 180))
    assert (events.t.tolist(), events.p.tolist()) == ([5, 8199, 16391], [0, 1, 1])
    assert events.dropped == 2


def test_a_record_that_begins_like_a_header_is_none(tmp_path):
    # The address's first byte is that of '#', as that of some of a DAVIS's events.
    address = 0x23 << 24 | 12 << 12
    data = b"#!AER-DAT2.0\r\n# AEChip: DAVIS240C\r\n"
    data += address.to_bytes(4, "big") + (9).to_bytes(4, "big")
    events = read(tmp_path, "1.aedat", data)
    assert (len(events), int(events.t[0]), int(events.x[0])) == (1, 9, 239 - 12)


@pytest.mark.parametrize(
    "polarity", [MADE.p, MADE.p * 2 - 1, MADE.p.astype(bool), 0 * MADE.p - 1, 0 * MADE.p]
)
def test_arrays_with_either_code_of_polarity_are_read(tmp_path, polarity):
    arrays, made = {**MADE._asdict(), "p": polarity}, MADE._replace(p=polarity > 0)
    check(read(tmp_path, "1.npz", npz(**arrays), Sensor(34, 34)), made, (34, 34))
    data = hdf5("events", **arrays)
    check(read(tmp_path, "1.h5", data, Sensor(34, 34)), made, (34, 34))


def test_arrays_may_say_their_sensor_and_be_one_table(tmp_path):
    arrays = MADE._asdict()
    check(read(tmp_path, "1.npz", npz(**arrays, width=40, height=50)), MADE, (40, 50))
    data = hdf5("events", {"width": 40, "height": 50}, **arrays)
    check(read(tmp_path, "1.hdf5", data), MADE, (40, 50))
    data = hdf5("", {"width": b"34", "height": np.array([34])}, **arrays)
    check(read(tmp_path, "3.h5", data), MADE, (34, 34))
    table = np.zeros(len(MADE.t), "u2,u2,i8,?")
    table.dtype.names = ("x", "y", "t", "p")
    for name, values in arrays.items():
        table[name] = values
    check(read(tmp_path, "2.npz", npz(events=table), Sensor(34, 34)), MADE, (34, 34))
    check(read(tmp_path, "3.npz", npz(events=table, width=40, height=50)), MADE, (40, 50))
    check(read(tmp_path, "2.h5", hdf5(events=table), Sensor(34, 34)), MADE, (34, 34))


def changed(name, values):
    return MADE._replace(**{name: np.asarray(values)})


def filled(data, octet, number=400, behind=400):
    """With a stretch before the last `behind` bytes overwritten, as by a disk that lost it."""
    return data[: -number - behind] + bytes([octet]) * number + data[-behind:]


def time_high_goes_back():
    """Between two events, and without one while it does; the time that they have is right."""
    event = [0x8002, 0x6000, 0x0001, 0x2001]
    words = np.array([*event, 0x8001, 0x8002, 0x0002, 0x2001], "<u2")
    return b"% evt 3.0\n% geometry 64x48\n% end\n" + words.tobytes()


AEDAT4 = cameras.aedat4(MADE)
BACK = changed("t", np.roll(MADE.t, 9))
WRAPPED = changed("t", [*range(2**23 - 2, 2**23), *range(298)])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("1.bin", b"", "the file is empty"),
        ("1.bin", cameras.nmnist(MADE)[:-1], r"the record at its end is incomplete \(4 bytes"),
        ("1.bin", cameras.nmnist(WRAPPED), r"overflows at event 2 \(from 8388607 to 0 us\)"),
        ("1.bin", cameras.nmnist(changed("x", MADE.x + 1)), "outside the 34x34 sensor"),
        ("1.bin", cameras.dvs128(MADE), "of N-MNIST's format, but its contents are AEDAT"),
        ("1.bin", cameras.evt2(MADE), "its contents are Prophesee"),
        ("1.aedat", cameras.nmnist(MADE), "not an AEDAT file"),
        ("1.aedat", cameras.dvs128(MADE, chip="x.y.DVS640"), "camera is not supported: x.y.DVS640"),
        ("1.aedat", b"#!AER-DAT2.0\r\n# nothing\r\n", "it has no events"),
        ("1.aedat", b"#!AER-DAT2.0\r\n" + bytes([128, 0, 0, 0, 0, 0, 0, 1]), "names no camera"),
        ("1.aedat", b"#!AER-DAT1.0\r\n" + bytes(8), "AEDAT 1.0 is not supported"),
        ("1.aedat", cameras.aedat4(MADE), "its contents are AEDAT 4; rename it to .aedat4"),
        ("1.aedat", cameras.aedat31(MADE)[:-40], r"packet at its end is incomplete \(832 bytes"),
        ("1.aedat", b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + bytes(28), "packet at byte 0 .* damaged"),
        ("1.dat", cameras.evt2(MADE), "is of EVT; rename it to .raw"),
        ("1.dat", cameras.dat(MADE, kind=0x0E), "type 0xe and 8 bytes"),
        ("1.dat", cameras.dat(MADE, header="% Version 2\n"), "does not store the sensor's size"),
        ("1.dat", cameras.dat(changed("p", [3] * 300)), "event 0 has polarity 3 instead of 0 or 1"),
        ("1.bin", bytes(5 * 50) + cameras.nmnist(MADE), r"event 0 is repeated 50 times"),
        ("1.aedat", filled(cameras.aedat31(MADE), 0), "declares 100 of 101 events as valid"),
        ("1.aedat", filled(cameras.davis240(MADE), 255), "has all bits set; the file may be"),
        ("1.raw", filled(cameras.evt2(MADE), 255), r"word \d+ .* continues a word that is missing"),
        ("1.raw", filled(cameras.evt3(MADE), 255), r"that is missing \(type 0xf\)"),
        ("1.raw", cameras.evt3(MADE) + bytes(4), "repeats the previous word, row 0"),
        ("1.raw", time_high_goes_back(), r"time decreases at word 4 .* \(from 2 to 1\)"),
        ("1.raw", cameras.dat(MADE), "has no EVT version"),
        ("1.raw", cameras.evt2(MADE)[:-1], "truncated"),
        ("1.raw", cameras.evt2(MADE)[:-4] + bytes([0, 0, 0, 0x50]), "word 600 .* 0x5, which"),
        ("1.npz", npz(x=MADE.x, y=MADE.y, t=MADE.t), "has x, y, t, but no array 'p'"),
        ("1.npz", npz(**BACK._asdict(), width=34, height=34), "decrease at event 9 .* by t"),
        ("1.npz", npz(**changed("p", MADE.p * 2)._asdict(), width=34, height=34), "polarity 2"),
        ("1.npz", npz(**changed("t", MADE.t / 1e6)._asdict()), "t has type float64; .*micros"),
        ("1.npz", npz(**changed("x", MADE.x[1:])._asdict()), r"x has the shape \(299,\)"),
        ("1.npz", npz(**MADE._asdict()), "does not store the sensor's size"),
        ("1.npz", npz(**dict.fromkeys("xytp", np.zeros(99, int)), width=3, height=3), "99 times"),
        ("1.npz", npz(**MADE._asdict())[:-30], "damaged, or not a .npz file"),
        (
            "1.npz",
            npz(**changed("t", [*MADE.t[:-1], 2**62])._asdict(), width=34, height=34),
            "event 299 comes more than",
        ),
        ("1.raw", b"% evt 2.0\n% " + b"x" * 2**21 + b"\n% end\n" + bytes(8), "store the sensor"),
        ("1.txt", b"hello", "its suffix is not one of"),
        ("1.aedat4", AEDAT4[: len(AEDAT4) // 2], "truncated"),
        ("1.aedat4", AEDAT4[: AEDAT4.index(b"FTAB") - 8], "truncated"),  # Behind the last packet.
        ("1.aedat4", AEDAT4 + b"\0", r"table .* cannot be .*its end is followed by 1 byte"),
        ("1.aedat4", cameras.aedat4(MADE, lines=lambda x: x[1:]), "the 2 packets in .* the 3 in"),
        ("1.aedat4", AEDAT4.replace(b"EVTS", b"ABCD"), "0 streams of events|no whole EVTS"),
        ("1.aedat4", AEDAT4.replace(b"</dv>", b"</dw>"), "damaged"),
        ("1.aedat4", cameras.aedat4(MADE, finished=False), "recording was not finished"),
        ("1.aedat4", cameras.aedat4(MADE, streams=(0, 1)), "2 streams of events"),
        ("1.aedat4", cameras.aedat4(MADE, sensor=(30, 40)), "outside the 30x40 sensor"),
        ("1.h5", hdf5()[:400], r"damaged, or not a \.h5 file"),
        ("1.h5", hdf5(x=MADE.x, y=MADE.y, T=MADE.t), "has T, x, y, but no array 't'"),
        *(
            ("1.h5", hdf5("", {"width": width, "height": 34}, **MADE._asdict()), "a width of")
            for width in ("abc", h5py.Empty("f"), -1, np.array([3, 4]))
        ),
    ],
)
def test_bad_recordings_are_refused_with_the_reason(tmp_path, name, data, words):
    with pytest.raises(BadRecording, match=words):
        read(tmp_path, name, data)


def test_hdf5_that_points_to_another_file_is_refused(tmp_path):
    (tmp_path / "other.h5").write_bytes(hdf5(**MADE._asdict()))
    with h5py.File(tmp_path / "1.h5", "w") as file:
        for name in "xytp":
            file[name] = h5py.ExternalLink(tmp_path / "other.h5", name)
    with pytest.raises(BadRecording, match="x is a link to another file"):
        read(tmp_path, "1.h5", (tmp_path / "1.h5").read_bytes(), Sensor(34, 34))


def test_a_sensor_that_the_file_contradicts_is_refused(tmp_path):
    with pytest.raises(BadRecording, match=r"its sensor is .*, not 99x99 as expected"):
        read(tmp_path, "1.raw", cameras.evt2(MADE), Sensor(99, 99))
